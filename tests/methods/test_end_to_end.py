"""Training the scales of the whole model: what changes, that it helps and is written, and that a killed run loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from lowbit import run
from lowbit.data import DataSpec
from lowbit.recipe import short_recipe
from lowbit.run import quantize

WHAT: dict[str, Any] = {
    "scheme": "w2a16-g32-asym",
    "method": "rtn+end_to_end",
    "options": {"end_to_end.steps": 12, "end_to_end.batch": 4, "end_to_end.scale_rate": 0.02},
    "data": DataSpec(source="random", rows=16, length=16),
    "format": "lowbit",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, dtype=torch.float32, seed=3)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def note_of(report: dict[str, Any]) -> dict[str, Any]:
    return report["blocks"][0]["transforms"][-1]


def test_scales_change_and_codes_do_not(llama: Path, tmp_path: Path) -> None:
    """The divergence from the float model falls on rows kept out, and the checkpoint holds what was trained."""
    report = quantize(str(llama), tmp_path / "trained", **WHAT)
    quantize(str(llama), tmp_path / "plain", **(WHAT | {"method": "rtn", "options": {}}))
    note = note_of(report)
    assert note["step"] == "end_to_end" and note["kept"] and note["loss_after"] < note["loss_before"]
    trained, plain = tensors(tmp_path / "trained"), tensors(tmp_path / "plain")
    assert trained.keys() == plain.keys()
    changed = {name.rpartition(".")[2] for name, value in plain.items() if not torch.equal(value, trained[name])}
    assert changed == {"scale"}
    assert {row["method"] for row in report["linears"]} == {"rtn+end_to_end"}
    assert json.loads((tmp_path / "trained" / "report.json").read_text())["linears"] == report["linears"]


def test_codes_train_too(llama: Path, tmp_path: Path) -> None:
    """With a rate, weights move to other codes."""
    quantize(str(llama), tmp_path / "plain", **(WHAT | {"method": "rtn", "options": {}}))
    options = {"end_to_end.steps": 60, "end_to_end.scale_rate": 0.02, "end_to_end.rate": 0.018, "end_to_end.batch": 8}
    note = note_of(quantize(str(llama), tmp_path / "both", **(WHAT | {"options": options})))
    assert note["kept"] and note["loss_after"] < note["loss_before"]
    codes = [{k: v for k, v in tensors(tmp_path / name).items() if k.endswith("codes")} for name in ("plain", "both")]
    assert any(not torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


@pytest.mark.parametrize("where", ["training", "moving"])
def test_a_killed_run_goes_on(where: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it trains, or after it but before the gate: the same bytes in the end."""
    quantize(str(llama), tmp_path / "whole", **WHAT)

    def stop(*given: Any) -> None:
        if where == "moving" or (given and given[0] == "end_to_end" and given[1] == 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "moving":
            patch.setattr(run, "_gate", stop)
        quantize(str(llama), tmp_path / "out", progress=stop if where == "training" else None, **WHAT)
    quantize(str(llama), tmp_path / "out", **WHAT)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="corrections of lorc would no longer fit"):
        short_recipe(**(WHAT | {"method": "rtn+lorc+end_to_end", "options": {}}))
    with pytest.raises(ValueError, match="end_to_end is there twice"):
        short_recipe(**(WHAT | {"method": "rtn+end_to_end+end_to_end", "options": {}}))


def test_nothing_to_train(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale_rate and rate are both 0"):
        quantize(str(llama), tmp_path / "out", **(WHAT | {"options": {"end_to_end.scale_rate": 0.0}}))
