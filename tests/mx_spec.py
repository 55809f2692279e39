"""The OCP microscaling formats (MX v1.0) in plain Python, one number at a time, from the specification's definitions.

Element values come from writing out every code. A block is converted as in section 6.3: the shared exponent is that of the
largest magnitude less the element's largest exponent, and each element is the nearest value of its format, ties to even,
saturating. Section 6.3 allows other ways to choose the scale; "even" and "ceil" are the two that engines use.

INT8 elements are, in the specification, k / 64 with k = -127 .. 127, so their largest exponent is 0. Here they are the
integers k themselves, with scales that are 2^6 times smaller, and likewise for fewer bits.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache

# exponent bits, mantissa bits, codes of the positive half that are no numbers
FLOATS = {
    "fp8_e4m3": (4, 3, {0x7F}),
    "fp8_e5m2": (5, 2, {0x7C, 0x7D, 0x7E, 0x7F}),
    "fp6_e3m2": (3, 2, set()),
    "fp6_e2m3": (2, 3, set()),
    "fp4_e2m1": (2, 1, set()),
}


def float_value(code: int, exponent_bits: int, mantissa_bits: int) -> Fraction:
    """The value of a sign-exponent-mantissa code that is a number."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if exponent == 0:
        return sign * Fraction(mantissa, 1 << mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 1 << mantissa_bits)) * Fraction(2) ** (exponent - bias)


@cache
def values(name: str) -> dict[int, Fraction]:
    """Every code of an element format that is a number, and its value."""
    if name.startswith("mxint"):
        most = (1 << int(name.removeprefix("mxint")) - 1) - 1
        return {k: Fraction(k) for k in range(-most, most + 1)}
    exponent_bits, mantissa_bits, excluded = FLOATS[name]
    half = 1 << exponent_bits + mantissa_bits
    return {code: float_value(code, exponent_bits, mantissa_bits) for code in range(2 * half) if code % half not in excluded}


@cache
def ascending(name: str) -> list[tuple[Fraction, int]]:
    """Values and codes of an element format."""
    return sorted((value, code) for code, value in values(name).items())


def largest(name: str) -> Fraction:
    """The largest value of an element format."""
    return max(values(name).values())


def floor_log2(x: Fraction) -> int:
    """The integer e with 2^e <= x < 2^(e+1)."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    while Fraction(2) ** e > x:
        e -= 1
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    return e


def nearest(x: Fraction, name: str) -> Fraction:
    """The value of the format nearest to x; of two equally near the one whose code is even; saturating."""
    every = ascending(name)
    place = bisect_left(every, (x, 0))
    neighbours = every[max(0, place - 1) : place + 1]
    return min(neighbours, key=lambda pair: (abs(pair[0] - x), pair[1] % 2))[0]


def mantissa_bits(name: str) -> int:
    """Bits after the first significant one in the largest binade."""
    return int(name.removeprefix("mxint")) - 2 if name.startswith("mxint") else FLOATS[name][1]


def scale_exponent(block: list[float], name: str, rule: str) -> int | None:
    """The exponent of the shared scale of a block; None for zeros, where any will do."""
    a = max(abs(Fraction(x)) for x in block)
    if a == 0:
        return None
    top = floor_log2(largest(name))
    if rule == "floor":
        return floor_log2(a) - top
    if rule == "ceil":
        ratio = a / largest(name)
        e = floor_log2(ratio)
        return e if Fraction(2) ** e == ratio else e + 1
    e, kept = floor_log2(a), mantissa_bits(name)
    unit = Fraction(2) ** (e - kept)
    steps = a / unit  # at least 2^kept
    return floor_log2(math.floor(steps + Fraction(1, 2)) * unit) - top


def convert(block: list[float], name: str, rule: str = "floor") -> list[float]:
    """A block as its elements times its scale."""
    e = scale_exponent(block, name, rule)
    if e is None:
        return [0.0] * len(block)
    scale = Fraction(2) ** max(-126, min(e, 127))
    return [float(nearest(Fraction(x) / scale, name) * scale) for x in block]
