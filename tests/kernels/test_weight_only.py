"""The products with float inputs against the reference, in Triton's interpreter: formats, odd shapes, splits of K."""

import pytest
import torch

pytest.importorskip("triton")

from matrices import FLOATS, error, quantized  # noqa: E402

from lowbit.kernels import reference  # noqa: E402
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
    for config in (Config(16, 64, 1), Config(16, 64, 2), Config(128, 128, 1)):
        assert error(linear(x, packed, bias, residual, config=config), wanted) < 1e-3, config
    assert torch.equal(dense(packed, torch.float16), unpack(packed).half())


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
    for columns, inner in ((4096, 4096), (11008, 4096), (28672, 8192)):
        for rows in (1, 16, 64, 256, 2048):
            config = config_for(rows, columns, inner, 132)
            blocks = -(-columns // config.block_n) * -(-rows // config.block_m)
            assert config.split * blocks >= 120 and (rows < 2048 or config.split == 1)
            assert config.split == 1 or blocks <= -(-columns // 16) * 16
