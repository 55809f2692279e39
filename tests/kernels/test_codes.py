"""Products of codes against the reference, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from matrices import error, quantized  # noqa: E402

from lowbit.kernels import reference  # noqa: E402
from lowbit.kernels.codes import config_for, linear  # noqa: E402
from lowbit.kernels.packed import pack_codes  # noqa: E402
from lowbit.kernels.weight_only import Config  # noqa: E402
from lowbit.qtensor import dequantize, parse_scheme  # noqa: E402

SCHEMES = [
    *("w8a8", "w8a8-g128", "w8a8-aasym", "w8a8-ag128", "w6a6", "fp8", "fp8-block", "w4a8", "w4a8-channel", "w4a8-g32"),
    *("w4a8-g128-asym", "w4a8-g128-two", "w4a8-g128-asym-aasym", "w4a8-ag64", "w4a8-ag32", "w4a8-g32-asym-aasym"),
    "w4a4-g128-ag128",
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_product(scheme: str) -> None:
    """The exact product of what the codes stand for, rounded once, at odd shapes, with bias and residual, K whole and split."""
    rows, columns = (128 if "block" in scheme else 72), 384
    q, inputs = quantized(scheme, rows, columns), parse_scheme(scheme).input
    assert inputs is not None
    packed, bias = pack_codes(q, inputs, torch.float16), torch.randn(rows, dtype=torch.float16)
    for few, config in ((5, Config(16, 64, 1)), (17, Config(32, 64, 3)), (17, Config(16, 64, 1))):
        x = reference.quantize_rows(torch.randn(few, columns) + 0.3, inputs)
        residual = torch.randn(few, rows, dtype=torch.float16)
        wanted = reference.linear(reference.dequantize_rows(x).double(), dequantize(q), bias, residual)
        assert error(linear(x, packed, bias, residual, torch.float16, config=config), wanted) < 5e-4, config


def test_integers_are_summed_exactly() -> None:
    """Whole numbers that float32 could not hold otherwise, an odd width, and the same bits again."""
    q, inputs = quantized("w8a8", 40, 1000), parse_scheme("w8a8").input
    assert inputs is not None
    packed = pack_codes(q, inputs, torch.float16)
    x = reference.Quantized(torch.randint(-127, 128, (3, 1000), dtype=torch.int8), torch.full((3, 1), 1e-5))
    found = linear(x, packed, None, None, torch.float32)
    exact = (x.codes.long() @ q.codes.long().T).double() * x.scale.double() * q.scale.double().T
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(found, linear(x, packed, None, None, torch.float32)) and not packed.counters.any()


def test_configurations_fill_a_gpu() -> None:
    """Few rows: as many parts of K as keep all processors busy. There is a counter for each block."""
    for columns, inner in ((4096, 4096), (11008, 4096), (28672, 8192)):
        for rows in (1, 16, 64, 256, 2048):
            config = config_for(rows, columns, inner, 132)
            blocks = -(-columns // config.block_n) * -(-rows // config.block_m)
            assert config.split * blocks >= 120 and (config.split == 1 or blocks <= -(-columns // 16) * 16)


def test_configurations_of_small_matrices() -> None:
    """Those of an encoder: the largest blocks that fill a GPU, K in parts only where these are long."""
    wanted = {
        (2048, 3072, 1024): (128, 128, 1), (2048, 1024, 1024): (128, 64, 1), (512, 4096, 1024): (128, 64, 1),
        (512, 1024, 4096): (64, 64, 1), (128, 1024, 1024): (32, 64, 1), (128, 1024, 4096): (32, 64, 2),
    }  # fmt: skip
    for (rows, columns, inner), (block_m, block_n, split) in wanted.items():
        config = config_for(rows, columns, inner, 132)
        assert (config.block_m, config.block_n, config.split) == (block_m, block_n, split), (rows, columns, inner)
