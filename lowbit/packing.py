"""Dense bit packing of integer codes, for checkpoints in lowbit's own format.

Codes of b bits form one little-endian bit stream per row: code k occupies bits [k*b, (k+1)*b), lowest bit first, and each
row is padded with zero bits to a whole byte. Every width from 1 to 8 packs without waste inside a row.
"""

import torch
from torch import Tensor

_CHUNK = 2**22  # codes expanded to bits at a time: 8 bytes of scratch for each


def packed_width(columns: int, bits: int) -> int:
    """Bytes in a packed row of `columns` codes."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, columns] (integers in 0 .. 2^bits-1) to uint8 [rows, packed_width(columns, bits)].

    Raises:
        ValueError: `bits` is not in 1..8, or a code does not fit into it.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; allowed are 1 to 8 bits")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes lie in {int(codes.min())}..{int(codes.max())}, not in 0..{2**bits - 1}")
    rows, columns = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    width = packed_width(columns, bits)
    out = torch.empty(rows, width, dtype=torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8)
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    for start, stop in _row_chunks(rows, columns):
        part = codes[start:stop].to(torch.uint8)
        stream = torch.zeros(stop - start, width * 8, dtype=torch.uint8)
        stream[:, : columns * bits] = ((part.unsqueeze(-1) >> shifts) & 1).flatten(1)
        out[start:stop] = (stream.view(stop - start, width, 8) * weights).sum(-1, dtype=torch.uint8)
    return out


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, packed_width] to uint8 codes [rows, columns]."""
    rows, width = packed.shape
    if width != packed_width(columns, bits):
        raise ValueError(f"a packed row of {columns} {bits}-bit codes has {packed_width(columns, bits)} bytes, not {width}")
    if bits == 8:
        return packed.clone()
    out = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    weights = (2 ** torch.arange(bits, device=packed.device)).to(torch.uint8)
    for start, stop in _row_chunks(rows, columns):
        stream = ((packed[start:stop].unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : columns * bits]
        out[start:stop] = (stream.view(stop - start, columns, bits) * weights).sum(-1, dtype=torch.uint8)
    return out


def padding_is_zero(packed: Tensor, bits: int, columns: int) -> bool:
    """Whether what fills up the last word of each row [rows, words] of `columns` codes, bytes or int32, is zero bits."""
    word = packed.element_size() * 8
    used = columns * bits - (packed.shape[1] - 1) * word
    return used >= word or not bool((packed[:, -1].long() % 2**word >> used).any())


def _row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
