"""Runs that are killed (SIGKILL) at a given step, run again until they finish, and compared with one that was not.

A step is what a process does to files below its folder: opened for writing, half written, flushed, renamed, removed, locked,
made; and every batch of hidden states that is read, so that computing is interrupted too. `JOBS` has every method of
`lowbit.recipe.METHODS`, both formats, plans, comparisons and parallel training, on tiny models.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import forked
import fuzz
import tiny

SEED = 20261129
DATA = ("--data", "random", "--rows", "8", "--length", "16")
OPEN = ("--engine", "transformers")
NATIVE = ("--format", "lowbit")
TIMES = {
    "seconds", "peak_rss", "stages", "load_seconds", "decode_tokens_per_second", "lowbit_seconds", "measured_seconds",
    "step_seconds", "created",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command on copies of a model and of texts; `ranks` if it starts interpreters of its own."""

    model: str
    words: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    ranks: bool = False
    before: tuple[str, ...] = ()  # a command that is run first, uninterrupted


def _quantize(scheme: str, method: str, *more: str, model: str = "llama", data: bool = True, **job: Any) -> Job:
    words = ("quantize", "model", "--out", "out", "--scheme", scheme, "--method", method, *(DATA if data else ()), *more)
    return Job(model, words, **job)


def _options(*pairs: str) -> tuple[str, ...]:
    return tuple(word for pair in pairs for word in ("--option", pair))


HEAD = """
format = "FORMAT"
engine = "transformers"
[data]
source = "random"
rows = 8
length = 16
[[rules]]
match = "lm_head"
scheme = "w8a16-g32"
[[rules]]
match = ""
scheme = "w4a16-g32"
[[steps]]
method = "gptq"
"""
SCAN = """
format = "lowbit"
[data]
source = "random"
rows = 8
length = 16
[[rules]]
match = "\\\\.(x|state)$"
scheme = "s8-clusters"
[[rules]]
match = ""
scheme = "s8"
[[rules]]
match = ""
scheme = "w8a8-astatic"
[[steps]]
method = "reorder"
[[steps]]
method = "hadamard"
[[steps]]
method = "gptq"
"""
PLAN = ("plan", "model", "--out", "plan.toml", "--bits", "6", *DATA, *OPEN, "--schemes", "w4a16-g32", "w8a16-channel")
COMPARE = ("compare", "model", "--out", "compared", "--recipes", "a.toml", "b.toml", "--text", "text.txt", "--window", "16")
BY_RECIPE = ("quantize", "model", "--out", "out", "--recipe", "recipe.toml")
TEXT = "\n\n".join(tiny.TEXT * 5)
RTN = 'engine = "transformers"\n[[rules]]\nmatch = ""\nscheme = "w4a16-g32"\n[[steps]]\nmethod = "rtn"\n'

