"""Rotary position embedding of queries and keys in one kernel (RoFormer, Su et al., 2021, as Llama lays it out).

Channel i of a head is turned with channel i + half. A program turns some heads of one token, the queries' or the keys'.
"""

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # of a program


@triton.jit
def _turn(
    x, cos, sin, out, token, batch, position, first, heads, half, stride_b, stride_h, stride_t, out_b, out_h, out_t,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads from `first` on of one token; cos and sin are those of the token, both halves of them."""
    h = first + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    angle = token.to(tl.int64) * 2 * half + i
    place = batch.to(tl.int64) * stride_b + position.to(tl.int64) * stride_t + h * stride_h + i
    there = batch.to(tl.int64) * out_b + position.to(tl.int64) * out_t + h * out_h + i
    here = (h < heads) & (i < half)
    a = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + place + half, mask=here, other=0.0).to(tl.float32)
    known = i < half
    cos_a = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=known, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=known, other=0.0).to(tl.float32)
    tl.store(out + there, (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=here)
    tl.store(out + there + half, (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=here)


@triton.jit
def _kernel(
    q, k, cos, sin, q_out, k_out, length, shared, q_heads, k_heads, half,
    q_b, q_h, q_t, k_b, k_h, k_t, q_out_b, q_out_h, q_out_t, k_out_b, k_out_h, k_out_t,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs: tokens of all rows, blocks of heads, first those of q. shared: whether rows have the same angles."""
    batch, position = tl.program_id(0) // length, tl.program_id(0) % length
    token = tl.where(shared, position, tl.program_id(0))
    block = tl.program_id(1)
    of_q = tl.cdiv(q_heads, HEADS)
    if block < of_q:
        _turn(
            q, cos, sin, q_out, token, batch, position, block * HEADS, q_heads, half, q_b, q_h, q_t, q_out_b, q_out_h, q_out_t,
            HEADS, BLOCK,
        )  # fmt: skip
    else:
        block -= of_q
        _turn(
            k, cos, sin, k_out, token, batch, position, block * HEADS, k_heads, half, k_b, k_h, k_t, k_out_b, k_out_h, k_out_t,
            HEADS, BLOCK,
        )  # fmt: skip


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """Fill q_out and k_out [rows, heads, tokens, width] by q and k turned; cos and sin are [rows or 1, tokens, width].

    The last axis of all is contiguous.
    """
    rows, heads, length, width = q.shape
    if not rows * length:
        return
    grid = (rows * length, -(-heads // _HEADS) + -(-k.shape[1] // _HEADS))
    strides = [part.stride()[:3] for part in (q, k, q_out, k_out)]
    _kernel[grid](
        *(q, k, cos, sin, q_out, k_out, length, len(cos) == 1, heads, k.shape[1], width // 2),
        *(step for part in strides for step in part),
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(width // 2),
        num_warps=4,
    )
