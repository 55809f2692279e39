"""Sanity of the references that the other tests compare with."""

from typing import Any

import pytest
import textbook
import torch
from torch import Tensor

GRIDS = [(True, textbook.absmax_params), (False, textbook.minmax_params)]


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weights and the hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing *= 0.8 ** torch.arange(columns).double()[:, None]
    x = torch.randn(512, columns, generator=generator, dtype=torch.float64) @ mixing
    return w, x.T @ x / 512


def arguments(bits: int, symmetric: bool, rule: Any, group: int | None) -> dict[str, Any]:
    return {"bits": bits, "symmetric": symmetric, "group": group, "find_params": rule(bits)}


@pytest.mark.parametrize(("symmetric", "rule"), GRIDS)
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("order", ["natural", "descending"])
def test_compensation_beats_nearest(symmetric: bool, rule: Any, group: int | None, order: Any) -> None:
    w, hessian = problem(16, 32, seed=1)
    same = arguments(3, symmetric, rule, group)
    nearest = textbook.nearest_textbook(w, **same)
    codes, scale, zero, dequantized = textbook.gptq_textbook(w, hessian, damping=0.01, order=order, **same)
    assert textbook.quadratic_loss(w, dequantized, hessian) < 0.7 * textbook.quadratic_loss(w, nearest[3], hessian)
    assert torch.equal(scale, nearest[1]) and torch.equal(zero, nearest[2])
    low, high = textbook.code_range(3, symmetric)
    assert codes.min() >= low and codes.max() <= high
    wide = (part.repeat_interleave(group or 32, dim=1) for part in (scale, zero))
    scale_of, zero_of = wide
    assert torch.equal(dequantized, scale_of * (codes - zero_of))


@pytest.mark.parametrize(("symmetric", "rule"), GRIDS)
def test_diagonal_hessian_is_nearest(symmetric: bool, rule: Any) -> None:
    w, _ = problem(8, 16, seed=2)
    hessian = torch.diag(torch.linspace(0.1, 3.0, 16, dtype=torch.float64))
    same = arguments(4, symmetric, rule, 8)
    for order in ("natural", "descending"):
        found = textbook.gptq_textbook(w, hessian, damping=0.1, order=order, **same)
        for ours, nearest in zip(found, textbook.nearest_textbook(w, **same), strict=True):
            assert torch.equal(ours, nearest)


@pytest.mark.parametrize(("symmetric", "rule"), GRIDS)
@pytest.mark.parametrize("seed", range(5))
def test_exhaustive_search_is_the_least(symmetric: bool, rule: Any, seed: int) -> None:
    w, hessian = problem(1, 6, seed)
    same = arguments(2, symmetric, rule, 3)
    codes, best = textbook.best_of_exhaustive(w, hessian, **same)
    least = textbook.quadratic_loss(w, best, hessian)
    for order in ("natural", "descending"):
        found = textbook.gptq_textbook(w, hessian, damping=0.0, order=order, **same)
        assert least <= textbook.quadratic_loss(w, found[3], hessian) + 1e-12
    nearest = textbook.nearest_textbook(w, **same)
    assert least <= textbook.quadratic_loss(w, nearest[3], hessian) + 1e-12
    assert codes.shape == best.shape == (1, 6)


def test_exhaustive_search_refuses_long_rows() -> None:
    w, hessian = problem(1, 7, seed=0)
    with pytest.raises(ValueError, match="12 bits"):
        textbook.best_of_exhaustive(w, hessian, **arguments(2, True, textbook.absmax_params, None))


def test_two_columns_by_hand() -> None:
    w = torch.tensor([[0.6, 2.0]], dtype=torch.float64)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)

    def unit(weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(len(weights), dtype=torch.float64), torch.zeros(len(weights), dtype=torch.float64)

    same: dict[str, Any] = {"bits": 4, "symmetric": True, "group": None, "damping": 0.0, "find_params": unit}
    # The first error, 0.6 - 1, moves the second weight by H01 / H11 of itself: 2 - 0.4 = 1.6.
    assert textbook.gptq_textbook(w, hessian, **same)[0].tolist() == [[1, 2]]
    # With a larger covariance it goes to 2 - 0.4 * 1.4 = 1.44.
    hessian[0, 1] = hessian[1, 0] = 1.4
    assert textbook.gptq_textbook(w, hessian, **same)[0].tolist() == [[1, 1]]


def test_dead_columns_become_zero() -> None:
    w, hessian = problem(4, 16, seed=3)
    hessian[5, :] = 0.0
    hessian[:, 5] = 0.0
    w[:, 5] = 100.0
    same = arguments(4, True, textbook.absmax_params, 8)
    codes, scale, _, dequantized = textbook.gptq_textbook(w, hessian, damping=0.01, order="descending", **same)
    assert not codes[:, 5].any() and not dequantized[:, 5].any()
    assert scale.max() < 10.0 and dequantized.isfinite().all()


def test_short_last_group_and_dtype() -> None:
    w, hessian = problem(4, 20, seed=4)
    same = arguments(4, False, textbook.minmax_params, 8)
    codes, scale, zero, dequantized = textbook.gptq_textbook(w.float(), hessian.float(), damping=0.01, **same)
    assert codes.dtype == torch.int64 and dequantized.dtype == torch.float64
    assert scale.shape == zero.shape == (4, 3)


def test_quadratic_loss_is_the_output_error() -> None:
    w, hessian = problem(5, 12, seed=5)
    x = torch.randn(64, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wq = w + 0.1
    expected = ((x @ (w - wq).T) ** 2).sum().item()
    assert textbook.quadratic_loss(w, wq, x.T @ x) == pytest.approx(expected)
    assert textbook.quadratic_loss(w, w, hessian) == 0.0