JOBS: dict[str, Job] = {
    "rtn": _quantize("w4a16-g32", "rtn", data=False),
    "rtn, lowbit's format": _quantize("w3a16-g32-asym", "rtn", *NATIVE, data=False),
    "rtn, over another": _quantize("w4a16-g32", "rtn", "--overwrite", before=("--scheme", "w8a16-g32", *OPEN)),
    "hqq": _quantize("w4a16-g32-asym", "hqq", *NATIVE, data=False),
    "gptq": _quantize("w4a16-g32", "gptq"),
    "gptq, experts": _quantize("w4a16-g32", "gptq", *OPEN, model="moe"),
    "gptq, static inputs": _quantize("w8a8-astatic", "gptq"),
    "gptq, asymmetry": _quantize("w4a16-g32", "gptq", *_options("asymmetry=0.25")),
    "gptq, text of the model": _quantize("w4a16-g32", "gptq", "--data", "self", "--rows", "4", "--length", "16", data=False),
    "gptq, text": _quantize(
        "w4a16-g32", "gptq", "--data", "text.txt", "--rows", "4", "--length", "16", data=False, files={"text.txt": TEXT}
    ),
    "gptq, encoder": _quantize("w8a8", "gptq", *OPEN, model="bert"),
    "gptq, head": Job("single", BY_RECIPE, {"recipe.toml": HEAD.replace("FORMAT", "compressed-tensors")}),
    "gptq, head, lowbit's format": Job("single", BY_RECIPE, {"recipe.toml": HEAD.replace("FORMAT", "lowbit")}),
    "fp8, key-value cache": _quantize("fp8", "rtn", "--kv-cache", "fp8"),
    "awq+gptq": _quantize("w4a16-g32", "awq+gptq"),
    "smooth+rtn": _quantize("w8a8", "smooth+rtn"),
    "smooth_search+rtn": _quantize("w8a8", "smooth_search+rtn", *_options("smooth_search.step=0.25", "smooth_search.rows=4")),
    "rotate+gptq": _quantize("w4a4-g32-ag32", "rotate+gptq", *OPEN, *NATIVE),
    "embed+rtn": _quantize("w4a16-g32", "embed+rtn", *NATIVE, data=False),
    "hadamard+gptq": _quantize("w4a8-g32", "hadamard+gptq", *NATIVE, *_options("hadamard.match=down_proj")),
    "reorder+hadamard+gptq, scan": Job("mamba", BY_RECIPE, {"recipe.toml": SCAN}),
    "rtn+lkd": _quantize("w4a16-g32", "rtn+lkd", *OPEN, *_options("lkd.steps=4")),
    "rtn+mrem": _quantize("w3a16-g32", "rtn+mrem", *OPEN, *_options("mrem.steps=4", "mrem.blocks=2")),
    "rtn+omniquant": _quantize("w3a16-g32", "rtn+omniquant", *OPEN, *_options("omniquant.steps=4")),
    "gptq+signround": _quantize("w3a16-g32", "gptq+signround", *OPEN, *_options("signround.steps=4")),
    "rtn+tesseraq": _quantize("w2a16-g32-asym", "rtn+tesseraq", *OPEN, *_options("tesseraq.steps=20")),
    "gptq+block_ap": _quantize("w2a16-g32-asym", "gptq+block_ap", *OPEN, *_options("block_ap.steps=4")),
    "gptq+end_to_end": _quantize("w3a16-g32", "gptq+end_to_end", *OPEN, *_options("end_to_end.steps=4")),
    "block_ap+end_to_end, lowbit's format": _quantize(
        "w2a16-g32-asym", "rtn+block_ap+end_to_end", *NATIVE, *_options("block_ap.steps=3", "end_to_end.steps=4")
    ),
    "gptq+lorc": _quantize("w3a16-g32", "gptq+lorc", *OPEN, *_options("lorc.rank=4", "lorc.whiten=true")),
    "smooth+gptq+signround+lorc": _quantize(
        "w4a8-g32", "smooth+gptq+signround+lorc", *NATIVE, *_options("signround.steps=3", "lorc.rank=4")
    ),
    "plan": Job("llama", (*PLAN, "--method", "rtn")),
    "plan, gptq, fisher": Job("llama", (*PLAN, "--method", "gptq", "--signal", "fisher")),
    "plan, ratio": Job("llama", (*PLAN[:4], "--max-ppl-ratio", "1.5", *PLAN[6:], "--method", "rtn")),
    "compare": Job("llama", (*COMPARE, "--limit", "2"), {"a.toml": RTN, "b.toml": RTN.replace("w4", "w8"), "text.txt": TEXT}),
    "parallel": _quantize(
        "w3a16-g32", "rtn+mrem", *OPEN, *_options("mrem.blocks=1", "mrem.steps=60", "mrem.batch=2", "mrem.rate=0.02"),
        "--parallel", "2", "--deterministic", ranks=True,
    ),
}  # fmt: skip


@dataclass
class Kill:
    """What happened after one run was killed, once or several times, and run again.

    Attributes:
        steps: at which it was killed, "12 of 80 os.rename out.partial/x".
        failures: what was wrong, each in one line; empty if nothing was.
        kills: how often it was killed.
    """

    job: str
    steps: list[str]
    failures: list[str]
    kills: int
    seconds: float


