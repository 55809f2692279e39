"""Random quantized matrices for the tests of kernels, and how far products are apart."""

import torch

from lowbit.qtensor import QTensor, find_params, parse_scheme, quantize


def quantized(scheme: str, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> QTensor:
    """A random matrix; `dtype` is that of scales."""
    spec = parse_scheme(scheme).weight
    w = torch.randn(rows, columns) + 0.2
    return quantize(w, find_params(w, spec, scale_dtype=dtype), spec)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of a product."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# One of each kind, and what is special: groups that divide no tile, zero points, outer scales.
FLOATS = [
    *("w2a16-g64-asym", "w3a16-g32-asym", "w3a16-g128", "w4a16-g48", "w4a16-g128-asym", "w4a16-channel-asym", "w4a16-tensor"),
    *("w4a16-g128-two", "w5a16-g64", "w8a16-g32", "w8a16-channel", "mxfp4a16", "mxfp6a16", "mxfp8a16", "mxint4a16", "nvfp4a16"),
    *("fp8a16-block", "bcq1-g128", "bcq2-g64", "bcq3-g128", "bcq4-channel"),
]
