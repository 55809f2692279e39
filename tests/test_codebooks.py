"""Codebooks against exhaustive searches, closed forms and the uniform grids they contain."""

from itertools import combinations_with_replacement, product

import pytest
import torch
from torch import Tensor

from lowbit.codebooks import bcq, even, kmeans, levels, nearest, pick, signs, uniform
from lowbit.qtensor import Spec, dequantize, find_params, parse_scheme, quantize, to_bcq


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(groups: Tensor, values: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """The least weighted squared error of each group with these values, by trying every one."""
    return ((groups.unsqueeze(-1) - values.unsqueeze(-2)).square().amin(-1) * importance).sum(-1)


def test_nearest_by_trying_all() -> None:
    groups, values = drawn(20, 30), drawn(20, 8, seed=1)  # in no order
    codes = nearest(groups, values)
    torch.testing.assert_close((pick(values, codes) - groups).square().sum(-1), errors(groups, values))
    assert nearest(torch.tensor([[0.5]]), torch.tensor([[1.0, 0.0]])).tolist() == [[1]]  # halfway: the lower value


def test_levels_by_hand() -> None:
    """0b01 is plus the first factor and minus the second."""
    assert levels(torch.tensor([[0.5, 2.0, 10.0]])).tolist() == [[7.5, 8.5, 11.5, 12.5]]
    assert signs(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_uniform_levels(planes: int) -> None:
    found = levels(uniform(torch.tensor([-3.0]), torch.tensor([0.25]), planes))
    assert found.tolist() == [[-3 + 0.25 * k for k in range(2**planes)]]


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-g32-asym", "w4a16-channel", "w4a16-g64-asym", "w3a16-tensor"])
def test_uniform_codes_convert_exactly(scheme: str) -> None:
    spec = parse_scheme(scheme).weight
    w = drawn(8, 128)
    q = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    binary = to_bcq(q)
    assert binary.spec.format.name == f"bcq{spec.format.bits}" and binary.codes.dtype == torch.uint8
    torch.testing.assert_close(dequantize(binary), dequantize(q), rtol=1e-6, atol=0)
    assert torch.equal(binary.codes.int() - 2 ** (spec.format.bits - 1), q.codes.int())
    groups = dequantize(q).view(8, binary.scale.shape[1], -1)
    assert torch.equal(nearest(groups, levels(binary.scale)), binary.codes.view(groups.shape).long())


def test_no_uniform_codes() -> None:
    w = drawn(4, 64)
    for scheme in ("w8a16", "mxfp4a16", "w4a16-g32-two"):
        spec = parse_scheme(scheme).weight
        with pytest.raises(ValueError, match="is no uniform code of up to 4 bits with float scales"):
            to_bcq(quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec))


def test_one_plane_has_a_closed_form() -> None:
    """Of values around 0: the mean magnitude, and the sign."""
    half = drawn(5, 16).abs() + 0.1
    groups = torch.cat([half, -half], -1)
    found = bcq(groups, 1, rounds=0)
    torch.testing.assert_close(found[:, 0], half.mean(-1))
    torch.testing.assert_close(found[:, 1], torch.zeros(5), atol=1e-6, rtol=0)
    assert torch.equal(levels(found).gather(-1, nearest(groups, levels(found))).sign(), groups.sign())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solve", [bcq, kmeans])
def test_errors_never_grow(solve: object, weighted: bool) -> None:
    groups = drawn(50, 64)
    importance = drawn(50, 64, seed=1).square() if weighted else torch.ones(50, 64)
    found = [solve(groups, 3, importance=importance, rounds=rounds) for rounds in (0, 1, 2, 4, 8, 15)]  # type: ignore[operator]
    values = [levels(one) if solve is bcq else one for one in found]
    losses = torch.stack([errors(groups, one, importance) for one in values])
    assert bool((losses[1:] <= losses[:-1] * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < 0.8 * float(losses[0].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["bcq", "kmeans"])
def test_never_worse_than_evenly_spaced(kind: str, bits: int) -> None:
    """Neither on a Gaussian nor on one with an outlier in every group; and worth it with few bits."""
    w = drawn(16, 256)
    w[:, ::32] *= 4
    spec = parse_scheme(f"{kind}{bits}-g64").weight
    found = quantize(w, find_params(w, spec, scale_dtype=torch.float32, shrink_steps=15), spec)
    groups = w.view(16, 4, 64)
    a, b = (dequantize(found).view(16, 4, 64) - groups).square().sum(-1), errors(groups, even(groups, 2**bits))
    assert bool((a <= b * (1 + 1e-5)).all())
    assert float(a.sum()) < {2: 0.6, 3: 0.8, 4: 0.97}[bits] * float(b.sum())


def test_k_means_near_the_optimum() -> None:
    """Of 9 values in 4 clusters, the best partition is one of consecutive values: few groups miss it by 5 %."""
    groups = drawn(60, 9)
    ordered = groups.sort(-1).values
    best = torch.full((60,), torch.inf)
    for cuts in combinations_with_replacement(range(10), 3):
        edges = (0, *cuts, 9)
        parts = [ordered[:, a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
        best = torch.minimum(
            best, sum(((part - part.mean(-1, keepdim=True)).square().sum(-1) for part in parts), torch.zeros(60))
        )
    found = errors(groups, kmeans(groups, 2))
    assert bool((found >= best * (1 - 1e-4)).all())
    assert int((found > best * 1.05 + 1e-6).sum()) <= 15 and float(found.sum()) < 1.15 * float(best.sum())


def test_bcq_near_the_optimum() -> None:
    """Of 5 values and 2 planes, every assignment of codes tried with least squares."""
    groups = drawn(40, 5).double()
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    table = torch.cat([signs(2).double(), torch.ones(4, 1, dtype=torch.float64)], 1)
    for codes in product(range(4), repeat=5):
        matrix = table[list(codes)]
        projector = torch.eye(5, dtype=torch.float64) - matrix @ torch.linalg.pinv(matrix)
        best = torch.minimum(best, (groups @ projector).square().sum(-1))
    found = errors(groups.float(), levels(bcq(groups.float(), 2)))
    assert bool((found >= best.float() - 1e-4).all())
    # Some draws fit exactly, so the share is of what a constant leaves.
    constant = (groups - groups.mean(-1, keepdim=True)).square().sum(-1).float()
    assert int(((found - best.float()) > 0.05 * constant).sum()) <= 4


def test_importance_decides() -> None:
    """Four weights count, and there are four values."""
    groups = drawn(10, 20)
    importance = torch.zeros(20)
    importance[:4] = 1
    found, alike = (errors(groups[:, :4], kmeans(groups, 2, importance=given)) for given in (importance, None))
    assert float(found.sum()) < 0.4 * float(alike.sum())


@pytest.mark.parametrize("kind", ["bcq", "kmeans"])
def test_degenerate_groups(kind: str) -> None:
    """Zeros, constants and two values are met to rounding."""
    w = torch.stack([torch.zeros(64), torch.full((64,), -0.75), torch.tensor([1.0, -2.0]).repeat(32)])
    spec = parse_scheme(f"{kind}2-g32").weight
    for steps in (0, 15):
        q = quantize(w, find_params(w, spec, scale_dtype=torch.float32, shrink_steps=steps), spec)
        torch.testing.assert_close(dequantize(q), w, atol=1e-5, rtol=1e-5)


def test_bits_per_weight() -> None:
    """Codes, and what each group stores in bfloat16: 3 factors and the offset; 8 values of a channel."""
    w = drawn(4, 512)
    for scheme, expected in (("bcq3", 3 + 4 * 16 / 128), ("bcq3-g64", 3 + 4 * 16 / 64), ("kmeans3", 3 + 8 * 16 / 512)):
        spec: Spec = parse_scheme(scheme).weight
        q = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
        assert q.bits_per_weight == expected


@pytest.mark.parametrize("scheme", ["bcq5", "bcq3a8", "kmeans3-asym", "bcq2-pow2", "kmeans2-r4", "bcq3-tensor", "kmeans1"])
def test_schemes_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="scheme"):
        parse_scheme(scheme)