class Killing:
    """Models, and the uninterrupted run of every job."""

    def __init__(self, root: Path, jobs: Iterable[str] = JOBS) -> None:
        self.root = root
        forked.warm()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        for name, kind in (("llama", "llama"), ("single", "llama_untied"), ("moe", "qwen3_moe"), ("bert", "bert")):
            fuzz.save_small(kind, root / name, sizes, 1 if name == "single" else 2)
        fuzz.save_small("mamba2", root / "mamba", {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}, 1)
        self.steps: dict[str, list[str]] = {}
        self.results: dict[str, dict[str, str]] = {}
        self.failures: list[Kill] = []
        for name in jobs:
            folder = self.laid_out(name, root / "whole")
            ending = forked.run(partial(_counted, folder, JOBS[name]), cwd=folder, seconds=120)
            if ending.kind != "returned" or ending.value["status"] != 0:
                self.failures.append(Kill(name, ["never"], [f"without a kill: {_words(ending)}"], 0, ending.seconds))
                continue
            self.steps[name], self.results[name] = ending.value["steps"], content(folder)

    def laid_out(self, name: str, folder: Path) -> Path:
        """A new folder for a job."""
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        job = JOBS[name]
        folder.mkdir()
        shutil.copytree(self.root / job.model, folder / "model")
        for file, text in job.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        if job.before:
            words = ("quantize", "model", "--out", "out", *job.before)
            ending = forked.run(partial(fuzz.command, *words), cwd=folder)
            assert ending.value == 0, ending
        return folder

    def kill(self, name: str, rng: random.Random) -> Kill:
        """Kill a job once, sometimes twice or three times, and let it finish."""
        folder, job, began = self.laid_out(name, self.root / "killed"), JOBS[name], time.monotonic()
        steps: list[str] = []
        failures: list[str] = []
        expected = self.results[name]
        times = rng.choice([1, 1, 1, 2, 2, 3])
        kills = 0
        for attempt in range(times + 2):
            last = attempt >= times
            known = self.steps[name]
            if job.ranks and rng.random() < 0.7:
                who = rng.choice(["parent", "rank"])
                work = partial(_training_killed, folder, job, who, 1 + rng.randrange(30))
                at, where = 0, f"{who} in training"
            else:
                at = len(known) - rng.randrange(min(14, len(known))) if rng.random() < 0.35 else 1 + rng.randrange(len(known))
                where = f"{at} of {len(known)}, {known[at - 1]}" if not steps else f"then {at}"
                work = partial(_killed, folder, job, at)
            if last:
                work, where = partial(_killed, folder, job, 0), ""
            complete = content(folder) == expected
            ending = forked.run(work, cwd=folder, seconds=120)
            if ending.orphans:
                failures.append(f"{len(ending.orphans)} processes outlive it: {ending.orphans[0]}")
            if ending.signal == signal.SIGKILL:
                kills += 1
                steps.append(where)
                continue
            if where and ending.kind == "returned" and isinstance(ending.value, int) and ending.value == 2 and "rank" in where:
                kills += 1
                steps.append(where)
                continue  # a run that says that a process died
            if complete and "exists" in ending.err:
                break  # nothing was left to do, and that is what it said
            if ending.kind != "returned" or ending.value != 0:
                failures.append(f"run again: {_words(ending)}")
            break
        unlike = difference(content(folder), expected)
        if unlike:
            failures.append(unlike)
        failures = [failure.replace(f"{folder}/", "") for failure in failures]
        return Kill(name, steps, failures, kills, time.monotonic() - began)


def _words(ending: forked.Ending) -> str:
    """How a run ended that should have ended well."""
    if ending.kind == "returned":
        lines = [line for line in ending.err.splitlines() if line.strip()]
        return f"status {ending.value}: {lines[-1] if lines else ''}"[:400]
    return f"{ending.kind} {ending.error or ending.signal} at {ending.frame}"[:400]


# --------------------------------------------------------------------------------------------------------- in the child

_EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "fcntl.flock"}
_COPIES = {"shutil.copyfile", "shutil.rmtree", "shutil.move", "shutil.copytree"}


