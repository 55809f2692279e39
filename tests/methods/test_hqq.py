"""HQQ: its own objective against the min-max grid, the proximal step against a search, and what it refuses."""

import pytest
import torch
from blind import Blind
from torch import Tensor

from lowbit.methods.hqq import _shrink, hqq, hqq_weight
from lowbit.qtensor import dequantize, find_params, parse_scheme, quantize


def norms(w: Tensor, scheme: str, p: float, **options: float) -> tuple[Tensor, Tensor]:
    """sum |W - Q(W)|^p of every group, of hqq and of rounding to nearest on the min-max grid."""
    spec = parse_scheme(scheme).weight
    found = hqq_weight(w, spec, scale_dtype=torch.bfloat16, p=p, **options)  # type: ignore[arg-type]
    plain = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    size = spec.group_size(w.shape[1])
    a, b = ((dequantize(q) - w).abs().pow(p).unflatten(1, (-1, size)).sum(-1) for q in (found, plain))
    return a, b


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a16-g64-asym", "w3a16-g32-asym", "w2a16-g32-asym", "w4a16-channel"])
@pytest.mark.parametrize("p", [0.4, 0.7, 1.0])
def test_no_group_is_worse_than_min_max(scheme: str, p: float) -> None:
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    w[:, 5] *= 5  # an outlier in a group
    found, plain = norms(w, scheme, p)
    assert bool((found <= plain * (1 + 1e-5)).all())
    assert float(found.sum()) < 0.985 * float(plain.sum())


def test_more_iterations_are_never_worse() -> None:
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    losses = [norms(w, "w3a16-g64-asym", 0.7, iterations=count)[0] for count in (1, 3, 10, 40)]
    assert all(bool((b <= a * (1 + 1e-5)).all()) for a, b in zip(losses, losses[1:], strict=False))
    assert float(losses[-1].sum()) < float(losses[0].sum())


def test_weights_on_a_grid_stay() -> None:
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(2)).float()
    codes[:, 0], codes[:, 1] = -8, 7
    spec = parse_scheme("w4a16-g64-asym").weight
    q = hqq_weight(codes * 0.25, spec, scale_dtype=torch.float32)
    torch.testing.assert_close(dequantize(q), codes * 0.25)


def test_shrink_solves_the_proximal_problem() -> None:
    """For p = 1 it is the soft threshold, argmin |e| + beta/2 (x - e)^2."""
    x = torch.linspace(-3, 3, 61)
    candidates = torch.linspace(-3, 3, 6001)
    best = candidates[(candidates.abs() + 2.0 * (x[:, None] - candidates).square()).argmin(-1)]
    torch.testing.assert_close(_shrink(x, 1.0, 4.0), best, atol=1e-3, rtol=0)
    assert float(_shrink(torch.tensor([0.1]), 0.7, 4.0)) == 0 and 1.7 < float(_shrink(torch.tensor([2.0]), 0.7, 4.0)) < 2


def test_needs_no_data_and_assigns_all() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 64), "b": (4, 96), "c": (5, 40)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    unit = Blind({"a": "w4a16-g16", "b": "w3a16-g32-asym", "c": "w8a16-channel"}, given)
    hqq(unit)
    assert set(unit.assigned) == {"a", "b", "c"}
    assert {record.method for record in unit.records.values()} == {"hqq"}
    assert all(record.error_kind == "weight" for record in unit.records.values())


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4a16", "mxint4a16", "w4a16-g32-pow2", "kmeans3", "nf4"])
def test_other_formats_are_refused_before_anything_is_done(scheme: str) -> None:
    given = {"a": torch.randn(4, 64), "b": torch.randn(4, 64)}
    unit = Blind({"a": "w4a16-g32", "b": scheme}, given)
    with pytest.raises(ValueError, match="hqq fits scales of integers; b has the scheme " + scheme):
        hqq(unit)
    assert not unit.assigned
