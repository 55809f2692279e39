"""SmoothQuant+: the least of the curve wins, the curve is that of the whole model, and it is what runs afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lowbit.data import DataSpec
from lowbit.export import load
from lowbit.methods.smooth_search import Steps, smooth_search
from lowbit.recipe import Recipe, Rule, Step
from lowbit.run import quantize

DATA = DataSpec(source="random", rows=6, length=24)


def recipe(*steps: Step, scheme: str = "w8a8") -> Recipe:
    return Recipe(rules=(Rule(match="", scheme=scheme),), steps=(*steps, Step(method="rtn")), data=DATA, format="lowbit")


@pytest.mark.parametrize(
    ("losses", "best"), [({None: 3.0, 0.5: 1.0}, 0.5), ({None: 0.5}, None), ({0.25: 1.0, 0.75: 1.0}, 0.25), ({}, None)]
)
def test_the_least_wins(losses: dict[float | None, float], best: float | None) -> None:
    """Of equals the lowest, none before 0."""
    asked: list[tuple[Steps, int]] = []

    def trial(steps: Steps, rows: int) -> float:
        asked.append((steps, rows))
        alpha = steps[0][1]["alpha"] if len(steps) == 2 else None
        return losses.get(alpha, 2.0)

    steps, row = smooth_search(trial, step=0.25, rows=7, links="norm")
    assert steps == (() if best is None else (("smooth", {"alpha": best, "links": "norm"}),))
    assert row["alpha"] == best and [point["alpha"] for point in row["curve"]] == [None, 0, 0.25, 0.5, 0.75, 1]
    assert all(given[-1] == ("rtn", {}) and rows == 7 for given, rows in asked) and len(asked) == 6


def planted(folder: Path) -> Path:
    """A model with a channel of large inputs in every linear after a norm."""
    tiny.save("llama", folder, dtype=torch.float32, seed=4)
    from safetensors.torch import load_file, save_file

    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, value in tensors.items():
            if name.endswith("layernorm.weight"):
                value[3] *= 256
            elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                value[:, 3] /= 256
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def divergence(model: Path, out: Path, rows: Tensor) -> float:
    """KL(float || quantized) by transformers alone."""
    with torch.no_grad():
        a, b = (load(str(folder)).float()(rows).logits.log_softmax(-1) for folder in (out, model))
    return float((b.exp() * (b - a)).sum(-1).mean())


def test_run(tmp_path: Path) -> None:
    """The curve is the divergence that the model has afterwards, and a run with the alpha found is the same run."""
    model = planted(tmp_path / "model")
    options: dict[str, Any] = {"step": 0.25, "rows": 4}
    report = quantize(str(model), tmp_path / "out", recipe=recipe(Step(method="smooth_search", options=options)))
    (row,) = report["searches"]
    losses = {point["alpha"]: point["loss"] for point in row["curve"]}
    assert row["alpha"] is not None and losses[row["alpha"]] == min(losses.values()) < 0.2 * losses[None]
    assert all(block["transforms"][0]["alpha"] == [row["alpha"]] * 4 for block in report["blocks"])
    assert f"smooth_search: alpha {row['alpha']:g}" in (tmp_path / "out" / "report.md").read_text()
    again = quantize(str(model), tmp_path / "again", recipe=recipe(Step(method="smooth", options={"alpha": row["alpha"]})))
    assert [linear["error"] for linear in again["linears"]] == [linear["error"] for linear in report["linears"]]
    rows = torch.stack([torch.randint(0, tiny.VOCAB, (24,), generator=torch.Generator().manual_seed(9)) for _ in range(4)])
    quantize(str(model), tmp_path / "rtn", recipe=recipe())
    assert divergence(model, tmp_path / "out", rows) < 0.3 * divergence(model, tmp_path / "rtn", rows)


def test_the_loss_is_that_of_the_model(tmp_path: Path) -> None:
    """On the calibration rows themselves, which a run with source "random" draws from its seed."""
    from lowbit.data import calibration_tokens

    model = planted(tmp_path / "model")
    options: dict[str, Any] = {"step": 1.0, "rows": 6}
    report = quantize(str(model), tmp_path / "out", recipe=recipe(Step(method="smooth_search", options=options)))
    rows = calibration_tokens(DATA, None, vocab_size=tiny.VOCAB).tokens
    for alpha in (None, 0.0, 1.0):
        steps = () if alpha is None else (Step(method="smooth", options={"alpha": alpha}),)
        quantize(str(model), tmp_path / f"run-{alpha}", recipe=recipe(*steps))
        loss = next(point["loss"] for point in report["searches"][0]["curve"] if point["alpha"] == alpha)
        assert loss == pytest.approx(divergence(model, tmp_path / f"run-{alpha}", rows), rel=0.02)


def test_killed_search_goes_on(tmp_path: Path) -> None:
    """Losses that are known are not computed again."""
    model = planted(tmp_path / "model")
    given = recipe(Step(method="smooth_search", options={"step": 0.5, "rows": 2}))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "smooth_search" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "out", recipe=given, progress=stop)
    work = tmp_path / "out.partial" / ".work"
    known = sorted(work.glob("trial-*.json"))
    assert len(known) == 2
    for path in known:  # what is found there is believed
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"loss": record["loss"] + 100}))
    report = quantize(str(model), tmp_path / "out", recipe=given)
    assert sum(point["loss"] > 100 for point in report["searches"][0]["curve"]) == 2
    assert not (tmp_path / "out" / ".work").exists()


def test_encoders_have_no_logits(tmp_path: Path) -> None:
    """The hidden states are compared instead."""
    tiny.save("bert", tmp_path / "bert", dtype=torch.float32, seed=4)
    given = recipe(Step(method="smooth_search", options={"step": 1.0, "rows": 2, "links": "linear"}), scheme="w4a8-g32")
    report = quantize(str(tmp_path / "bert"), tmp_path / "out", recipe=given)
    assert all(0 < point["loss"] < 1 for point in report["searches"][0]["curve"])
