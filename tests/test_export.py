"""Quantized checkpoints: what is written reads back bit for bit, here and in transformers; what no engine loads is refused."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CompressedTensorsConfig

from lowbit.arch import Arch, Linear, discover
from lowbit.export import (
    QuantizedSource,
    check_export,
    encode,
    load,
    open_checkpoint,
    quantized_sites,
    reason_against,
    write_config,
)
from lowbit.files import save_shard
from lowbit.packing import packed_width
from lowbit.qtensor import QTensor, Scheme, dequantize, find_params, parse_scheme, quantize
from lowbit.source import Source, open_source
from lowbit.unit import Input

WEIGHT_ONLY = (
    "w4a16-g32", "w4a16-g32-asym", "w4a16-channel", "w8a16", "w8a16-asym", "w8a16-g32", "w3a16-g32", "w3a16-g32-asym",
    "w2a16-g32", "w5a16-channel-asym", "fp8a16", "fp8a16-tensor", "mxfp4a16", "mxfp6a16-ceil", "mxfp8a16-even", "nvfp4a16",
)  # fmt: skip
WITH_INPUTS = ("w8a8", "w8a8-tensor", "w4a8-g32", "fp8", "fp8-tensor", "w8a8-astatic", "mxfp4", "mxfp6", "mxfp8", "nvfp4")
# compressed-tensors has no layout for these
NATIVE_ONLY = (
    "w8a8-asym", "w4a16-tensor", "w3a16-tensor-asym", "w8a8-g32-asym", "mxint4", "mxint6a16", "mxfp4-g16", "mxfp6-e3m2",
    "mxfp8-e5m2", "fp8-e5m2", "fp4a16-g16-pow2", "nf4-g32", "w4a8-g32-two", "w4a8-g32-two-asym", "w8a8-r16", "nvfp4-g32",
    "mxfp4a8-even", "mxfp4-floor", "mxfp8-even", "kmeans3", "kmeans2-g32", "bcq1-g32", "bcq3-channel", "w4a4-g32-ag32-aasym",
)  # fmt: skip
LARGEST = 7.0  # of the inputs, where a scheme needs it from calibration; for NVFP4 the largest below its power of two


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No bars of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Arch]:
    """Discovered bfloat16 checkpoints of the tiny models, each saved once, to be read only."""
    known: dict[str, Arch] = {}

    def get(name: str) -> Arch:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder, dtype=torch.bfloat16, seed=3)
            known[name] = discover(open_source(str(folder)))
        return known[name]

    return get


def linears_of(arch: Arch) -> list[Linear]:
    return [linear for block in arch.blocks for linear in block.linears]


def choose(arch: Arch, rules: str | dict[str, str]) -> dict[str, Scheme]:
    """Schemes by regular expressions, the first that is found wins; linears that none finds stay float."""
    table = {"": rules} if isinstance(rules, str) else rules
    chosen = {}
    for linear in linears_of(arch):
        found = next((scheme for pattern, scheme in table.items() if re.search(pattern, linear.name)), "float")
        if found != "float":
            chosen[linear.name] = parse_scheme(found)
    return chosen


def write(arch: Arch, folder: Path, rules: str | dict[str, str], format: str) -> dict[str, QTensor]:
    """Round to nearest and write a checkpoint of one shard; returns what was written."""
    schemes = choose(arch, rules)
    folder.mkdir(parents=True, exist_ok=True)
    every = arch.source.read(list(arch.source.tensors))
    written: dict[str, QTensor] = {}
    for linear in linears_of(arch):
        if linear.name in schemes:
            stored = every[linear.tensor] if not linear.stacked else every[linear.tensor][linear.index]
            w, spec = (stored.T if linear.transposed else stored).float(), schemes[linear.name].weight
            written[linear.name] = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    replaced = {linear.tensor for linear in linears_of(arch) if linear.name in schemes}
    tensors = {name: value for name, value in every.items() if name not in replaced}
    for name, q in written.items():
        given = schemes[name].input
        inputs = None if given is None else Input(given, LARGEST if Input(given).calibrated else None)
        tensors |= encode(name, q, schemes[name], format, inputs)
    save_shard(tensors, folder / ("lowbit.safetensors" if format == "lowbit" else "model.safetensors"))
    write_config(folder, arch, linears_of(arch), schemes, format)
    return written


def assert_reads_back(folder: Path, arch: Arch, written: dict[str, QTensor]) -> QuantizedSource:
    """The folder shows the original names and shapes, and the values of the codes, rounded once to bfloat16."""
    source = QuantizedSource(folder)
    original = arch.source.tensors
    assert {name: (info.shape, info.dtype) for name, info in source.tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in original.items()
    }
    assert set(source.modules) == set(written)
    for given in source.inputs().values():
        assert given.largest == (pytest.approx(LARGEST, rel=2**-7) if given.calibrated else None)
    for name, q in written.items():
        found = source.quantized(name)
        assert torch.equal(found.codes, q.codes) and torch.equal(dequantize(found), dequantize(q))
    values = source.read(list(original))
    plain = arch.source.read(list(original))
    by_tensor: dict[str, list[Linear]] = {}
    for linear in linears_of(arch):
        if linear.name in written:
            by_tensor.setdefault(linear.tensor, []).append(linear)
    for name, value in values.items():
        assert value.dtype == torch.bfloat16 and value.shape == plain[name].shape
        if name not in by_tensor:
            assert torch.equal(value, plain[name])
        for linear in by_tensor.get(name, []):
            found = value[linear.index] if linear.stacked else value
            found = found.T if linear.transposed else found
            assert torch.equal(found, dequantize(written[linear.name], torch.bfloat16))
            assert not torch.equal(found, (plain[name][linear.index] if linear.stacked else plain[name]).view(found.shape))
    return source


# ------------------------------------------------------------------------------------------------- reading back, in lowbit


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *WITH_INPUTS])
def test_compressed_tensors_read_back(scheme: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model("llama")
    written = write(arch, tmp_path, scheme, "compressed-tensors")
    source = assert_reads_back(tmp_path, arch, written)
    assert not source.native
    wanted = parse_scheme(scheme)
    for name, found in source.schemes().items():
        # the rule of powers of two is how codes were made, not how they are read
        assert (replace(found.weight, rule=wanted.weight.rule), found.input) == (wanted.weight, wanted.input)
        rows, columns = written[name].codes.shape
        if wanted.weight.format.bits == 8 and wanted.weight.symmetric and wanted.input is not None and wanted.input.dynamic:
            assert source.bits_per_weight(name) == written[name].bits_per_weight
        else:  # packing fills 32-bit words, and the shape is stored beside
            overhead = source.bits_per_weight(name) - written[name].bits_per_weight
            assert -1e-9 <= overhead <= 2 + 8 * 16 / (rows * columns)


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *WITH_INPUTS, *NATIVE_ONLY])
def test_native_reads_back(scheme: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model("llama")
    written = write(arch, tmp_path, scheme, "lowbit")
    source = assert_reads_back(tmp_path, arch, written)
    assert source.native
    assert source.schemes() == dict.fromkeys(written, parse_scheme(scheme))
    for name, q in written.items():
        rows, columns = q.codes.shape
        stored = 8 * rows * packed_width(columns, q.spec.format.bits) + 8 * q.scale.nbytes
        stored += sum(8 * part.nbytes for part in (q.zero, q.outer) if part is not None)
        stored += 32 if f"{name}.input_largest" in source.stored else 0
        assert source.bits_per_weight(name) == stored / (rows * columns)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "mamba", "bert"])
def test_native_reads_back_other_models(name: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    """gpt2 keeps [in, out], mixtral fuses experts in memory, the others have matrices that stay float."""
    arch = model(name)
    written = write(arch, tmp_path, "w4a16-g32-asym", "lowbit")
    assert_reads_back(tmp_path, arch, written)
    loaded = load(str(tmp_path))
    twin = Arch(arch.source, torch.bfloat16)
    twin.adopt(tuple(replace(block, points=()) for block in arch.blocks))  # no point is quantized
    twin.fill()
    for linear in linears_of(arch):
        expected = dequantize(written[linear.name], torch.bfloat16)
        assert torch.equal(linear.view(loaded.get_parameter(linear.param)), expected)
        linear.view(twin.param(linear)).copy_(expected)
    rows = tiny.tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(rows).logits, twin.model(rows).logits)


def test_native_reads_back_stacked_experts(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "gpt_oss", vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, num_experts_per_tok=2, num_local_experts=4, head_dim=16,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    arch = discover(open_source(str(tmp_path / "model")))
    written = write(arch, tmp_path / "out", {"experts": "w4a16-g32"}, "lowbit")
    assert len(written) == 8
    assert_reads_back(tmp_path / "out", arch, written)


MIXED = {"down_proj": "w8a16", r"layers\.1\..*o_proj": "float", "self_attn": "w4a16-g32-asym", "": "w4a16-g32"}


@pytest.mark.parametrize("format", ["compressed-tensors", "lowbit"])
def test_mixed_schemes_read_back(format: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model("llama")
    written = write(arch, tmp_path, MIXED, format)
    assert len(written) == 20 and "model.layers.1.self_attn.o_proj" not in written
    source = assert_reads_back(tmp_path, arch, written)
    assert {name: scheme.weight for name, scheme in source.schemes().items()} == {
        name: scheme.weight for name, scheme in choose(arch, MIXED).items()
    }


def test_native_checkpoint_has_the_original_config(model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model("gpt2")
    write(arch, tmp_path, "w4a16-g32", "lowbit")
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, arch.source.folder))
    assert config == original | {"quantization_config": {"quant_method": "lowbit"}}
    described = json.loads((tmp_path / "lowbit.json").read_text())
    assert described["format"] == "lowbit" and described["version"] == 3
    assert described["linears"]["transformer.h.0.attn.c_attn"] == {
        "tensor": "transformer.h.0.attn.c_attn.weight",
        "index": None,
        "transposed": True,
        "shape": [192, 64],
        "scheme": "w4a16-g32",
        "weight": {
            "format": "int4",
            "group": 32,
            "rows": 1,
            "symmetric": True,
            "dynamic": False,
            "scale": "float",
            "rule": "floor",
        },
        "input": None,
        "turned": False,
    }


# ------------------------------------------------------------------------------------------------------------- transformers


def from_transformers(folder: Path, *, name: str = "llama", dequantize: bool) -> Any:
    """The model as transformers loads it, nothing missing or unexpected; with its weights dequantized, before or by a run."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded, info = tiny.auto_class(name).from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        loaded.eval()(tiny.tokens(1, 8))  # what is still packed is unpacked by the first call
    return loaded


