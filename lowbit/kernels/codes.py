"""Products of codes: int8 or E4M3 rows of inputs with weights of 8 bits, and int8 rows with integers of up to 4 bits.

The product is computed transposed, as in `weight_only`: few rows of x do not fill the 64 rows that a tensor core's instruction
has, but outputs do. Codes of 4 bits become bytes without a conversion: each half of a byte, moved to the top, is 16 times its
code, which the scale takes back; the halves of a step of 32 columns, 16 each, are less than a tensor core multiplies, and are
put side by side. With groups, the sum of a step of up to 128 columns is scaled by the group of the weights and that of the
inputs. Such a sum of integers starts at the bits of 1.5 * 2^23 and is read as a float, from which that number is taken away: no
conversion (|sum| < 2^22).

Zero points of inputs take away sums of weights, which were computed when these were packed; those of 4-bit weights are taken
from the codes. K is split, and parts are added, as in `weight_only`.
"""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.formats import FORMATS
from lowbit.kernels.packed import ALIGNED, STEP, Packed
from lowbit.kernels.reference import Quantized
from lowbit.kernels.weight_only import INTERPRETED, Config, _added, _write, power_up_to, processors, scratch_for

_UPPER = "and.b32 $0, $1, 0xf0f0f0f0;"
_LOWER = "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }"
_BITS_OF_ROUNDS = tl.constexpr(0x4B400000)
_ROUNDS = tl.constexpr(12582912.0)
_LEAST_K = tl.constexpr(32)  # columns of bytes that an instruction of a tensor core multiplies


@triton.jit
def _half(pair, half: tl.constexpr, ASM: tl.constexpr):
    """16 times the codes in the lower (0) or upper half of each byte."""
    if ASM[half] is None:
        w = (pair << 4) if half == 0 else (pair >> 4 << 4)
    else:
        w = tl.inline_asm_elementwise(ASM[half], "=r,r", [pair], dtype=tl.int8, is_pure=True, pack=4)
    return w


@triton.jit
def _less_zeros(w, zero, n, k, columns, GROUP: tl.constexpr):
    """Codes from 16 times them, less their zero points."""
    group = k // GROUP if GROUP > 0 else 0
    z = tl.load(zero + group * columns + n, mask=n < columns, other=0.0).to(tl.int8)
    return (w >> 4) - z[:, None]


