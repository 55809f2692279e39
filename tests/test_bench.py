"""Times of a tiny model and its quantized checkpoint, side by side; the command prints and draws them."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_runtime import written

from lowbit.bench import bench, read_bytes, weight_bytes
from lowbit.cli import main
from lowbit.export import load


def test_original_and_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row for each model and batch, ratios to the first, fewer bytes; the same as JSON and as a picture."""
    models = [str(tmp_path / "model"), written("llama_untied", tmp_path, "w4a16-g32")]
    options = ["--batch", "1", "2", "--prompt", "8", "--tokens", "3"]
    assert main(["bench", *models, *options, "--json", "--plot", str(tmp_path / "roofline.png")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["rows"]) for row in result["rows"]] == [(m, b) for m in models for b in (1, 2)]
    first, _, third, _ = result["rows"]
    assert first["step_speedup"] == first["prefill_speedup"] == 1
    assert third["step_speedup"] == pytest.approx(first["step_seconds"] / third["step_seconds"])
    assert third["weight_bytes"] < first["weight_bytes"] and not first["graph"]
    assert third["of_roofline"] == pytest.approx(third["read_bytes"] / result["bandwidth"] / third["step_seconds"])
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    float_model = load(models[0])
    assert weight_bytes(float_model) - read_bytes(float_model) == tiny.VOCAB * tiny.HIDDEN * 2


def test_refused(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match="does not generate"):
        bench([str(tmp_path / "bert")], prompt=8)
    with pytest.raises(ValueError, match="no peer 'awq'; there are torchao-int4"):
        bench([str(tmp_path / "bert")], peers=["awq"])
    with pytest.raises(ValueError, match="is one for GPUs"):
        bench([str(tmp_path / "bert")], peers=["torchao-int4"])
    out = written("llama", tmp_path, "w4a16-g32")
    with pytest.raises(ValueError, match="quantized already"):
        bench([out], peers=["torchao-int8"])


def test_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model again, quantized by torchao, is compared with the first; its bytes are those it really has."""
    pytest.importorskip("torchao")
    tiny.save("llama_untied", tmp_path / "model", dtype=torch.bfloat16)
    first, second = bench([str(tmp_path / "model")], batches=[1], prompt=8, tokens=3, peers=["torchao-int8"])["rows"]
    assert second["model"] == "torchao-int8" and second["weight_bytes"] < 0.8 * first["weight_bytes"]
    assert second["prefill_speedup"] == pytest.approx(first["prefill_seconds"] / second["prefill_seconds"])


@pytest.mark.parametrize("part", ["decode", "encoder"])
def test_the_script_of_the_end_to_end_section(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes on a CPU: both models are timed, and the section has a line for every bar that could be measured."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import end_to_end

    page = tmp_path / "page.md"
    end_to_end.main(["--part", part, "--tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--markdown", str(page)])
    result = json.loads((tmp_path / "out" / "end_to_end.json").read_text(encoding="utf-8"))
    assert all(row["fp16"]["eager"] > 0 and row["lowbit"]["eager"] > 0 for row in result[part]["rows"])
    assert ("over fp16 eager" in page.read_text(encoding="utf-8")) and len(result[part]["rows"]) == 2
