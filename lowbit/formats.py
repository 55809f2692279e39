"""Number formats: what values one stored code can mean.

A `Format` knows nothing of scales or groups (see `qtensor.Spec`). It answers three questions: which values exist, which
of them is nearest to x, and how a value is stored.

Integers are two's complement, `bits` wide: codes -2^(b-1) .. 2^(b-1)-1, stored as int8. Those of microscaling (MXINT) leave
the lowest code unused, as the specification allows, so that the range is symmetric.
Floats are sign, exponent, mantissa (OCP 8-bit floating point and OCP microscaling v1.0): codes are the bit patterns,
stored as uint8. E4M3 here is the "fn" variant: no infinities, one NaN pattern per sign, largest value 448.
Tables are any ascending list of values, stored as uint8 indices; NF4 is the one with a name.
Codebooks (k-means, BCQ) have no values of their own: every group of weights brings its own (see `codebooks`).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format of `bits` bits.

    Attributes:
        name: as used in scheme names and records, e.g. "int4", "fp8_e4m3".
        kind: "int" (two's complement), "float" (sign, exponent, mantissa), "table", or the codebooks "kmeans" and "bcq".
        bits: width of a stored code.
        exponent, mantissa: field widths of a float format, 0 for others.
        largest: the largest finite value of a float format; of an integer format whose lowest code is unused, the largest
            code; 0 for others.
        values: the values of a table, ascending.
    """

    name: str
    kind: Literal["int", "float", "table", "kmeans", "bcq"]
    bits: int
    exponent: int = 0
    mantissa: int = 0
    largest: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def codebook(self) -> bool:
        """Whether the values belong to a group of weights; then only name, bits and code_dtype mean something."""
        return self.kind in ("kmeans", "bcq")

    @property
    def max(self) -> float:
        """The largest representable value."""
        if self.kind == "table":
            return self.values[-1]
        return self.largest or float(2 ** (self.bits - 1) - 1)

    @property
    def min(self) -> float:
        """The smallest (most negative) representable value."""
        if self.kind == "table":
            return self.values[0]
        return -self.largest or float(-(2 ** (self.bits - 1)))

    @property
    def top_exponent(self) -> int:
        """The exponent of the largest value, floor(log2 max): what MX subtracts from that of a block's largest element."""
        return math.frexp(self.max)[1] - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype in which `encode` stores codes."""
        return torch.int8 if self.kind == "int" else torch.uint8

    def round(self, x: Tensor) -> Tensor:
        """The nearest representable value, ties to even, saturating. x: any shape, float32; same shape and dtype out."""
        if self.kind == "int":
            return x.round().clamp_(self.min, self.max)
        if self.kind == "table":
            return self._table(x.device)[self._nearest(x)]
        step = self.spacing(x)
        return (x / step).round_().mul_(step).clamp_(self.min, self.max)

    def spacing(self, x: Tensor) -> Tensor:
        """How far apart the representable values around x are. x: any shape, float32; same shape and dtype out."""
        if self.kind == "int":
            return torch.ones_like(x)
        if self.kind == "table":
            table = self._table(x.device)
            above = torch.searchsorted(table, x.contiguous()).clamp_(1, len(table) - 1)
            return table[above] - table[above - 1]
        # Numbers in [2^e, 2^(e+1)) lie 2^(e - mantissa) apart; below the smallest normal the spacing stays.
        exponent = torch.frexp(x).exponent - 1
        return torch.ldexp(torch.ones_like(x), exponent.clamp_(min=self._lowest_exponent) - self.mantissa)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (`code_dtype`) of the values nearest to x (float32), the same shape."""
        if self.kind == "table":
            return self._nearest(x).to(torch.uint8)
        value = self.round(x)
        if self.kind == "int":
            return value.to(torch.int8)
        magnitude = torch.searchsorted(self._magnitudes.to(x.device), value.abs().contiguous())
        return (magnitude + (torch.signbit(value) * 2 ** (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of `codes`, the same shape."""
        if self.kind == "int":
            return codes.to(torch.float32)
        if self.kind == "table":
            return self._table(codes.device)[codes.to(torch.int64)]
        half = 2 ** (self.bits - 1)
        code = codes.to(torch.int64)
        not_numbers = self._magnitudes.new_full((half - len(self._magnitudes),), torch.nan)
        value = torch.cat([self._magnitudes, not_numbers]).to(codes.device)[code % half]
        return torch.where(code >= half, -value, value)

    def is_number(self, codes: Tensor) -> Tensor:
        """Whether each code of a float format has a value; bool, the same shape."""
        return codes % 2 ** (self.bits - 1) < len(self._magnitudes)

    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values, device=device)

    def _nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest value of the table; halfway between two, the lower."""
        table = self._table(x.device)
        return torch.searchsorted((table[1:] + table[:-1]) / 2, x.contiguous())

    @property
    def _lowest_exponent(self) -> int:
        return 2 - 2 ** (self.exponent - 1)  # 1 - bias, bias = 2^(exponent - 1) - 1

    @cached_property
    def _magnitudes(self) -> Tensor:
        """The non-negative finite values in ascending order, so that the index is the code without its sign."""
        code = torch.arange(2 ** (self.bits - 1))
        exponent, fraction = code >> self.mantissa, (code % 2**self.mantissa).to(torch.float32) / 2**self.mantissa
        normal = torch.ldexp(1 + fraction, exponent - 1 + self._lowest_exponent)
        values = torch.where(exponent > 0, normal, torch.ldexp(fraction, torch.tensor(self._lowest_exponent)))
        return values[values <= self.largest]


def integer(bits: int) -> Format:
    """The two's complement integer format of 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits}-bit integers are not supported; allowed are 2 to 8 bits")
    return Format(name=f"int{bits}", kind="int", bits=bits)


def block_integer(bits: int) -> Format:
    """The integers of MXINT: codes -(2^(b-1) - 1) .. 2^(b-1) - 1."""
    return Format(name=f"mxint{bits}", kind="int", bits=bits, largest=float(2 ** (bits - 1) - 1))


def codebook(kind: Literal["kmeans", "bcq"], bits: int) -> Format:
    """Indices of `bits` bits into the values of a group: any values, or sums of `bits` binary planes (see `codebooks`)."""
    return Format(name=f"{kind}{bits}", kind=kind, bits=bits)


FP8_E4M3 = Format(name="fp8_e4m3", kind="float", bits=8, exponent=4, mantissa=3, largest=448.0)
FP8_E5M2 = Format(name="fp8_e5m2", kind="float", bits=8, exponent=5, mantissa=2, largest=57344.0)
FP6_E3M2 = Format(name="fp6_e3m2", kind="float", bits=6, exponent=3, mantissa=2, largest=28.0)
FP6_E2M3 = Format(name="fp6_e2m3", kind="float", bits=6, exponent=2, mantissa=3, largest=7.5)
FP4_E2M1 = Format(name="fp4_e2m1", kind="float", bits=4, exponent=2, mantissa=1, largest=6.0)
# Quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al., QLoRA, NeurIPS 2023, appendix E).
NF4 = Format(
    name="nf4",
    kind="table",
    bits=4,
    values=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip

FORMATS = {
    known.name: known
    for known in (
        *(integer(bits) for bits in range(2, 9)),
        *(block_integer(bits) for bits in range(2, 9)),
        *(FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1, NF4),
        *(codebook("kmeans", bits) for bits in range(2, 5)),
        *(codebook("bcq", bits) for bits in range(1, 5)),
    )
}
