"""Number formats: what values one stored code can mean.

A `Format` knows nothing of scales or groups (see `qtensor.Spec`). It answers three questions: which values exist, which
of them is nearest to x, and how a value is stored.

Integers are two's complement, `bits` wide: codes -2^(b-1) .. 2^(b-1)-1, stored as int8.
Floats are sign, exponent, mantissa (OCP 8-bit floating point and OCP microscaling v1.0): codes are the bit patterns,
stored as uint8. E4M3 here is the "fn" variant: no infinities, one NaN pattern per sign, largest value 448.
"""

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
        kind: "int" (two's complement) or "float" (sign, exponent, mantissa).
        bits: width of a stored code.
        exponent, mantissa: field widths of a float format, 0 for integers.
        largest: the largest finite value of a float format, 0 for integers.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    exponent: int = 0
    mantissa: int = 0
    largest: float = 0.0

    @property
    def max(self) -> float:
        """The largest representable value."""
        return float(2 ** (self.bits - 1) - 1) if self.kind == "int" else self.largest

    @property
    def min(self) -> float:
        """The smallest (most negative) representable value."""
        return float(-(2 ** (self.bits - 1))) if self.kind == "int" else -self.largest

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype in which `encode` stores codes."""
        return torch.int8 if self.kind == "int" else torch.uint8

    def round(self, x: Tensor) -> Tensor:
        """The nearest representable value, ties to even, saturating. x: any shape, float32; same shape and dtype out."""
        if self.kind == "int":
            return x.round().clamp_(self.min, self.max)
        # Numbers in [2^e, 2^(e+1)) lie 2^(e - mantissa) apart; below the smallest normal the spacing stays.
        exponent = torch.frexp(x).exponent - 1
        step = torch.ldexp(torch.ones_like(x), exponent.clamp_(min=self._lowest_exponent) - self.mantissa)
        return (x / step).round_().mul_(step).clamp_(self.min, self.max)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (`code_dtype`) of the values nearest to x (float32), the same shape."""
        value = self.round(x)
        if self.kind == "int":
            return value.to(torch.int8)
        magnitude = torch.searchsorted(self._magnitudes.to(x.device), value.abs().contiguous())
        return (magnitude + (torch.signbit(value) * 2 ** (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of `codes`, the same shape."""
        if self.kind == "int":
            return codes.to(torch.float32)
        half = 2 ** (self.bits - 1)
        code = codes.to(torch.int64)
        not_numbers = self._magnitudes.new_full((half - len(self._magnitudes),), torch.nan)
        value = torch.cat([self._magnitudes, not_numbers]).to(codes.device)[code % half]
        return torch.where(code >= half, -value, value)

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


FP8_E4M3 = Format(name="fp8_e4m3", kind="float", bits=8, exponent=4, mantissa=3, largest=448.0)
