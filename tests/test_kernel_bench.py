"""The kernels' times: what is timed beside what, as a table and a picture. Times themselves are measured on a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import kernel_bench
from lowbit.cli import main


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch runs once and takes as many microseconds as there are launches."""

    def time_of(launches: list[Callable[[], Any]], replays: int = 15) -> float:
        for launch in launches:
            launch()
        return float(len(launches))

    monkeypatch.setattr(kernel_bench, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_bench, "time_of", time_of)
    monkeypatch.setattr(kernel_bench, "copies_of", lambda nbytes: 3)
    monkeypatch.setattr(kernel_bench, "ceilings", lambda: {"bytes": 1e9, "copy": 1e9, "operations": 1e12})
    monkeypatch.setattr(kernel_bench, "SHAPES", {"small": ((256, 128), (128, 256))})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a CPU")


@pytest.mark.usefixtures("on_a_cpu")
def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each shape, scheme and number of rows, ratios to the peers that are there; the same as JSON."""
    command = ["bench", "kernels", "--shapes", "small", "--schemes", "w4a16-g128", "w8a8", "--batch", "1", "16"]
    assert main([*command, "--plot", str(tmp_path / "roofline.png")]) == 0
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines()]
    assert "x cublas" in table and "x gemlite" not in table and "0.00 TB/s read, 1 T float16" in table
    assert ["small", "256", "x", "128", "w4a16-g128", "1", "3.0"] in [line[:7] for line in lines]
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 2 * 2 * 2 and all(row["lowbit"] == row["cublas"] == 3 for row in result["rows"])
    first = result["rows"][0]
    matrix = 256 * 128 // 2 + 2 * 2 * 128 + 4 * 128  # codes, scales of two groups, and a factor, for each output
    assert first["bytes"] == matrix + 2 * (128 + 256) and first["floor"] == pytest.approx(first["bytes"] / 1e9 * 1e6)


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is timed."""
    for options, message in (
        (["--shapes", "llama-8b"], "no shapes of 'llama-8b'; there are those of llama-7b"),
        (["--schemes", "nf4"], "nf4: values of nf4 are looked up"),
        ([], "kernels are timed on a GPU"),
    ):
        if options or not torch.cuda.is_available():
            assert main(["bench", "kernels", *options]) == 2
            assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """No product is faster than the hardware, and cuBLAS is timed too."""
    result = kernel_bench.bench_kernels(models=["bert-base"], rows=[16])
    assert len(result["rows"]) == 8 and all(row["cublas"] > 0 for row in result["rows"])
    assert all(row["floor"] < row["lowbit"] for row in result["rows"])
