"""Rounding to nearest: the textbook's codes, no data, and a search that is kept apart from the baseline."""

import pytest
import textbook
import torch
from blind import Blind
from torch import Tensor

from lowbit.arch import Linear
from lowbit.methods.rtn import rtn
from lowbit.qtensor import Grid, dequantize, find_params, parse_scheme, quantize

SCHEMES = {"a": "w4a16-g16", "b": "w3a16-g32-asym", "c": "w8a16-channel", "d": "fp8"}


def weights() -> dict[str, Tensor]:
    """Matrices of several shapes; in e, which has no scheme, nothing may happen."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 64), "b": (4, 96), "c": (5, 40), "d": (3, 24), "e": (2, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected_weights(w: Tensor, scheme: str) -> Tensor:
    """Integer grids by the textbook, float8 by torch."""
    spec = parse_scheme(scheme).weight
    if spec.format.kind == "float":
        scale = w.abs().amax(dim=1, keepdim=True) / 448
        return (w / scale).to(torch.float8_e4m3fn).double() * scale
    bits = spec.format.bits

    def half_range(part: Tensor) -> tuple[Tensor, Tensor]:
        """lowbit's symmetric rule: of 8 bits, half of the code range for the largest magnitude; of fewer, the lowest code."""
        largest = part.abs().amax(dim=1)
        scale = largest / ((2**bits - 1) / 2) if bits == 8 else largest * -(2.0 ** (1 - bits))
        positive = (part == largest.unsqueeze(1)).any(1)
        return torch.where(positive, scale, scale.abs()), torch.zeros_like(scale)

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


class Seeing(Blind):
    """A unit with given weights and Gram matrices."""

    def __init__(self, schemes: dict[str, str], weights: dict[str, Tensor], grams: dict[str, Tensor]) -> None:
        super().__init__(schemes, weights)
        self.given = grams

    def gram(self, linear: Linear, *, sequential: bool = False) -> Tensor:
        """The given matrix."""
        self._grams[self._gram_key(linear)] = self.given[linear.name]
        return self.given[linear.name]


def test_importance() -> None:
    """Of twenty ranges, each group has the one with the least error weighed by the mean square of the inputs."""
    w = weights()["b"]
    x = torch.randn(50, 96) * torch.logspace(-1, 1, 96)
    unit = Seeing({"b": "w3a16-g32-asym"}, {"b": w}, {"b": x.T @ x})
    rtn(unit, importance=True)
    spec = parse_scheme("w3a16-g32-asym").weight

    def errors(fraction: float) -> Tensor:
        """Of each group of each row, when its range is shrunken so."""
        groups = w.unflatten(1, (3, 32))
        low, high = groups.amin(-1, keepdim=True).clamp(max=0) * fraction, groups.amax(-1, keepdim=True).clamp(min=0) * fraction
        scale = (high - low) / 7
        zero = (-4 - low / scale).round().clamp(-4, 3)
        found = ((groups / scale + zero).round().clamp(-4, 3) - zero) * scale
        return ((found - groups).square() * x.square().sum(0).unflatten(0, (3, 32))).sum(-1)

    tried = torch.stack([errors(1 - step / 100) for step in range(20)])
    delta = dequantize(unit.assigned["b"]) - w
    found = (delta.square() * x.square().sum(0)).unflatten(1, (3, 32)).sum(-1)
    torch.testing.assert_close(found, tried.amin(0), rtol=1e-4, atol=1e-5)
    assert float((found / tried[0]).mean()) < 0.95
    plain = quantize(w, find_params(w, spec, scale_dtype=torch.float32, shrink_steps=20), spec)
    assert not torch.equal(plain.scale, unit.assigned["b"].scale)
    record = unit.records["b"]
    assert (record.method, record.error_kind, record.warnings) == ("rtn", "output", [])


def test_importance_without_tokens() -> None:
    """A layer that no token reached keeps its min-max grid, and the record says so."""
    w = weights()["b"]
    unit = Seeing({"b": "w3a16-g32-asym"}, {"b": w}, {"b": torch.zeros(96, 96)})
    rtn(unit, importance=True)
    spec = parse_scheme("w3a16-g32-asym").weight
    assert torch.equal(unit.assigned["b"].scale, find_params(w, spec, scale_dtype=torch.float32).scale)
    assert unit.records["b"].warnings == ["no calibration token reached this layer: its scales were not searched"]


@pytest.mark.parametrize("steps", [0, 1])
def test_importance_without_a_search(steps: int) -> None:
    with pytest.raises(ValueError, match=f"importance = true weighs a search of scales, and shrink_steps = {steps} is none"):
        rtn(Blind(SCHEMES, weights()), importance=True, shrink_steps=steps)
