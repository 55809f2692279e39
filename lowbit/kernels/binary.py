"""Products of one row of float16 or bfloat16 inputs with binary-coded weights, by tables of sums.

Eight columns have 256 sums of +-x. A byte that holds the bits of one plane of these columns says which of the sums is theirs,
so that one look-up, times the factor of the plane, stands for eight products (LUT-GEMM, Park et al., ICLR 2024). The layout has
such bytes, see `packed`: for 128 columns there are 16 tables, one for each byte j of an output, which lie beside each other in
shared memory. Table and sums are float32, and no weight is rounded.

Lanes of a warp are to look up neighbouring j, whose entries lie in different banks. Therefore each reads words on its own: a
hint that they are not contiguous keeps Triton from giving a thread several of them. What a step needs is read in the step
before. K is split, and parts are added, as in `weight_only`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.kernels.packed import Packed
from lowbit.kernels.weight_only import INTERPRETED, Config, _added, _write, processors, scratch_for

_WIDTH = tl.constexpr(16)  # bytes of a plane, output and step
_STEP = tl.constexpr(128)  # columns of a step, which share factors
_SUMS = tl.constexpr(256)  # of a table
_BYTES = " ".join(f"prmt.b32 ${at}, $4, 0, 0x444{byte};" for at, byte in enumerate((0, 2, 1, 3)))  # of two words

# ------------------------------------------------------------------------------------------------------------ the kernel


@triton.jit
def _input(x, at, inner, WHOLE: tl.constexpr):
    """Columns of x, 0 from `inner` on; WHOLE: there are none."""
    return tl.load(x + at) if WHOLE else tl.load(x + at, mask=at < inner, other=0.0)


@triton.jit
def _inputs(x, start, inner, WHOLE: tl.constexpr):
    """The columns of a step, eight vectors: a table is made of one column of each."""
    at = start + tl.arange(0, _WIDTH)
    return (
        _input(x, at, inner, WHOLE),
        _input(x, at + _WIDTH, inner, WHOLE),
        _input(x, at + 2 * _WIDTH, inner, WHOLE),
        _input(x, at + 3 * _WIDTH, inner, WHOLE),
        _input(x, at + 4 * _WIDTH, inner, WHOLE),
        _input(x, at + 5 * _WIDTH, inner, WHOLE),
        _input(x, at + 6 * _WIDTH, inner, WHOLE),
        _input(x, at + 7 * _WIDTH, inner, WHOLE),
    )


@triton.jit
def _words(words, step, start, columns, PLANES: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr):
    """Words of a step, of a byte for each of PLANES planes, [_WIDTH, outputs]; PLANES 0: of words of two steps one byte."""
    j = tl.arange(0, _WIDTH)
    n = tl.arange(0, BLOCK_N)
    if PLANES == 0:
        first = words + ((step // 2).to(tl.int64) * columns + start) * (2 * _WIDTH) + step % 2
        place = tl.max_contiguous(n[None, :] * (2 * _WIDTH) + 2 * j[:, None], [1, 1])
    else:
        first = words + (step.to(tl.int64) * columns + start) * _WIDTH
        place = tl.max_contiguous(n[None, :] * _WIDTH + j[:, None], [1, 1])
    there = (start + n < columns)[None, :]
    word = tl.load(first + place) if EVEN else tl.load(first + place, mask=there, other=0)
    unsigned = tl.uint16 if word.dtype == tl.int16 else tl.uint8
    return word.to(unsigned, bitcast=True)


@triton.jit
def _factors(scale, step, n, columns, groups, CODED: tl.constexpr, LOOKED_UP: tl.constexpr, GROUP: tl.constexpr):
    """Factors of a step: of what is looked up, [1, outputs, LOOKED_UP], and of the sum of x, [outputs]."""
    group = tl.minimum(step * _STEP // GROUP, groups - 1) if GROUP > 0 else 0
    first = scale + group * (CODED + 1) * columns + n
    plane = tl.arange(0, LOOKED_UP)
    there = n < columns
    alpha = tl.load(first[None, :, None] + plane[None, None, :] * columns, mask=there[None, :, None], other=0.0)
    return alpha, tl.load(first + CODED * columns, mask=there, other=0.0)


@triton.jit
def _entries(byte):
    """Where the sums that bytes stand for lie in the tables."""
    return byte.to(tl.int32) * _WIDTH + tl.arange(0, _WIDTH)[:, None]


@triton.jit
def _bytes(word, ASM: tl.constexpr):
    """The lower and the upper byte of words of 16 bits. An instruction for each, which the compiler would make two."""
    if ASM is None:
        lower, upper = word & 255, word >> 8
    else:
        lower, upper = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=2
        )  # fmt: skip
    return lower, upper


@triton.jit
def _tables(values):
    """All sums of +-x: [_SUMS * _WIDTH], entry by entry; the lowest bit is that of the first vector."""
    entry = tl.arange(0, _SUMS)
    sums = tl.zeros((_SUMS, _WIDTH), tl.float32)
    for bit in tl.static_range(8):
        sign = 2.0 * ((entry >> bit) & 1).to(tl.float32) - 1.0
        sums += sign[:, None] * values[bit].to(tl.float32)[None, :]
    return tl.reshape(sums, (_SUMS * _WIDTH,))


@triton.jit(do_not_specialize=["steps", "groups", "parts"])
def _kernel(
    x, words, high, scale, outer, bias, residual, out, scratch, counters, columns, inner, steps, groups, parts,
    ASM: tl.constexpr, CODED: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [1, columns] = x [1, inner] W^T; programs: blocks of columns, 1, parts of K.

    WHOLE: steps fill K; EVEN: blocks have all their columns.
    """
    # Of 3 planes the offset is looked up as a fourth, whose bits are all 1; else it is multiplied by the sum of x.
    LOOKED_UP: tl.constexpr = 4 if CODED == 3 else CODED
    block, part = tl.program_id(0), tl.program_id(2)
    start = block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    total = tl.zeros((_WIDTH, BLOCK_N), tl.float32)
    offsets = tl.zeros((BLOCK_N,), tl.float32)
    each = (steps + parts - 1) // parts
    last = tl.minimum(steps, part * each + each)
    alpha, offset = _factors(scale, part * each, n, columns, groups, CODED, LOOKED_UP, GROUP)
    values = _inputs(x, part * each * _STEP, inner, WHOLE)
    word = _words(words, part * each, start, columns, 0 if CODED == 1 else 2, BLOCK_N, EVEN)
    third = word
    if CODED > 2:
        third = _words(high, part * each, start, columns, CODED - 2, BLOCK_N, EVEN)
    for step in range(part * each, last):
        if CODED != 3:
            sums = values[0].to(tl.float32)
            for bit in tl.static_range(1, 8):
                sums += values[bit].to(tl.float32)
            offsets += offset.to(tl.float32) * tl.sum(sums, 0)
        tables = _tables(values)
        if CODED == 1:
            entries = _entries(word)
        else:
            lower, upper = _bytes(word, ASM)
            if CODED == 2:
                entries = tl.join(_entries(lower), _entries(upper))
            else:
                if CODED == 3:
                    fourth = tl.full((_WIDTH, BLOCK_N), _SUMS - 1, tl.int32)
                else:
                    third, fourth = _bytes(third, ASM)
                even, odd = tl.join(_entries(lower), _entries(third)), tl.join(_entries(upper), _entries(fourth))
                entries = tl.join(even, odd)
        following = tl.minimum(step + 1, last - 1)
        next_alpha, offset = _factors(scale, following, n, columns, groups, CODED, LOOKED_UP, GROUP)
        values = _inputs(x, following * _STEP, inner, WHOLE)
        word = _words(words, following, start, columns, 0 if CODED == 1 else 2, BLOCK_N, EVEN)
        third = word
        if CODED > 2:
            third = _words(high, following, start, columns, CODED - 2, BLOCK_N, EVEN)
        found = tl.gather(tables, tl.reshape(entries, (_WIDTH * BLOCK_N * LOOKED_UP,)), 0)
        total += tl.sum(tl.reshape(found, (_WIDTH, BLOCK_N, LOOKED_UP)) * alpha.to(tl.float32), 2)
        alpha = next_alpha
    total = (tl.sum(total, 0) + offsets)[:, None]
    m = tl.arange(0, 1)
    if SPLIT:
        finished, total = _added(total, scratch, counters, parts, part, block)
        if finished:
            _write(total, outer, bias, residual, out, n, m, 1, columns, BIASED, ADDED)
    else:
        _write(total, outer, bias, residual, out, n, m, 1, columns, BIASED, ADDED)


