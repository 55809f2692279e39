"""Products of float16 or bfloat16 inputs with packed weights: integers and floats of 2 to 8 bits, and binary coding.

The product is computed transposed, y^T = W x^T, because only the left operand of a tensor core may come from registers, where
the weights are unpacked (see `packed` for their layout in planes of columns).

A code becomes a float without a conversion. Integers are put into the mantissa of 1024 (float16) or 128 (bfloat16), at its end
or before, which makes that number plus the code times a power of two, from which one instruction makes the code less its zero
point, exactly. The bits of a small float are moved to where the larger format has them, which makes it too small by a power of
two. A binary plane becomes -1 and 1: the sign of a one. Planes are multiplied one by one and their sums added with their
factors, the offset being that of a plane of ones: no weight is ever rounded. One row of x is multiplied by tables of sums
instead, see `binary`.

Scales multiply the sum of a group where registers hold two sums, else the weights: for these, ptxas runs products one after the
other (warning C7515). From `rows_of_cublas` rows on, the weights are unpacked to memory, a part that stays in the L2 cache at a
time, and cuBLAS multiplies, which it does that much faster. x and words are not read by the copy engine: waiting for it doubles
the instructions of a step, of which there are as many as the memory allows.

Where x has few rows, K is split within a program: the left operand is the same outputs at several parts of K, one below the
other, the right one the same rows of x at these parts, beside each other, and of the product only the blocks on the diagonal
count. A tensor core's instruction has at least 8 columns, so for one row of x 8 such slices cost nothing. Beyond, K is split
over programs; partial sums go to scratch memory, and the last program to finish adds them in their order. No floating-point
atomics: the same input gives the same bits. One matrix must not be multiplied in two streams at the same time: its counters
say which program is the last.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import FORMATS, Format
from lowbit.kernels.packed import Packed, container, planes_of

# ------------------------------------------------------------------------------------------------------------ the kernel


@cache
def _instructions(fmt: Format, dtype: torch.dtype) -> tuple[str | None, ...]:
    """For every plane (of binary coding, for every plane and bit): words in a register become two floats, see above.

    None where there are none: in the interpreter, and for 8-bit integers, which do not fit into the mantissa of a bfloat16.
    """
    bits, half = container(fmt), dtype == torch.float16
    mantissa, one = (10, 0x3C00) if half else (7, 0x3F80)
    if INTERPRETED or (fmt.kind == "int" and bits > mantissa):
        return (None,) * (planes_of(bits) * max(1, fmt.bits))
    twice = 0x00010001
    low = 2 if bits == 3 else bits

    def moved(source: str, up: int) -> str:
        return f"{'shl' if up >= 0 else 'shr'}.b32 t, {source}, {abs(up)};"

    def kept(mask: int, other: str) -> str:  # (t & mask) | other
        return f"lop3.b32 $0, t, 0x{mask * twice:08x}, {other}, 0xea;"

    found: list[str | None] = []
    for plane, (_, place) in enumerate(_places(fmt, dtype)):
        at = plane * low
        if fmt.kind == "bcq":
            for bit in range(fmt.bits):
                source = "$2" if bit >= 2 else "$1"
                found.append(_scoped(moved(source, 15 - (plane + bit % 2 * 8)) + kept(0x8000, f"0x{one * twice:08x}")))
        elif fmt.kind == "int":
            base = 0x6400 if half else 0x4300
            code = f"lop3.b32 $0, $1, 0x{(2**low - 1 << place) * twice:08x}, 0x{base * twice:08x}, 0xea;"
            third = moved("$2", place + 2 - plane) + kept(4 << place, "$0")
            found.append(_scoped(code + third if bits == 3 else code))
        else:
            up = mantissa - fmt.mantissa
            magnitude = f"{moved('$1', up - at)} and.b32 $0, t, 0x{(2 ** (bits - 1) - 1 << up) * twice:08x};"
            found.append(_scoped(magnitude + moved("$1", 15 - (at + bits - 1)) + kept(0x8000, "$0")))
    return tuple(found)


def _places(fmt: Format, dtype: torch.dtype) -> list[tuple[int, int]]:
    """For every plane of integers: by how much words are shifted to the right, and at which bit its code then lies.

    A code need not lie at the lowest bit of the mantissa, but within it, so several planes share a shift. All are 0 of other
    formats, and in the interpreter, where codes are cut out without instructions.
    """
    bits, mantissa = container(fmt), 10 if dtype == torch.float16 else 7
    if INTERPRETED or fmt.kind != "int":
        return [(0, 0)] * planes_of(bits)
    low = 2 if bits == 3 else bits
    each = max(1, (mantissa - bits) // low + 1)
    return [(plane // each * each * low, plane % each * low) for plane in range(planes_of(bits))]


def _scoped(text: str) -> str:
    return f"{{ .reg .b32 t; {text} }}"


@triton.jit
def _unpacked(
    word, third, HALF: tl.constexpr, ASM: tl.constexpr, AT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, PLANE: tl.constexpr, BIT: tl.constexpr, BASE: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """Floats of a plane: integers BASE + code * 2^place, floats too small by FACTOR, binary coding 1 - 2 * bit."""
    dtype = tl.float16 if HALF else tl.bfloat16
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    if ASM[AT] is not None:
        if SHIFTS[PLANE] is not None:
            word = tl.inline_asm_elementwise(SHIFTS[PLANE], "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2)
        if BITS == 3:
            w = tl.inline_asm_elementwise(ASM[AT], "=&r,r,r", [word, third], dtype=dtype, is_pure=True, pack=2)
        else:
            w = tl.inline_asm_elementwise(ASM[AT], "=&r,r", [word], dtype=dtype, is_pure=True, pack=2)
    elif KIND == "bcq":
        bits = third if BIT >= 2 else word
        w = (1 - 2 * ((bits >> (PLANE + BIT % 2 * 8)) & 1)).to(dtype)
    else:
        code = (word >> (PLANE * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            code = code | (((third >> PLANE) & 1) << 2)
        if KIND == "int":
            w = code.to(dtype) + BASE
        else:
            UP: tl.constexpr = (10 if HALF else 7) - MANTISSA
            bits = ((code & ((1 << (BITS - 1)) - 1)) << UP) | ((code >> (BITS - 1)) << 15)
            w = bits.to(tl.int16).to(dtype, bitcast=True)
    return w


@triton.jit
def _centred(w, z, BASE: tl.constexpr, PLACE: tl.constexpr):
    """code - z of BASE + code * 2^PLACE, exactly."""
    if PLACE == 0:
        w = w - (z + BASE).to(w.dtype)
    else:
        UNIT: tl.constexpr = 1.0 / (1 << PLACE)
        w = tl.fma(w, tl.full((1, 1), UNIT, w.dtype), -(z + BASE * UNIT).to(w.dtype))
    return w


@triton.jit
def _inputs(x, m, k, rows, inner, end, WHOLE: tl.constexpr):
    """x transposed: columns k [., rows or 1] of rows m, which are 0 from `end` [1, rows] or one for all on; WHOLE: all are
    before it."""
    here = m[None, :] < rows
    if not WHOLE:
        here = here & (k < end)
    return tl.load(x + (m[None, :].to(tl.int64) * inner + k), mask=here, other=0.0)


@triton.jit
def _scales(
    scale, zero, first, n, columns, groups,
    GROUP: tl.constexpr, SCALED: tl.constexpr, ASYMMETRIC: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of outputs n in the group of a column (one for all, or for each output)."""
    dtype: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    there = n < columns
    group = tl.minimum(first // GROUP, groups - 1) if GROUP > 0 else 0
    s = tl.full(n.shape, 1.0, dtype)
    z = tl.full(n.shape, 1 << (BITS - 1), dtype)
    if SCALED:
        s = tl.load(scale + group * columns + n, mask=there, other=0.0)
    if ASYMMETRIC:
        z = tl.load(zero + group * columns + n, mask=there, other=0.0)
    return s, z


@triton.jit
def _tile(
    total, s, z, x, words, high, scale, zero, tile, start, n, m, rows, columns, inner, end, groups,
    ASM: tl.constexpr, SHIFTS: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    CODED: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, SCALED: tl.constexpr, ASYMMETRIC: tl.constexpr, SCALE_SUMS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """total [outputs n, rows m] plus the product of a tile (of one for each output) and the columns of x from `start` on
    (one for all, or [1, rows]).

    A tile has spans of SPAN columns that share a scale; a span has whole planes. s, z: scales and zero points, if it has one.
    """
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    EACH: tl.constexpr = SPAN // WIDTH
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_M: tl.constexpr = total.shape[1]
    dtype = x.dtype.element_ty
    HALF: tl.constexpr = dtype == tl.float16
    BASE: tl.constexpr = 0 if ASM[0] is None else (1024 if HALF else 128)
    TILE: tl.constexpr = PLANES * WIDTH
    j = tl.arange(0, WIDTH)
    there = n < columns
    place = n.to(tl.int64) + tile * columns
    word = tl.load(words + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
    third = word
    if BITS == 3:
        third = tl.load(high + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0).to(tl.int16)
    for span in tl.static_range(TILE // SPAN):
        if KIND == "bcq":
            group = tl.minimum((tile * TILE + span * SPAN) // GROUP, groups - 1) if GROUP > 0 else 0
            for bit in tl.static_range(CODED + 1):
                sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for plane in tl.static_range(span * EACH, span * EACH + EACH):
                    values = _inputs(x, m, start + (plane * WIDTH + j)[:, None], rows, inner, end, WHOLE)
                    if bit == CODED:
                        w = tl.full((BLOCK_N, WIDTH), 1.0, dtype)
                    else:
                        w = _unpacked(
                            word, third, HALF, ASM, plane * CODED + bit, KIND, BITS, MANTISSA, plane, bit, BASE, SHIFTS
                        )  # fmt: skip
                    sums = tl.dot(w, values, sums)
                alpha = tl.load(scale + (group * (CODED + 1) + bit) * columns + n, mask=there, other=0.0).to(tl.float32)
                if bit == CODED:
                    total += sums * alpha[:, None]
                else:
                    total -= sums * alpha[:, None]
        else:
            if SPAN < TILE:
                s, z = _scales(
                    scale, zero, tile * TILE + span * SPAN, n, columns, groups, GROUP, SCALED, ASYMMETRIC, HALF, BITS
                )  # fmt: skip
            if SCALE_SUMS:
                sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for plane in tl.static_range(span * EACH, span * EACH + EACH):
                values = _inputs(x, m, start + (plane * WIDTH + j)[:, None], rows, inner, end, WHOLE)
                w = _unpacked(word, third, HALF, ASM, plane, KIND, BITS, MANTISSA, plane, 0, BASE, SHIFTS)
                w = _centred(w, z[:, None], BASE, PLACES[plane]) if KIND == "int" else w * tl.full((1, 1), FACTOR, dtype)
                if SCALE_SUMS:
                    sums = tl.dot(w, values, sums)
                elif SCALED:
                    total = tl.dot(w * s[:, None], values, total)
                else:
                    total = tl.dot(w, values, total)
            if SCALE_SUMS:
                total += sums * s.to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["rows", "tiles", "groups", "parts", "each"])
def _kernel(
    x, words, high, scale, zero, outer, bias, residual, out, scratch, counters,
    rows, columns, inner, tiles, groups, parts, each,
    ASM: tl.constexpr, SHIFTS: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    CODED: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, SCALED: tl.constexpr, ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, SPLIT: tl.constexpr, SCALE_SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = x [rows, inner] W^T; programs: blocks of columns, blocks of rows, parts of K of `each` tiles.

    Each of SLICES is a part of K too: the left operand has the same columns of W for each, one below the other, the right one
    the same rows of x, and of their product only the blocks on the diagonal are meant. WHOLE: tiles fill each part, and
    columns each tile.
    """
    TILE: tl.constexpr = (8 if BITS == 3 else 16 // BITS) * WIDTH
    SINGLE: tl.constexpr = KIND != "bcq" and SPAN == TILE  # one scale a tile
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    OUTPUTS: tl.constexpr = BLOCK_N // SLICES
    ROWS: tl.constexpr = BLOCK_M // SLICES
    block_n, block_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    left, right = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    n = block_n * OUTPUTS + left % OUTPUTS
    m = block_m * ROWS + right % ROWS
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if SLICES == 1:
        of_words = part * each
        of_x = of_words * TILE
    else:
        of_words = (part * SLICES + left // OUTPUTS) * each
        of_x = ((part * SLICES + right // ROWS) * (each * TILE))[None, :]
    end = tl.minimum(inner, of_x + each * TILE)  # beyond is what other parts have, and counts as 0
    HAS_S: tl.constexpr = SINGLE and SCALED
    HAS_Z: tl.constexpr = SINGLE and ASYMMETRIC
    s, z = _scales(scale, zero, of_words * TILE, n, columns, groups, GROUP, HAS_S, HAS_Z, HALF, BITS)
    for at in range(0, each):
        tile = of_words + at
        next_s, next_z = s, z
        if SINGLE and GROUP > 0:  # ahead, because what is this small does not go through the pipeline
            next_s, next_z = _scales(scale, zero, (tile + 1) * TILE, n, columns, groups, GROUP, HAS_S, HAS_Z, HALF, BITS)
        if not WHOLE:
            tile = tl.minimum(tile, tiles - 1)
        total = _tile(
            total, s, z, x, words, high, scale, zero, tile, of_x + at * TILE, n, m, rows, columns, inner, end, groups,
            ASM, SHIFTS, PLACES, KIND, BITS, CODED, MANTISSA, FACTOR, WIDTH, GROUP, SPAN, SCALED, ASYMMETRIC, SCALE_SUMS, WHOLE,
        )  # fmt: skip
        s, z = next_s, next_z
    if SLICES > 1:
        total = tl.where((left // OUTPUTS)[:, None] == (right // ROWS)[None, :], total, 0.0)
        total = tl.sum(tl.sum(total.reshape(SLICES, OUTPUTS, SLICES, ROWS), 2), 0)
        n = block_n * OUTPUTS + tl.arange(0, OUTPUTS)
        m = block_m * ROWS + tl.arange(0, ROWS)
    if SPLIT:
        finished, total = _added(total, scratch, counters, parts, part, block_m * tl.num_programs(0) + block_n)
        if finished:
            _write(total, outer, bias, residual, out, n, m, rows, columns, BIASED, ADDED)
    else:
        _write(total, outer, bias, residual, out, n, m, rows, columns, BIASED, ADDED)


@triton.jit
def _added(total, scratch, counters, parts, part, slot):
    """Whether this program is the last of a slot, and then the sum of the parts of all, in their order."""
    N: tl.constexpr = total.shape[0]
    M: tl.constexpr = total.shape[1]
    inside = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    first = scratch + slot.to(tl.int64) * parts * N * M
    tl.store(first + part * N * M + inside, total)
    tl.debug_barrier()
    finished = tl.atomic_add(counters + slot, 1, sem="acq_rel") == parts - 1
    if finished:
        total = tl.zeros((N, M), tl.float32)
        for other in range(parts):
            total += tl.load(first + other * N * M + inside, cache_modifier=".cg")
        tl.store(counters + slot, 0)
    return finished, total


@triton.jit
def _write(total, outer, bias, residual, out, n, m, rows, columns, BIASED: tl.constexpr, ADDED: tl.constexpr):
    """The transposed sums, scaled, with bias and residual, where they belong."""
    there = n < columns
    total = total * tl.load(outer + n, mask=there, other=0.0)[:, None]
    if BIASED:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    place = m[None, :].to(tl.int64) * columns + n[:, None]
    mask = there[:, None] & (m[None, :] < rows)
    if ADDED:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "stop", "groups"])
def _unpack_kernel(
    words, high, scale, zero, outer, out, start, stop, columns, inner, groups,
    ASM: tl.constexpr, SHIFTS: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    CODED: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, SCALED: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [stop - start, inner] = the weights of these columns; programs: blocks of columns, tiles."""
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    dtype = out.dtype.element_ty
    HALF: tl.constexpr = dtype == tl.float16
    BASE: tl.constexpr = 0 if ASM[0] is None else (1024 if HALF else 128)
    tile = tl.program_id(1)
    n = start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, WIDTH)
    there = n < stop
    place = n.to(tl.int64) + tile * columns
    word = tl.load(words + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
    third = word
    if BITS == 3:
        third = tl.load(high + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0).to(tl.int16)
    o = tl.load(outer + n, mask=there, other=0.0)
    for plane in tl.static_range(PLANES):
        first = (tile * PLANES + plane) * WIDTH
        k = first + j
        if KIND == "bcq":
            group = tl.minimum(first // GROUP, groups - 1) if GROUP > 0 else 0
            alphas = scale + group * (CODED + 1) * columns + n
            value = tl.load(alphas + CODED * columns, mask=there, other=0.0).to(tl.float32)[:, None] + tl.zeros(
                (1, WIDTH), tl.float32
            )
            for bit in tl.static_range(CODED):
                w = _unpacked(word, third, HALF, ASM, plane * CODED + bit, KIND, BITS, MANTISSA, plane, bit, BASE, SHIFTS)
                value -= w.to(tl.float32) * tl.load(alphas + bit * columns, mask=there, other=0.0).to(tl.float32)[:, None]
        else:
            w = _unpacked(word, third, HALF, ASM, plane, KIND, BITS, MANTISSA, plane, 0, BASE, SHIFTS)
            s, z = _scales(scale, zero, first, n, columns, groups, GROUP, SCALED, ASYMMETRIC, HALF, BITS)
            w = _centred(w, z[:, None], BASE, PLACES[plane]) if KIND == "int" else w * tl.full((1, 1), FACTOR, dtype)
            value = w.to(tl.float32)
            if SCALED:
                value = value * s.to(tl.float32)[:, None]
        value = value * o[:, None]
        here = there[:, None] & (k[None, :] < inner)
        at = out + (n - start)[:, None].to(tl.int64) * inner + k[None, :]
        tl.store(at, value.to(dtype), mask=here, eviction_policy="evict_last")  # a product reads it next


INTERPRETED = not isinstance(_kernel, triton.runtime.JITFunction)


# ------------------------------------------------------------------------------------------------------------- the launch


@dataclass(frozen=True)
class Config:
    """Sizes of blocks, parts of K, warps, stages of the pipeline; slices: parts of K within a block."""

    block_m: int
    block_n: int
    split: int
    warps: int = 4
    stages: int = 3
    slices: int = 1


_OF_FEW = {  # whether weights are plain -> rows, and how many programs there should be for each multiprocessor
    True: (
        (1, Config(8, 64, 1, warps=2, slices=8), 2.0),
        (4, Config(8, 64, 1, warps=2, slices=2), 7.0),
        (8, Config(8, 128, 1), 3.5),
        (16, Config(32, 128, 1, slices=2), 3.5),
    ),
    False: (
        (1, Config(8, 64, 1, slices=8), 2.0),
        (4, Config(8, 64, 1, slices=2), 7.0),
        (8, Config(8, 64, 1), 7.0),
        (16, Config(16, 64, 1), 7.0),
    ),
}


@cache
def config_for(rows: int, columns: int, inner: int, processors: int, *, plain: bool = True) -> Config:
    """What was fastest on an H100 or H200 (benchmarks/kernels.py --sweep), by classes of shapes.

    plain: integers of 2, 4 or 8 bits with at most two scales a tile. For others two warps have too few registers, and larger
    blocks too many instructions.
    """
    wide = columns >= 8192
    if rows <= 16:
        config, share = next((config, share) for most, config, share in _OF_FEW[plain] if rows <= most)
        tiles = -(-inner // 128)
        if rows == 1 and (-(-tiles // 8) * 2 > -(-tiles // 4) or columns > 16384 and tiles < 64):
            config = replace(config, slices=4)  # eight would be of unequal size, or have too little to do
        blocks, of_slice = -(-columns * config.slices // config.block_n), -(-tiles // config.slices)
        most = max(1, int(share * processors / blocks))
        # Of the upper half of what fills the GPU, the number of parts that wastes the fewest tiles
        split = min(range(max(1, most // 2), most + 1), key=lambda s: (-(-of_slice // s) * s, -s))
        return replace(config, split=min(split, of_slice))
    if rows <= 64 and columns * inner <= 4096**2:
        config = Config(32 if rows <= 32 else 64, 64, 4)
    elif rows <= 64:
        config = Config(32 if rows <= 32 else 64, 128, power_up_to(2 * processors * 128 // columns))
    elif rows <= 256:
        config = Config(64, 128, 1, warps=8, stages=4) if wide else Config(64, 128, 2)
    else:
        config = Config(128, 128, 1, warps=8)
    return replace(config, split=max(1, min(config.split, -(-inner // 128) // 2)))


def power_up_to(limit: int) -> int:
    """The largest power of two up to a limit, at least 1."""
    return 1 << max(0, limit.bit_length() - 1)


_CACHED = 40 * 2**20  # bytes of unpacked weights that stay in the L2 cache
_SUMS = 2048  # of a block and warp, 64 a thread: two of them leave registers for the rest


def rows_of_cublas(fmt: Format) -> int:
    """Rows of x from which unpacked weights pay; planes of binary coding are multiplied one by one, which pays for few only."""
    return 65 if fmt.kind == "bcq" else 1024


def linear(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None, *, config: Config | None = None) -> Tensor:
    """x [rows, in] times the packed matrix, plus bias [out], plus residual [rows, out]: [rows, out] in the dtype of x."""
    rows, (columns, inner) = len(x), packed.shape
    if rows >= rows_of_cublas(FORMATS[packed.format]) and config is None:
        return _by_cublas(x, packed, bias, residual)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    how, fmt = _how(packed, x.dtype), FORMATS[packed.format]
    tiles, tile = packed.words.shape[0], planes_of(container(fmt)) * packed.words.shape[2]
    if config is None:
        plain = fmt.kind == "int" and container(fmt) != 3 and tile <= 2 * how["SPAN"]
        config = config_for(rows, columns, inner, processors(x.device), plain=plain)
    split, slices = min(config.split, tiles), config.slices
    outputs, block = config.block_n // slices, config.block_m // slices
    grid = (-(-columns // outputs), -(-rows // block), split)
    scratch = scratch_for(grid, outputs * block, x.device)
    assert split == 1 or grid[0] * grid[1] <= len(packed.counters), (grid, len(packed.counters))
    _kernel[grid](
        *(x, packed.words, packed.high, packed.scale, packed.zero, packed.outer, bias, residual, out, scratch, packed.counters),
        *(rows, columns, inner, tiles, 1 if packed.scale is None else packed.scale.shape[0], split),
        -(-tiles // (split * slices)),
        **how,
        BIASED=bias is not None,
        ADDED=residual is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SLICES=slices,
        SPLIT=split > 1,
        SCALE_SUMS=packed.scale is not None and config.block_m * config.block_n <= _SUMS * config.warps,
        WHOLE=inner % (split * slices * tile) == 0,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def scratch_for(grid: tuple[int, int, int], floats: int, device: torch.device) -> Tensor | None:
    """Room for the partial sums of a grid of blocks and parts."""
    return torch.empty(grid[0] * grid[1] * grid[2] * floats, device=device) if grid[2] > 1 else None


def _by_cublas(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The product by parts of the outputs, whose weights stay in the L2 cache: multiples of what fills the GPU once."""
    columns, inner = packed.shape
    out = x.new_empty(len(x), columns)
    wave = max(256, processors(x.device) * 128 // len(x) * 256)
    step = max(1, _CACHED // (inner * x.element_size()) // wave) * wave
    for first in range(0, columns, step):
        last = min(first + step, columns)
        w = dense(packed, x.dtype, first, last)
        torch.mm(x, w.T, out=out[:, first:last])
    for term in (bias, residual):
        if term is not None:
            out += term
    return out


def dense(packed: Packed, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """The matrix, or its rows from `first` to `last`, [rows, in], each weight rounded once."""
    (rows, columns), tiles = packed.shape, packed.words.shape[0]
    last = rows if last is None else last
    out = torch.empty(last - first, columns, dtype=dtype, device=packed.words.device)
    parts = (packed.words, packed.high, packed.scale, packed.zero, packed.outer)
    groups = 1 if packed.scale is None else packed.scale.shape[0]
    grid = (-(-len(out) // 32), tiles)
    _unpack_kernel[grid](*parts, out, first, last, rows, columns, groups, **_how(packed, dtype), BLOCK_N=32)
    return out


def _how(packed: Packed, dtype: torch.dtype) -> dict[str, Any]:
    """How a kernel is to read the words."""
    present = packed.scale is not None, packed.zero is not None
    return _how_to_read(packed.format, packed.words.shape[2], packed.group, *present, dtype)


@cache
def _how_to_read(name: str, width: int, group: int, scaled: bool, asymmetric: bool, dtype: torch.dtype) -> dict[str, Any]:
    fmt = FORMATS[name]
    bits = container(fmt)
    tile = planes_of(bits) * width
    bias = 2 ** (fmt.exponent - 1) - 1 if fmt.exponent else 0
    places = _places(fmt, dtype)
    return {
        "ASM": _instructions(fmt, dtype),
        "SHIFTS": tuple(f"shr.b32 $0, $1, {shift};" if shift else None for shift, _ in places),
        "PLACES": tuple(place for _, place in places),
        "KIND": fmt.kind,
        "BITS": bits,
        "CODED": fmt.bits,
        "MANTISSA": fmt.mantissa,
        "FACTOR": 2.0 ** ((15 if dtype == torch.float16 else 127) - bias),
        "WIDTH": width,
        "GROUP": group,
        "SPAN": gcd(group, tile) if group else tile,
        "SCALED": scaled,
        "ASYMMETRIC": asymmetric,
    }


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
