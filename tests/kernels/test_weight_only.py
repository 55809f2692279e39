"""The weight-only linear against the reference, in Triton's interpreter: bits, groups, odd shapes, splits of K."""

import pytest
import torch

pytest.importorskip("triton")

from lowbit.kernels import reference  # noqa: E402
from lowbit.kernels.weight_only import INTERPRETED, ROWS_OF_CUBLAS, Config, config_for, dense, linear, pack, unpack  # noqa: E402
from lowbit.qtensor import QTensor, dequantize, find_params, parse_scheme, quantize  # noqa: E402

SCHEMES = [
    *("w2a16-g32", "w2a16-g64-asym", "w3a16-g32-asym", "w3a16-g128", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128"),
    *("w4a16-g128-asym", "w4a16-g256", "w4a16-channel", "w4a16-channel-asym", "w8a16-g32", "w8a16-g128-asym", "w8a16-channel"),
]


def quantized(scheme: str, rows: int, columns: int, dtype: torch.dtype) -> QTensor:
    spec = parse_scheme(scheme).weight
    w = torch.randn(rows, columns) + 0.2
    return quantize(w, find_params(w, spec, scale_dtype=dtype), spec)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_interpreted() -> None:
    """Otherwise nothing here tests the kernel."""
    assert INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_loses_nothing(scheme: str, dtype: torch.dtype) -> None:
    """Unpacked, the matrix is what `dequantize` gives, to the bit; a width that is no multiple of a tile included."""
    for columns in (256, 320 if "g128" not in scheme and "g256" not in scheme else 384):
        if "g256" in scheme and columns != 256:
            continue
        q = quantized(scheme, 40, columns, dtype)
        assert torch.equal(unpack(pack(q, dtype)), dequantize(q, dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_product(scheme: str) -> None:
    """Within the rounding of float16 inputs and outputs, with the output poisoned where it is not written."""
    q = quantized(scheme, 72, 256, torch.float16)
    x, bias = torch.randn(5, 256, dtype=torch.float16), torch.randn(72, dtype=torch.float16)
    wanted = reference.linear(x.double(), dequantize(q), bias)
    for config in (Config(16, 32, 1), Config(16, 32, 2), Config(128, 32, 1)):
        found = linear(x, pack(q, torch.float16), bias, config=config)
        assert bool(torch.isfinite(found).all())
        assert error(found, wanted) < 1e-3, config


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("columns", [320, 1408])
def test_odd_shapes(rows: int, columns: int) -> None:
    """Rows, outputs and inputs that fill no block, more parts than tiles, leading axes, no bias."""
    q = quantized("w4a16-g64-asym", 50, columns, torch.float16)  # Triton's interpreter does not compute in bfloat16
    x = torch.randn(1, rows, columns, dtype=torch.float16)
    found = linear(x, pack(q, torch.float16), config=Config(16, 32, 5))
    assert found.shape == (1, rows, 50)
    assert error(found, reference.linear(x.double(), dequantize(q))) < 1e-3


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "g256" not in name])
def test_many_rows(scheme: str) -> None:
    """The kernel that unpacks gives what `unpack` gives, to the bit; the product is that of the reference."""
    q = quantized(scheme, 40, 384, torch.float16)
    packed = pack(q, torch.float16)
    assert torch.equal(dense(packed), unpack(packed))
    if scheme == "w4a16-g128":
        x = torch.randn(ROWS_OF_CUBLAS, 384, dtype=torch.float16)
        assert error(linear(x, packed), reference.linear(x.double(), dequantize(q))) < 1e-3


def test_the_same_bits_again() -> None:
    """Parts are added in their order, and counters are left at 0."""
    q = pack(quantized("w4a16-g128", 64, 1024, torch.float16), torch.float16)
    x = torch.randn(3, 1024, dtype=torch.float16)
    first = linear(x, q, config=Config(16, 32, 8))
    assert all(torch.equal(first, linear(x, q, config=Config(16, 32, 8))) for _ in range(3))
    assert not torch.equal(first, linear(-x, q, config=Config(16, 32, 8)))


def test_what_the_kernel_does_not_take() -> None:
    """Other formats and inputs are refused with the reason."""
    for scheme in ("mxfp4a16", "w4a16-g16", "w5a16-g64", "fp8a16"):
        q = quantized(scheme, 32, 128, torch.float16)
        with pytest.raises(ValueError, match="weight-only kernels take integers of 2, 3, 4, 8 bits"):
            pack(q, torch.float16)
    packed = pack(quantized("w4a16-g64", 32, 128, torch.float16), torch.float16)
    with pytest.raises(ValueError, match=r"packed for torch.float16 of width 128, but x is torch.bfloat16"):
        linear(torch.zeros(1, 128, dtype=torch.bfloat16), packed)
    assert linear(torch.zeros(0, 128, dtype=torch.float16), packed).shape == (0, 32)


def test_configurations_fill_a_gpu() -> None:
    """Few rows: as many parts of K as keep all processors busy; many rows: none."""
    for columns, inner in ((4096, 4096), (11008, 4096), (28672, 8192)):
        for rows in (1, 16, 64, 256, 2048):
            config = config_for(rows, columns, inner, 132)
            programs = config.split * -(-columns // config.block_n) * -(-rows // config.block_m)
            assert programs >= 120 and (rows < 2048 or config.split == 1)
