"""The row quantizers against the reference, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from lowbit.kernels import entry, reference  # noqa: E402
from lowbit.qtensor import parse_scheme  # noqa: E402
from lowbit.unit import Input  # noqa: E402

SCHEMES = ["w8a8", "w8a8-aasym", "w8a8-ag64", "w8a8-ag64-aasym", "w8a8-astatic", "w4a4-ag32", "fp8", "fp8-ag128"]


def same(found: reference.Quantized, wanted: torch.Tensor, inputs: Input) -> None:
    """Codes are those of `wanted`, but one apart where it lies half way; scales agree to the last digits."""
    expected = reference.quantize_rows(wanted, inputs.spec, inputs.largest)
    assert torch.allclose(found.scale, expected.scale, rtol=1e-5)
    apart = (found.codes.float() - expected.codes.float()).abs()
    assert float((apart > 0).float().mean()) < 0.01
    step = expected.codes.float().abs() / 8 if inputs.spec.format.kind == "float" else torch.ones_like(apart)
    assert bool((apart <= step.clamp(min=2**-9)).all())
    if expected.zero is not None:
        assert found.zero is not None and bool(((found.zero - expected.zero).abs() <= 1).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_producer(scheme: str) -> None:
    """Rows of odd count, a row of zeros, views whose rows lie apart, residuals."""
    spec = parse_scheme(scheme).input
    assert spec is not None
    inputs = Input(spec, 3.0 if not spec.dynamic else None)
    both = torch.randn(3, 1, 768, dtype=torch.float16)
    both[1] = 0
    x, up = both.split(384, -1)
    weight, bias = torch.rand(384, dtype=torch.float16), torch.randn(384, dtype=torch.float16)
    same(entry.plain(x, inputs), x, inputs)
    same(entry.silu_mul(x, up, inputs), reference.silu_mul(x, up), inputs)
    same(entry.gelu(x, inputs), reference.gelu(x), inputs)
    same(entry.gelu(x, inputs, tanh=True), reference.gelu(x, tanh=True), inputs)
    same(entry.rms_norm(x, weight, 1e-6, inputs), reference.rms_norm(x, weight, 1e-6), inputs)
    same(entry.layer_norm(x, weight, bias, 1e-5, inputs), reference.layer_norm(x, weight, bias, 1e-5), inputs)
    found, stream = entry.add_rms_norm(x, up, weight, 1e-6, inputs, one_plus=True)
    assert torch.equal(stream, x + up)
    same(found, reference.rms_norm(x + up, weight.float() + 1, 1e-6), inputs)
    found, stream = entry.add_layer_norm(x, up, weight, None, 1e-5, inputs)
    same(found, reference.layer_norm(x + up, weight, None, 1e-5), inputs)
    wanted = reference.layer_norm(x, weight, bias, 1e-5).half()
    found, floats = entry.kept_layer_norm(x, weight, bias, 1e-5, inputs)
    assert torch.allclose(floats, wanted, rtol=2e-3, atol=2e-3)
    same(found, floats, inputs)
    found, floats = entry.kept_rms_norm(x, weight, 1e-6, inputs)
    assert torch.allclose(floats, reference.rms_norm(x, weight, 1e-6).half(), rtol=2e-3, atol=2e-3)
    same(found, floats, inputs)


def test_a_width_that_is_no_power_of_two() -> None:
    """What fills the block does not count, also in means and in ranges."""
    x = torch.randn(2, 200, dtype=torch.float16) + 4
    same(
        entry.layer_norm(x, torch.ones(200), torch.ones(200), 1e-5),
        reference.layer_norm(x, torch.ones(200), torch.ones(200), 1e-5),
        Input(entry.INT8.spec),
    )


@pytest.mark.parametrize("width", [200, 1500])
def test_floats(width: int) -> None:
    """Rows of the dtype of what they are made of; of more columns than a block, where blocks do not depend on each other."""
    both = torch.randn(3, 1, 2 * width, dtype=torch.float16)
    x, up = both.split(width, -1)
    weight = torch.rand(width, dtype=torch.float16)

    def equal(found: object, wanted: torch.Tensor) -> bool:
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float16
        return torch.allclose(found.float(), wanted, rtol=2e-3, atol=1e-6)

    assert equal(entry.silu_mul(x, up, None), reference.silu_mul(x, up))
    assert equal(entry.gelu(x, None), reference.gelu(x))
    assert equal(entry.rms_norm(x, weight, 1e-6, None), reference.rms_norm(x, weight, 1e-6))
    assert equal(entry.layer_norm(x, weight, None, 1e-5, None), reference.layer_norm(x, weight, None, 1e-5))
    wide = 1e6 * x.float()
    assert equal(entry.rms_norm(wide, weight, 1e-6, None, dtype=torch.float16), reference.rms_norm(wide, weight, 1e-6))
    found, stream = entry.add_rms_norm(x, up, weight, 1e-6, None, one_plus=True)
    assert torch.equal(stream, x + up)
    assert equal(found, reference.rms_norm(x + up, weight.float() + 1, 1e-6))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "static" not in name])
def test_an_overflow_spoils_what_shares_its_scale(scheme: str, bad: float) -> None:
    """In the kernel as in the specification: a scale of NaN, so that nothing plausible comes out of the product."""
    spec = parse_scheme(scheme).input
    assert spec is not None
    x = torch.randn(3, 256, dtype=torch.float16)
    x[1, 70] = bad
    found, wanted = entry.plain(x, Input(spec)), reference.quantize_rows(x, spec)
    assert torch.equal(found.scale.isnan(), wanted.scale.isnan())
    assert int(found.scale.isnan().sum()) == 1
    assert torch.equal(reference.dequantize_rows(found).isnan(), reference.dequantize_rows(wanted).isnan())
    same(reference.Quantized(*(None if part is None else part[::2] for part in found)), x[::2], Input(spec))
