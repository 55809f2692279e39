"""Models with packed weights compute what the dequantized ones do, fused or not, in all architectures."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import export, runtime
from lowbit.decoding import Decoder
from lowbit.recipe import Rule, short_recipe
from lowbit.run import quantize
from lowbit.runtime import Awaited, GatedProduct, Norm, PackedExperts, PackedLinear, Part, QuantizingGelu, QuantizingNorm

QUICK = ("llama", "gpt2", "bert", "phi3", "mixtral", "mamba2")  # the others are marked slow
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
# KL of the packed model in float16 to the dequantized one in float32; rounding of inputs amplifies last bits, which also
# choose experts
MOST = {"w4a16-g32": 2e-4, "w8a8": 1e-3}
MOST_EXPERTS = {"w4a16-g32": 1e-3, "w8a8": 1e-2}


def written(name: str, folder: Path, scheme: str, format: str = "lowbit", ignore: list[str] | None = None, **more: Any) -> str:
    """A tiny model, rounded to nearest, on disk."""
    tiny.save(name, folder / "model", dtype=torch.bfloat16)
    recipe = short_recipe(
        scheme=scheme, method=more.pop("method", "rtn"), options=more.pop("options", {}), ignore=ignore, data=None,
        format=format, engine="transformers", kv_cache=None,
    )  # fmt: skip
    quantize(str(folder / "model"), str(folder / "out"), recipe=recipe)
    return str(folder / "out")


def kl(a: Any, b: Any) -> float:
    """KL(a || b) of the output of two models, in nats a token."""
    tokens = tiny.tokens(3, 24)
    with torch.no_grad():
        p, q = (model(tokens).logits.float().log_softmax(-1) for model in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


def kinds(model: nn.Module) -> Counter[type]:
    return Counter(type(module) for module in model.modules())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in tiny.NAMES])
def test_equals_the_dequantized_model(name: str, scheme: str, tmp_path: Path) -> None:
    """Every linear is packed and nothing is put back, whatever the architecture; nothing of the float matrices is left."""
    out = written(name, tmp_path, scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = runtime.load(out, dtype=torch.float16, kernels=True)
    assert {row.runs for row in packed.lowbit} == {"packed"}
    most = (MOST_EXPERTS if name in EXPERTS else MOST)[scheme]
    assert kl(export.load(out, dtype=torch.float32), packed) < most
    matrices = set(export.QuantizedSource(Path(out)).modules)
    assert not {n for n, _ in packed.named_parameters()} & {f"{m}.weight" for m in matrices}


def test_what_is_joined(tmp_path: Path) -> None:
    """q, k, v and gate, up are one product; with quantized inputs norms, GELU and the gated product quantize."""
    llama = runtime.load(written("llama", tmp_path / "a", "w8a8"), kernels=True)
    found = kinds(llama)
    assert (found[QuantizingNorm], found[GatedProduct], found[Part]) == (2 * tiny.LAYERS, tiny.LAYERS, 3 * tiny.LAYERS)
    norms = [module for module in llama.modules() if isinstance(module, QuantizingNorm)]
    assert not any(norm.floats for norm in norms)
    assert bool(norms[0](torch.randn(1, 2, tiny.HIDDEN, dtype=llama.dtype)).isnan().all())
    bert = runtime.load(written("bert", tmp_path / "b", "w8a8"), kernels=True)
    found = kinds(bert)
    assert (found[QuantizingNorm], found[QuantizingGelu], found[Part]) == (2 * tiny.LAYERS, tiny.LAYERS, 3 * tiny.LAYERS)
    assert all(module.floats for module in bert.modules() if isinstance(module, QuantizingNorm))  # residuals read them
    floats = runtime.load(written("llama", tmp_path / "d", "w4a16-g32"), kernels=True)
    found = kinds(floats)
    assert (found[Norm], found[GatedProduct], found[Part]) == (2 * tiny.LAYERS + 1, tiny.LAYERS, 3 * tiny.LAYERS)
    for model in (llama, floats):  # the products before a sum, and the queries and keys of every attention
        assert sum(module.awaited for module in model.modules() if isinstance(module, PackedLinear)) == 2 * tiny.LAYERS
        assert sum("forward" in vars(module) for module in model.modules()) == tiny.LAYERS
    mixtral = runtime.load(written("mixtral", tmp_path / "c", "w4a16-g32"), kernels=True)
    assert kinds(mixtral)[PackedExperts] == 2 * tiny.LAYERS


def test_kernels_of_a_layer(tmp_path: Path) -> None:
    """What a layer launches in a decoding step: two norms and SiLU, four products, the rotation, one write to the cache, and
    attention; transformers' own has 48."""

    class Launches(TorchDispatchMode):
        """Counts operators that do more than allocate or view."""

        def __init__(self) -> None:
            super().__init__()
            self.found: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.name().split("::")[1].partition(".")[0]
            if not func.is_view and "empty" not in name and name != "_unsafe_view":
                self.found[name] += 1
            return out

    def step(model: Any) -> Counter[str]:
        decoder = Decoder(model, 1, 16)
        decoder.prefill(tiny.tokens(1, 9))
        with Launches() as launches:
            decoder.step()
        return launches.found

    folder = written("llama", tmp_path, "w4a16-g32")
    packed = runtime.load(folder, dtype=torch.float16, kernels=True)
    found = step(packed)
    layers = packed.model.layers
    packed.model.layers, packed.config.num_hidden_layers = layers[:1], 1
    fewer = step(packed)
    each = {name: (count - fewer[name]) / (tiny.LAYERS - 1) for name, count in found.items() if count > fewer[name]}
    assert each == {"rows": 3, "linear_floats": 4, "rope": 1, "put": 1, "attend": 1}


