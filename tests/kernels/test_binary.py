"""One row times binary-coded weights by tables against the reference, in Triton's interpreter: planes, groups, odd shapes."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from matrices import error, quantized  # noqa: E402

from lowbit.kernels import binary, entry, reference  # noqa: E402
from lowbit.kernels.packed import pack_planes  # noqa: E402
from lowbit.kernels.weight_only import INTERPRETED, Config  # noqa: E402
from lowbit.qtensor import dequantize  # noqa: E402


def test_interpreted() -> None:
    """Otherwise nothing here tests the kernel."""
    assert INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", ["g128", "g256", "channel"])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_product(planes: int, group: str, dtype: torch.dtype) -> None:
    """Within the rounding of outputs (the interpreter cuts those of bfloat16 off), K whole and split, blocks that columns fill
    and do not, with bias and residual."""
    columns = {"g128": 384, "g256": 768, "channel": 328}[group]
    q = quantized(f"bcq{planes}-{group}", 96, columns, dtype)
    packed = pack_planes(q, dtype)
    x, bias, residual = (torch.randn(*shape, dtype=dtype) for shape in ((1, columns), (96,), (1, 96)))
    none, both = (None, None), (bias, residual)
    for config, terms in ((Config(1, 32, 1), none), (Config(1, 64, 2), both), (Config(1, 128, 9), both)):
        wanted = reference.linear(x.double(), dequantize(q), *terms)
        found = binary.linear(x, packed, *terms, config=config)
        assert error(found, wanted) < (1e-3 if dtype == torch.float16 else 8e-3), config
    assert not packed.counters.any()


def test_the_same_bits_again() -> None:
    """Parts are added in their order."""
    packed = pack_planes(quantized("bcq2-g128", 64, 1024), torch.float16)
    x = torch.randn(1, 1024, dtype=torch.float16)
    first = binary.linear(x, packed, None, None, config=Config(1, 32, 8))
    assert all(torch.equal(first, binary.linear(x, packed, None, None, config=Config(1, 32, 8))) for _ in range(2))
    assert not torch.equal(first, binary.linear(-x, packed, None, None))


def test_when_tables_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operator for one row, and groups that a step divides; else planes are multiplied, with the same result."""
    used = []
    linear = binary.linear

    def noted(x: torch.Tensor, *given: Any) -> torch.Tensor:
        used.append(len(x))
        return linear(x, *given)

    monkeypatch.setattr(binary, "linear", noted)
    x = torch.randn(2, 1, 384, dtype=torch.float16)
    for scheme, taken in (("bcq3-g128", True), ("bcq3-channel", True), ("bcq3-g64", False), ("w3a16-g128", False)):
        q = quantized(scheme, 48, 384)
        matrix = entry.prepare(q, inputs=None, dtype=torch.float16)
        for rows, by_tables in ((x[0], taken), (x, False)):
            used.clear()
            assert error(entry.linear(rows, matrix), reference.linear(rows.double(), dequantize(q))) < 1e-3
            assert used == [1] * by_tables, scheme


def test_bytes_of_words() -> None:
    """What a GPU runs to get at them, and the interpreter does not: of two words in a register."""
    found = dict.fromkeys(range(4), 0)
    for target, selector in re.findall(r"prmt\.b32 \$(\d), \$4, 0, 0x(\w{4});", binary._BYTES):
        register = (0x44332211).to_bytes(4, "little") + bytes(4)
        found[int(target)] = int.from_bytes(bytes(register[int(at, 16)] for at in reversed(selector)), "little")
    assert list(found.values()) == [0x11, 0x33, 0x22, 0x44]  # the lower ones first


def test_configurations_fill_a_gpu() -> None:
    """Every processor has a program, no part is without steps, and there is a counter for each block."""
    for columns, inner in ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120), (28672, 8192)):
        config = binary.config_for(columns, inner, 132)
        blocks, steps = -(-columns // config.block_n), inner // 128
        assert 120 <= blocks * config.split <= 7 * 132 and -(-steps // -(-steps // config.split)) == config.split
        assert blocks <= -(-columns // 16) * 16
