"""Comparisons: every recipe is run once, a failing one does not end it, and the best of all are named."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowbit import comparison
from lowbit.cli import main
from lowbit.comparison import _key, compare, front, search_space
from lowbit.data import DataSpec
from lowbit.recipe import short_recipe
from lowbit.source import open_source

TEXT = "one two three four five six seven eight nine ten " * 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, dtype=torch.float32, seed=3)
    tiny.save_tokenizer(folder)
    (folder / "judge.txt").write_text(TEXT)
    (folder / "calibration.txt").write_text(TEXT[::-1])
    return folder


def test_front() -> None:
    """What another beats in one respect and equals in the other is not on it; ties keep one."""
    points = {
        "small": (1.0, 9.0),
        "worse": (2.0, 9.0),
        "good": (2.0, 3.0),
        "same": (2.0, 3.0),
        "large": (5.0, 1.0),
        "bad": (6.0, 2.0),
    }
    assert front(points) == ["small", "good", "large"]
    assert front({}) == []


def test_the_space_of_a_search() -> None:
    """Stated: three chains by the schemes that the engine loads, the quickest chain first."""
    data = DataSpec(source="random")
    names = list(search_space(data, "compressed-tensors", "vllm"))
    assert names[0].endswith(" rtn") and names[-1].endswith(" awq+gptq") and len(names) == 9
    assert len(search_space(data, "lowbit", "vllm")) == 15


def test_checkpoints_are_named_by_content(llama: Path, tmp_path: Path) -> None:
    """Another option, other calibration text or another model is another checkpoint; the same text elsewhere is not."""
    source = open_source(str(llama))
    recipe = short_recipe(
        scheme="w4a16-g32", method="gptq", data=DataSpec(source=str(llama / "calibration.txt"), rows=2, length=16)
    )
    (tmp_path / "copy.txt").write_text(TEXT[::-1])
    (tmp_path / "other.txt").write_text(TEXT)
    assert recipe.data is not None
    copy, other = (replace(recipe, data=replace(recipe.data, source=str(tmp_path / f"{n}.txt"))) for n in ("copy", "other"))
    option = short_recipe(scheme="w4a16-g32", method="gptq", options={"damping": 0.02}, data=recipe.data)
    assert _key(source, recipe) == _key(source, copy)
    tiny.save("llama", tmp_path / "second", dtype=torch.float32, seed=4)
    keys = [_key(source, each) for each in (recipe, other, option)] + [_key(open_source(str(tmp_path / "second")), recipe)]
    assert len(set(keys)) == 4


def test_nothing_to_compare(llama: Path, tmp_path: Path) -> None:
    """No recipes or no text: an error before any work."""
    recipe = {"a": short_recipe(scheme="w4a16-g32")}
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(str(llama), {}, tmp_path, texts=[str(llama / "judge.txt")])
    with pytest.raises(ValueError, match="nothing to judge by"):
        compare(str(llama), recipe, tmp_path, texts=[])


@pytest.mark.slow
def test_run_reuse_and_go_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run does nothing twice; a recipe that fails has a row that says why, and the others their figures."""
    runs: list[list[str]] = []
    original = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        runs.append(command)
        return original(command, **options)

    monkeypatch.setattr(comparison.subprocess, "run", counted)
    recipes = {"eight": short_recipe(scheme="w8a16-channel"), "two": short_recipe(scheme="w2a16-g32", format="lowbit")}
    given: dict[str, Any] = {"texts": [str(llama / "judge.txt")], "window": 32, "windows": 4}
    first = compare(str(llama), recipes, tmp_path / "out", **given)
    assert len(runs) == 2
    eight, two = first["rows"]
    assert eight["evaluations"][0]["kl"] < two["evaluations"][0]["kl"] and eight["bytes"] > two["bytes"]
    assert first["front"] == ["two", "eight"]
    assert first["float"]["evaluations"][0]["perplexity"] == pytest.approx(eight["evaluations"][0]["reference_perplexity"])
    assert first["float"]["load_seconds"] > 0 and first["float"]["decode_tokens_per_second"] > 0
    assert eight["samples"][0]["prompt"] and set(eight["outliers"]) == set(first["float"]["outliers"])
    assert two["histograms"] and all(sum(each["float"]) == sum(each["quantized"]) for each in two["histograms"])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert f"{two['evaluations'][0]['perplexity']:.4g}" in page

    recipes["broken"] = short_recipe(scheme="w4a16-g48")
    again = compare(str(llama), recipes, tmp_path / "out", **given)
    assert len(runs) == 3 and again["rows"][:2] == first["rows"]
    assert (
        "do not divide" in again["rows"][2]["failed"] and "do not divide" in (tmp_path / "out" / "comparison.html").read_text()
    )
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["front"] == ["two", "eight"]

    late = {"two": recipes["two"], "three": short_recipe(scheme="w3a16-g32", format="lowbit")}
    for seconds in (0, 0.5):  # not begun; begun, and stopped
        left = compare(str(llama), {"eight": recipes["eight"]}, tmp_path / "out", searched=late, limit_seconds=seconds, **given)
        assert left["left_out"] == ["three"] and [row["name"] for row in left["rows"]] == ["eight", "two"]


def test_a_comparison_waits_for_what_another_left_running(tmp_path: Path) -> None:
    """A recipe that outlives its comparison, which was killed, has the folder to itself until it is done."""
    said: list[str] = []

    def say(stage: str, done: int, total: int) -> None:
        said.append(stage)

    with comparison._alone(tmp_path, say) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    assert said == []
    assert left.stdin is not None
    threading.Timer(0.2, left.stdin.close).start()
    with comparison._alone(tmp_path, say):
        assert left.wait(5) == 1
    assert said == ["waiting for another process in the folder"]


@pytest.mark.slow
def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, a warning for what failed, and errors before work."""
    for name, scheme in (("good", "w8a16-channel"), ("bad", "w4a16-g48")):
        (tmp_path / f"{name}.toml").write_text(short_recipe(scheme=scheme).to_toml())
    text = str(llama / "judge.txt")
    common = ["compare", str(llama), "--out", str(tmp_path / "out"), "--text", text, "--window", "32", "--limit", "2"]
    assert main([*common, "--recipes", str(tmp_path / "good.toml"), str(tmp_path / "bad.toml")]) == 2
    printed = capsys.readouterr()
    assert "original" in printed.out and "good *" in printed.out and "bad failed" in printed.err
    assert main(common) == 2 and "say what to compare" in capsys.readouterr().err
    assert main([*common, "--search", "5"]) == 2 and "--search needs calibration data" in capsys.readouterr().err