def test_a_wrong_fusion_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does not compute the same runs its linears one by one, and says so."""
    out = written("llama", tmp_path, "w8a8")
    monkeypatch.setattr(runtime.GatedProduct, "forward", lambda self, x: x * 3)
    with pytest.warns(UserWarning, match=r"layers\.0: fused, it does not compute the same"):
        packed = runtime.load(out, dtype=torch.float16, kernels=True)
    assert not kinds(packed)[GatedProduct] and not kinds(packed)[Part]
    assert kl(export.load(out, dtype=torch.float32), packed) < MOST["w8a8"]


def test_other_schemes(tmp_path: Path) -> None:
    """Inputs that no kernel takes are simulated; matrices that none takes are dequantized, or refused if they are all."""
    out = written("llama", tmp_path / "a", "mxfp4")
    with pytest.warns(UserWarning, match="21 linears packed, inputs simulated"):
        packed = runtime.load(out, dtype=torch.float16, kernels=True)
    assert kl(export.load(out, dtype=torch.float32), packed) < 0.1  # 4-bit inputs
    out = written("llama", tmp_path / "b", "nf4-g32")
    with pytest.raises(ValueError, match="no linear of it can stay packed"):
        runtime.load(out, kernels=True)
    assert kl(export.load(out), runtime.load(out)) == 0  # a CPU dequantizes by default
    with pytest.raises(ValueError, match="is not quantized"):
        runtime.load(str(tmp_path / "a" / "model"), kernels=True)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_turned_inputs(scheme: str, tmp_path: Path) -> None:
    """Inputs that a Hadamard matrix turns are turned before the kernel, which takes codes of them where it takes codes."""
    out = written("llama", tmp_path, scheme, method="hadamard+rtn", options={"hadamard.match": "o_proj|down_proj|gate_proj"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = runtime.load(out, dtype=torch.float16, kernels=True)
    assert sum(module.turned for module in packed.modules() if isinstance(module, PackedLinear)) == 3 * tiny.LAYERS
    assert kl(export.load(out, dtype=torch.float32), packed) < MOST[scheme]


def test_dequantized_linears_have_their_inputs_turned(tmp_path: Path) -> None:
    """By simulation, beside packed ones."""
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    recipe = short_recipe(
        scheme="w8a8", method="hadamard+rtn", options={"hadamard.match": "o_proj"}, format="lowbit", data=None
    )
    recipe = replace(recipe, rules=(Rule(match="o_proj", scheme="nf4-g32"), *recipe.rules))
    quantize(str(tmp_path / "model"), str(tmp_path / "out"), recipe=recipe)
    with pytest.warns(UserWarning, match="3 linears dequantized: values of nf4"):
        packed = runtime.load(str(tmp_path / "out"), dtype=torch.float16, kernels=True)
    assert kl(export.load(str(tmp_path / "out"), dtype=torch.float32), packed) < MOST["w8a8"]


def test_padded_rows_of_scans(tmp_path: Path) -> None:
    """Mixers put padded tokens to 0, so a norm before one leaves its floats too."""
    out = written("mamba2", tmp_path, "w8a8")
    packed, tokens = runtime.load(out, dtype=torch.float16, kernels=True), tiny.tokens(2, 24)
    assert kinds(packed)[QuantizingNorm] == tiny.LAYERS
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        a, b = (each(tokens, attention_mask=mask).logits[:, 5:] for each in (export.load(out, dtype=torch.float32), packed))
    assert float((a - b).norm() / a.norm()) < 0.1


def test_corrections_and_the_other_format(tmp_path: Path) -> None:
    """Low-rank corrections run beside packed matrices, and compressed-tensors folders give the same model."""
    out = written("llama", tmp_path / "a", "w3a16-g32", method="rtn+lorc", options={"lorc.rank": 4})
    packed = runtime.load(out, dtype=torch.float16, kernels=True)
    assert all(m.low is not None for m in packed.modules() if isinstance(m, PackedLinear))
    assert kl(export.load(out, dtype=torch.float32), packed) < MOST["w4a16-g32"]
    tokens = tiny.tokens(2, 16)
    for scheme in ("w4a16-g32-asym", "w8a8"):
        both = [written("llama", tmp_path / scheme / f, scheme, f) for f in ("lowbit", "compressed-tensors")]
        a, b = (runtime.load(each, kernels=True)(tokens).logits for each in both)
        assert torch.equal(a, b)


def test_compiles_whole(tmp_path: Path) -> None:
    """torch.compile sees one graph, handoffs included; sums are rounded elsewhere, which flips codes of inputs."""
    packed = runtime.load(written("llama", tmp_path, "w8a8"), dtype=torch.float16, kernels=True)
    tokens = tiny.tokens(1, 16)
    with torch.no_grad():
        wanted = packed(tokens, use_cache=False).logits
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        assert runtime._distance(compiled(tokens, use_cache=False).logits, wanted) < 0.05


def test_a_product_that_waits() -> None:
    """Added to something of its shape and dtype, it is computed with the sum, once; whatever else reads it gets the product."""
    asked: list[Any] = []

    def product(residual: torch.Tensor | None) -> torch.Tensor:
        asked.append(residual)
        return torch.full((2, 4), 3.0) if residual is None else 3 + residual

    def waiting() -> Any:
        return Awaited.of(torch.zeros(2, 8), 4, torch.float32, product)

    ones = torch.ones(2, 4)
    for add in (
        lambda x: x + ones,
        lambda x: ones + x,
        lambda x: torch.add(ones, x),
        lambda x: ones + F.dropout(x, 0.5, False),
    ):
        found = add(waiting())
        assert torch.equal(found, ones * 4) and type(found) is torch.Tensor and len(asked) == 1 and asked.pop() is ones
    assert waiting().shape == (2, 4) and waiting().dtype == torch.float32 and not asked
    for read in (
        lambda x: x * 2,
        lambda x: torch.cat([x]) * 2,
        lambda x: x.view(-1)[:2] + 3,
        lambda x: x + 3,
        lambda x: x + ones[:1] + 2,
    ):
        found = read(waiting())
        assert bool((found == 6).all()) and type(found) is torch.Tensor and asked == [None]
        asked.clear()
    assert torch.equal(waiting() + waiting(), ones * 6) and len(asked) == 2
    asked.clear()
    one = waiting()
    assert torch.equal(one.T + (one + ones).T, torch.full((4, 2), 7.0)) and asked == [None]
