"""Experts stored as one tensor, written one by one for the engines that read them so."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from lowbit import load, quantize
from lowbit.arch import discover
from lowbit.cli import main
from lowbit.data import DataSpec
from lowbit.experts import PerExpert, split_experts
from lowbit.export import QuantizedSource
from lowbit.files import sha256_of
from lowbit.qtensor import parse_scheme
from lowbit.source import Source, open_source
from lowbit.unit import Stream, Unit
from tests import tiny

DATA = DataSpec(source="random", rows=4, length=32)
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {
        **tiny._EXPERTS, **_LINEAR_ATTENTION, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "head_dim": 32
    },
    "granitemoe": _EXPERTS,
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64, "head_dim": 32,
        "hidden_size_per_layer_input": 0, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "llama4_text": {
        **_EXPERTS, "head_dim": 32, "intermediate_size_mlp": 128, "num_experts_per_tok": 1, "moe_layers": [1, 2],
        "attention_chunk_size": 16, "no_rope_layers": [1, 1, 0],
    },
    "gpt_oss": {
        **_EXPERTS, "head_dim": 32, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip


def save(kind: str, folder: Path) -> None:
    """A tiny model of a type with fused experts."""
    config = transformers.AutoConfig.for_model(kind, **{**tiny._GROUPED, **CONFIGS[kind]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def fuse(folder: Path) -> None:
    """Store experts that are there one by one as one tensor, as the hub has Qwen3.5."""
    source = Source(folder)
    tensors = source.read(list(source.tensors))
    for name in [name for name in tensors if ".experts.0." in name and name in tensors]:
        if name.endswith("up_proj.weight"):
            continue
        head, tail = name.rsplit(".experts.0.", 1)
        parts = [tail] if tail.startswith("down") else [tail, tail.replace("gate", "up")]
        experts = [torch.cat([tensors.pop(f"{head}.experts.{expert}.{part}") for part in parts]) for expert in range(4)]
        tensors[f"{head}.experts.{'down_proj' if len(parts) == 1 else 'gate_up_proj'}"] = torch.stack(experts)
    write(folder, tensors)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(48, 32), (64, 32), (32, 32), (32, 64)])
def test_split(tmp_path: Path, hidden: int, width: int, transposed: bool) -> None:
    """The first half of the outputs is the gate, whichever way the tensors are stored and whatever sizes are equal."""
    gate_up, down = torch.randn(3, 2 * width, hidden), torch.randn(3, hidden, width)
    stored = [x.transpose(1, 2) for x in (gate_up, down)] if transposed else [gate_up, down]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text"}))
    write(tmp_path, {"m.experts.gate_up_proj": stored[0], "m.experts.down_proj": stored[1], "m.norm": torch.ones(4)})
    source = split_experts(open_source(str(tmp_path)), set)
    names = [f"m.experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")]
    assert set(source.tensors) == {*names, "m.norm"}
    found = source.read([*names, "m.norm"])
    assert all(tuple(found[name].shape) == source.tensors[name].shape for name in found)
    for i in range(3):
        assert torch.equal(found[f"m.experts.{i}.gate_proj.weight"], gate_up[i, :width])
        assert torch.equal(found[f"m.experts.{i}.up_proj.weight"], gate_up[i, width:])
        assert torch.equal(found[f"m.experts.{i}.down_proj.weight"], down[i])
    assert source.nbytes() == open_source(str(tmp_path)).nbytes()


def test_what_is_not_split(tmp_path: Path) -> None:
    """Types that no engine reads so, experts that stay float; only some of a layer's cannot be quantized."""
    tensors = {"m.experts.gate_up_proj": torch.randn(3, 64, 48), "m.experts.down_proj": torch.randn(3, 48, 32)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    write(tmp_path, tensors)
    source = open_source(str(tmp_path))
    assert split_experts(source, set) is source
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    source = open_source(str(tmp_path))
    assert split_experts(source, lambda names: set()) is source
    with pytest.raises(ValueError, match="m.experts: engines keep all of its experts in one tensor; quantize all"):
        split_experts(source, lambda names: {name for name in names if "1.gate" in name})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_fused_as_one_by_one(tmp_path: Path, method: str) -> None:
    """The same weights stored either way become the same files; transformers gives the logits of lowbit."""
    save("qwen3_5_moe_text", tmp_path / "single")
    shutil.copytree(tmp_path / "single", tmp_path / "fused")
    fuse(tmp_path / "fused")
    assert "model.layers.0.mlp.experts.gate_up_proj" in Source(tmp_path / "fused").tensors
    for name in ("single", "fused"):
        quantize(str(tmp_path / name), tmp_path / f"{name}-out", scheme="w4a16-g32", method=method, data=DATA)
    hashes = [
        {path.name: sha256_of(path) for path in (tmp_path / f"{name}-out").iterdir() if not path.name.startswith("report")}
        for name in ("single", "fused")
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) > 3
    same_in_transformers(tmp_path / "fused-out")


def same_in_transformers(out: Path) -> None:
    tokens = tiny.tokens(2, 24)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, experts_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(str(out))(tokens).logits)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "w4a16-g32"), ("gptq", "w4a16-g32"), ("rtn", "fp8a16")])