def assert_same_weights(found: Any, expected: Any, names: list[str]) -> None:
    for name in names:
        weight = found.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected.get_submodule(name).weight), name


FOR_TRANSFORMERS = ("w4a16-g32", "w4a16-g32-asym", "w8a16", "w3a16-g32", "w2a16-g32", "w8a8", "fp8")
OTHERS = tuple(scheme for scheme in (*WEIGHT_ONLY, *WITH_INPUTS) if scheme not in FOR_TRANSFORMERS)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", [False, True], ids=["compressed", "dequantized"])
@pytest.mark.parametrize("scheme", [*FOR_TRANSFORMERS, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in OTHERS)])
def test_transformers_loads_the_same_weights(
    scheme: str, dequantize: bool, model: Callable[[str], Arch], tmp_path: Path
) -> None:
    arch = model("llama")
    written = write(arch, tmp_path, scheme, "compressed-tensors")
    found = from_transformers(tmp_path, dequantize=dequantize)
    expected = load(str(tmp_path))
    assert_same_weights(found, expected, list(written))
    rows = tiny.tokens(2, 24, seed=1)
    with torch.no_grad():
        logits, wanted = found(rows).logits.float(), expected(rows).logits.float()
    if scheme in WEIGHT_ONLY:
        assert torch.equal(logits, wanted)
    else:  # int8 inputs: compressed-tensors divides by 127.5 where vLLM and lowbit divide by 127
        assert (logits - wanted).norm() < 0.08 * wanted.norm()
        with torch.no_grad():
            plain = load(str(arch.source.folder))(rows).logits.float()
        assert (plain - wanted).norm() > 0.02 * wanted.norm()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", [False, True], ids=["compressed", "dequantized"])
