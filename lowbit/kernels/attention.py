"""What a step of decoding does with a cache: keys and values put into it, and attention of one token to it under a mask.

In attention a program has a part of the tokens of one head, as heads alone are too few to read a cache as fast as memory gives
it; the last part that finishes joins them (Flash-Decoding, Dao et al., 2023), in their order. What the mask hides is not read.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.weight_only import processors

_TOKENS = 32  # that a program reads at once
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _kernel(
    q, k, v, mask, out, scratch, counters, length, each, heads, width, factor, mask_b, q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, width]; programs: heads of all rows, parts of the tokens."""
    slot, part = tl.program_id(0), tl.program_id(1)
    row, head = (slot // heads).to(tl.int64), (slot % heads).to(tl.int64)
    d = tl.arange(0, WIDTH)
    there = d < width
    query = tl.load(q + row * q_b + head * q_h + d, mask=there, other=0.0).to(tl.float32) * factor
    most = tl.full((1,), _LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    made = tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum(length, part * each + each)
    for first in range(part * each, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        seen = tl.load(mask + row * mask_b + token, mask=token < end, other=0) != 0
        read = seen[:, None] & there[None, :]
        keys = tl.load(k + row * k_b + head * k_h + token[:, None] * k_t + d[None, :], mask=read, other=0.0)
        values = tl.load(v + row * v_b + head * v_h + token[:, None] * v_t + d[None, :], mask=read, other=0.0)
        score = tl.where(seen, tl.sum(keys.to(tl.float32) * query[None, :], 1), _LOWEST)
        higher = tl.maximum(most, tl.max(score, 0))
        share = tl.where(seen, tl.exp(score - higher), 0.0)
        shrunk = tl.exp(most - higher)
        total = total * shrunk + tl.sum(share, 0)
        made = made * shrunk + tl.sum(values.to(tl.float32) * share[:, None], 0)
        most = higher
    if SPLIT:
        parts = tl.num_programs(1)
        mine = scratch + (slot.to(tl.int64) * parts + part) * (WIDTH + 2)
        tl.store(mine + d, made)
        tl.store(mine + WIDTH + tl.arange(0, 1), most)
        tl.store(mine + WIDTH + 1 + tl.arange(0, 1), total)
        tl.debug_barrier()
        if tl.atomic_add(counters + slot, 1, sem="acq_rel") == parts - 1:
            most = tl.full((1,), _LOWEST, tl.float32)
            total = tl.zeros((1,), tl.float32)
            made = tl.zeros((WIDTH,), tl.float32)
            for other in range(parts):
                its = scratch + (slot.to(tl.int64) * parts + other) * (WIDTH + 2)
                its_most = tl.load(its + WIDTH + tl.arange(0, 1), cache_modifier=".cg")
                higher = tl.maximum(most, its_most)
                shrunk, its_share = tl.exp(most - higher), tl.exp(its_most - higher)
                total = total * shrunk + tl.load(its + WIDTH + 1 + tl.arange(0, 1), cache_modifier=".cg") * its_share
                made = made * shrunk + tl.load(its + d, cache_modifier=".cg") * its_share
                most = higher
            tl.store(counters + slot, 0)
            tl.store(out + slot.to(tl.int64) * width + d, (made / total).to(out.dtype.element_ty), mask=there)
    else:
        tl.store(out + slot.to(tl.int64) * width + d, (made / total).to(out.dtype.element_ty), mask=there)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factor: float, out: Tensor) -> None:
    """Fill out [rows, heads, width] by softmax(factor q k^T) v over the tokens where mask [rows or 1, tokens] is true.

    q is [rows, heads, width], k and v are [rows, heads, tokens, width]; the last axis of all is contiguous.
    """
    rows, heads, width = q.shape
    length = k.shape[2]
    if not rows:
        return
    parts = max(1, min(processors(q.device) // (rows * heads), length // _TOKENS))
    each = triton.cdiv(triton.cdiv(length, parts), _TOKENS) * _TOKENS
    block = triton.next_power_of_2(width)
    scratch = torch.empty(rows * heads * parts * (block + 2), device=q.device) if parts > 1 else None
    counters = _counters(q.device, triton.next_power_of_2(rows * heads)) if parts > 1 else None
    _kernel[(rows * heads, parts)](
        *(q, k, v, mask.view(torch.uint8), out, scratch, counters, length, each, heads, width, factor),
        *(0 if len(mask) == 1 else mask.stride(0), *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
        TOKENS=_TOKENS,
        WIDTH=block,
        SPLIT=parts > 1,
        num_warps=4,
    )


@triton.jit
def _put_kernel(
    k, v, keys, values, at, heads, length, k_width, v_width, k_b, k_h, k_t, v_b, v_h, v_t, WIDTH: tl.constexpr
):  # fmt: skip
    """keys, values [rows, heads, length, width] at [tokens] = k, v; programs: heads of all rows, tokens."""
    slot, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = slot // heads, slot % heads
    place = slot * length + tl.load(at + token)
    d = tl.arange(0, WIDTH)
    new = tl.load(k + row * k_b + head * k_h + token * k_t + d, mask=d < k_width, other=0.0)
    tl.store(keys + place * k_width + d, new, mask=d < k_width)
    new = tl.load(v + row * v_b + head * v_h + token * v_t + d, mask=d < v_width, other=0.0)
    tl.store(values + place * v_width + d, new, mask=d < v_width)


def put(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor) -> None:
    """Put k and v [rows, heads, tokens, width] into contiguous keys and values [rows, heads, length, width], at [tokens].

    The last axis of k and v is contiguous.
    """
    rows, heads, tokens, width = k.shape
    _put_kernel[(rows * heads, tokens)](
        *(k, v, keys, values, at, heads, keys.shape[2], width, v.shape[3], *k.stride()[:3], *v.stride()[:3]),
        WIDTH=triton.next_power_of_2(max(width, v.shape[3])),
        num_warps=1,
    )


@cache
def _counters(device: torch.device, count: int) -> Tensor:
    """Parts that have finished, of every head: 0 before and after a launch; no two launches run at once."""
    return torch.zeros(count, dtype=torch.int32, device=device)
