"""The entry to the kernels: what it prepares multiplies like the dequantized matrix, and what it cannot is refused."""

import pytest
import torch

from lowbit.kernels import entry
from lowbit.qtensor import dequantize, find_params, parse_scheme, quantize


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g64-asym", "w2a16-channel", "w8a16", "w8a8"])
def test_several_matrices_are_one_product(scheme: str) -> None:
    """Parts below each other, with bias and residual, within the rounding of the dtype; codes are multiplied exactly."""
    chosen = parse_scheme(scheme)
    parts = [quantize(w, find_params(w, chosen.weight, scale_dtype=torch.float16), chosen.weight)
             for w in (torch.randn(24, 128), torch.randn(8, 128))]  # fmt: skip
    prepared = entry.prepare(parts, inputs=chosen.input, dtype=torch.float16)
    x, bias, residual = torch.randn(2, 3, 128).half(), torch.randn(32).half(), torch.randn(2, 3, 32).half()
    rows = entry.plain(x) if chosen.input else x
    wanted = rows.codes.double() * rows.scale if isinstance(rows, entry.Quantized) else x.double()
    wanted = wanted @ torch.cat([dequantize(part) for part in parts]).double().T + bias + residual
    found = entry.linear(rows, prepared, bias, residual)
    assert found.dtype == torch.float16 and float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert prepared.shape == (32, 128) and 0 < prepared.nbytes < 32 * 128 * 2


def test_refused() -> None:
    w = torch.randn(8, 64)
    for scheme in ("nf4-g32", "w4a8-g32", "w5a16-channel", "w8a8-asym", "fp8"):
        chosen = parse_scheme(scheme)
        assert entry.reason_against(chosen)
        q = quantize(w, find_params(w, chosen.weight, scale_dtype=torch.float32), chosen.weight)
        with pytest.raises(ValueError, match="products"):
            entry.prepare(q, inputs=chosen.input, dtype=torch.float16)
    a, b = (parse_scheme(s).weight for s in ("w4a16-g32", "w4a16-g64"))
    parts = [quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec) for spec in (a, b)]
    with pytest.raises(ValueError, match="different schemes"):
        entry.prepare(parts, inputs=None, dtype=torch.float16)
