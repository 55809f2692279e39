"""Damaged input, and runs that are killed: a share of what benchmarks/fuzz.py and benchmarks/kills.py do at length.

They run as scripts of their own, since children are forked from a process that has computed nothing yet.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    texts = [" ".join([*job.words, *job.files.values()]) for job in kills.JOBS.values()]
    assert not METHODS.keys() - set(re.findall(r"\w+", " ".join(texts)))


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


def say(message: str, status: int = 2) -> Callable[..., int]:
    def command(*words: str) -> int:
        print(message, file=sys.stderr)
        return status

    return command


def break_down(*words: str) -> int:
    raise KeyError("shape")


def die(*words: str) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def litter(*words: str) -> int:
    Path(os.environ["TMPDIR"], "rest").touch()
    return 0


def spoil(*words: str) -> int:
    Path("text.txt").write_text("another")
    return 0


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (say("", 0), "ran"),
        (say("lowbit: text.txt has no text"), "clean"),
        (say("lowbit: --rows 0: give at least 1"), "clean"),
        (say("lowbit: Expecting value: line 1 column 1 (char 0)"), "bare"),
        (say("lowbit: text.txt is wrong:\n  here"), "bare"),
        (say("lowbit: a fault of lowbit, not of what you gave it: KeyError: 'text.txt' (a.py:3)", 1), "traceback"),
        (say("lowbit: out of memory (text.txt); use a machine with more"), "memory"),
        (break_down, "traceback"),
        (die, "signal"),
        (litter, "litter"),
        (spoil, "litter"),
    ],
)
def test_verdicts(command: Callable[..., int], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does is told from what it should have done; a judge's complaint makes a wrong result of a good one."""
    materials = fuzz.Materials.__new__(fuzz.Materials)
    materials.root = tmp_path
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.setattr(fuzz, "command", command)
    one = fuzz.Case(7, "data", {"text.txt": "text.txt"}, [], ("eval", "model"))
    verdict = fuzz.judged(one, materials, tmp_path / "case")
    assert verdict.kind == kind and not (tmp_path / "case").exists(), verdict
    one.judge = lambda folder, materials: "other logits (0.25 of their size)"
    verdict = fuzz.judged(one, materials, tmp_path / "case")
    assert verdict.kind == ("wrong" if kind in ("ran", "litter") else kind)


def test_cases_follow_from_their_number(tmp_path: Path) -> None:
    """The same damage for the same number, whatever was made before, and nearly always another for another."""
    materials = fuzz.Materials.__new__(fuzz.Materials)
    materials.root = tmp_path
    (tmp_path / "recipe.toml").write_text(fuzz.RECIPE)
    (tmp_path / "plan.toml").write_text(fuzz.RECIPE)
    numbers = [n for n in range(400) if fuzz.area(n) in ("recipe", "interface")]
    stories = [fuzz.case(materials, n).story for n in numbers]
    assert stories == [fuzz.case(materials, n).story for n in numbers]
    assert len(set(stories)) > 0.9 * len(stories) and {fuzz.area(n) for n in range(400)} == set(fuzz.AREAS)
    assert [fuzz.area(n, seed=1) for n in range(40)] != [fuzz.area(n) for n in range(40)]


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