def test_transformers_loads_mixed_schemes(dequantize: bool, model: Callable[[str], Arch], tmp_path: Path) -> None:
    """Two layouts in one checkpoint: packed integers and FP8, and a linear that stays float."""
    arch = model("llama")
    rules = {"down_proj": "fp8a16", r"layers\.1\..*o_proj": "float", "": "w4a16-g32-asym"}
    written = write(arch, tmp_path, rules, "compressed-tensors")
    found = from_transformers(tmp_path, dequantize=dequantize)
    expected = load(str(tmp_path))
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in found.named_modules()}
    quantized = {name for name, scheme in schemes.items() if scheme is not None}
    assert quantized == set(written) and "model.layers.1.self_attn.o_proj" not in quantized
    for name in quantized:
        assert (str(schemes[name].weights.type), schemes[name].weights.symmetric) == (
            ("float", True) if name.endswith("down_proj") else ("int", False)
        )
    assert_same_weights(found, expected, [*written, "model.layers.1.self_attn.o_proj"])
    rows = tiny.tokens(2, 24, seed=1)
    with torch.no_grad():
        assert torch.equal(found(rows).logits, expected(rows).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "fp8a16", pytest.param("w3a16-g32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_moe", "qwen3_moe"))])
def test_transformers_loads_experts(name: str, scheme: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model(name)
    write(arch, tmp_path, scheme, "compressed-tensors")
    found, expected = from_transformers(tmp_path, name=name, dequantize=True), load(str(tmp_path))
    for linear in linears_of(arch):
        given, wanted = (linear.view(m.get_parameter(linear.param)) for m in (found, expected))
        assert torch.equal(given, wanted)
    rows = tiny.tokens(2, 24, seed=1)
    with torch.no_grad():
        logits, wanted = found(rows).logits.float(), expected(rows).logits.float()
    assert (logits - wanted).norm() < 0.02 * wanted.norm()  # bfloat16 sums of another order


def test_transformers_refuses_the_native_format(model: Callable[[str], Arch], tmp_path: Path) -> None:
    """Rather than loading random weights, as it does where shards have the usual names but other tensors."""
    write(model("llama"), tmp_path, "w4a16-g32", "lowbit")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_config_keeps_every_key(name: str, model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model(name)
    original = json.loads((arch.source.folder / "config.json").read_text())
    config = arch.source.folder / "config.json"
    before = config.read_bytes()
    try:
        config.write_text(json.dumps(original | {"a_key_of_tomorrow": {"nested": [1, None, "ä"]}}))
        write(arch, tmp_path, "w4a16-g32", "compressed-tensors")
        expected = json.loads(config.read_text())
    finally:
        config.write_bytes(before)
    found = json.loads((tmp_path / "config.json").read_text())
    quantization = found.pop("quantization_config")
    assert found == expected and list(found) == list(expected)
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "pack-quantized"
    assert quantization["quantization_status"] == "compressed"


def ignored(folder: Path) -> set[str]:
    return set(json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"])


def test_ignore_list(model: Callable[[str], Arch], tmp_path: Path) -> None:
    """Exactly the linear layers that stay float, tied heads and routers too."""
    layers = range(tiny.LAYERS)
    write(model("llama"), tmp_path / "llama", {"k_proj": "float", "": "w4a16-g32"}, "compressed-tensors")
    assert ignored(tmp_path / "llama") == {"lm_head"} | {f"model.layers.{i}.self_attn.k_proj" for i in layers}
    write(model("mixtral"), tmp_path / "mixtral", "w4a16-g32", "compressed-tensors")
    assert ignored(tmp_path / "mixtral") == {"lm_head"} | {f"model.layers.{i}.block_sparse_moe.gate" for i in layers}
    write(model("mixtral"), tmp_path / "experts", {"experts": "float", "": "w4a16-g32"}, "compressed-tensors")
    experts = {f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}" for i in layers for e in range(4) for w in (1, 2, 3)}
    assert ignored(tmp_path / "experts") == ignored(tmp_path / "mixtral") | experts
    write(model("qwen2_moe"), tmp_path / "qwen2_moe", "w4a16-g32", "compressed-tensors")
    gates = {f"model.layers.{i}.mlp.{gate}" for i in layers for gate in ("gate", "shared_expert_gate")}
    assert ignored(tmp_path / "qwen2_moe") == {"lm_head"} | gates
    write(model("mamba"), tmp_path / "mamba", "w8a8", "compressed-tensors")
    assert {"lm_head"} | {f"backbone.layers.{i}.mixer.dt_proj" for i in layers} <= ignored(tmp_path / "mamba")


def test_targets(model: Callable[[str], Arch], tmp_path: Path) -> None:
    """One scheme is for every Linear; several are told apart by families of names, or by names where a family is mixed."""

    def groups(rules: str | dict[str, str], folder: str) -> list[tuple[int, list[str]]]:
        write(model("llama"), tmp_path / folder, rules, "compressed-tensors")
        config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        return [(group["weights"]["num_bits"], group["targets"]) for group in config["config_groups"].values()]

    assert groups("w4a16-g32", "one") == [(4, ["Linear"])]
    families = dict(groups({"mlp": "w8a16", "": "w4a16-g32"}, "two"))
    assert set(families[8]) == {f"re:model\\.layers\\.\\d+\\.mlp\\.{leaf}$" for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert len(families[4]) == 4
    mixed = dict(groups({r"layers\.1\..*down_proj": "w8a16", "": "w4a16-g32"}, "three"))
    assert mixed[8] == ["model.layers.1.mlp.down_proj"]
    assert {"model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"} <= set(mixed[4])
    assert sum("down_proj" in target for target in mixed[4]) == 2


# ---------------------------------------------------------------------------------------------------------------- refusals


def refusal(arch: Arch, rules: str | dict[str, str], engine: str = "vllm", format: str = "compressed-tensors") -> str:
    """The message of the refusal."""
    with pytest.raises(ValueError) as caught:
        check_export(format, engine, linears_of(arch), choose(arch, rules))
    return str(caught.value)


NO_LAYOUT = [
    "mxint4", "mxint6a16", "mxfp4-g16", "mxfp6-e3m2", "mxfp8-e5m2", "fp8-e5m2", "fp4a16-g16-pow2", "nf4-g32", "w4a8-g32-two",
    "w8a8-r16", "nvfp4-g32", "kmeans3", "bcq3-channel",
]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "reason", "for_transformers"),
    [
        ("w3a16-g32", "vLLM has no kernel for 3-bit weights, only for 4 and 8 bits", True),
        ("w2a16-g32", "vLLM has no kernel for 2-bit weights", True),
        ("w8a8-g32", "vLLM runs 8-bit weights with 8-bit inputs only with one scale a channel or a tensor", True),
        ("fp8a16-g32", "vLLM runs FP8 weights only with one scale a channel, a tensor, or a block of 128 x 128", True),
        ("w8a8-asym", "zero points with quantized inputs, or with one scale a tensor, have no layout; use -sym", False),
        ("w4a8-g32-asym", "zero points with quantized inputs", False),
        ("w4a16-tensor", "one integer scale for a whole tensor has no packed layout; use -channel or a group", False),
        ("mxfp6", "vLLM has no kernel for 6-bit floats", True),
        ("w4a4-g32", "vLLM runs integer inputs only with 8 bits and one scale a token or a tensor", True),
        ("w4a8-g32-astatic", "vLLM runs 4-bit weights with 8-bit inputs only with symmetric scales for each token", True),
        ("mxfp4-floor", "engines choose the powers of two of these inputs by even, not by floor", False),
        ("mxfp8-even", "engines choose the powers of two of these inputs by ceil, not by even", False),
        ("mxfp4a8-even", "engines choose the powers of two of these inputs by ceil, not by even", False),
        *((scheme, "compressed-tensors has no layout for it", False) for scheme in NO_LAYOUT),
    ],
)
def test_schemes_that_are_refused(scheme: str, reason: str, for_transformers: bool, model: Callable[[str], Arch]) -> None:
    arch = model("llama")
    message = refusal(arch, scheme)
    assert message.startswith(f"scheme {scheme} cannot be exported for vllm: {reason}")
    assert message.endswith("or write lowbit's own format with --format lowbit")
    assert ("--engine transformers" in message) == for_transformers
    if for_transformers:
        check_export("compressed-tensors", "transformers", linears_of(arch), choose(arch, scheme))
    else:
        assert reason in refusal(arch, scheme, engine="transformers")
    check_export("lowbit", "vllm", linears_of(arch), choose(arch, scheme))


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w8a8", "w8a8-tensor", "w8a8-astatic", "fp8", "fp8-astatic", "fp8a16",
     "w4a16-channel", "w4a8-g32", "mxfp4", "mxfp4a16", "mxfp8", "nvfp4", "nvfp4a16"],
)  # fmt: skip
def test_schemes_that_are_allowed(scheme: str, model: Callable[[str], Arch]) -> None:
    for engine in ("vllm", "transformers"):
        assert reason_against(parse_scheme(scheme), engine) is None
        check_export("compressed-tensors", engine, linears_of(model("llama")), choose(model("llama"), scheme))


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_transposed_matrices_are_refused(engine: str, model: Callable[[str], Arch]) -> None:
    arch = model("gpt2")
    message = refusal(arch, "w4a16-g32", engine=engine)
    assert "transformer.h.0.attn.c_attn is stored as [in, out] (Conv1D), which compressed-tensors does not know" in message
    assert "--format lowbit" in message
    check_export("lowbit", engine, linears_of(arch), choose(arch, "w4a16-g32"))


