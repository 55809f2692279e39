"""The entry: schemes that have a kernel, merged matrices, what is refused."""

import pytest
import torch
from matrices import error, quantized

from lowbit.kernels import reference
from lowbit.kernels.entry import linear, plain, prepare, reason_against
from lowbit.qtensor import dequantize, parse_scheme
from lowbit.unit import Input


@pytest.fixture(autouse=True)
def specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CPUs, not the interpreted kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("scheme", ["w4a16-g128", "nvfp4a16", "w8a8", "w8a8-astatic", "fp8", "w4a8-g128-two", "w8a8-aasym"])
def test_merged_matrices(scheme: str) -> None:
    """Two below each other give both products; floats are quantized as the scheme says."""
    parsed = parse_scheme(scheme)
    assert reason_against(parsed) is None
    inputs = None if parsed.input is None else Input(parsed.input, None if parsed.input.dynamic else 4.0)
    parts = [quantized(scheme, rows, 256) for rows in (32, 16)]
    matrix = prepare(parts, inputs=inputs, dtype=torch.float16)
    assert matrix.shape == (48, 256) and matrix.sizes == (32, 16) and matrix.takes_codes == (inputs is not None)
    x = torch.randn(2, 3, 256, dtype=torch.float16)
    rounded = x.float() if inputs is None else inputs.quantize(x.float())
    wanted = torch.cat([reference.linear(rounded.double(), dequantize(part)) for part in parts], -1)
    assert error(linear(x, matrix), wanted) < 1e-3
    if inputs is not None:
        assert torch.equal(linear(plain(x, inputs), matrix), linear(x, matrix))


def test_what_is_refused() -> None:
    """With the reason: schemes without a kernel, other dtypes, widths, and codes for a matrix that takes floats."""
    for scheme in ("kmeans3", "nf4", "mxfp4", "nvfp4", "w8a8-asym"):
        assert reason_against(parse_scheme(scheme))
    q = quantized("w4a16-g64", 32, 128)
    with pytest.raises(ValueError, match="float16 or bfloat16, not torch.float32"):
        prepare(q, inputs=None, dtype=torch.float32)
    matrix = prepare(q, inputs=None, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"packed for torch.float16 of width 128, but x is torch.bfloat16 \[..., 128\]"):
        linear(torch.zeros(1, 128, dtype=torch.bfloat16), matrix)
    with pytest.raises(ValueError, match="inputs are floats"):
        linear(plain(torch.zeros(1, 128)), matrix)
