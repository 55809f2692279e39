"""Processes that are started here end with the one that started them, however that ends."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def tied(code: str, *arguments: str) -> list[str]:
    """The command of a Python process that runs `code` with these arguments, and is killed when this process ends.

    On systems other than Linux it is not killed: let it inherit a lock (`pass_fds`) that keeps others away until it is done.
    Call this in the thread that waits for the process, because the kernel takes the end of that thread for the end of all.
    """
    return [
        sys.executable,
        "-c",
        f"from lowbit.processes import tie_to; tie_to({os.getpid()})\n{code}",
        *arguments,
    ]


def tie_to(parent: int) -> None:
    """Have this process killed when `parent`, which started it, ends; leave at once if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
