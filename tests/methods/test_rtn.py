"""Rounding to nearest: the textbook's codes, no data, and a search that is kept apart from the baseline."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import textbook
import torch
from torch import Tensor

from lowbit.arch import Block, Linear
from lowbit.methods.rtn import rtn
from lowbit.qtensor import Grid, dequantize, find_params, parse_scheme, quantize
from lowbit.unit import Unit

SCHEMES = {"a": "w4a16-g16", "b": "w3a16-g32-asym", "c": "w8a16-channel", "d": "fp8"}


def weights() -> dict[str, Tensor]:
    """Matrices of several shapes; in e, which has no scheme, nothing may happen."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 64), "b": (4, 96), "c": (5, 40), "d": (3, 24), "e": (2, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Blind(Unit):
    """A unit with given weights that has no data."""

    def __init__(self, schemes: dict[str, str], weights: dict[str, Tensor]) -> None:
        linears = tuple(
            Linear(
                name=name,
                tensor=f"{name}.weight",
                param=f"{name}.weight",
                index=None,
                rows=(0, len(w)),
                transposed=False,
                stacked=False,
                out_features=w.shape[0],
                in_features=w.shape[1],
                shares=name,
            )
            for name, w in weights.items()
        )
        arch = SimpleNamespace(param=lambda linear: weights[linear.name], device=torch.device("cpu"))
        block = Block(index=0, name="block", tensors=(), linears=linears)
        parsed = {name: parse_scheme(scheme) for name, scheme in schemes.items()}
        super().__init__(cast(Any, arch), block, parsed, cast(Any, None), torch.float32)

    def gram(self, linear: Linear, *, sequential: bool = False) -> Tensor:
        """Not to be asked for."""
        raise AssertionError("rounding to nearest needs no data")


def expected_weights(w: Tensor, scheme: str) -> Tensor:
    """Integer grids by the textbook, float8 by torch."""
    spec = parse_scheme(scheme).weight
    if spec.format.kind == "float":
        scale = w.abs().amax(dim=1, keepdim=True) / 448
        return (w / scale).to(torch.float8_e4m3fn).double() * scale
    bits = spec.format.bits

    def half_range(part: Tensor) -> tuple[Tensor, Tensor]:
        """lowbit's symmetric rule: half of the code range for the largest magnitude."""
        scale = part.abs().amax(dim=1) / ((2**bits - 1) / 2)
        return scale, torch.zeros_like(scale)

    found = textbook.nearest_textbook(
        w,
        bits=bits,
        symmetric=spec.symmetric,
        group=spec.group if spec.group > 0 else None,
        find_params=half_range if spec.symmetric else textbook.minmax_params(bits),
    )
    return found[3]


def test_nearest() -> None:
    """Each linear of the unit with its own scheme; weights stay as they are until the block is finished."""
    given = weights()
    unit = Blind(SCHEMES, given)
    rtn(unit)
    assert set(unit.assigned) == set(unit.records) == set(SCHEMES)
    for name, scheme in SCHEMES.items():
        found, expected = dequantize(unit.assigned[name]).double(), expected_weights(given[name], scheme)
        # Half of the range is a tie: the largest weight of a symmetric group may go either way, at the same distance.
        assert torch.allclose((found - given[name]).abs(), (expected - given[name]).abs(), atol=1e-5)
        assert (torch.isclose(found, expected, atol=1e-5)).double().mean() > 0.9
        record = unit.records[name]
        assert (record.method, record.scheme, record.damping, record.warnings) == ("rtn", scheme, None, [])
        error = (expected - given[name]).square().sum() / given[name].square().sum()
        assert record.error_kind == "weight"
        assert record.error == record.error_rtn == pytest.approx(float(error), rel=1e-3)
    for name, w in weights().items():
        assert torch.equal(given[name], w)


def test_search() -> None:
    """`shrink_steps` reaches the choice of scales, and lowers the error that it searches by."""
    given = weights()
    unit = Blind(SCHEMES, given)
    rtn(unit, shrink_steps=50)
    gains = {}
    for name, scheme in SCHEMES.items():
        spec = parse_scheme(scheme).weight
        scale, zero, _ = find_params(given[name], spec, scale_dtype=torch.float32, shrink_steps=50)
        expected = quantize(given[name], Grid(scale, zero, None), spec)
        assert torch.equal(unit.assigned[name].codes, expected.codes)
        assert torch.equal(unit.assigned[name].scale, scale)
        found = (dequantize(unit.assigned[name]) - given[name]).abs().pow(2.4).sum()
        plain = (expected_weights(given[name], scheme) - given[name]).abs().pow(2.4).sum()
        gains[name] = float(found / plain)
        assert unit.records[name].method == "rtn"
    assert all(gain < 1 + 1e-5 for gain in gains.values())
    assert gains["b"] < 0.95


def test_search_is_compared_with_the_plain_grid() -> None:
    """`error_rtn` is that of a min-max grid, also for rtn."""
    plain, searched = Blind(SCHEMES, weights()), Blind(SCHEMES, weights())
    rtn(plain)
    rtn(searched, shrink_steps=50)
    assert searched.records["b"].error < plain.records["b"].error
    assert searched.records["b"].error_rtn == plain.records["b"].error_rtn