@triton.jit
def _step(x, words, zero, acc, n0, m0, k, n, columns, ASM: tl.constexpr, FOUR: tl.constexpr, ASYMMETRIC: tl.constexpr,
          GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """acc plus the product of BLOCK_K columns from k on."""
    if FOUR:
        HALF: tl.constexpr = BLOCK_K // 2
        pair = words.load([k // BLOCK_K * columns + n0, 0])
        if HALF < _LEAST_K:
            w = tl.join(_half(pair, 0, ASM), _half(pair, 1, ASM)).permute(0, 2, 1).reshape(BLOCK_N, BLOCK_K)
            if ASYMMETRIC:
                w = _less_zeros(w, zero, n, k, columns, GROUP)
            acc = tl.dot(w, x.load([m0, k]).T, acc, out_dtype=acc.dtype)
        else:
            for half in tl.static_range(2):
                w = _half(pair, half, ASM)
                if ASYMMETRIC:
                    w = _less_zeros(w, zero, n, k, columns, GROUP)
                acc = tl.dot(w, x.load([m0, k + half * HALF]).T, acc, out_dtype=acc.dtype)
    else:
        acc = tl.dot(words.load([n0, k]), x.load([m0, k]).T, acc, out_dtype=acc.dtype)
    return acc


@triton.jit(do_not_specialize=["rows", "parts", "x_groups"])
def _kernel(
    x, words, x_scale, x_zero, scale, zero, outer, sums, bias, residual, out, scratch, counters,
    rows, columns, inner, parts, x_groups,
    ASM: tl.constexpr, FOUR: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    STEPS: tl.constexpr, ASYMMETRIC: tl.constexpr, X_ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = x [rows, inner] W^T; programs: blocks, parts of K. BAND columns of blocks at a time share x."""
    block, part = tl.program_id(0), tl.program_id(1)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = block // (BAND * blocks_m)
    height = tl.minimum(blocks_n - band * BAND, BAND)
    inside = block % (BAND * blocks_m)
    n0, m0 = (band * BAND + inside % height) * BLOCK_N, (inside // height) * BLOCK_M
    n, m = n0 + tl.arange(0, BLOCK_N), m0 + tl.arange(0, BLOCK_M)
    there = n < columns
    OF: tl.constexpr = tl.float32 if FLOAT else tl.int32
    UNIT: tl.constexpr = 0.0625 if FOUR and not ASYMMETRIC else 1.0
    steps = tl.cdiv(inner, BLOCK_K)
    each = tl.cdiv(steps, parts)
    first, last = part * each, tl.minimum(steps, part * each + each)
    if STEPS:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in range(first, last):
            k = step * BLOCK_K
            if FLOAT:
                value = _step(x, words, zero, tl.zeros((BLOCK_N, BLOCK_M), OF), n0, m0, k, n, columns, ASM, FOUR, ASYMMETRIC,
                              GROUP, BLOCK_N, BLOCK_K)  # fmt: skip
            else:
                start = tl.full((BLOCK_N, BLOCK_M), _BITS_OF_ROUNDS, OF)
                acc = _step(x, words, zero, start, n0, m0, k, n, columns, ASM, FOUR, ASYMMETRIC, GROUP, BLOCK_N, BLOCK_K)
                value = (acc.to(tl.float32, bitcast=True) - _ROUNDS) * UNIT
            x_group = k // X_GROUP if X_GROUP > 0 else 0
            if X_ASYMMETRIC:
                z = tl.load(x_zero + m.to(tl.int64) * x_groups + x_group, mask=m < rows, other=0.0)
                value -= z[None, :] * tl.load(sums + step * columns + n, mask=there, other=0.0)[:, None]
            if X_GROUP > 0:
                value *= tl.load(x_scale + m.to(tl.int64) * x_groups + x_group, mask=m < rows, other=0.0)[None, :]
            if GROUP > 0:
                s = tl.load(scale + k // GROUP * columns + n, mask=there, other=0.0).to(tl.float32)
                total += value * s[:, None]
            else:
                total += value
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), OF)
        for step in range(first, last):
            k = step * BLOCK_K
            acc = _step(x, words, zero, acc, n0, m0, k, n, columns, ASM, FOUR, ASYMMETRIC, GROUP, BLOCK_N, BLOCK_K)
        total = acc.to(tl.float32) * UNIT
        if X_ASYMMETRIC:
            z = tl.load(x_zero + m, mask=m < rows, other=0.0) * (part == 0)
            total -= z[None, :] * tl.load(sums + n, mask=there, other=0.0)[:, None]
    if X_GROUP == 0:
        total *= tl.load(x_scale + m, mask=m < rows, other=0.0)[None, :]
    if SPLIT:
        finished, total = _added(total, scratch, counters, parts, part, block)
        if finished:
            _write(total, outer, bias, residual, out, n, m, rows, columns, BIASED, ADDED)
    else:
        _write(total, outer, bias, residual, out, n, m, rows, columns, BIASED, ADDED)


_SMALL = 2**22  # weights of a matrix, as encoders have them: blocks as large as leave enough of them
_OF_SMALL = (  # with how many there must be for each multiprocessor
    (Config(128, 128, 1, warps=8, stages=3), 1.5),
    (Config(128, 64, 1, stages=4), 1.0),
    (Config(64, 64, 1, stages=5), 0.875),
    (Config(32, 64, 1, stages=4), 0.875),
)


@cache
def config_for(rows: int, columns: int, inner: int, processors: int, *, four: bool = False, stepped: bool = False) -> Config:
    """What was fastest on an H100 or H200 (benchmarks/kernels.py --sweep), by classes of shapes.

    four: weights are of 4 bits. stepped: the sums of steps are scaled, which takes registers for two sums.
    """
    if rows > 16 and columns * inner <= _SMALL and not four and not stepped:
        for config, share in _OF_SMALL:
            blocks = -(-columns // config.block_n) * -(-rows // config.block_m)
            if blocks >= share * processors:
                return config
        return replace(config, split=max(1, min(power_up_to(2 * processors // blocks), inner // 2048)))
    if rows <= 16 and four and not stepped and columns < 12288:
        config = Config(16, 64, power_up_to(2 * processors * 64 // columns), warps=2, stages=4)
    elif rows <= 64:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        wide = columns >= (8192 if four and rows <= 16 else 12288 if four else 16384 if rows <= 16 else 2**30)
        block_n = 128 if wide else 64
        programs = (4 if four and stepped and rows <= 16 else 2 if four or rows <= 16 else 1) * processors
        split = power_up_to(programs * block_n // columns)
        config = Config(block_m, block_n, split, stages=4 if four or wide else 6 if rows <= 16 else 5)
    elif rows <= 256:
        block_m, block_n = (64, 64) if stepped else (128, 128 if four and columns >= 8192 else 64)
        blocks = -(-columns // block_n) * -(-rows // block_m)
        config = Config(block_m, block_n, 2 if blocks <= 2 * processors and columns < 8192 else 1, stages=4)
    elif four or stepped:
        config = Config(128, 128, 1, warps=8 if stepped else 4, stages=3 if stepped else 4)
    else:
        tiles = -(-rows // 128) * -(-columns // 128)
        config = Config(128, 128, 1, warps=8, stages=3) if tiles <= 12 * processors else Config(256, 128, 1, warps=8, stages=4)
    return replace(config, split=max(1, min(config.split, -(-inner // STEP) // 2)))


def linear(
    x: Quantized,
    packed: Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
) -> Tensor:
    """Codes [rows, in] times the packed matrix, plus bias [out], plus residual [rows, out]: [rows, out] in `dtype`."""
    rows, (columns, inner) = len(x.codes), packed.shape
    out = torch.empty(rows, columns, dtype=dtype, device=x.codes.device)
    if not rows:
        return out
    fmt, four = FORMATS[packed.format], packed.words.dim() == 3
    if config is None:
        config = config_for(rows, columns, inner, processors(x.codes.device), four=four, stepped=packed.step > 0)
    block_k = packed.step or STEP
    codes = x.codes
    if inner % ALIGNED:
        codes = F.pad(codes.view(torch.int8), (0, -inner % ALIGNED)).view(codes.dtype)
    half = block_k // 2 if four else block_k
    described = TensorDescriptor.from_tensor(codes, [config.block_m, max(half, _LEAST_K.value)])
    words = packed.words.flatten(0, 1) if four else packed.words
    split = min(config.split, -(-inner // block_k))
    blocks = -(-columns // config.block_n) * -(-rows // config.block_m)
    scratch = scratch_for((blocks, 1, split), config.block_n * config.block_m, codes.device)
    assert split == 1 or blocks <= len(packed.counters), (blocks, len(packed.counters))
    x_groups = x.scale.shape[-1]
    _kernel[(blocks, split)](
        *(described, TensorDescriptor.from_tensor(words, [config.block_n, half])),
        *(x.scale, x.zero, packed.scale, packed.zero, packed.outer, packed.sums, bias, residual, out, scratch, packed.counters),
        *(rows, columns, inner, split, x_groups),
        ASM=(None, None) if INTERPRETED else (_LOWER, _UPPER),
        FOUR=four,
        FLOAT=fmt.kind == "float",
        GROUP=packed.group,
        X_GROUP=0 if x_groups == 1 else inner // x_groups,
        STEPS=packed.step > 0,
        ASYMMETRIC=packed.zero is not None,
        X_ASYMMETRIC=x.zero is not None,
        BIASED=bias is not None,
        ADDED=residual is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        SPLIT=split > 1,
        BAND=8,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
