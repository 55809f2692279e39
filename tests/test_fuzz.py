"""Damaged input, and runs that are killed: a share of what benchmarks/fuzz.py and benchmarks/kills.py do at length.

They run as scripts of their own, since children are forked from a process that has computed nothing yet.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import fuzz
import kills
import pytest

from lowbit.recipe import METHODS

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark into a folder; what it found, as JSON."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(folder), *arguments]
    done = subprocess.run(
        [*command, "--markdown", str(folder / "RESULTS.md")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    file = folder / f"{name}.json"
    assert file.exists(), done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.slow
def test_damaged_input(tmp_path: Path) -> None:
    """Everything is refused in a line that names what is wrong, or gives the right result."""
    found = script("fuzz", tmp_path, "--cases", "130")
    assert found["cases"] == 130 and len(found["kinds"]) == len(fuzz.AREAS)
    assert not found["failures"], "\n".join(found["failures"])


@pytest.mark.slow
def test_killed_runs(tmp_path: Path) -> None:
    """Run again, they give what an uninterrupted run gives, and leave nothing."""
    jobs = [
        "gptq",
        "rtn, over another",
        "smooth+gptq+signround+lorc",
        "block_ap+end_to_end, lowbit's format",
        "plan",
        "compare",
    ]
    found = script("kills", tmp_path, "--kills", "24", "--jobs", *jobs)
    assert sum(kill["kills"] for kill in found["kills"]) >= 24
    assert not [kill for kill in found["kills"] if kill["failures"]]


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_damaged_input_at_length(tmp_path: Path) -> None:
    found = script("fuzz", tmp_path, "--cases", "2000", "--first", "100000")
    assert not found["failures"], "\n".join(found["failures"])


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_killed_runs_at_length(tmp_path: Path) -> None:
    found = script("kills", tmp_path, "--kills", "100", "--seed", "1")
    assert not [kill for kill in found["kills"] if kill["failures"]]


def test_every_method_is_killed() -> None:
    """A new method needs a job in tests/kills.py."""
    words = " ".join(" ".join([*job.words, *job.files.values()]) for job in kills.JOBS.values())
    missing = [name for name in METHODS if name not in words]
    assert not missing


# ------------------------------------------------------------------------------------------------- the children themselves


def crash() -> None:
    ctypes.string_at(0)


def grow() -> int:
    return len(bytearray(1 << 30))


def leave() -> None:
    subprocess.Popen(["sleep", "60"], start_new_session=True)


def refuse() -> None:
    from lowbit.recipe import read_recipe

    read_recipe("nowhere.toml")


def test_children(tmp_path: Path) -> None:
    """Every way to end is told from the others, and nothing is left running."""
    assert forked.run(lambda: os.getcwd(), cwd=tmp_path).value == str(tmp_path)
    refused = forked.run(refuse, cwd=tmp_path)
    assert refused.kind == "raised" and refused.error == ["ValueError", "recipe nowhere.toml does not exist"]
    assert refused.frame.startswith("recipe.py:") and refused.frame.endswith(" read_recipe")
    assert forked.run(lambda: sys.exit(2), cwd=tmp_path).value == 2
    assert forked.run(crash, cwd=tmp_path).signal == 11
    assert forked.run(grow, cwd=tmp_path, memory=1 << 28).kind == "memory"
    began = time.monotonic()
    for wait in (lambda: time.sleep(60), lambda: [None for _ in iter(int, 1)]):
        assert forked.run(wait, cwd=tmp_path, seconds=0.3).kind == "hang"
    left = forked.run(leave, cwd=tmp_path)
    assert left.kind == "returned" and [words.split() for words in left.orphans] == [["sleep", "60"]]
    assert time.monotonic() - began < 30
    assert not forked.run(lambda: None, cwd=tmp_path).orphans


def test_a_wrong_result_is_told(tmp_path: Path) -> None:
    """What the judges compare with: a kill that leaves something, a file that is another one."""
    for name in ("whole", "killed"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / "report.json").write_text(json.dumps({"seconds": len(name), "error": 0.5}))
    whole = kills.content(tmp_path / "whole")
    assert not kills.difference(kills.content(tmp_path / "killed"), whole)
    (tmp_path / "killed" / "out" / ".work").mkdir()
    (tmp_path / "killed" / "out" / "report.json").write_text(json.dumps({"seconds": 3, "error": 0.25}))
    unlike = kills.difference(kills.content(tmp_path / "killed"), whole)
    assert unlike == "left over: out/.work/; different: out/report.json"
