"""Layouts of matrices: nothing is lost, and what has none is refused with the reason."""

import pytest
import torch
from matrices import FLOATS, quantized

from lowbit.kernels.packed import pack_codes, pack_planes, reason_against_codes, reason_against_planes, stacked, unpack
from lowbit.qtensor import dequantize, parse_scheme, to_bcq

CODES = ["w8a8", "w8a8-g128-aasym", "fp8", "fp8-block", "w4a8-g32", "w4a8-channel", "w4a8-g128-asym-aasym", "w4a8-g128-two"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", FLOATS)
def test_packing_for_floats_loses_nothing(scheme: str, dtype: torch.dtype) -> None:
    """Unpacked, the matrix is what `dequantize` gives, to the bit, at a width that is no multiple of a tile."""
    q = quantized(scheme, 128, 384, dtype)
    assert torch.equal(unpack(pack_planes(q, dtype)).to(dtype), dequantize(q, dtype))


@pytest.mark.parametrize("scheme", CODES)
def test_packing_for_codes_loses_nothing(scheme: str) -> None:
    """The same for inputs that are codes, and for two matrices below each other."""
    given, inputs = quantized(scheme, 128, 384), parse_scheme(scheme).input
    assert inputs is not None
    packed = pack_codes(given, inputs, torch.float16)
    assert torch.equal(unpack(packed).half(), dequantize(given, torch.float16))
    assert torch.equal(unpack(stacked([packed, packed])), unpack(packed).repeat(2, 1))


def test_uniform_codes_in_binary_coding_are_exact() -> None:
    """Also where an offset has more digits than 16 bits hold."""
    q = quantized("w4a16-g128-asym", 24, 256)
    found = unpack(pack_planes(to_bcq(q), torch.float16))
    assert float((found - dequantize(q)).abs().max()) <= 1e-6 * float(dequantize(q).abs().max())


def test_what_has_no_layout() -> None:
    """Tables and odd groups are refused; so are matrices of one product that differ."""
    for scheme, why in (("nf4", "looked up"), ("kmeans3", "looked up"), ("w4a16-g24", "no multiple of 16")):
        assert why in str(reason_against_planes(parse_scheme(scheme).weight))
        with pytest.raises(ValueError, match=why):
            pack_planes(quantized(scheme, 16, 384), torch.float16)
    for scheme, why in (
        ("mxfp4", "with e8m0 scales are not multiplied"),
        ("fp4", "no product of fp4_e2m1 and fp8_e4m3"),
        ("w8a8-asym", "more than 4 bits with zero points"),
        ("w4a8-g48", "neither 32, 64 nor a multiple of 128"),
        ("w8a8-ag96", "no power of two"),
    ):
        parsed = parse_scheme(scheme)
        assert parsed.input is not None and why in str(reason_against_codes(parsed.weight, parsed.input))
    one, other = (pack_planes(quantized(scheme, 16, 256), torch.float16) for scheme in ("w4a16-g64", "w4a16-g128"))
    with pytest.raises(ValueError, match="matrices of one product differ"):
        stacked([one, other])
