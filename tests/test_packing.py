"""Bit packing against a packer that moves one bit at a time, and there and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import packing
from lowbit.packing import pack, packed_width, unpack


def pack_row(codes: list[int], bits: int) -> list[int]:
    """Bit b of code k is bit k * bits + b of the row's stream; bit i of the stream is bit i % 8 of byte i // 8."""
    out = [0] * -(-len(codes) * bits // 8)
    for k, code in enumerate(codes):
        for b in range(bits):
            position = k * bits + b
            out[position // 8] |= ((code >> b) & 1) << (position % 8)
    return out


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Bits a code, and a matrix of codes."""
    bits = draw(st.integers(1, 8))
    columns = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return bits, draw(st.lists(row, min_size=1, max_size=5))


@given(matrices(), st.sampled_from([torch.uint8, torch.int16, torch.int64]))
def test_there_and_back(given: tuple[int, list[list[int]]], dtype: torch.dtype) -> None:
    bits, rows = given
    codes = torch.tensor(rows, dtype=dtype)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [pack_row(row, bits) for row in rows]
    back = unpack(packed, bits, len(rows[0]))
    assert back.dtype == torch.uint8
    assert back.tolist() == rows


@pytest.mark.parametrize("bits", range(1, 9))
def test_large_and_in_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on a few at a time; the last few may be fewer."""
    codes = torch.randint(0, 2**bits, (11, 37), generator=torch.Generator().manual_seed(bits))
    expected = [pack_row(row, bits) for row in codes.tolist()]
    for chunk in (1, 37 * 3, 37 * 4 + 5, 2**22):
        monkeypatch.setattr(packing, "_CHUNK", chunk)
        packed = pack(codes, bits)
        assert packed.tolist() == expected
        assert unpack(packed, bits, 37).tolist() == codes.tolist()


def test_order_of_bits_by_hand() -> None:
    """Lowest bit first: 5 = 101 and 3 = 011 fill bits 0..5, 6 = 110 the bits 6..8."""
    assert pack(torch.tensor([[5, 3, 6]]), 3).tolist() == [[0b10_011_101, 0b1]]
    assert pack(torch.tensor([[1, 2], [15, 0]]), 4).tolist() == [[0x21], [0x0F]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]]), 1).tolist() == [[0b1000_0001, 1]]
    assert pack(torch.tensor([[200, 7]]), 8).tolist() == [[200, 7]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 128])
def test_packed_width(bits: int, columns: int) -> None:
    assert packed_width(columns, bits) == len(pack_row([0] * columns, bits))
    assert pack(torch.zeros(3, columns, dtype=torch.uint8), bits).shape == (3, packed_width(columns, bits))
    assert unpack(torch.zeros(3, packed_width(columns, bits), dtype=torch.uint8), bits, columns).shape == (3, columns)
    assert pack(torch.zeros(0, columns, dtype=torch.uint8), bits).shape == (0, packed_width(columns, bits))


def test_transposed_input() -> None:
    codes = torch.randint(0, 8, (9, 5))
    assert torch.equal(pack(codes.T, 3), pack(codes.T.contiguous(), 3))
    packed = pack(codes.T, 3)
    wide = torch.empty(packed.shape[1], packed.shape[0], dtype=torch.uint8).T.copy_(packed)
    assert not wide.is_contiguous()
    assert torch.equal(unpack(wide, 3, 9), codes.T.to(torch.uint8))


def test_unpack_shares_no_memory() -> None:
    """The result can be changed without changing the checkpoint's tensor, at 8 bits too."""
    packed = torch.tensor([[1, 2]], dtype=torch.uint8)
    unpack(packed, 8, 2).zero_()
    assert packed.tolist() == [[1, 2]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_that_do_not_fit(bits: int) -> None:
    too_large = torch.tensor([[0, 2**bits]])
    with pytest.raises(ValueError, match=rf"^codes lie in 0\.\.{2**bits}, not in 0\.\.{2**bits - 1}$"):
        pack(too_large, bits)
    with pytest.raises(ValueError, match=rf"^codes lie in -1\.\.0, not in 0\.\.{2**bits - 1}$"):
        pack(torch.tensor([[0], [-1]], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_widths_that_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^codes of {bits} bits cannot be packed; allowed are 1 to 8 bits$"):
        pack(torch.zeros(2, 4, dtype=torch.uint8), bits)


@pytest.mark.parametrize("width", [0, 4, 6])
def test_width_that_does_not_fit(width: int) -> None:
    with pytest.raises(ValueError, match=f"^a packed row of 13 3-bit codes has 5 bytes, not {width}$"):
        unpack(torch.zeros(2, width, dtype=torch.uint8), 3, 13)
