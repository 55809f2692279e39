"""Checkpoints that others quantized: their weights as transformers and compressed-tensors dequantize them, bit for bit, and
what becomes of them in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lowbit import load, quantize
from lowbit.cli import main
from lowbit.data import DataSpec
from lowbit.dequantize import decode_mxfp4, decode_scaled, without_quantization
from lowbit.export import QuantizedSource, open_checkpoint
from lowbit.inspection import summary_of
from lowbit.source import Source, open_source
from tests import tiny

DATA = DataSpec(source="random", rows=4, length=32)
E4M3 = torch.float8_e4m3fn
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def block_fp8(w: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes of w [out, in] and scales [ceil(out / rows), ceil(in / columns)] float32, as DeepSeek makes them."""
    scale = torch.empty(-(-w.shape[0] // rows), -(-w.shape[1] // columns))
    codes = torch.empty(w.shape, dtype=E4M3)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = w[part].abs().max() / 448
            codes[part] = (w[part] / scale[i, j]).to(E4M3)
    return codes, scale


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, **config: Any) -> None:
    """Save tensors as the only shard of a folder that has a config.json."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | config
    if quantization is not None:
        described["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(described))


def fp8_llama(folder: Path, kind: str = "block", name: str = "llama_untied") -> None:
    """A tiny model whose linears are FP8."""
    tiny.save(name, folder, dtype=torch.bfloat16)
    source = Source(folder)
    tensors = source.read(list(source.tensors))
    for key in list(tensors):
        if not key.removesuffix(".weight").endswith(LINEARS):
            continue
        w = tensors[key].float()
        if kind == "block":
            tensors[key], tensors[f"{key}_scale_inv"] = block_fp8(w, 32, 32)
        elif kind == "tensor":
            tensors[key], scale = block_fp8(w, *w.shape)
            tensors[f"{key}_scale_inv"] = scale.reshape(())
            tensors[f"{key.removesuffix('weight')}activation_scale"] = torch.ones(())
        else:
            tensors[key], tensors[f"{key}_scale"] = block_fp8(w, 1, w.shape[1])
    quantization = {"block": FP8, "tensor": FP8 | {"weight_block_size": None}, "channel": {"quant_method": "fbgemm_fp8"}}
    rewrite(folder, tensors, quantization[kind])


# ------------------------------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_blocks_as_in_transformers(scale_dtype: torch.dtype) -> None:
    codes = torch.randn(256, 384).to(E4M3)
    exponents = torch.randint(100, 140, (2, 3))
    scale = exponents.to(torch.uint8) if scale_dtype == torch.uint8 else torch.exp2(exponents - 127.0).to(scale_dtype)
    if scale_dtype in (torch.float32, torch.bfloat16):
        scale = (scale.float() * torch.rand(2, 3)).to(scale_dtype)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(decode_scaled(codes, scale, (128, 128)).to(torch.bfloat16), expected)


@pytest.mark.parametrize(("rows", "columns"), [(576, 128), (128, 200), (130, 257), (192, 64), (100, 1)])
def test_ragged_blocks(rows: int, columns: int) -> None:
    """The last block of a row or column is smaller: that is, the scale of (i, j) is that of (i // 128, j // 128)."""
    codes = torch.randn(rows, columns).to(E4M3)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    expected = codes.float() * scale[torch.arange(rows)[:, None] // 128, torch.arange(columns)[None] // 128]
    assert torch.equal(decode_scaled(codes, scale, (128, 128)), expected)


def test_mxfp4_as_in_transformers() -> None:
    """All codes and all scales, so that a swapped nibble or a bias of 128 shows."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(3, 8, 2, 1).view(3, 8, 32, 16)
    scales = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 8, 32)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(decode_mxfp4(blocks, scales).to(torch.bfloat16), expected)


# --------------------------------------------------------------------------------------------------------------- sources
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("block", "fp8, blocks of 32 x 32"),
        ("tensor", "fp8, a scale for each tensor"),
        ("channel", "fbgemm_fp8, a scale for each channel"),
    ],
)
def test_fp8_source(tmp_path: Path, kind: str, words: str) -> None:
    """The tensors are those of the float model in its dtype, and no other; the weights are code times scale."""
    fp8_llama(tmp_path, kind)
    tiny.save("llama_untied", tmp_path / "float", dtype=torch.bfloat16)
    source, original = open_source(str(tmp_path)), open_source(str(tmp_path / "float"))
    assert source.quantization == words
    assert {name: (info.shape, info.dtype) for name, info in source.tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in original.tensors.items()
    }
    assert source.dtype() == torch.bfloat16
    assert source.stored_bytes() < source.nbytes() == original.nbytes()
    name = "model.layers.1.mlp.down_proj.weight"
    scale = f"{name}_scale" if kind == "channel" else f"{name}_scale_inv"
    stored = source.read_stored([name, scale])
    value = source.read([name, "model.norm.weight"])[name]
    if kind != "tensor":
        assert torch.equal(value, Fp8Dequantize(None)._dequantize_one(stored[name], stored[scale], torch.bfloat16))
    else:
        assert torch.equal(value, (stored[name].float() * stored[scale]).to(torch.bfloat16))
    w = original.read([name])[name].float()
    assert float((value.float() - w).norm() / w.norm()) < 0.05


def test_fp8_model_as_in_transformers(tmp_path: Path) -> None:
    """All of the model, which transformers dequantizes on machines without FP8."""
    fp8_llama(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(str(tmp_path))
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in ours.named_parameters())


def test_stacked_fp8_experts(tmp_path: Path) -> None:
    """Scales of 3-D weights: blocks of each expert, ragged, or one an expert."""
    tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    codes = torch.randn(4, 40, 64).to(E4M3)
    blocks, single = torch.rand(4, 2, 2), torch.rand(4, 1, 1)
    rewrite(tmp_path, {"a": codes, "a_scale_inv": blocks, "b": codes.clone(), "b_scale_inv": single}, FP8)
    found = open_source(str(tmp_path)).read(["a", "b"])
    each = torch.stack([decode_scaled(codes[i], blocks[i], (32, 32)) for i in range(4)])
    assert torch.equal(found["a"], each.to(torch.bfloat16))
    assert torch.equal(found["b"], (codes.float() * single).to(torch.bfloat16))


def gpt_oss(folder: Path) -> None:
    """A tiny gpt-oss as it is published: experts in MXFP4, the rest in bfloat16."""
    config = transformers.AutoConfig.for_model(
        "gpt_oss", **tiny._GROUPED, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    source = Source(folder)
    tensors = source.read(list(source.tensors))
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, out = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(256, (experts, out, inner // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 123, (experts, out, inner // 32), dtype=torch.uint8)
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def test_gpt_oss_as_in_transformers(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    assert open_source(str(tmp_path)).quantization == "mxfp4"
    expected, ours = dict(theirs.named_parameters()), dict(load(str(tmp_path)).named_parameters())
    assert set(ours) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "fp8", "nvfp4", "mxfp4a16"])
def test_compressed_tensors_source(tmp_path: Path, scheme: str) -> None:
    """What lowbit wrote, as a source of the next run: the weights of the library's decompression, in the model's dtype."""
    tiny.save("llama_untied", tmp_path / "model", dtype=torch.bfloat16)
    quantize(str(tmp_path / "model"), tmp_path / "first", scheme=scheme, data=DATA)
    source, known = open_source(str(tmp_path / "first")), QuantizedSource(tmp_path / "first")
    assert source.quantization is not None and source.quantization.startswith("compressed-tensors, ")
    assert set(source.tensors) == set(open_source(str(tmp_path / "model")).tensors)
    for tensor in source.tensors:
        assert torch.equal(source.read([tensor])[tensor], known.read([tensor])[tensor]), tensor


# ------------------------------------------------------------------------------------------------------------------ runs
CASES: dict[str, Callable[[Path], None]] = {
    "fp8": fp8_llama,
    "fp8-tensor": lambda folder: fp8_llama(folder, "tensor"),
    "fp8-experts": lambda folder: fp8_llama(folder, name="qwen3_moe"),
}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("case", CASES)
def test_run(tmp_path: Path, case: str, method: str) -> None:
    """The same checkpoint as from the dequantized weights stored as such; the report says what the source was."""
    CASES[case](tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "plain", source.read(list(source.tensors)), None)
    reports = [
        quantize(str(tmp_path / name), tmp_path / f"{name}-out", scheme="w4a16-g32", method=method, data=DATA)
        for name in ("model", "plain")
    ]
    assert reports[0]["model"]["source_quantization"] == source.quantization
    assert reports[1]["model"]["source_quantization"] is None
    assert reports[0]["sizes"]["source_bytes"] == source.stored_bytes()
    text = [(tmp_path / f"{name}-out" / "report.md").read_text() for name in ("model", "plain")]
    assert ["quantized already" in each for each in text] == [True, False]
    a, b = (Source(tmp_path / f"{name}-out") for name in ("model", "plain"))
    assert a.config == b.config and a.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert set(a.tensors) == set(b.tensors)
    values = a.read(list(a.tensors)), b.read(list(b.tensors))
    assert all(torch.equal(values[0][name].view(torch.uint8), values[1][name].view(torch.uint8)) for name in a.tensors)


def test_run_of_a_compressed_source(tmp_path: Path) -> None:
    """From W8A8 with a calibrated cache to W4A16: what belonged to the first format is gone."""
    tiny.save("llama_untied", tmp_path / "model", dtype=torch.bfloat16)
    quantize(str(tmp_path / "model"), tmp_path / "first", scheme="w8a8-astatic", kv_cache="fp8", data=DATA)
    quantize(str(tmp_path / "first"), tmp_path / "out", scheme="w4a16-g32", method="gptq", data=DATA)
    stored = Source(tmp_path / "out").tensors
    assert not [name for name in stored if name.endswith(("input_scale", "k_scale", "v_scale"))]
    assert "kv_cache_scheme" not in Source(tmp_path / "out").config["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tokens = tiny.tokens(2, 16)
    assert torch.equal(model(tokens).logits, load(str(tmp_path / "out"))(tokens).logits)


def test_gpt_oss_run(tmp_path: Path) -> None:
    gpt_oss(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--scheme", "w4a16-g32"]
    with pytest.warns(UserWarning, match=r"The source was quantized already \(mxfp4\): what was lost before is lost"):
        assert main([*command, "--format", "lowbit"]) == 0
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert type(open_checkpoint(str(tmp_path / "out"))) is QuantizedSource


def test_evaluation_of_a_quantized_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8_llama(tmp_path)
    tiny.save_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(tiny.TEXT) * 3)
    assert main(["eval", str(tmp_path), "--data", str(tmp_path / "text.txt"), "--window", "32"]) == 0
    assert "perplexity" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("quantization", "tensors", "message"),
    [
        (None, {"a": torch.zeros(8, 8, dtype=E4M3)}, "a is stored as F8_E4M3, but config.json has no quant"),
        (FP8, {"a": torch.zeros(8, 8, dtype=E4M3)}, "a is stored as F8_E4M3, but has no scale"),
        (FP8, {"a": torch.zeros(8, 8)}, "says it is quantized .fp8., but no tensor is"),
        (FP8, {"a": torch.zeros(64, 64, dtype=E4M3), "a_scale_inv": torch.ones(3, 2)}, "does not fit a of shape"),
        (FP8, {"a": torch.zeros(64, 64, dtype=torch.int8), "a_scale_inv": torch.ones(2, 2)}, "a is stored as I8 with scales"),
        ({"quant_method": "mxfp4"}, {"a_blocks": torch.zeros(2, 3, 4, 8, dtype=torch.uint8)}, "a_blocks of shape"),
        ({"quant_method": "gptq", "bits": 4}, {"a.qweight": torch.zeros(8, 8, dtype=torch.int32)}, "already .gptq., which"),
        ({"quant_method": "awq", "bits": 4}, {"a.qweight": torch.zeros(8, 8, dtype=torch.int32)}, "already .awq., which"),
        ({"bits": 4}, {"a": torch.zeros(8, 8)}, "already .unknown., which lowbit cannot dequantize"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, quantization: dict[str, Any] | None, tensors: dict[str, Tensor], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    rewrite(tmp_path, tensors, quantization)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_adapter_beside_a_compressed_source(tmp_path: Path) -> None:
    """Without its corrections it would be another model."""
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32", method="rtn+lorc")
    with pytest.raises(ValueError, match="low-rank adapter beside it"):
        open_source(str(tmp_path / "out"))
    assert load(str(tmp_path / "out")) is not None


def test_quantization_of_the_text_part(tmp_path: Path) -> None:
    """Models with several parts may say it there, and the output says nothing of it."""
    fp8_llama(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "dtype": "float16"}
    del config["dtype"]
    path.write_text(json.dumps(config))
    source = open_source(str(tmp_path))
    assert source.quantization == "fp8, blocks of 32 x 32"
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F16"
    assert without_quantization(config)["text_config"] == {"dtype": "float16"}


def test_inspection(tmp_path: Path) -> None:
    fp8_llama(tmp_path)
    assert summary_of(str(tmp_path))["format"] == "fp8, blocks of 32 x 32"


# -------------------------------------------------------------------------------------------------------------- resuming
class Stopped(BaseException):
    """Thrown in the middle of a run."""


def test_what_is_stored_is_compared(tmp_path: Path) -> None:
    """An unfinished run goes on from the stored tensors that it has read, and another scale is another model."""
    fp8_llama(tmp_path / "model")
    given: dict[str, Any] = {"scheme": "w4a16-g32", "method": "gptq", "data": DATA}
    quantize(str(tmp_path / "model"), tmp_path / "whole", **given)

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing", 1):
            raise Stopped

    with pytest.raises(Stopped):
        quantize(str(tmp_path / "model"), tmp_path / "out", progress=progress, **given)
    shard = tmp_path / "model" / "model.safetensors"
    good, source = shard.read_bytes(), Source(tmp_path / "model")
    tensors = source.read(list(source.tensors))
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name].view(-1)[0] *= 2
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"unfinished run of another model: .* {name} changed"):
        quantize(str(tmp_path / "model"), tmp_path / "out", **given)
    shard.write_bytes(good)
    quantize(str(tmp_path / "model"), tmp_path / "out", **given)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_tensor_that_changes_while_it_is_used(tmp_path: Path) -> None:
    """Parts of a weight are looked at whenever it is read."""
    fp8_llama(tmp_path)
    source = open_source(str(tmp_path))
    source.track()
    (name,) = (name for name in source.tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    source.read([name])
    assert set(source.contents()["tensors"]) == set(source.stored)
    tensors = Source(tmp_path).read(list(source.stored))
    tensors[f"{name}_scale_inv"].view(-1)[0] *= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name}_scale_inv is not what it was when it was read before"):
        source.read([name])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"transform_config": {"config_groups": {"u": {}}}}, "has transforms or sparsity"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "has transforms or sparsity"),
        ({"config_groups": 3}, "compressed-tensors does not read quantization_config"),
        ({"ignore": ["re:(([a-z_.0-9])+)+\\W$"] * 50}, "takes too long to match"),
    ],
)
def test_descriptions_of_compressed_sources(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    """They are read as those of checkpoints that lowbit computes with, and no less carefully."""
    tiny.save("llama_untied", tmp_path / "model", dtype=torch.bfloat16)
    quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w8a8-astatic", data=DATA)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"] = {"format": "dense"}
    path.write_text(json.dumps(config))
    assert "int-quantized" in str(open_source(str(tmp_path / "out")).quantization)
    config["quantization_config"] |= edit
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "out"))


@pytest.mark.parametrize("size", ["x", [32], [0, 32], [32.0, 32]])
def test_block_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    fp8_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight_block_size in config\.json is .*; allowed are two whole numbers above 0"):
        open_source(str(tmp_path))
