"""Number formats against Python's integers, the definition of E4M3 and torch's own float8 type."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.formats import FP8_E4M3, Format, integer

FINITE = [code for code in range(256) if code % 128 != 127]  # all but the two NaN patterns
INTEGERS = [integer(bits) for bits in range(2, 9)]


def ocp_value(code: int) -> float:
    """The value of a finite E4M3 bit pattern, from OCP 8-bit floating point (exponent bias 7)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def torch_round(x: Tensor) -> Tensor:
    """The E4M3 value nearest to x by torch's conversion, which makes NaN of what is too large: saturate first."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as float32 bit patterns, so that 0 and -0 differ."""
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


# ------------------------------------------------------------------------------------------------------------- integers
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_range(bits: int) -> None:
    fmt = integer(bits)
    assert (fmt.name, fmt.kind, fmt.bits) == (f"int{bits}", "int", bits)
    assert (fmt.min, fmt.max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert fmt.code_dtype == torch.int8


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_integer_width_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^{bits}-bit integers are not supported; allowed are 2 to 8 bits"):
        integer(bits)


@pytest.mark.parametrize("fmt", INTEGERS, ids=lambda fmt: fmt.name)
def test_integer_rounding(fmt: Format) -> None:
    """Nearest, ties to even, saturating: each value against Python's round."""
    given = [step / 4 for step in range(-1200, 1201)] + [math.inf, -math.inf, 1e30, -1e30, 2.4999998, 2.5000002]
    low, high = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1
    expected = [float(min(max(round(max(min(x, 1e4), -1e4)), low), high)) for x in given]
    x = torch.tensor(given)
    before = x.clone()
    rounded = fmt.round(x)
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == expected
    assert torch.equal(x, before)
    codes = fmt.encode(x)
    assert codes.dtype == torch.int8
    assert codes.tolist() == expected
    assert fmt.decode(codes).dtype == torch.float32
    assert fmt.decode(codes).tolist() == expected


@pytest.mark.parametrize("fmt", INTEGERS, ids=lambda fmt: fmt.name)
def test_integer_codes_are_values(fmt: Format) -> None:
    codes = torch.arange(int(fmt.min), int(fmt.max) + 1).to(torch.int8)
    assert fmt.decode(codes).tolist() == list(range(int(fmt.min), int(fmt.max) + 1))
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


# --------------------------------------------------------------------------------------------------------------- floats
def test_fp8_attributes() -> None:
    assert (FP8_E4M3.name, FP8_E4M3.kind, FP8_E4M3.bits) == ("fp8_e4m3", "float", 8)
    assert (FP8_E4M3.min, FP8_E4M3.max) == (-448.0, 448.0)
    assert (FP8_E4M3.max, FP8_E4M3.code_dtype) == (torch.finfo(torch.float8_e4m3fn).max, torch.uint8)


def test_fp8_decodes_every_finite_code() -> None:
    codes = torch.tensor(FINITE, dtype=torch.uint8)
    values = FP8_E4M3.decode(codes)
    assert same_bits(values, codes.view(torch.float8_e4m3fn).float())
    assert values.tolist() == [ocp_value(code) for code in FINITE]
    assert same_bits(FP8_E4M3.round(values), values)
    assert torch.equal(FP8_E4M3.encode(values), codes)


def test_fp8_decodes_nan() -> None:
    """The two patterns that no encoding of a number gives are NaN for every engine."""
    assert FP8_E4M3.decode(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).isnan().all()


def test_fp8_random_values() -> None:
    """Values of all magnitudes, from far below the smallest subnormal to far above 448."""
    generator = torch.Generator().manual_seed(0)
    size = 20000
    magnitude = torch.ldexp(1 + torch.rand(size, generator=generator), torch.randint(-20, 14, (size,), generator=generator))
    x = torch.where(torch.rand(size, generator=generator) < 0.5, -magnitude, magnitude)
    before = x.clone()
    rounded = FP8_E4M3.round(x)
    assert torch.equal(x, before)
    assert same_bits(rounded, torch_round(x))
    codes = FP8_E4M3.encode(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert same_bits(FP8_E4M3.decode(codes), rounded)
    assert same_bits(codes.view(torch.float8_e4m3fn).float(), rounded)


def test_fp8_ties_and_their_neighbours() -> None:
    """Halfway between two values the even mantissa wins; the next float32 on either side goes to its own side."""
    values = sorted({abs(ocp_value(code)) for code in FINITE})
    assert len(values) == 127
    for code, (low, high) in enumerate(pairwise(values)):
        tie = torch.tensor((low + high) / 2)
        below, above = torch.nextafter(tie, torch.tensor(0.0)), torch.nextafter(tie, torch.tensor(1e9))
        even = low if code % 2 == 0 else high
        x = torch.stack([below, tie, above])
        assert FP8_E4M3.round(x).tolist() == [low, even, high]
        assert FP8_E4M3.round(-x).tolist() == [-low, -even, -high]
        assert same_bits(FP8_E4M3.round(-x), torch_round(-x))


def test_fp8_subnormals_and_zeros() -> None:
    """Multiples of 2^-9 below 2^-6; half of the smallest rounds to 0, and the sign of 0 is kept."""
    smallest = 2.0**-9
    x = torch.tensor([k * smallest for k in range(9)])
    assert FP8_E4M3.encode(x).tolist() == list(range(9))
    assert same_bits(FP8_E4M3.round(x), x)
    tiny = torch.tensor([0.0, -0.0, smallest / 2, -smallest / 2, smallest * 0.51, 1e-30, -1e-45])
    assert FP8_E4M3.encode(tiny).tolist() == [0, 0x80, 0, 0x80, 1, 0, 0x80]
    assert same_bits(FP8_E4M3.round(tiny), torch_round(tiny))


def test_fp8_saturates() -> None:
    x = torch.tensor([447.9, 448.0, 463.9, 464.0, 465.0, 1e6, 3e38, math.inf])
    assert FP8_E4M3.round(x).tolist() == [448.0] * 8
    assert FP8_E4M3.round(-x).tolist() == [-448.0] * 8
    assert FP8_E4M3.encode(x).tolist() == [0x7E] * 8
    assert FP8_E4M3.encode(-x).tolist() == [0xFE] * 8


@pytest.mark.parametrize("fmt", [integer(4), FP8_E4M3], ids=lambda fmt: fmt.name)
def test_shapes_and_strides(fmt: Format) -> None:
    """Any shape, contiguous or not, element by element."""
    x = (4 * torch.randn(6, 5, 4)).transpose(0, 2)
    assert not x.is_contiguous()
    flat = x.flatten()
    assert torch.equal(fmt.round(x), fmt.round(flat).view(4, 5, 6))
    assert torch.equal(fmt.encode(x), fmt.encode(flat).view(4, 5, 6))
    assert torch.equal(fmt.decode(fmt.encode(x)), fmt.round(flat).view(4, 5, 6))
    assert fmt.encode(torch.tensor(3.0)).shape == fmt.round(torch.tensor(3.0)).shape == ()
    assert fmt.round(torch.empty(0, 3)).shape == (0, 3)
