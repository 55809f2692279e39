"""No process outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.processes import tied

ROOT = Path(__file__).resolve().parents[1]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a lock that they hold keeps others away")


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_runs_the_code_with_its_arguments() -> None:
    done = subprocess.run(tied("import sys; print(sys.argv[1:]); sys.exit(3)", "a", "b c"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "['a', 'b c']\n")


@only_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(number: signal.Signals) -> None:
    code = (
        "import subprocess; from lowbit.processes import tied\n"
        "child = subprocess.Popen(tied('import time; print(1, flush=True); time.sleep(100)'), stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child, 0.1)
        parent.send_signal(number)
    assert gone(child)


def test_it_leaves_where_its_parent_has_ended_before() -> None:
    command = tied("print('still here')")
    command[2] = command[2].replace(str(os.getpid()), "1234567")
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
