"""Kernels run in Triton's interpreter here, on the CPU; benchmarks/ checks them on a GPU.

The interpreter multiplies blocks of any size. Here it refuses those too small for the tensor cores of an H100.
"""

import importlib
import importlib.util
import os

# Triton decides when a kernel is defined, so they are imported now, before a test without the interpreter can be the first.
if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton") is not None:
    for _name in ("attention", "binary", "codes", "rope", "rows", "scan", "weight_only"):
        importlib.import_module(f"lowbit.kernels.{_name}")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import min_dot_size
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
