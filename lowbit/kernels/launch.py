"""How kernels are launched: the next one starts while the one before still runs (programmatic dependent launch).

A kernel of a decoding step takes microseconds, a good part of them until its programs run. On GPUs of compute capability 9.0
and later every kernel lets its successor start at once, and waits itself before it touches what others leave: `follow` is the
first thing in it, after what needs nothing but weights. All kernels that are launched so wait, so each knows that everything
before it is done. Other kernels are launched as ever, after the end of what came before.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next kernel start; wait for the end of those before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


INTERPRETED = not isinstance(follow, triton.runtime.JITFunction)
_LEAST = (9, 0)  # compute capability


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch of a kernel that begins with `follow`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