def test_stacked_experts_are_refused() -> None:
    linear = Linear(
        name="experts.up.0", tensor="experts.up", param="experts.up", index=0, rows=(0, 64), transposed=False, stacked=True,
        out_features=64, in_features=64,
    )  # fmt: skip
    schemes = {"experts.up.0": parse_scheme("w4a16-g32")}
    with pytest.raises(ValueError, match=r"experts\.up holds all experts of a layer, and neither vLLM nor transformers"):
        check_export("compressed-tensors", "transformers", [linear], schemes)
    check_export("compressed-tensors", "transformers", [linear], {})  # left float
    check_export("lowbit", "vllm", [linear], schemes)


@pytest.mark.parametrize(
    ("name", "rules", "first", "second"),
    [
        ("llama", {"v_proj": "w8a16", "": "w4a16-g32"}, "self_attn.q_proj", "self_attn.v_proj"),
        ("llama", {"k_proj": "float", "": "w4a16-g32"}, "self_attn.q_proj", "self_attn.k_proj"),
        ("llama", {"gate_proj": "w8a16", "": "w4a16-g32"}, "mlp.gate_proj", "mlp.up_proj"),
        ("mixtral", {"w3": "w8a16", "": "w4a16-g32"}, "w1", "w3"),
        ("bert", {"value": "w8a16", "": "w4a16-g32"}, "attention.self.query", "attention.self.value"),
    ],
)
def test_matrices_that_vllm_stacks(
    name: str, rules: dict[str, str], first: str, second: str, model: Callable[[str], Arch]
) -> None:
    arch = model(name)
    message = refusal(arch, rules)
    assert re.match(rf"\S+\.{first} and \S+\.{second} have different schemes, but vLLM keeps them in one matrix", message)
    check_export("compressed-tensors", "transformers", linears_of(arch), choose(arch, rules))


