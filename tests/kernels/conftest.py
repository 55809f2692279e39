"""Kernels run in Triton's interpreter here, on the CPU; benchmarks/ checks them on a GPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"
