"""Commands and calls in forked children of a warmed process, with limits, so that none can harm or outlive what runs it.

Starting Python and importing transformers takes seconds, a fork milliseconds. The parent must not have run a backward pass,
whose threads a fork does not copy.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lowbit

MARKER = "LOWBIT_CHILD_OF"  # in the environment of a child and of what it starts
PACKAGE = str(Path(lowbit.__file__).parent)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


@dataclass
class Ending:
    """How a child ended.

    Attributes:
        kind: "returned", "raised", "killed" (by a signal, its own included), "hang", "memory".
        value: what the work returned, as JSON.
        error: type and message of what was raised.
        frame: the last frame in lowbit, "file.py:line function".
        inner: the last frame of all.
        signal: that ended it.
        orphans: command lines of processes it started that were still there 2 seconds after its end; they were killed.
    """

    kind: str
    value: Any = None
    error: list[str] | None = None
    frame: str = ""
    inner: str = ""
    signal: int = 0
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    orphans: list[str] = field(default_factory=list)


def warm() -> None:
    """Import what commands import, so that children need not."""
    import compressed_tensors  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    from compressed_tensors.compressors import base  # noqa: F401

    import lowbit.bench
    import lowbit.cli
    import lowbit.comparison
    import lowbit.evaluate
    import lowbit.inspection
    import lowbit.planner
    import lowbit.run
    import lowbit.runtime  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _adopt()
    gc.collect()
    gc.freeze()  # so that collections in children do not copy what they share


def _adopt() -> None:
    """Have orphans become children of this process, not of the system's first."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def side_by_side(shares: Sequence[Callable[[], list[Any]]], folder: Path) -> list[Any]:
    """Do every share in a process of its own, without limits; what they return, as JSON, in one list.

    Raises:
        RuntimeError: one died.
    """
    workers = {}
    for number, share in enumerate(shares):
        told = folder / f"share-{number}.json"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _adopt()
                told.write_text(json.dumps(share()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        workers[pid] = told
    found = []
    for pid, told in workers.items():
        if os.waitpid(pid, 0)[1] != 0:
            raise RuntimeError(f"a process of {len(workers)} died")
        found += json.loads(told.read_text())
    return found


def run(work: Callable[[], Any], *, cwd: Path, seconds: float = 20.0, memory: int = 4 << 30, figures: bool = False) -> Ending:
    """Do `work` in a child, in the folder `cwd`, with TMPDIR at `cwd`/tmp.

    Args:
        work: returns JSON.
        seconds: of computing, or of waiting for nothing; on a busy machine five times as much may pass.
        memory: bytes of address space above those of this process.
        figures: draw report.html.
    """
    notes = Path(tempfile.mkdtemp(prefix="lowbit-child-"))
    mark = f"{os.getpid()}-{uuid.uuid4().hex}"
    (cwd / "tmp").mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(work, cwd, notes, mark, memory, figures)
    try:
        kind, status = _wait(pid, seconds)
        ending = _told(notes, kind, status)
        ending.seconds = time.monotonic() - began
        ending.orphans = _orphans(mark)
        return ending
    finally:
        subprocess.run(["rm", "-rf", str(notes)], check=True)


def _child(work: Callable[[], Any], cwd: Path, notes: Path, mark: str, memory: int, figures: bool) -> None:
    """Never returns."""
    try:
        os.setsid()
        faulthandler.disable()  # of pytest, which writes to the terminal
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT), stream)
        yes = notes / "in"  # who asks for anything is told yes
        yes.write_text("y\n" * 100)
        os.dup2(os.open(yes, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(cwd)
        os.environ[MARKER] = mark
        os.environ["TMPDIR"] = str(cwd / "tmp")
        tempfile.tempdir = None
        most = _address_space() + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not figures:
            import lowbit.report

            lowbit.report.report_page = lambda report: report["model"]["name"]  # type: ignore[attr-defined]
        told: dict[str, Any] = {}
        try:
            told = {"kind": "returned", "value": work()}
        except SystemExit as error:
            told = {"kind": "returned", "value": error.code}
        except BaseException as error:
            told = _raised(error)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        sys.stdout.flush()
        sys.stderr.flush()
        (notes / "told.json").write_text(json.dumps(told))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(97)


def _raised(error: BaseException) -> dict[str, Any]:
    text = str(error)
    name = type(error).__name__
    exhausted = isinstance(error, MemoryError) or any(
        words in text for words in ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "not enough memory")
    )
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]

    def words(frame: traceback.FrameSummary) -> str:
        return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"

    return {
        "kind": "memory" if exhausted else "raised",
        "error": [name, text[:2000]],
        "frame": words(ours[-1]) if ours else "",
        "inner": words(frames[-1]) if frames else "",
    }


def _wait(pid: int, seconds: float) -> tuple[str, int]:
    """Wait for the end, or bring it about."""
    began = time.monotonic()
    pause = 0.002
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return "ended", status
        passed = time.monotonic() - began
        if passed > seconds:
            used = _processor_seconds(pid)
            if used > seconds or used < passed / 20 or passed > 5 * seconds:
                os.killpg(pid, signal.SIGKILL)
                return "hang", os.waitpid(pid, 0)[1]
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)


def _told(notes: Path, kind: str, status: int) -> Ending:
    out, err = ((notes / name).read_text(errors="replace") if (notes / name).exists() else "" for name in ("out", "err"))
    file = notes / "told.json"
    if kind == "hang":
        return Ending("hang", out=out, err=err)
    if os.WIFSIGNALED(status):
        return Ending("killed", signal=os.WTERMSIG(status), out=out, err=err)
    if not file.exists():
        lost = "bad_alloc" in err or "MemoryError" in err
        return Ending("memory" if lost else "raised", error=["exit", str(os.WEXITSTATUS(status))], out=out, err=err)
    return Ending(**json.loads(file.read_text()), out=out, err=err)


def _orphans(mark: str) -> list[str]:
    """Processes with the mark in their environment, killed after a moment of patience."""
    deadline = time.monotonic() + 2.0
    while True:
        found = _marked(mark)
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
    _reap()
    return list(found.values())


def _reap() -> None:
    """Collect orphans that ended: those of a session of their own that no Popen of this process waits for."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == os.getpid() and int(fields[3]) != os.getsid(0):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)


def _marked(mark: str) -> dict[int, str]:
    found = {}
    wanted = f"{MARKER}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
        except OSError:
            continue
    return found


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own and of children it waited for


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def fork_commands() -> None:
    """In a child: have `lowbit.comparison` run its commands as forks of this process instead of as fresh interpreters."""
    import lowbit.comparison
    from lowbit.cli import main

    def run_forked(command: Sequence[str], *, timeout: float | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        words = list(command[command.index("quantize") :])
        parent = os.getpid()
        with tempfile.TemporaryFile() as told:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    if "tie_to" in command[2]:  # it is to end with its parent
                        import_module("lowbit.processes").tie_to(parent)
                    os.dup2(told.fileno(), 2)
                    sys.stderr = os.fdopen(2, "w")
                    code = main(words)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told.seek(0)
            return subprocess.CompletedProcess(command, status, "", told.read().decode(errors="replace"))

    forking = SimpleNamespace(**vars(subprocess) | {"run": run_forked})
    lowbit.comparison.subprocess = forking  # type: ignore[attr-defined, assignment]
