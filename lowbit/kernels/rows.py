"""Rows of activations as codes, by the kernel that computes them: one pass over memory, a row in registers.

A program makes one row: what produces it (a norm, after the addition of a residual; SiLU times another; GELU; nothing),
then the largest magnitude of the row or of each group, then codes. Where no inputs are quantized, the row is written as floats,
in blocks of columns where these do not depend on each other.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import Format

_COLUMNS = 1024  # of a block of floats that need nothing of the rest of their row
_EACH = 512  # columns of a warp; twice as many where there is one more reduction, in which warps wait for each other
_ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to whole numbers, half to even


@triton.jit
def _gelu(v):
    """v times the normal distribution function of v, within 4e-6: a logistic function of v times a polynomial of v^2.

    The coefficients are a minimax fit on |v| < 6. By erf it takes twice the instructions, more than the memory leaves time for.
    """
    square = tl.minimum(v * v, 36.0)
    factor = 2.30204539 + square * (
        0.105226688 + square * (-0.0003602745 + square * (-8.82381424e-05 + square * 3.22898942e-06))
    )
    return v / (1.0 + tl.exp2(-v * factor))


@triton.jit
def _kernel(
    x, second, weight, bias, out, scale, zero, stream, width, x_stride, second_stride, eps, given,
    PRODUCER: tl.constexpr, ADDED: tl.constexpr, KEPT: tl.constexpr, BIASED: tl.constexpr, ONE_PLUS: tl.constexpr,
    CODED: tl.constexpr, WHOLE: tl.constexpr, STATIC: tl.constexpr, SYMMETRIC: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, width], scale and zero [rows, groups], stream [rows, width] = x + second, or (KEPT) what is quantized.

    Programs: rows, blocks.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    v = tl.load(x + row * x_stride + at, mask=here, other=0.0).to(tl.float32)
    if ADDED:
        v += tl.load(second + row * second_stride + at, mask=here, other=0.0).to(tl.float32)
        v = v.to(stream.dtype.element_ty)
        if not KEPT:
            tl.store(stream + row * width + at, v, mask=here)
        v = v.to(tl.float32)
    if PRODUCER == "rms_norm" or PRODUCER == "layer_norm":
        if PRODUCER == "layer_norm":
            v = tl.where(here, v - tl.sum(v, 0) / width, 0.0)
        v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / width + eps))
        w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
        if ONE_PLUS:
            w += 1.0
        v = v * w
        if BIASED:
            v += tl.load(bias + at, mask=here, other=0.0).to(tl.float32)
        if KEPT:
            v = v.to(stream.dtype.element_ty)
            tl.store(stream + row * width + at, v, mask=here)
            v = v.to(tl.float32)
    elif PRODUCER == "silu_mul":
        up = tl.load(second + row * second_stride + at, mask=here, other=0.0).to(tl.float32)
        v = v * tl.sigmoid(v) * up
    elif PRODUCER == "gelu":
        v = _gelu(v)
    elif PRODUCER == "gelu_tanh":
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    if not CODED:
        tl.store(out + row * width + at, v.to(out.dtype.element_ty), mask=here)
    else:
        v = tl.where(here, v, 0.0)
        groups = v.reshape(BLOCK // GROUP, GROUP)
        if STATIC:
            s = tl.full((BLOCK // GROUP,), 0.0, tl.float32) + given
        else:
            # As integers magnitudes keep their order, and a NaN, which a maximum of floats may pass over, is above infinity.
            bits = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
            if SYMMETRIC:
                reach = bits.to(tl.float32, bitcast=True)
                s = tl.div_rn(tl.maximum(reach, 1e-12), tl.full((BLOCK // GROUP,), HIGH, tl.float32))
            else:
                low, high = tl.minimum(tl.min(groups, 1), 0.0), tl.maximum(tl.max(groups, 1), 0.0)
                s = tl.div_rn(tl.maximum(high - low, 1e-12), tl.full((BLOCK // GROUP,), HIGH - LOW, tl.float32))
            s = tl.where(bits < 0x7F800000, s, float("nan"))
        g = tl.arange(0, BLOCK // GROUP)
        tl.store(scale + row * GROUPS + g, s, mask=g < GROUPS)
        groups = groups * tl.div_rn(1.0, s)[:, None]
        if not SYMMETRIC:
            z = (LOW - tl.div_rn(low, s)) + _ROUNDS - _ROUNDS
            tl.store(zero + row * GROUPS + g, z, mask=g < GROUPS)
            groups += z[:, None]
        groups = tl.minimum(tl.maximum(groups, LOW), HIGH)
        if WHOLE:
            groups = groups + _ROUNDS - _ROUNDS
        else:  # E4M3: 8 steps in a binade, from 2^-6 on
            binade = (groups.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            rounds = tl.maximum(binade, 0.015625) * 0.125 * _ROUNDS
            groups = groups + rounds - rounds
        tl.store(out + row * width + at, groups.to(out.dtype.element_ty).reshape(BLOCK), mask=here)


def rows(
    producer: str,
    x: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    added: bool,
    kept: bool,
    eps: float,
    one_plus: bool,
    fmt: Format | None,
    group: int,
    given: float | None,
    symmetric: bool,
) -> None:
    """Fill `out`: codes or floats [..., width], scale and zero [..., groups], stream [..., width] if added or kept.

    x and second are [rows, width] whose rows are contiguous but may lie further apart.
    """
    count, width = x.shape
    if not count:
        return
    block = max(triton.next_power_of_2(width), group)
    if fmt is None and not producer.endswith("norm"):
        block = min(block, _COLUMNS)
    how: dict[str, Any] = {"LOW": 0.0, "HIGH": 0.0} if fmt is None else {"LOW": fmt.min, "HIGH": fmt.max}
    codes, scale, zero, stream = out
    _kernel[(count, -(-width // block))](
        *(x, second, weight, bias, codes, scale, zero, stream),
        *(width, x.stride(0), 0 if second is None else second.stride(0), eps, given or 0.0),
        PRODUCER=producer,
        ADDED=added,
        KEPT=kept,
        BIASED=bias is not None,
        ONE_PLUS=one_plus,
        CODED=fmt is not None,
        WHOLE=fmt is not None and fmt.kind == "int",
        STATIC=given is not None,
        SYMMETRIC=symmetric,
        **how,
        GROUP=group or block,
        GROUPS=scale.shape[-1],
        BLOCK=block,
        num_warps=min(16, max(1, block // (2 * _EACH if producer == "layer_norm" else _EACH))),
    )
