"""What a run's page shows: histograms of the right matrices, outliers where they were planted, in the files of a real run."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lowbit.data import DataSpec
from lowbit.report import read_report
from lowbit.run import quantize
from lowbit.source import open_source

DATA = DataSpec(source="random", rows=4, length=32)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose first norm makes one input channel of q, k and v fifty times as large."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, dtype=torch.float32, seed=3)
    name = "model.layers.0.input_layernorm.weight"
    file = folder / open_source(str(folder)).tensors[name].shard
    tensors = load_file(file)
    tensors[name][5] *= 50
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_outliers_before_and_after(planted: Path, tmp_path: Path) -> None:
    """Where a transform moves them away the report says so; without one there is no before and after."""
    quantize(str(planted), tmp_path / "smooth", scheme="w8a8", method="smooth+rtn", data=DATA)
    report = read_report(tmp_path / "smooth")
    assert report is not None
    before, after = (report["outliers"][key]["model.layers.0.self_attn.q_proj"] for key in ("before", "after"))
    assert before > 10 and after < before / 2
    assert report["outliers"]["before"].keys() == {row["name"] for row in report["linears"]}
    quantize(str(planted), tmp_path / "plain", scheme="w8a16-channel")
    plain = read_report(tmp_path / "plain")
    assert plain is not None and plain["outliers"] is None
    assert "Outliers of activations" in (tmp_path / "smooth" / "report.html").read_text(encoding="utf-8")


def test_histograms(planted: Path, tmp_path: Path) -> None:
    """One of each kind, of its worst linear, worst first; the counts are the checkpoint's, 3 bits have at most 8 points."""
    report = quantize(str(planted), tmp_path / "out", scheme="w3a16-g32", format="lowbit")
    found = report["histograms"]
    errors = {row["name"]: row["error"] for row in report["linears"]}
    for each in found:
        kind = each["linear"].rpartition(".")[2]
        assert errors[each["linear"]] == max(error for name, error in errors.items() if name.endswith(kind))
    shown = [errors[each["linear"]] for each in found]
    assert len(found) == 6 and shown == sorted(shown, reverse=True)
    tensor = f"{found[0]['linear']}.weight"
    w = open_source(str(planted)).read([tensor])[tensor]
    assert found[0]["float"] == torch.histc(w, 80, float(w.min()), float(w.max())).long().tolist()
    assert 2 <= len(found[0]["grid"]) <= 8
    assert found[0]["linear"] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