class Steps:
    """Counts the steps of this process, and kills it at the one numbered `kill_at`."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.kill_at, self.found, self.pid = str(folder), kill_at, list[str](), os.getpid()

    def step(self, kind: str, path: Any = "", before_death: Callable[[], Any] = lambda: None) -> None:
        """One step."""
        if os.getpid() != self.pid:
            return
        name = str(path).removeprefix(self.folder + "/")
        self.found.append(f"{kind} {name}".strip()[:100])
        if len(self.found) == self.kill_at:
            before_death()
            os.kill(self.pid, signal.SIGKILL)

    def watch(self) -> None:
        """From here on."""
        import lowbit.files
        import lowbit.reconstruct
        import lowbit.unit

        sys.addaudithook(self._hook)
        save, read, write, sync = lowbit.files.save_file, lowbit.unit.Stream.read, Path.write_text, os.fsync
        put = lowbit.unit.Stream.write

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            save(tensors, path, metadata=metadata)
            self.step("half", path, lambda: os.truncate(path, Path(path).stat().st_size // 2))

        def reading(stream: Any, boundary: int, *which: Any, **more: Any) -> Any:
            self.step("read", f"boundary {boundary}")
            return read(stream, boundary, *which, **more)

        def writing(stream: Any, file: Any, part: Any, hidden: Any) -> None:
            put(stream, file, part, hidden)
            self.step("half", file.name, file.flush)

        def write_text(path: Path, text: str, *rest: Any, **options: Any) -> int:
            write(path, text[: len(text) // 2], *rest, **options)
            self.step("half", path)
            return write(path, text, *rest, **options)

        def fsync(handle: int) -> None:
            self.step("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        lowbit.files.save_file, lowbit.unit.Stream.read = save_file, reading
        lowbit.unit.Stream.write, os.fsync = writing, fsync  # type: ignore[method-assign, assignment]
        Path.write_text = write_text  # type: ignore[method-assign]

    def _hook(self, event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = details
            writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and self._mine(path):
                self.step("open", path)
        elif event in _EVENTS or event in _COPIES:
            relative = event in ("os.remove", "os.rmdir") and isinstance(details[0], str) and "/" not in details[0]
            if event == "fcntl.flock" or relative or self._mine(details[0]):  # rmtree removes by name in a folder
                self.step(event, details[0])

    def _mine(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(self.folder)


def _prepared(folder: Path, kill_at: int, *, saving: bool = False) -> Steps:
    import lowbit.reconstruct

    if saving:
        lowbit.reconstruct._SAVED = 0  # a training writes its state after every step, not after a minute
    steps = Steps(folder, kill_at)
    steps.watch()
    return steps


def _counted(folder: Path, job: Job) -> dict[str, Any]:
    """The job, uninterrupted, with its steps."""
    steps = _prepared(folder, 0, saving=True)
    status = fuzz.command(*job.words)
    return {"status": status, "steps": steps.found}


def _killed(folder: Path, job: Job, kill_at: int) -> int:
    """The job, killed at a step if it is not 0."""
    _prepared(folder, kill_at, saving=True)
    return fuzz.command(*job.words)


def _training_killed(folder: Path, job: Job, who: str, step: int) -> int:
    """The job, killed itself or one of its processes, when these have done so many steps."""

    def watch() -> None:
        while True:
            logs = [path.read_text(errors="replace") for path in folder.glob("out.partial/.work/rank-*.log")]
            if any(f"step {step}\n" in log for log in logs):
                break
            time.sleep(0.01)
        victim = os.getpid() if who == "parent" else _ranks()[-1]
        os.kill(victim, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return fuzz.command(*job.words)


def _ranks() -> list[int]:
    """The processes that this one started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------- comparing


def content(folder: Path) -> dict[str, str]:
    """Everything below a folder by its path: hashes of files, of JSON without times; folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("model/") or name == "tmp":
            continue
        if path.is_dir() and not path.is_symlink():
            found[name + "/"] = ""
        elif path.suffix == ".json" and path.name != "config.json":
            found[name] = _digest(json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True).encode())
        elif path.suffix in (".html",) or path.name == "report.md":
            found[name] = ""  # drawn from the JSON
        else:
            found[name] = _digest(path.read_bytes())
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """How two contents differ, or ""."""
    parts = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "different": [name for name in found if name in expected and found[name] != expected[name]],
    }
    return "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts.items() if names)[:400]


def run_kills(
    killing: Killing,
    count: int,
    *,
    seed: int = SEED,
    say: Callable[[Kill], None] = lambda kill: None,
    until: float = float("inf"),
) -> list[Kill]:
    """So many kills or a few more, spread over the jobs in turn, until `until` (of time.monotonic) at most."""
    done: list[Kill] = list(killing.failures)
    names = list(killing.results)
    number = 0
    while names and sum(kill.kills for kill in done) < count and time.monotonic() < until:
        name = names[number % len(names)]
        kill = killing.kill(name, random.Random(f"{seed}-{name}-{number // len(names)}"))
        kill.steps = [f"{step} (number {number})" for step in kill.steps]
        done.append(kill)
        say(kill)
        number += 1
    return done


def run_side_by_side(
    root: Path, jobs: Sequence[str], count: int, *, seed: int, until: float, workers: int, say: Callable[[Kill], None]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """`run_kills` by several processes, each with jobs of its own: what `Kill` holds, and by job the number of steps."""
    forked.warm()

    def share(mine: Sequence[str], folder: Path) -> list[Any]:
        folder.mkdir()
        killing = Killing(folder, mine)
        kills = run_kills(killing, -(-count * len(mine) // len(jobs)), seed=seed, until=until, say=say)
        return [([vars(kill) for kill in kills], {name: len(steps) for name, steps in killing.steps.items()})]

    shares = [partial(share, jobs[i::workers], root / str(i)) for i in range(min(workers, len(jobs)))]
    found = forked.side_by_side(shares, root)
    return [kill for kills, _ in found for kill in kills], {name: n for _, steps in found for name, n in steps.items()}
