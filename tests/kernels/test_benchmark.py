"""The benchmark's checks and table, on small shapes without a GPU, so that a GPU's time is not lost to a slip."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from lowbit import kernel_bench  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", FOLDER / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_checks_find_what_is_wrong(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreted kernels are right; a product that is off by a little is not."""
    monkeypatch.setattr(benchmark, "CHECKS", ["w4a16-g128", "w8a8", "bcq2"])
    result = benchmark.measure("check")
    assert len(result["rows"]) == 3 + len(benchmark.PRODUCERS) + 7 and all(row["right"] for row in result["rows"])
    assert "wrong: none" in benchmark.markdown({"check": result})
    exact = benchmark.linear
    monkeypatch.setattr(benchmark, "linear", lambda *given: exact(*given) * 1.01)
    result = benchmark.measure("check")
    assert [row["right"] for row in result["rows"][:3]] == [False] * 3
    assert "wrong: w4a16-g128" in benchmark.markdown({"check": result})


def test_bars_and_table(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part goes through with times that stand in, and the bars are those asked for."""
    monkeypatch.setattr(kernel_bench, "DEVICE", "cpu")
    for module in (benchmark, kernel_bench):
        monkeypatch.setattr(module, "time_of", lambda launches, replays=15: [launch() for launch in launches] and 10.0)
        monkeypatch.setattr(module, "copies_of", lambda nbytes: 2)
    monkeypatch.setattr(benchmark, "ceilings", lambda: {"bytes": 3e12, "copy": 3e12, "operations": 7e14})
    monkeypatch.setattr(benchmark, "SHAPES", [(256, 128)])
    monkeypatch.setattr(benchmark, "SWEEP", {64: [benchmark.Config(16, 64, 1)]})
    parts = {
        "floats": (["w4a16-g128"], [1], [benchmark.cublas]),
        "codes": (["w8a8"], [16], [benchmark.cublas, benchmark.int_mm]),
    }
    monkeypatch.setattr(benchmark, "PARTS", parts)
    results = {part: benchmark.measure(part, sweep=True) for part in parts}
    assert [row["best"] for result in results.values() for row in result["rows"]] == [10.0, 10.0]
    text = benchmark.markdown(results)
    assert text.count("| met |") == 2 and "### codes" in text
    row = {"scheme": "w8a8", "m": 2048, "lowbit": 10.0, "cublas": 14.0, "floor": 5.0}
    assert benchmark.met("codes", row) is False and benchmark.met("codes", row | {"cublas": 15.0})
    row = {"scheme": "w4a16-g128", "m": 16, "lowbit": 14.0, "cublas": 40.0, "floor": 10.0}
    assert benchmark.met("floats", row) is False and benchmark.met("floats", row | {"lowbit": 13.0})
    assert benchmark.met("rows", {"scheme": "gelu", "m": 1, "lowbit": 12.0, "floor": 10.0})
