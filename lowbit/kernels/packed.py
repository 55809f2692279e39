"""Matrices as the kernels read them: laid out once, when a model is loaded; plain torch.

Two layouts. With float inputs, codes lie in tiles [tiles, out, words]; a word of 16 bits holds the codes of columns that are
`width` apart, so that one mask over a register of words gives the weights of consecutive columns, and each word is loaded
once. With 4 bits and a width of 32, word j of a tile holds columns j, 32 + j, 64 + j, 96 + j. Of 3 bits, two are in words
of 16 bits and the third in bytes. In binary coding the bits of one plane lie beside each other: byte i of a word holds those of
plane i of columns j, 16 + j to 112 + j, the third and fourth plane are in bytes or words of their own, and of a single plane a
word holds 16 columns. With quantized inputs, codes of 8 bits lie in rows, and those of 4 bits in such tiles, in
words of 8 bits: byte j holds columns j (low half) and 64 + j.

Scales are of 16 bits under a float32 factor for each output, a power of two where there are groups, so that neither range
nor precision is lost to float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import FORMATS, Format
from lowbit.qtensor import CHANNEL, TENSOR, QTensor, Spec

TILE = 128  # columns of a tile, less where groups are smaller
STEP = 128  # columns of a product of codes, after which its sum is scaled, less where groups are smaller
ALIGNED = 16  # bytes a row starts at, where the copy engine reads it


@dataclass(frozen=True)
class Packed:
    """A quantized matrix [out, in], or several below each other.

    Attributes:
        words: the codes: int16 [tiles, out, width] (of 3 bits the two lower ones), or for quantized inputs int8 or
            float8_e4m3fn [out, in padded], int8 [tiles, out, width].
        high: int8 [tiles, out, width], the third bit; of four binary planes int16, the two upper ones; else None.
        scale: [groups, out]; of BCQ [groups, planes + 1, out], the offset last; None: one scale a row, which is `outer`.
        zero: [groups, out]: what is taken from codes, which for float inputs are counted from 0; None: half of their range.
        outer: float32 [out], the second factor of every scale.
        sums: float32 [steps, out], sums of codes over the columns of each step, for inputs with zero points; else None.
        counters: int32, 0 before and after every product: programs that have finished, where K is split.
        format: a name in `formats.FORMATS`.
        group: columns a scale; 0: all.
        step: columns after which a sum of products of codes is scaled; 0: all.
        shape: out, in.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    outer: Tensor
    sums: Tensor | None
    counters: Tensor
    format: str
    group: int
    step: int
    shape: tuple[int, int]

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The parts that are tensors, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)[:7]}

    def to(self, device: str | torch.device) -> "Packed":
        """The same on another device."""
        moved: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in self.tensors.items()}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.nbytes for name, part in self.tensors.items() if part is not None and name != "counters")


def container(fmt: Format) -> int:
    """Bits in which a code is kept: 2, 3, 4 or 8; of BCQ 1, 2, or 3 where bits are in two tensors, of which there may be 4."""
    if fmt.kind == "bcq":
        return min(fmt.bits, 3)
    return fmt.bits if fmt.bits <= 4 else 8


def planes_of(bits: int) -> int:
    """How many codes, or their two lower bits, a word of 16 bits holds."""
    return 8 if bits == 3 else 16 // bits


