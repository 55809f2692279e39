"""Linear layers with weights of 2, 3, 4 or 8 bits and float16 or bfloat16 inputs.

The product is computed transposed, y^T = W x^T, because only the left operand of a tensor core may come from registers, where
the weights are unpacked. They are stored in tiles of 128 columns [tiles, out, words]; a word of 16 bits holds the codes of
columns that lie 128 / planes apart ("planes"), so that one mask over a register of words gives the weights of consecutive
columns, and each word is loaded once. With 4 bits, word j of a tile holds columns j, 32 + j, 64 + j, 96 + j. Of 3 bits, two are
in words of 16 bits and the third in bytes.

A code becomes a float without a conversion: put into the mantissa of 1024 (float16) or 128 (bfloat16), it is that number plus
the code, from which that number plus the zero point is taken away, exactly. Scales multiply the sum of a group where a tile has
one group and few rows of x share it, else the weights.

From `ROWS_OF_CUBLAS` rows on, the weights are unpacked to memory and cuBLAS multiplies, which it does that much faster.

Where x has few rows, K is split over programs; partial sums go to scratch memory, and the last program to finish adds them in
their order. No floating-point atomics: the same input gives the same bits.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels import reference
from lowbit.qtensor import QTensor

TILE = 128  # columns
BITS = (2, 3, 4, 8)
ROWS_OF_CUBLAS = 1024
_LEAST_CAPABILITY = (8, 0)  # tensor cores with bfloat16


@dataclass(frozen=True)
class Packed:
    """A quantized matrix [out, in] as the kernel reads it.

    Attributes:
        words: int16 [tiles, out, words of a tile and row]: the codes, of 3 bits the two lower ones.
        high: int8 [tiles, out, 16], the third bit, or None.
        scale: [groups, out], float16 or bfloat16.
        zero: the same, what is taken from codes counted from 0; None where it is half of their range.
        bits, group: of the codes; columns a scale.
        shape: out, in.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    shape: tuple[int, int]

    def to(self, device: str | torch.device) -> "Packed":
        """The same on another device."""
        high, zero = (None if part is None else part.to(device) for part in (self.high, self.zero))
        return Packed(self.words.to(device), high, self.scale.to(device), zero, self.bits, self.group, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.nbytes for part in (self.words, self.high, self.scale, self.zero) if part is not None)


def planes_of(bits: int) -> int:
    """How many codes, or their two lower bits, a word of 16 bits holds."""
    return 8 if bits == 3 else 16 // bits


