"""Kernels run in Triton's interpreter here, on the CPU; benchmarks/ checks them on a GPU."""

import importlib
import importlib.util
import os

# Triton decides when a kernel is defined, so they are imported now, before a test without the interpreter can be the first.
if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton") is not None:
    for _name in ("attention", "codes", "rope", "rows", "scan", "weight_only"):
        importlib.import_module(f"lowbit.kernels.{_name}")
