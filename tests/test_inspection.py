"""Checkpoints of other tools: shapes, bits and sizes from their headers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from lowbit.cli import main
from lowbit.inspection import scheme_name, summary_of
from lowbit.qtensor import Scheme, parse_scheme
from lowbit.run import quantize


def foreign(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """A folder with one quantized linear and a float table."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file({"model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.float16)} | tensors, folder / "model.safetensors")
    return str(folder)


def gptq_tensors(out: int, inner: int, bits: int, group: int) -> dict[str, torch.Tensor]:
    groups = inner // group
    return {
        "l.qweight": torch.zeros(inner * bits // 32, out, dtype=torch.int32),
        "l.qzeros": torch.zeros(groups, out * bits // 32, dtype=torch.int32),
        "l.scales": torch.zeros(groups, out, dtype=torch.float16),
        "l.g_idx": torch.zeros(inner, dtype=torch.int32),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(tmp_path: Path, bits: int) -> None:
    """Packed along the inputs; scales, zero points and the order of columns count."""
    tensors = gptq_tensors(96, 128, bits, 64)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 64, "sym": True, "desc_act": False}
    found = summary_of(foreign(tmp_path / "m", config, tensors))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    row = found["linears"]["l"]
    assert found["format"] == "gptq" and row["scheme"] == f"w{bits}a16-g64" and row["shape"] == [96, 128]
    assert row["bits"] == pytest.approx(8 * stored / (96 * 128), abs=1e-3)
    assert found["bytes"] == stored + 160


def test_awq(tmp_path: Path) -> None:
    """Packed along the outputs."""
    tensors = {
        "l.qweight": torch.zeros(128, 96 * 4 // 32, dtype=torch.int32),
        "l.qzeros": torch.zeros(1, 96 * 4 // 32, dtype=torch.int32),
        "l.scales": torch.zeros(1, 96, dtype=torch.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    found = summary_of(foreign(tmp_path / "m", config, tensors))
    assert found["format"] == "awq"
    assert found["linears"]["l"] == {"scheme": "w4a16-g128-asym", "shape": [96, 128], "bits": pytest.approx(4.156, abs=1e-3)}


def test_gguf(tmp_path: Path) -> None:
    """Blocks of several types, as the gguf package wrote them."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    w = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
    for name, kind in (("blk.0.attn_q", "Q8_0"), ("blk.0.ffn_up", "Q4_0")):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = summary_of(str(path))
    assert found["format"] == "gguf" and found["model_type"] == "llama"
    assert found["linears"] == {
        "blk.0.attn_q": {"scheme": "Q8_0", "shape": [16, 64], "bits": 8.5},
        "blk.0.ffn_up": {"scheme": "Q4_0", "shape": [16, 64], "bits": 4.5},
    }
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(ValueError, match="is not a GGUF file"):
        summary_of(str(tmp_path / "bad.gguf"))


def test_own_and_float(tmp_path: Path) -> None:
    """lowbit's two formats and the float model they come from."""
    tiny.save("llama", tmp_path / "llama")
    assert summary_of(str(tmp_path / "llama"))["format"] == "float"
    for form in ("lowbit", "compressed-tensors"):
        report = quantize(str(tmp_path / "llama"), tmp_path / form, scheme="w4a16-g32", format=form)
        found = summary_of(str(tmp_path / form))
        assert found["format"] == form and found["gate"] == report["gate"]
        assert {row["scheme"] for row in found["linears"].values()} == {"w4a16-g32"}
        assert {name: row["bits"] for name, row in found["linears"].items()} == {
            row["name"]: pytest.approx(row["bits_per_weight"], abs=0.1) for row in report["linears"]
        }


NAMES = ("w4a16-g64-asym", "w8a8-channel", "w8a8-channel-astatic", "w4a8-g128")
NAMES += ("fp8", "fp8a16", "fp8-block", "fp8-astatic", "mxfp4a16", "mxfp8", "nvfp4")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_schemes(name: str) -> None:
    """A scheme read from a description that has no name for it gets the one that recipes use."""
    assert scheme_name(replace(parse_scheme(name), name="int4/float")) == name


def test_a_scheme_without_a_name() -> None:
    """Keeps its own."""
    odd = parse_scheme("w4a16-g64")
    odd = Scheme(name="int4/float", weight=replace(odd.weight, group=96, rows=2), input=None)
    assert scheme_name(odd) == "int4/float"


def test_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another method, a description without bits, one without its tensors: an error that says so."""
    with pytest.raises(ValueError, match="quantized already .exotic., which lowbit cannot dequantize"):
        summary_of(foreign(tmp_path / "a", {"quant_method": "exotic"}, {}))
    with pytest.raises(ValueError, match="names no bits"):
        summary_of(foreign(tmp_path / "b", {"quant_method": "gptq"}, {}))
    folder = foreign(tmp_path / "c", {"quant_method": "gptq", "bits": 4, "group_size": 128}, {})
    with pytest.raises(ValueError, match="holds no qweight"):
        summary_of(folder)
    assert main(["inspect", folder]) == 2 and "holds no qweight" in capsys.readouterr().err


def test_whoever_reads_may_have_seen_enough(tmp_path: Path) -> None:
    """As in `lowbit inspect OUT | head`: no traceback."""
    tensors = {"l.qweight": torch.zeros(16, 96, dtype=torch.int32)}
    folder = foreign(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 128}, tensors)
    command = [sys.executable, "-m", "lowbit", "inspect", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