def pack(q: QTensor, dtype: torch.dtype) -> Packed:
    """Lay out integers with one scale for a row or a group of 32, 64, 128, ... columns; once, when a model is loaded.

    Args:
        dtype: of the inputs to come, float16 or bfloat16.

    Raises:
        ValueError: the kernel has no such format.
    """
    spec, (rows, columns) = q.spec, q.codes.shape
    group = columns if spec.group < 0 else spec.group
    plain = (
        spec.format.kind == "int" and spec.format.bits in BITS and spec.scale == "float" and spec.rows == 1 and spec.group != 0
    )
    if not plain or (group != columns and (group < 32 or group & (group - 1))):
        raise ValueError(
            f"weight-only kernels take integers of {', '.join(map(str, BITS))} bits with a scale for a row or for 32, 64, 128, "
            f"... columns, not {spec.format.name} in groups of {group}"
        )
    bits, planes = spec.format.bits, planes_of(spec.format.bits)
    middle = 2 ** (bits - 1)
    codes = torch.nn.functional.pad(q.codes.to(torch.int32) + middle, (0, -columns % TILE))
    tiles = codes.view(rows, -1, planes, TILE // planes).permute(1, 0, 3, 2)  # [tiles, rows, columns of a plane, planes]
    width = 2 if bits == 3 else bits
    shifts = torch.arange(planes, device=codes.device) * width
    words = ((tiles & (2**width - 1)) << shifts).sum(-1).to(torch.int32)
    words = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
    high = None
    if bits == 3:
        third = ((tiles >> 2) << torch.arange(planes, device=codes.device)).sum(-1)
        high = torch.where(third >= 2**7, third - 2**8, third).to(torch.int8).contiguous()
    zero = None if q.zero is None else (q.zero.to(torch.int32) + middle).T.to(dtype).contiguous()
    return Packed(words.contiguous(), high, q.scale.T.to(dtype).contiguous(), zero, bits, group, (rows, columns))


def unpack(packed: Packed) -> Tensor:
    """The matrix [out, in] as the kernel multiplies by it, in the dtype of the scales."""
    rows, columns = packed.shape
    planes, width = planes_of(packed.bits), 2 if packed.bits == 3 else packed.bits
    shifts = torch.arange(planes, device=packed.words.device)
    codes = (packed.words.to(torch.int32)[..., None] >> (shifts * width)) & (2**width - 1)
    if packed.high is not None:
        codes += ((packed.high.to(torch.int32)[..., None] >> shifts) & 1) << 2
    codes = codes.permute(1, 0, 3, 2).reshape(rows, -1)[:, :columns].float()
    which = torch.arange(columns, device=codes.device) // packed.group
    zero = 2.0 ** (packed.bits - 1) if packed.zero is None else packed.zero.float().T[:, which]
    return ((codes - zero) * packed.scale.float().T[:, which]).to(packed.scale.dtype)


# ------------------------------------------------------------------------------------------------------------ the kernel


@cache
def _instructions(bits: int, dtype: torch.dtype) -> tuple[str, ...]:
    """For every plane: two words in a register become two floats, base + code."""
    base = 0x64006400 if dtype == torch.float16 else 0x43004300
    mask = (2**bits - 1) * 0x00010001
    found = []
    for plane in range(planes_of(bits)):
        shift = plane * bits
        move = f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
        found.append(f"{{ .reg .b32 t; {move} lop3.b32 $0, t, 0x{mask:08x}, 0x{base:08x}, 0xea; }}")
    return tuple(found)


@triton.jit
def _kernel(
    x,
    words,
    high,
    scale,
    zero,
    bias,
    out,
    scratch,
    counters,
    rows,
    columns,
    inner,
    tiles,
    groups_each,
    parts,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
):
    """out [rows, columns] = x [rows, inner] W^T; programs: blocks of columns, blocks of rows, parts of K."""
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    WIDTH: tl.constexpr = 128 // PLANES
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    dtype = x.dtype.element_ty
    BASE: tl.constexpr = 1024 if dtype == tl.float16 else 128
    block_n, block_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, WIDTH)
    there = n < columns
    middle = tl.full((BLOCK_N,), 1 << (BITS - 1), dtype)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    each = (tiles + parts - 1) // parts
    for tile in range(part * each, tl.minimum(tiles, part * each + each)):
        place = n.to(tl.int64) + tile * columns
        word = tl.load(words + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
        if BITS == 3:
            third = tl.load(high + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0).to(tl.int16)
        if SCALE_SUMS:
            group = tile * 128 // GROUP if GROUP > 0 else 0
            s = tl.load(scale + group * columns + n, mask=there, other=0.0)
            z = tl.load(zero + group * columns + n, mask=there, other=0.0) if ASYMMETRIC else middle
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for plane in tl.static_range(PLANES):
            k = tile * 128 + plane * WIDTH + j
            values = tl.load(
                x + m[None, :].to(tl.int64) * inner + k[:, None], mask=(m[None, :] < rows) & (k[:, None] < inner), other=0.0
            )
            if ASM is None:
                code = (word >> (plane * LOW)) & ((1 << LOW) - 1)
                if BITS == 3:
                    code = code | (((third >> plane) & 1) << 2)
                w = code.to(dtype)
                base = 0
            else:
                w = tl.inline_asm_elementwise(ASM[plane], "=r,r", [word], dtype=dtype, is_pure=True, pack=2)
                base = BASE
            if SCALE_SUMS:
                w = w - (z + base).to(dtype)[:, None]
                sums = tl.dot(w, values, sums)
            else:
                if GROUP > 0 and GROUP < WIDTH:  # several groups in a plane
                    group = tl.minimum(k // GROUP, groups_each - 1)
                    s = tl.load(scale + group[None, :] * columns + n[:, None], mask=there[:, None], other=0.0)
                    if ASYMMETRIC:
                        z = tl.load(zero + group[None, :] * columns + n[:, None], mask=there[:, None], other=0.0)
                        w = (w - (z + base).to(dtype)) * s
                    else:
                        w = (w - (middle + base).to(dtype)[:, None]) * s
                else:
                    group = tl.minimum((tile * 128 + plane * WIDTH) // GROUP, groups_each - 1) if GROUP > 0 else 0
                    s = tl.load(scale + group * columns + n, mask=there, other=0.0)
                    z = tl.load(zero + group * columns + n, mask=there, other=0.0) if ASYMMETRIC else middle
                    w = (w - (z + base).to(dtype)[:, None]) * s[:, None]
                total = tl.dot(w, values, total)
        if SCALE_SUMS:
            total += sums * s.to(tl.float32)[:, None]
    if SPLIT:
        slot = block_m * tl.num_programs(0) + block_n
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        first = scratch + slot.to(tl.int64) * parts * BLOCK_N * BLOCK_M
        tl.store(first + part * BLOCK_N * BLOCK_M + inside, total)
        tl.debug_barrier()
        done = tl.atomic_add(counters + slot, 1, sem="acq_rel")
        if done == parts - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in range(parts):
                total += tl.load(first + other * BLOCK_N * BLOCK_M + inside, cache_modifier=".cg")
            tl.store(counters + slot, 0)
            _write(total, bias, out, n, m, rows, columns, BIASED)
    else:
        _write(total, bias, out, n, m, rows, columns, BIASED)


@triton.jit
def _write(total, bias, out, n, m, rows, columns, BIASED: tl.constexpr):
    """The transposed sums, with bias, where they belong."""
    there = n < columns
    if BIASED:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    place = out + m[None, :].to(tl.int64) * columns + n[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & (m[None, :] < rows))


@triton.jit
def _unpack_kernel(
    words,
    high,
    scale,
    zero,
    out,
    columns,
    inner,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [columns, inner] = the weights; programs: blocks of columns, tiles."""
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    WIDTH: tl.constexpr = 128 // PLANES
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    dtype = scale.dtype.element_ty
    BASE: tl.constexpr = 1024 if dtype == tl.float16 else 128
    tile = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, WIDTH)
    there = n < columns
    place = n.to(tl.int64) + tile * columns
    word = tl.load(words + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
    if BITS == 3:
        third = tl.load(high + place[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0).to(tl.int16)
    for plane in tl.static_range(PLANES):
        k = tile * 128 + plane * WIDTH + j
        here = there[:, None] & (k[None, :] < inner)
        if ASM is None:
            code = (word >> (plane * LOW)) & ((1 << LOW) - 1)
            if BITS == 3:
                code = code | (((third >> plane) & 1) << 2)
            w = code.to(dtype)
            base = 0
        else:
            w = tl.inline_asm_elementwise(ASM[plane], "=r,r", [word], dtype=dtype, is_pure=True, pack=2)
            base = BASE
        group = k // GROUP if GROUP > 0 else k * 0
        at = group[None, :] * columns + n[:, None]
        s = tl.load(scale + at, mask=here, other=0.0)
        if ASYMMETRIC:
            w = w - (tl.load(zero + at, mask=here, other=0.0) + base).to(dtype)
        else:
            w = w - tl.full((1, 1), (1 << (BITS - 1)) + base, dtype)
        tl.store(out + n[:, None].to(tl.int64) * inner + k[None, :], w * s, mask=here)


INTERPRETED = not isinstance(_kernel, triton.runtime.JITFunction)


# ------------------------------------------------------------------------------------------------------------- the launch


@dataclass(frozen=True)
class Config:
    """Sizes of blocks, parts of K, warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    split: int
    warps: int = 4
    stages: int = 3


def config_for(rows: int, columns: int, inner: int, processors: int) -> Config:
    """What was fastest on an H200 (benchmarks/weight_only.py --sweep), by classes of shapes."""
    wide = columns >= 8192
    if rows <= 16:
        config = Config(16, 128, 4) if wide else Config(16, 64, 8)
    elif rows <= 64 and columns * inner <= 4096**2:
        config = Config(32 if rows <= 32 else 64, 64, 4)
    elif rows <= 64:
        config = Config(32 if rows <= 32 else 64, 128, 2 ** max(0, (2 * processors * 128 // columns).bit_length() - 1))
    elif rows <= 256:
        config = Config(128, 128, 1, warps=8) if wide else Config(64, 128, 2)
    else:
        config = Config(128, 128, 1, warps=8)
    return replace(config, split=max(1, min(config.split, -(-inner // TILE) // 2)))


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, config: Config | None = None) -> Tensor:
    """x [..., in] times the packed matrix, plus bias [out], in the dtype of x: [..., out].

    Raises:
        ValueError: another dtype than it was packed for, or a GPU without bfloat16 tensor cores.
    """
    rows, columns = packed.shape
    if x.dtype != packed.scale.dtype or x.shape[-1] != columns:
        raise ValueError(f"packed for {packed.scale.dtype} of width {columns}, but x is {x.dtype} [..., {x.shape[-1]}]")
    if not x.is_cuda and not INTERPRETED:
        return reference.linear(x, unpack(packed), bias)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < _LEAST_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(x.device)} has no bfloat16 tensor cores, which lowbit's kernels need; load the model "
            "on a newer GPU, or with dequantized weights"
        )
    flat = x.reshape(-1, columns).contiguous()
    if len(flat) >= ROWS_OF_CUBLAS and config is None:
        return torch.nn.functional.linear(x, dense(packed), bias)
    out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    if len(flat):
        _launch(flat, packed, bias, out, config or config_for(len(flat), rows, columns, _processors(x.device)))
    return out.view(*x.shape[:-1], rows)


def dense(packed: Packed) -> Tensor:
    """What `unpack` gives, by a kernel."""
    (rows, columns), tiles = packed.shape, packed.words.shape[0]
    out = torch.empty(rows, columns, dtype=packed.scale.dtype, device=packed.scale.device)
    parts = (packed.words, packed.high, packed.scale, packed.zero)
    _unpack_kernel[(-(-rows // 32), tiles)](*parts, out, rows, columns, **_how(packed), BLOCK_N=32)
    return out


def _how(packed: Packed) -> dict[str, Any]:
    """How a kernel is to read the words."""
    dtype = packed.scale.dtype
    fits = packed.bits in (2, 4) or (packed.bits == 8 and dtype == torch.float16)
    return {
        "ASM": _instructions(packed.bits, dtype) if fits and not INTERPRETED else None,
        "BITS": packed.bits,
        "GROUP": 0 if packed.group == packed.shape[1] else packed.group,
        "ASYMMETRIC": packed.zero is not None,
    }


def _launch(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, config: Config) -> None:
    (columns, inner), tiles = packed.shape, packed.words.shape[0]
    split = min(config.split, tiles)
    grid = (-(-columns // config.block_n), -(-len(x) // config.block_m), split)
    scratch, counters = _scratch(
        x.device, split * grid[0] * grid[1] * config.block_n * config.block_m, grid[0] * grid[1], split
    )
    how = _how(packed)
    _kernel[grid](
        x,
        packed.words,
        packed.high,
        packed.scale,
        packed.zero,
        bias,
        out,
        scratch,
        counters,
        len(x),
        columns,
        inner,
        tiles,
        packed.scale.shape[0],
        split,
        **how,
        BIASED=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT=split > 1,
        SCALE_SUMS=config.block_m <= 64 and (how["GROUP"] == 0 or how["GROUP"] % TILE == 0),
        num_warps=config.warps,
        num_stages=config.stages,
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_SCRATCH: dict[Any, tuple[Tensor, Tensor]] = {}


def _scratch(device: torch.device, floats: int, slots: int, split: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for partial sums, and counters, which every product leaves at 0; one of each for a stream."""
    if split == 1:
        return None, None
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    sums, counters = _SCRATCH.get(key, (None, None))
    if sums is None or counters is None or sums.numel() < floats or counters.numel() < slots:
        sums = torch.empty(floats, dtype=torch.float32, device=device)
        counters = torch.zeros(slots, dtype=torch.int32, device=device)
        _SCRATCH[key] = (sums, counters)
    return sums, counters
