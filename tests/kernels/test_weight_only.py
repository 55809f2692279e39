"""The products with float inputs against the reference, in Triton's interpreter: formats, odd shapes, splits of K."""

import pytest
import torch

pytest.importorskip("triton")

from matrices import FLOATS, error, quantized  # noqa: E402

from lowbit.formats import FORMATS  # noqa: E402
from lowbit.kernels import reference, weight_only  # noqa: E402
from lowbit.kernels.packed import pack_planes, unpack  # noqa: E402
from lowbit.kernels.weight_only import INTERPRETED, Config, config_for, dense, linear  # noqa: E402
from lowbit.qtensor import dequantize  # noqa: E402


def test_interpreted() -> None:
    """Otherwise nothing here tests the kernel."""
    assert INTERPRETED


@pytest.mark.parametrize("scheme", FLOATS)
def test_product(scheme: str) -> None:
    """Within the rounding of float16, with bias and residual, at odd shapes, K whole and split, scales on sums or weights."""
    rows = 128 if "block" in scheme else 72
    q = quantized(scheme, rows, 384)
    x, bias, residual = (torch.randn(*shape, dtype=torch.float16) for shape in ((5, 384), (rows,), (5, rows)))
    packed = pack_planes(q, torch.float16)
    wanted = reference.linear(x.double(), dequantize(q), bias, residual)
    configs = Config(16, 64, 1), Config(16, 64, 2), Config(128, 128, 1), Config(8, 64, 2, slices=4), Config(8, 128, 1, slices=8)
    for config in configs:
        assert error(linear(x, packed, bias, residual, config=config), wanted) < 1e-3, config
    assert torch.equal(dense(packed, torch.float16), unpack(packed).half())


def run_ptx(text: str, words: list[int]) -> int:
    """The register $0 after a few instructions of PTX on $1, $2."""
    registers = {f"${at}": word for at, word in enumerate(words, 1)}
    for line in filter(None, (part.strip() for part in text.strip("{ }").replace(".reg .b32 t;", "").split(";"))):
        name, _, rest = line.partition(" ")
        target, *given = (part.strip() for part in rest.split(","))
        a, b, *more = (registers[part] if part in registers else int(part, 0) for part in given)
        value = {
            "shl.b32": lambda a, b: a << b,
            "shr.b32": lambda a, b: a >> b,
            "and.b32": lambda a, b: a & b,
            "lop3.b32": lambda a, b, c, table: (a & b) | c,
        }[name](a, b, *more)
        assert name != "lop3.b32" or more[1] == 0xEA  # that table
        registers[target] = value & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_instructions(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, and the interpreter does not: every code of every plane, two words in a register, less a zero point."""
    monkeypatch.setattr(weight_only, "INTERPRETED", False)
    instructions = weight_only._instructions.__wrapped__(FORMATS[f"int{bits}"], dtype)
    base, mantissa = (1024, 10) if dtype == torch.float16 else (128, 7)
    if bits > mantissa:
        assert set(instructions) == {None}
        return
    places = weight_only._places(FORMATS[f"int{bits}"], dtype)
    low = 2 if bits == 3 else bits
    for plane, (text, (shift, place)) in enumerate(zip(instructions, places, strict=True)):
        for code in range(2**bits):
            other = 2**bits - 1 - code
            word = sum(((0xA5A5 & ~((2**low - 1) << plane * low)) | (c & 2**low - 1) << plane * low) << 16 * at
                       for at, c in enumerate((code, other)))  # fmt: skip
            third = sum(((0x5A & ~(1 << plane)) | (c >> 2) << plane) << 16 * at for at, c in enumerate((code, other)))
            found = run_ptx(text, [word >> shift, third])
            values = torch.tensor([found & 0xFFFF, found >> 16], dtype=torch.int32).to(torch.int16).view(dtype).float()
            less = (base * 2.0**-place + 3) * torch.ones(2)
            assert torch.equal(less.to(dtype).float(), less)
            assert (values * 2.0**-place - less).tolist() == [code - 3, other - 3], (plane, code)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_instructions_of_binary_planes(planes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 where a bit is 0, -1 where it is 1: those of a binary plane lie beside each other, the upper planes in other words."""
    monkeypatch.setattr(weight_only, "INTERPRETED", False)
    instructions = weight_only._instructions.__wrapped__(FORMATS[f"bcq{planes}"], dtype)
    each = 16 if planes == 1 else 8
    assert len(instructions) == each * planes
    for at, text in enumerate(instructions):
        column, bit = divmod(at, planes)
        for first in (0, 1):
            plain = [0xA5A5 & ~(1 << column + bit % 2 * 8) | b << column + bit % 2 * 8 for b in (first, 1 - first)]
            words = [0x5A5A5A5A, 0x5A5A5A5A]
            words[bit // 2] = plain[0] | plain[1] << 16
            found = run_ptx(text, words)
            values = torch.tensor([found & 0xFFFF, found >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            assert values.tolist() == [1 - 2 * first, 2 * first - 1], (column, bit)


def test_odd_shapes() -> None:
    """More parts than tiles, rows that fill no block, none at all."""
    q = quantized("w4a16-g64-asym", 50, 320)
    packed = pack_planes(q, torch.float16)
    x = torch.randn(17, 320, dtype=torch.float16)
    found = linear(x, packed, None, None, config=Config(16, 32, 5))
    assert error(found, reference.linear(x.double(), dequantize(q))) < 1e-3
    assert linear(x[:0], packed, None, None).shape == (0, 50)
    many = x.repeat(61, 1)
    assert error(linear(many, packed, None, x.new_ones(len(many), 50)), reference.linear(many, dequantize(q)) + 1) < 1e-3


def test_the_same_bits_again() -> None:
    """Parts are added in their order, and counters are left at 0."""
    packed = pack_planes(quantized("w4a16-g128", 64, 1024), torch.float16)
    x = torch.randn(3, 1024, dtype=torch.float16)
    first = linear(x, packed, None, None, config=Config(16, 32, 8))
    assert all(torch.equal(first, linear(x, packed, None, None, config=Config(16, 32, 8))) for _ in range(3))
    assert not torch.equal(first, linear(-x, packed, None, None)) and not packed.counters.any()


def test_configurations_fill_a_gpu() -> None:
    """Few rows: as many parts of K as keep all processors busy; many rows: none. There is a counter for each block."""
    for columns, inner in ((4096, 4096), (4096, 11008), (11008, 4096), (28672, 8192)):
        for rows in (1, 2, 7, 16, 64, 256, 2048):
            for plain in (True, False):
                config = config_for(rows, columns, inner, 132, plain=plain)
                of_block = config.block_m // config.slices, config.block_n // config.slices
                blocks = -(-columns // of_block[1]) * -(-rows // of_block[0])
                assert config.split * blocks >= 120 and (rows < 2048 or config.split == 1)
                assert config.split == 1 or blocks <= -(-columns // 16) * 16