def test_llama4(tmp_path: Path, method: str, scheme: str) -> None:
    """Its experts multiply by a 3-D parameter at once, [in, out]; they are quantized as modules, as transformers loads."""
    save("llama4_text", tmp_path / "model")
    report = quantize(
        str(tmp_path / "model"), tmp_path / "out", scheme=scheme, method=method, data=DATA, engine="transformers",
        ignore=["router", "lm_head"],
    )  # fmt: skip
    experts = [row["name"] for row in report["linears"] if ".experts." in row["name"]]
    assert len(experts) == 2 * 4 * 3
    assert report["notes"] == []
    same_in_transformers(tmp_path / "out")


@pytest.fixture(params=["granitemoe", "gemma4_text"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_types_for_vllm(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Written as vLLM reads them; that transformers does not is refused where it matters, and said where it does not."""
    save(kind, tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--scheme", "w4a16-g32"]
    assert main([*command, "--engine", "transformers"]) == 2
    assert f"it loads the experts of {kind} as one tensor only" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="This checkpoint is for vLLM"):
        assert main(command) == 0
    prefix = "model.layers.1." + ("block_sparse_moe." if kind == "granitemoe" else "")
    source, original = QuantizedSource(tmp_path / "out"), Source(tmp_path / "model")
    assert {f"{prefix}experts.3.{part}_proj" for part in ("gate", "up", "down")} <= set(source.modules)
    fused = "block_sparse_moe.output_linear.weight" if kind == "granitemoe" else "experts.down_proj"
    w = original.read([f"model.layers.1.{fused}"])[f"model.layers.1.{fused}"][3].float()
    found = source.read([f"{prefix}experts.3.down_proj.weight"])[f"{prefix}experts.3.down_proj.weight"].float()
    assert float((found - w).norm() / w.norm()) < 0.15


def test_float_experts_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    """Then transformers loads the rest."""
    save(kind, tmp_path / "model")
    ignore = ["block_sparse_moe", "lm_head"] if kind == "granitemoe" else ["experts"]
    quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32", ignore=ignore, engine="transformers")
    before, after = Source(tmp_path / "model"), Source(tmp_path / "out")
    for name in [name for name, info in before.tensors.items() if len(info.shape) == 3]:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    same_in_transformers(tmp_path / "out")


@pytest.mark.parametrize("format", ["compressed-tensors", "lowbit"])
def test_gpt_oss(tmp_path: Path, format: str) -> None:
    """Gates and ups alternate, with biases: no engine reads them quantized by compressed-tensors."""
    save("gpt_oss", tmp_path / "model")
    out = tmp_path / "out"
    if format == "lowbit":
        report = quantize(str(tmp_path / "model"), out, scheme="w4a16-g32", method="gptq", data=DATA, format=format)
        assert sum(".experts." in row["name"] for row in report["linears"]) == 3 * 4 * 2
        return
    with pytest.raises(ValueError, match="neither vLLM nor transformers loads quantized experts of gpt_oss"):
        quantize(str(tmp_path / "model"), out, scheme="w4a16-g32")
    quantize(str(tmp_path / "model"), out, scheme="w4a16-g32", ignore=["experts", "lm_head"])
    same_in_transformers(out)


def test_layers_for_speculation_stay_fused(tmp_path: Path) -> None:
    """The model has no place for them, so they are kept byte for byte."""
    save("qwen3_5_moe_text", tmp_path / "model")
    fuse(tmp_path / "model")
    source = Source(tmp_path / "model")
    tensors = source.read(list(source.tensors))
    extra = {
        f"mtp.layers.0.mlp.experts.{part}": tensors[f"model.layers.0.mlp.experts.{part}"].clone()
        for part in ("gate_up_proj", "down_proj")
    }
    write(tmp_path / "model", tensors | extra)
    quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32")
    out = Source(tmp_path / "out")
    assert all(torch.equal(out.read([name])[name], value) for name, value in extra.items())
    assert "model.layers.0.mlp.experts.0.up_proj" in QuantizedSource(tmp_path / "out").modules


def test_dequantized_and_split(tmp_path: Path) -> None:
    """Both views at once: fused experts in FP8."""
    gate_up, down = torch.randn(2, 64, 32), torch.randn(2, 32, 32)
    codes = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in codes.items()}
    tensors |= {f"{name}_scale_inv": torch.full((2, 1, 1), 0.5) for name in codes}
    config = {"model_type": "qwen3_vl_moe", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(tmp_path, tensors)
    source = split_experts(open_source(str(tmp_path)), set)
    assert isinstance(source, PerExpert) and source.quantization == "fp8, a scale for each tensor"
    found = source.read(["experts.1.up_proj.weight"])["experts.1.up_proj.weight"]
    assert torch.equal(found, (tensors["experts.gate_up_proj"][1, 32:].float() * 0.5).to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------------------ calibration
def units(folder: Path, work: Path, *, all_experts: bool) -> list[Unit]:
    """The blocks of a model, with a stream that is at the first."""
    arch = discover(open_source(str(folder)))
    stream = Stream(arch, tiny.tokens(2, 16), work, all_experts=all_experts)
    stream.start()
    block = arch.blocks[1]
    for earlier in arch.blocks[:1]:
        values = arch.load(earlier.tensors)
        Unit(arch, earlier, {}, stream, torch.float32, values).finish()
    values = arch.load(block.tensors)
    scheme = parse_scheme("w4a16-g32")
    return [Unit(arch, block, {linear.name: scheme for linear in block.linears}, stream, torch.float32, values)]


def test_statistics_of_all_experts(tmp_path: Path) -> None:
    """Every expert's Gram matrix is that of all tokens; those of other linears, and the block's output, are as before."""
    tiny.save("qwen2_moe", tmp_path / "model")
    found = {}
    for which in (False, True):
        (tmp_path / str(which)).mkdir()
        (unit,) = units(tmp_path / "model", tmp_path / str(which), all_experts=which)
        grams = {linear.name.removeprefix("model.layers.1."): unit.gram(linear).clone() for linear in unit.linears}
        unit.finish()
        found[which] = grams, unit.stream.file(2).read_bytes()
    routed, every = found[False][0], found[True][0]
    assert found[False][1] == found[True][1]
    for name in routed:
        assert torch.equal(routed[name], every[name]) != ("mlp.experts" in name), name
    x = every["mlp.shared_expert.gate_proj"]
    assert all(torch.allclose(every[f"mlp.experts.{i}.gate_proj"], x, rtol=1e-4, atol=1e-5) for i in range(4))
    total = sum(float(every[f"mlp.experts.{i}.down_proj"].trace()) for i in range(4))
    assert total > sum(float(routed[f"mlp.experts.{i}.down_proj"].trace()) for i in range(4))


def test_all_experts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With few tokens some experts get none by default, which is a warning; with all_experts each has its statistics."""
    tiny.save("qwen3_moe", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps(described | {"num_experts_per_tok": 1}))
    command = ["quantize", str(tmp_path / "model"), "--scheme", "w4a16-g32", "--method", "gptq"]
    command += ["--data", "random", "--rows", "1", "--length", "2"]
    assert main([*command, "--out", str(tmp_path / "routed")]) == 0
    assert "warning: model.layers.1.mlp.experts." in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "all"), "--all-experts"]) == 0
    assert "no calibration token" not in capsys.readouterr().err
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["recipe"]["all_experts"] is True
    assert {row["method"] for row in report["linears"]} == {"gptq"}


def test_static_input_of_an_expert_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save("qwen3_moe", tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--scheme", "nvfp4", "--data", "random", "--rows", "1", "--length", "2"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "no calibration token reached this layer: its input has the scale of magnitude 1" in capsys.readouterr().err


def test_all_experts_refused(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="all_experts: no step looks at calibration data"):
        quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32", all_experts=True)
    with pytest.raises(ValueError, match="no linear of this model is one of several experts"):
        quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32", method="gptq", data=DATA, all_experts=True)
