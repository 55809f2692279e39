"""Attention under a mask of keys, and what a step of decoding puts into its cache.

Of one token (a step of decoding) a program has a part of the keys of one head, as heads alone are too few to read a cache as
fast as memory gives it; the last part that finishes joins them (Flash-Decoding, Dao et al., 2023), in their order. Of more
tokens (an encoder) a program has a block of them and all keys (FlashAttention-2, Dao, 2023). What the mask hides is not read.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.weight_only import processors

_TOKENS = 64  # that a program of one token reads at once
_PROGRAMS = 4  # of one token, for a multiprocessor
_BLOCK = 64  # tokens, and keys, of a program of many
_LOWEST = tl.constexpr(-1.0e30)
_LOG2_E = 1.4426950408889634


@triton.jit
def _read(
    k, v, mask, key, end, row, head, d, there, mask_b, k_b, k_h, k_t, v_b, v_h, v_t, MASKED: tl.constexpr
):  # fmt: skip
    """Which of some keys there are and the mask shows, and these and their values [keys, width]; of the others 0."""
    seen = key < end
    if MASKED:
        seen = tl.load(mask + row * mask_b + key, mask=seen, other=0) != 0
    read = seen[:, None] & there[None, :]
    keys = tl.load(k + row * k_b + head * k_h + key[:, None] * k_t + d[None, :], mask=read, other=0.0)
    values = tl.load(v + row * v_b + head * v_h + key[:, None] * v_t + d[None, :], mask=read, other=0.0)
    return seen, keys, values


@triton.jit
def _one_kernel(
    q, k, v, mask, out, scratch, counters, length, each, heads, shared, width, factor,
    mask_b, q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t,
    MASKED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, width]; programs: heads of all rows, parts of the tokens. shared: heads of q for one of k and v."""
    slot, part = tl.program_id(0), tl.program_id(1)
    row, head = (slot // heads).to(tl.int64), (slot % heads).to(tl.int64)
    of_k = head // shared
    d = tl.arange(0, WIDTH)
    there = d < width
    query = tl.load(q + row * q_b + head * q_h + d, mask=there, other=0.0).to(tl.float32) * factor
    most = tl.full((1,), _LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    made = tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum(length, part * each + each)
    for first in range(part * each, end, TOKENS):
        key = first + tl.arange(0, TOKENS)
        seen, keys, values = _read(
            k, v, mask, key, end, row, of_k, d, there, mask_b, k_b, k_h, k_t, v_b, v_h, v_t, MASKED
        )  # fmt: skip
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


@triton.jit
def _many_kernel(
    q, k, v, mask, out, tokens, keys, heads, shared, width, factor, mask_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, tokens, width]; programs: blocks of tokens, heads of all rows. factor: for powers of two."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    of_k = head // shared
    t, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    there = d < width
    mine = (t < tokens)[:, None] & there[None, :]
    query = tl.load(q + row * q_b + head * q_h + t[:, None] * q_t + d[None, :], mask=mine, other=0.0)
    most = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    made = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, keys, BLOCK):
        key = first + tl.arange(0, BLOCK)
        seen, of_keys, values = _read(
            k, v, mask, key, keys, row, of_k, d, there, mask_b, k_b, k_h, k_t, v_b, v_h, v_t, MASKED
        )  # fmt: skip
        score = tl.where(seen[None, :], tl.dot(query, of_keys.T) * factor, _LOWEST)
        higher = tl.maximum(most, tl.max(score, 1))
        share = tl.where(seen[None, :], tl.exp2(score - higher[:, None]), 0.0)
        shrunk = tl.exp2(most - higher)
        total = total * shrunk + tl.sum(share, 1)
        made = tl.dot(share.to(values.dtype), values, made * shrunk[:, None])
        most = higher
    place = row * out_b + head * out_h + t[:, None].to(tl.int64) * out_t + d[None, :]
    tl.store(out + place, (made / total[:, None]).to(out.dtype.element_ty), mask=mine)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float, out: Tensor) -> None:
    """Fill out [rows, heads, tokens, width] by softmax(factor q k^T) v over the keys where mask [rows or 1, keys] is true.

    q is [rows, heads, tokens, width], k and v are [rows, heads or a part of them, keys, width]; the last axis is contiguous.
    """
    rows, heads, tokens, width = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    if not rows * tokens:
        return
    seen = None if mask is None else mask.view(torch.uint8)
    mask_b = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    sources = (*k.stride()[:3], *v.stride()[:3])
    if tokens > 1:
        _many_kernel[(triton.cdiv(tokens, _BLOCK), rows * heads)](
            *(q, k, v, seen, out, tokens, keys, heads, shared, width, factor * _LOG2_E, mask_b),
            *(*q.stride()[:3], *sources, *out.stride()[:3]),
            MASKED=mask is not None,
            BLOCK=_BLOCK,
            WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=4,
            num_stages=2,
        )
        return
    parts = max(1, min(_PROGRAMS * processors(q.device) // (rows * heads), keys // _TOKENS))
    each = triton.cdiv(triton.cdiv(keys, parts), _TOKENS) * _TOKENS
    block = triton.next_power_of_2(width)
    scratch = torch.empty(rows * heads * parts * (block + 2), device=q.device) if parts > 1 else None
    counters = _counters(q.device, triton.next_power_of_2(rows * heads)) if parts > 1 else None
    _one_kernel[(rows * heads, parts)](
        *(q, k, v, seen, out, scratch, counters, keys, each, heads, shared, width, factor, mask_b, *q.stride()[:2], *sources),
        MASKED=mask is not None,
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