# ------------------------------------------------------------------------------------------------------------- the launch

_BLOCK = 128  # outputs of a program


def takes(rows: int, packed: Packed) -> bool:
    """Whether this kernel multiplies: one row, binary coding, groups of whole steps."""
    return rows == 1 and FORMATS[packed.format].kind == "bcq" and packed.group % _STEP.value == 0


@cache
def config_for(columns: int, inner: int, processors: int) -> Config:
    """The parts of K that should take least, counted in steps, of blocks of many outputs, for which a table is made once.

    An estimate: beside its steps a program takes two for its start and end, up to three share a processor without slowing each
    other by much, and the last program adds three parts in the time of a step. Sweeps on an H200 agree within a tenth.
    """
    blocks, steps = -(-columns // _BLOCK), -(-inner // _STEP.value)

    def cost(parts: int) -> float:
        most = -(-blocks * parts // processors)
        return max(most, 2.5) * (-(-steps // parts) + 2) + parts / 3

    return Config(1, _BLOCK, min(range(1, steps + 1), key=cost))


def linear(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None, *, config: Config | None = None) -> Tensor:
    """x [1, in] times the packed matrix, plus bias [out], plus residual [1, out]: [1, out] in the dtype of x."""
    assert takes(len(x), packed) and packed.scale is not None
    columns, inner = packed.shape
    if config is None:
        config = config_for(columns, inner, processors(x.device))
    out = torch.empty(1, columns, dtype=x.dtype, device=x.device)
    coded, steps = FORMATS[packed.format].bits, -(-inner // _STEP.value)
    parts = -(-steps // -(-steps // config.split))  # none is empty
    grid = (-(-columns // config.block_n), 1, parts)
    scratch = scratch_for(grid, config.block_n, x.device)
    words = packed.words.view(torch.int8) if coded == 1 else packed.words
    _kernel[grid](
        *(x, words, packed.high, packed.scale, packed.outer, bias, residual, out, scratch, packed.counters),
        *(columns, inner, steps, len(packed.scale), parts),
        ASM=None if INTERPRETED else _BYTES,
        CODED=coded,
        GROUP=packed.group,
        BIASED=bias is not None,
        ADDED=residual is not None,
        BLOCK_N=config.block_n,
        SPLIT=parts > 1,
        WHOLE=inner % _STEP.value == 0,
        EVEN=columns % config.block_n == 0,
        num_warps=config.warps,
        num_stages=1,
    )
    return out
