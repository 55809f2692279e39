"""The specification of the kernels, against arithmetic done otherwise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.kernels import reference
from lowbit.qtensor import fake_quantize_input, parse_scheme


@given(st.integers(0, 2**31), st.sampled_from([1, 7, 64]))
def test_rows_are_within_half_a_step(seed: int, width: int) -> None:
    """Every value is within half a step of its code, the largest has code 127, and it is the scheme w8a8 that is computed."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * 10
    codes, scale = reference.quantize_rows(x)
    assert codes.dtype == torch.int8 and bool((codes.int().abs().amax(-1) == 127).all())
    assert bool(((codes * scale - x).abs() <= 0.5001 * scale).all())
    spec = parse_scheme("w8a8").input
    assert spec is not None and torch.allclose(codes * scale, fake_quantize_input(x, spec), atol=1e-6)


def test_rows_of_zeros() -> None:
    """They have a scale, and codes of 0."""
    codes, scale = reference.quantize_rows(torch.zeros(2, 4))
    assert bool((codes == 0).all()) and bool((scale == 1).all())


def test_norms_and_activations() -> None:
    """Those of torch, in float64."""
    x, w, b = torch.randn(3, 32), torch.rand(32), torch.rand(32)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    assert torch.allclose(reference.rms_norm(x, w, 1e-6).double(), wanted, atol=1e-6)
    centred = wide - wide.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b
    assert torch.allclose(reference.layer_norm(x, w, b, 1e-5).double(), wanted, atol=1e-6)
    assert torch.allclose(reference.silu_mul(x, x + 1).double(), wide * torch.sigmoid(wide) * (wide + 1), atol=1e-6)
    assert torch.allclose(reference.gelu(x).double(), wide * (1 + torch.erf(wide / 2**0.5)) / 2, atol=1e-6)


def test_products() -> None:
    """Integers are summed exactly, and a product of floats is rounded once."""
    a, b = (torch.randint(-127, 128, (4, 4096), dtype=torch.int8) for _ in range(2))
    scales = torch.rand(4, 1), torch.rand(4)
    found = reference.int8_linear(a, scales[0], b, scales[1], None, torch.float64)
    exact = (a.long() @ b.long().T).double()
    assert torch.equal(found, exact * scales[0].double() * scales[1].double())
    x, w = torch.randn(3, 64, dtype=torch.float16), torch.randn(5, 64, dtype=torch.float16)
    assert torch.equal(reference.linear(x, w), (x.float() @ w.float().T).half())
