"""Times of a tiny model and its quantized checkpoint, side by side; the command prints and draws them."""

import json
from pathlib import Path

import pytest
import tiny
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
