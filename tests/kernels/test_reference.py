"""The specification of the kernels, against arithmetic done otherwise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.kernels import reference
from lowbit.qtensor import fake_quantize_input, parse_scheme


@given(
    st.integers(0, 2**31),
    st.sampled_from(["w8a8", "w8a8-aasym", "w8a8-ag32", "w8a8-ag32-aasym", "w8a8-astatic", "w4a4", "fp8", "fp8-block"]),
)
def test_rows_are_those_of_the_scheme(seed: int, scheme: str) -> None:
    """What the codes stand for is what inputs are simulated as, to the bit; a row of zeros included."""
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)) * 10
    x[3] = 0
    spec = parse_scheme(scheme).input
    assert spec is not None
    found = reference.quantize_rows(x, spec, 25.0)
    assert found.codes.dtype == (torch.int8 if spec.format.kind == "int" else torch.float8_e4m3fn)
    assert torch.equal(reference.dequantize_rows(found), fake_quantize_input(x, spec, 25.0))


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
    wanted = wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))) / 2
    assert torch.allclose(reference.gelu(x, tanh=True).double(), wanted, atol=1e-6)


def test_products() -> None:
    """Summed wide and rounded once, with bias and residual."""
    x, w = torch.randn(3, 64, dtype=torch.float16), torch.randn(5, 64, dtype=torch.float16)
    assert torch.equal(reference.linear(x, w), (x.float() @ w.float().T).half())
    wanted = x.float() @ w.float().T + w[:, 0].float() + x[:, :5].float()
    assert torch.equal(reference.linear(x, w, w[:, 0], x[:, :5]), wanted.half())
