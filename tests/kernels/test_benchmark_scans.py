"""The benchmark of scans: its checks and table, on small shapes without a GPU, so that a GPU's time is not lost to a slip."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/scans.py, on the specification."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("scans")


def test_checks_find_what_is_wrong(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreted kernels are right; steps that are off by a little are not."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = benchmark.measure("check")
    assert len(result["rows"]) == 5 and all(row["right"] for row in result["rows"])
    assert "wrong: none" in benchmark.markdown({"check": result})
    monkeypatch.delenv("TRITON_INTERPRET")
    exact = benchmark.stepped
    monkeypatch.setattr(benchmark, "stepped", lambda *given: exact(*given) * 1.01)
    result = benchmark.measure("check")
    assert [row["right"] for row in result["rows"]] == [True, True, True, False, False]
    assert "wrong: step at an end" in benchmark.markdown({"check": result})


def test_steps_and_table(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny stack and transformers' own decode with times that stand in, and the bar is the one asked for."""
    monkeypatch.setattr(benchmark, "time_of", lambda launches, replays=15: [launches[0]() for _ in range(2)] and 10.0)
    monkeypatch.setattr(benchmark, "seconds_of", lambda step, device: step() and 30e-6)
    monkeypatch.setattr(benchmark, "STACK", TINY)
    monkeypatch.setattr(benchmark, "BATCHES", (2,))
    monkeypatch.setattr(benchmark, "SCHEMES", ("w4a16-g32", "w4a8-channel"))
    monkeypatch.setattr(benchmark.torch.nn.Module, "compile", lambda module, **how: None)
    result = benchmark.measure("decode")
    ways = {"eager": 30.0, "eager in a graph": 10.0, "compiled": 30.0, "compiled in a graph": 10.0}
    assert [row["peers"] for row in result["rows"]] == [ways] * 2
    assert benchmark.markdown({"decode": result}).count("| missed |") == 2
    row = result["rows"][0]
    assert not benchmark.met(row | {"lowbit": 5.1}) and benchmark.met(row | {"lowbit": 5.0})


def test_loaded_models(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is made, loaded with int8 scans, and as near to the simulation as asked for; another is not."""
    monkeypatch.setattr(benchmark, "seconds_of", lambda steps, device: 10e-6 * benchmark.CHUNK)
    monkeypatch.setattr(benchmark, "LOADED", {**TINY, "hidden_size": 128, "num_hidden_layers": 1, "num_heads": 8})
    monkeypatch.setattr(benchmark, "RECIPES", ("quamba2-w4a8",))
    result = benchmark.measure("loaded")
    (row,) = result["rows"]
    assert benchmark.same(row) and row["lowbit"] == row["float"] == pytest.approx(10)
    assert not benchmark.same(row | {"steps": 1.0}) and not benchmark.same(row | {"runs": ["packed", "simulated"]})
    assert "| quamba2-w4a8 |" in benchmark.markdown({"loaded": result})