def width_of(bits: int, group: int) -> int:
    """Words of a tile and row: each plane of columns lies in one group (0: of all columns)."""
    widest = max(16, TILE // planes_of(bits))
    return widest if group == 0 else gcd(widest, group)


def reason_against_planes(spec: Spec) -> str | None:
    """Why a matrix has no layout for float inputs, or None."""
    if spec.format.kind in ("table", "kmeans"):
        return f"values of {spec.format.name} are looked up, for which there is no kernel"
    if spec.group > 0 and spec.group % 16:
        return f"groups of {spec.group} columns are no multiple of 16"
    return None


def reason_against_codes(spec: Spec, inputs: Spec) -> str | None:
    """Why a matrix has no layout for inputs of 8 bits, or None."""
    if inputs.scale != "float" or inputs.format.kind not in ("int", "float"):
        return f"inputs in {inputs.format.name} with {inputs.scale} scales are not multiplied as codes"
    if inputs.format.kind == "float" and (inputs.format.name, spec.format.name) != ("fp8_e4m3", "fp8_e4m3"):
        return f"no product of {spec.format.name} and {inputs.format.name} codes"
    if inputs.format.kind == "int" and spec.format.kind != "int":
        return f"no product of {spec.format.name} and {inputs.format.name} codes"
    if spec.format.bits > 4 and not spec.symmetric:
        return "weights of more than 4 bits with zero points have no codes of 8 bits"
    if spec.group > 0 and spec.group % STEP and spec.group not in (32, 64):
        return f"groups of {spec.group} columns are neither 32, 64 nor a multiple of {STEP}"
    if inputs.group > 0 and (inputs.group < 32 or inputs.group & (inputs.group - 1)):
        return f"inputs in groups of {inputs.group}, no power of two from 32 on, are not multiplied as codes"
    return None


def pack_planes(q: QTensor, dtype: torch.dtype) -> Packed:
    """Lay out for float inputs of `dtype`, float16 or bfloat16.

    Raises:
        ValueError: there is no such layout.
    """
    _refuse(reason_against_planes(q.spec))
    fmt, (rows, columns) = q.spec.format, q.codes.shape
    bits, group = container(fmt), _group(q.spec, columns)
    planes, width = planes_of(bits), width_of(bits, group)
    codes = _counted(q.codes, fmt, bits)
    tiles = F.pad(codes, (0, -columns % (planes * width))).view(rows, -1, planes, width).permute(1, 0, 3, 2)
    low = 2 if bits == 3 else bits
    if fmt.kind == "bcq":
        words = _joined(_plane_by_plane(tiles, 0, low), 1, torch.int16)
        above = torch.int8 if fmt.bits == 3 else torch.int16
        high = _joined(_plane_by_plane(tiles, 2, fmt.bits), 1, above) if bits == 3 else None
    else:
        words = _joined(tiles & (2**low - 1), low, torch.int16)
        high = _joined(tiles >> 2, 1, torch.int8) if bits == 3 else None
    zero = None
    if q.zero is not None:
        zero = (_expanded(q.zero, q.spec, rows).to(torch.int32) + 2 ** (bits - 1)).T.to(dtype).contiguous()
    scale, outer = _alphas(q, dtype) if fmt.kind == "bcq" else _scales(q, dtype)
    return Packed(words, high, scale, zero, outer, None, _counters(words), fmt.name, group, 0, (rows, columns))


def pack_codes(q: QTensor, inputs: Spec, dtype: torch.dtype) -> Packed:
    """Lay out for inputs that are codes of 8 bits (int8 of up to 8 bits, or E4M3), outputs of `dtype`.

    Raises:
        ValueError: there is no such layout.
    """
    _refuse(reason_against_codes(q.spec, inputs))
    fmt, (rows, columns) = q.spec.format, q.codes.shape
    group, of_inputs = _group(q.spec, columns), _group(inputs, columns)
    step = min((min(STEP, each) for each in (group, of_inputs) if each), default=0)
    if fmt.bits <= 4:
        width = min(step or STEP, STEP) // 2
        pairs = F.pad(q.codes, (0, -columns % (2 * width))).view(rows, -1, 2, width).permute(1, 0, 2, 3).to(torch.int16)
        words = ((pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)).to(torch.int8).contiguous()
    else:
        kind = torch.float8_e4m3fn if fmt.kind == "float" else torch.int8
        words = F.pad(q.codes, (0, -columns % ALIGNED)).contiguous().view(kind)
    zero = None if q.zero is None else q.zero.T.to(dtype).contiguous()
    scale, outer = _scales(q, dtype)
    sums = None
    if not inputs.symmetric:
        size = step or columns
        sums = F.pad(q.codes, (0, -columns % size)).view(rows, -1, size).sum(-1, dtype=torch.int32).float()
        if q.zero is not None:
            ones = F.pad(torch.ones(columns, device=q.codes.device), (0, -columns % size)).view(-1, size).sum(-1)
            which = torch.arange(sums.shape[1], device=q.codes.device) * size // (group or columns)
            sums = sums - ones * q.zero.float()[:, which]
        sums = sums.T.contiguous()
    return Packed(words, None, scale, zero, outer, sums, _counters(words), fmt.name, group, step, (rows, columns))


def stacked(parts: Sequence[Packed]) -> Packed:
    """One matrix whose outputs are those of all parts, in their order; their inputs are the same.

    Raises:
        ValueError: they are laid out differently.
    """
    first = parts[0]
    for part in parts[1:]:
        same = (part.format, part.group, part.step, part.shape[1]) == (first.format, first.group, first.step, first.shape[1])
        if not same or any(
            (a is None) != (b is None) for a, b in zip(part.tensors.values(), first.tensors.values(), strict=True)
        ):
            raise ValueError(
                f"matrices of one product differ: {first.format} of {first.shape[1]} columns in groups of {first.group}, and "
                f"{part.format} of {part.shape[1]} in groups of {part.group}; multiply by each of them"
            )
    tiled = first.words.dim() == 3

    def joined(name: str) -> Tensor | None:
        tensors = [part.tensors[name] for part in parts]
        axis = 1 if tiled and name in ("words", "high") else 0 if name in ("words", "outer") else -1
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None], axis)

    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    tensors: dict[str, Any] = {name: joined(name) for name in first.tensors if name != "counters"}
    return replace(first, **tensors, counters=_counters(tensors["words"]), shape=shape)