def test_one_refused_scheme_of_two_is_enough(model: Callable[[str], Arch]) -> None:
    assert "scheme w3a16-g32 cannot" in refusal(model("llama"), {"down_proj": "w3a16-g32", "": "w4a16-g32"})


# ----------------------------------------------------------------------------------------------------------------- opening


def test_open_checkpoint_tells_formats_apart(model: Callable[[str], Arch], tmp_path: Path) -> None:
    arch = model("llama")
    assert type(open_checkpoint(str(arch.source.folder))) is Source
    for format in ("compressed-tensors", "lowbit"):
        write(arch, tmp_path / format, "w4a16-g32", format)
        opened = open_checkpoint(str(tmp_path / format))
        assert isinstance(opened, QuantizedSource) and opened.native == (format == "lowbit")
    with pytest.raises(ValueError, match="is neither a folder nor a hub id|not a local folder"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_other_quantization_methods_are_refused(model: Callable[[str], Arch], tmp_path: Path) -> None:
    write(model("llama"), tmp_path, "w4a16-g32", "compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized already .awq., which lowbit cannot dequantize"):
        load(str(tmp_path))


def test_later_version_of_the_native_format_is_refused(model: Callable[[str], Arch], tmp_path: Path) -> None:
    write(model("llama"), tmp_path, "w4a16-g32", "lowbit")
    described = json.loads((tmp_path / "lowbit.json").read_text())
    (tmp_path / "lowbit.json").write_text(json.dumps(described | {"version": 4}))
    with pytest.raises(ValueError, match=r"lowbit\.json has version 4; this lowbit reads version 3"):
        load(str(tmp_path))


def test_scale_without_a_group_is_refused(model: Callable[[str], Arch], tmp_path: Path) -> None:
    write(model("llama"), tmp_path, {"mlp": "w8a16", "": "w4a16-g32"}, "compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config has no group for model\.layers\.\d"):
        load(str(tmp_path))


def test_checkpoint_that_lacks_a_linear(model: Callable[[str], Arch], tmp_path: Path) -> None:
    write(model("llama"), tmp_path, "w4a16-g32", "compressed-tensors")
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("model.layers.1.mlp.up_proj.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors the model needs: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------- loading


def test_load_a_float_checkpoint(model: Callable[[str], Arch]) -> None:
    folder = model("llama").source.folder
    loaded = load(str(folder))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not loaded.training and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    rows = tiny.tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(rows).logits, plain(rows).logits)


def test_load_in_another_dtype(model: Callable[[str], Arch], tmp_path: Path) -> None:
    """Dequantized to the checkpoint's dtype first, so the weights are the same numbers."""
    write(model("llama"), tmp_path, "w4a16-g32", "compressed-tensors")
    plain, wide = load(str(tmp_path)), load(str(tmp_path), dtype=torch.float32)
    assert plain.dtype == torch.bfloat16 and wide.dtype == torch.float32
    for (name, a), (other, b) in zip(plain.named_parameters(), wide.named_parameters(), strict=True):
        assert name == other and torch.equal(a.float(), b)


def test_load_takes_the_generation_config(model: Callable[[str], Arch], tmp_path: Path) -> None:
    write(model("llama"), tmp_path, "w4a16-g32", "lowbit")
    transformers.GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(tmp_path)
    assert load(str(tmp_path)).generation_config.temperature == 0.25


@pytest.mark.parametrize("format", ["compressed-tensors", "lowbit"])
@pytest.mark.parametrize(("scheme", "limit"), [("w8a8", 127.0), ("fp8", 448.0)])
def test_loaded_model_quantizes_inputs(
    scheme: str, limit: float, format: str, model: Callable[[str], Arch], tmp_path: Path
) -> None:
    """The logits are those of plain hooks that round every quantized linear's input, and of those linears alone."""
    arch = model("llama")
    rules = {"down_proj": scheme.replace("w8a8", "w8a16").replace("fp8", "fp8a16"), "": scheme}
    write(arch, tmp_path, rules, format)
    loaded = load(str(tmp_path), dtype=torch.float32)
    specs = quantized_sites(arch, QuantizedSource(tmp_path))
    assert len(specs) == 6 * tiny.LAYERS and not any("down_proj" in site[0] for site in specs)

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = args[0].abs().amax(-1, keepdim=True) / limit
        x = args[0] / scale
        x = x.round() if scheme == "w8a8" else x.to(torch.float8_e4m3fn).float()
        return (x * scale,)

    rows = tiny.tokens(2, 12)
    twin = load(str(arch.source.folder), dtype=torch.float32)
    with torch.no_grad():
        found = loaded(rows).logits
        twin.load_state_dict(loaded.state_dict())
        plain = twin(rows).logits
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear) and "layers" in name and "down_proj" not in name:
                module.register_forward_pre_hook(rounded)
        expected = twin(rows).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 0.02


# ------------------------------------------------------------------------------------------------------------------ shards


def test_save_shard(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    save_shard({"a": value.T, "b": value}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), value.T) and torch.equal(file.get_tensor("b"), value)


def test_save_shard_leaves_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shard({"a": torch.ones(3)}, tmp_path / "x.safetensors")

    def fails(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit.files.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        save_shard({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3))
