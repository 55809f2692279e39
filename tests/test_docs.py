"""What the documents say is run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import lowbit
from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, open_checkpoint, reason_against
from lowbit.qtensor import fake_quantize_input, parse_scheme
from lowbit.recipe import Recipe, Rule, Step, read_recipe
from lowbit.ssm import ACTIVATIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the code printed in docs/format.md defines; the example in it asserts its own numbers."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2 and "def read(" in blocks[0] and "assert dequantize(" in blocks[1]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/format.md", "exec"), names)
    return names


RULES = {
    "ints": ("llama", {"q_proj": "w3a16-g32-asym", "k_proj": "w2a16-g32", "v_proj": "w5a16-channel-asym", "": "w8a8"}),
    "others": ("llama", {"self_attn": "fp8", "up_proj": "w7a16-tensor-asym", "down_proj": "float", "": "w4a16-tensor"}),
    "transposed": ("gpt2", {"": "w6a16-g16-asym"}),
    "experts": ("gpt_oss", {"experts": "w4a16-g32-asym", "": "fp8a16-g32"}),
    "blocks": (
        "llama",
        {"q_proj": "mxfp4", "k_proj": "mxfp6", "v_proj": "mxfp6-e3m2", "o_proj": "mxfp8-e5m2", "": "mxint4-even"},
    ),
    "two factors": ("llama", {"self_attn": "nvfp4", "down_proj": "w4a8-g32-two", "": "w3a16-g32-asym-two"}),
    "rows": ("llama", {"self_attn": "w8a8-r16", "down_proj": "fp8-g32-r8", "": "fp4-pow2-g32"}),
    "codebooks": (
        "llama",
        {"q_proj": "kmeans2", "k_proj": "kmeans3-g16", "v_proj": "bcq4-g32", "mlp": "bcq2-g64", "": "nf4-g32"},
    ),
    "static": ("llama", {"self_attn": "w8a8-tensor-astatic", "": "fp8-astatic"}),
}


@pytest.mark.parametrize("case", RULES)
def test_reader_of_the_format_page(case: str, page: dict[str, Any], tmp_path: Path) -> None:
    """The reader printed in docs/format.md gives the tensors that lowbit gives, and takes no other version."""
    name, schemes = RULES[case]
    if name == "gpt_oss":
        settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_key_value_heads": 2}
        config = transformers.AutoConfig.for_model(
            name, vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, **settings
        )
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    else:
        tiny.save(name, tmp_path / "model", dtype=torch.bfloat16)
    recipe = Recipe(
        rules=tuple(Rule(match=match, scheme=scheme) for match, scheme in schemes.items()),
        steps=(Step(method="rtn"),),
        data=DataSpec(source="random", rows=2, length=16),
        format="lowbit",
    )
    lowbit.quantize(str(tmp_path / "model"), tmp_path / "out", recipe=recipe)
    source, original = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tmp_path / "model"))
    found, expected = page["read"](tmp_path / "out"), source.read(list(source.tensors))
    assert found.keys() == expected.keys() == original.tensors.keys()
    plain = original.read(list(original.tensors))
    changed = 0
    for tensor, value in expected.items():
        assert found[tensor].dtype == value.dtype and torch.equal(found[tensor], value), tensor
        changed += not torch.equal(value, plain[tensor])
    assert isinstance(source, QuantizedSource)
    assert changed == len({module.tensor for module in source.modules.values()}) > 0

    described = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    (tmp_path / "out" / "lowbit.json").write_text(json.dumps(described | {"version": 1}))
    with pytest.raises(ValueError, match="is not in version 3"):
        page["read"](tmp_path / "out")


def test_inputs_of_the_format_page() -> None:
    """The page's words about inputs are what `fake_quantize_input` does, zeros included."""
    x = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1e4]])
    for name in ("w8a8", "fp8", "w4a4-g32-ag16", "w8a8-aasym", "w8a8-astatic", "mxfp4", "mxfp8-even", "mxint8-ceil", "nvfp4"):
        spec = parse_scheme(name).input
        assert spec is not None
        fmt, largest = spec.format, 2e4
        shared = x.unflatten(1, (-1, spec.group_size(64)))
        reach = shared.abs().amax(-1, keepdim=True)
        z: Any = 0.0
        if not spec.dynamic:
            s = torch.tensor(largest / fmt.max)
        elif spec.scale == "e8m0":
            e = int(math.log2(fmt.max))
            kept = {"mxfp8": 3, "mxfp4": 1, "mxint8": 6}[name.partition("-")[0]]
            rounded = torch.tensor([[[round_mantissa(float(a), kept)] for a in row] for row in reach[..., 0]])
            floor = 2.0 ** ((rounded if spec.rule == "even" else reach).log2().floor() - e)
            ceil = 2.0 ** (reach / fmt.max).log2().ceil()
            s = torch.where(reach > 0, ceil if spec.rule == "ceil" else floor, 1.0)
        elif spec.scale == "e4m3":
            o = 2.0 ** math.ceil(math.log2(1.5 * largest / fmt.max / 448))
            s = ((reach / fmt.max / o).to(torch.float8_e4m3fn).float() * o).clamp(min=2.0**-9 * o)
        elif spec.symmetric:
            s = reach.clamp(min=1e-12) / fmt.max
        else:
            low, high = shared.amin(-1, keepdim=True).clamp(max=0), shared.amax(-1, keepdim=True).clamp(min=0)
            s = (high - low).clamp(min=1e-12) / 255
            z = (-128 - low / s).round()
        expected = ((fmt.round(shared / s + z) - z) * s).view(x.shape)
        assert torch.equal(fake_quantize_input(x, spec, largest), expected), name
        half = fake_quantize_input(x.bfloat16().float(), spec, largest).bfloat16()
        assert torch.equal(fake_quantize_input(x.bfloat16(), spec, largest), half)


def round_mantissa(a: float, bits: int) -> float:
    """a to so many bits after the first."""
    if a == 0:
        return a
    mantissa, exponent = math.frexp(a)
    return math.ldexp(math.floor(mantissa * 2 ** (bits + 1) + 0.5) / 2 ** (bits + 1), exponent)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    """Every recipe in recipes/ reads, says what it is for, fits a Llama and can be exported for its engine; calibration text is
    named where it is needed, as a file that --data replaces. tests/test_recipes.py runs them."""
    recipe = read_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    names = [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    points = [f"backbone.layers.0.mixer.{name}" for name in ACTIVATIONS] if "s8" in path.read_text() else []
    schemes = recipe.schemes(names, points)
    assert set(schemes) == set(names) and set(recipe.point_schemes(points)) == set(points)
    reasons = {reason_against(scheme, recipe.engine) for scheme in schemes.values()}
    assert (
        reasons == {None}
        if recipe.format == "compressed-tensors"
        else None not in reasons or {"embed", "hadamard"} & {step.method for step in recipe.steps}
    )
    assert (recipe.data.source if recipe.data else None) == ("calibration.jsonl" if recipe.calibrated else None)


def test_there_are_recipes() -> None:
    """The folder is not empty, so that the test above runs."""
    assert len(list((ROOT / "recipes").glob("*.toml"))) >= 6