def unpack(packed: Packed) -> Tensor:
    """The matrix [out, in] that the kernels multiply by, float32."""
    rows, columns = packed.shape
    fmt = FORMATS[packed.format]
    codes = _codes(packed)
    which = torch.arange(columns, device=codes.device) // (packed.group or columns)
    if fmt.kind == "bcq":
        assert packed.scale is not None
        alphas = packed.scale.float()[which]  # [in, planes + 1, out]
        values = alphas[:, -1].T
        for i in range(fmt.bits):
            values = values + alphas[:, i].T * (((codes >> i) & 1) * 2 - 1)
        return values
    if fmt.kind == "int":
        middle = 0 if packed.words.dtype != torch.int16 else 2 ** (container(fmt) - 1)
        values = codes - (middle if packed.zero is None else packed.zero.float().T[:, which])
    else:
        values = fmt.decode(codes)
    if packed.scale is not None:
        values = values * packed.scale.float().T[:, which]
    return values * packed.outer[:, None]


def _codes(packed: Packed) -> Tensor:
    """Codes [out, in] as they were packed: int32, of integers for float inputs counted from 0."""
    (rows, columns), words, fmt = packed.shape, packed.words, FORMATS[packed.format]
    if words.dim() == 2:
        codes = words.view(torch.int8 if fmt.kind == "int" else torch.uint8).to(torch.int32)
    elif words.dtype == torch.int8:
        wide = words.to(torch.int32)
        codes = torch.stack([(wide << 28) >> 28, wide >> 4], 2).transpose(0, 1).reshape(rows, -1)
    else:
        bits = container(fmt)
        low = 2 if bits == 3 else bits
        shifts = torch.arange(planes_of(bits), device=words.device)
        pair = [part.to(torch.int32)[..., None] for part in (words, packed.high) if part is not None]
        if fmt.kind == "bcq":
            planes = [((pair[i // 2] >> (shifts + i % 2 * 8)) & 1) << i for i in range(fmt.bits)]
            codes = torch.stack(planes).sum(0, dtype=torch.int32)
        else:
            codes = (pair[0] >> (shifts * low)) & (2**low - 1)
            if bits == 3:
                codes += ((pair[1] >> shifts) & 1) << 2
        codes = codes.permute(1, 0, 3, 2).reshape(rows, -1)
        if fmt.kind == "float":  # the sign back from the top of the container
            codes = (codes & (2 ** (bits - 1) - 1)) | ((codes >> (bits - 1)) << (fmt.bits - 1))
    return codes[:, :columns]


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def _group(spec: Spec, columns: int) -> int:
    """Columns a scale, 0 where that is all of them."""
    return 0 if spec.group in (CHANNEL, TENSOR, columns) else spec.group


def _counted(codes: Tensor, fmt: Format, bits: int) -> Tensor:
    """Codes as int32 from 0 to 2^bits - 1: integers counted from the lowest, floats with the sign on top."""
    codes = codes.to(torch.int32)
    if fmt.kind == "int":
        return codes + 2 ** (bits - 1)
    if fmt.kind == "float":
        top = fmt.bits - 1
        return (codes & (2**top - 1)) | ((codes >> top) << (bits - 1))
    return codes


def _plane_by_plane(codes: Tensor, first: int, last: int) -> Tensor:
    """Bits `first` to `last` of codes [..., columns]: [..., bits * columns], all columns of a bit beside each other."""
    return torch.cat([(codes >> bit) & 1 for bit in range(first, last)], -1)


def _joined(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes [..., planes] of some bits, side by side in words."""
    total = (codes << (torch.arange(codes.shape[-1], device=codes.device) * bits)).sum(-1)
    size = torch.iinfo(dtype).bits
    return torch.where(total >= 2 ** (size - 1), total - 2**size, total).to(dtype).contiguous()


def _expanded(per_group: Tensor, spec: Spec, rows: int) -> Tensor:
    """What belongs to groups, for every row of the matrix: [rows, groups]."""
    return per_group.expand(rows, -1) if spec.group == TENSOR else per_group.repeat_interleave(spec.rows, 0)


def _scales(q: QTensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """scale and outer of a `Packed`."""
    rows, columns = q.codes.shape
    scale = _expanded(q.scale.float(), q.spec, rows)
    outer = torch.ones(rows, 1, device=scale.device) if q.outer is None else q.outer.expand(rows, 1)
    if _group(q.spec, columns) == 0:
        return None, (scale * outer)[:, 0].contiguous()
    if q.spec.scale != "int8":  # the largest of a row becomes 1 to 2; integers stay
        power = torch.ldexp(torch.ones_like(outer), torch.frexp(scale.abs().amax(1, keepdim=True)).exponent - 1)
        scale, outer = scale / power, outer * power
    return scale.T.to(dtype).contiguous(), outer[:, 0].contiguous()


def _alphas(q: QTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and outer of a `Packed` in binary coding: float32 where `dtype` would round."""
    alphas = q.scale.float().permute(1, 2, 0).contiguous()
    short = alphas.to(dtype)
    return short if bool((short.float() == alphas).all()) else alphas, torch.ones(len(q.codes), device=alphas.device)


def _counters(words: Tensor) -> Tensor:
    """One for every 16 outputs and each of up to 16 blocks of rows of x."""
    rows = words.shape[1] if words.dim() == 3 else words.shape[0]
    return torch.zeros(-(-rows // 16) * 16, dtype=torch.int32, device=words.device)
