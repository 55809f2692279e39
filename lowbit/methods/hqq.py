"""HQQ: scales and zero points that fit the bulk of the weights instead of their outliers, without data.

Minimises sum |W - Q(W)|^p, p = 0.7, over scale and zero point of every group by half-quadratic splitting (Badri & Shaji, Half-
Quadratic Quantization, 2023): with E standing for the error,

    E <- shrink(W - Q(W), beta)           the p-norm's proximal step: small errors become 0, large ones stay
    s, z <- least squares of W - E        for the codes as they are
    codes <- nearest of W on the new grid; beta <- 1.01 beta

and the best grid seen is kept, min-max included, so it is never worse by that measure.

Cost: `iterations` passes over the weights. Deviations: HQQ keeps the scale and moves a float zero point; engines store zero
points as integers, which leaves almost nothing to move, so the scale is fitted too, and symmetric grids can take part.
"""

from typing import Annotated

import torch
from torch import Tensor

from lowbit.qtensor import Grid, QTensor, Spec, find_params, grouped, quantize
from lowbit.unit import Between, Unit


def hqq(
    unit: Unit,
    *,
    p: Annotated[float, Between(0.1, 1)] = 0.7,
    beta: Annotated[float, Between(0.1, 1000)] = 10.0,
    iterations: Annotated[int, Between(1, 200)] = 20,
) -> None:
    """Fit every linear of the unit.

    Args:
        p: the norm; below 1, a few large errors count less than many small ones.
        beta: how small an error must be to count as none: the penalty of the splitting, in units of 1 / the mean step.
        iterations: rounds.

    Raises:
        ValueError: a scheme is not of integers with float scales.
    """
    for linear in unit.linears:
        spec = unit.spec(linear)
        if spec.format.kind != "int" or spec.scale != "float" or spec.format.largest:
            raise ValueError(
                f"hqq fits scales of integers; {linear.name} has the scheme {unit.scheme(linear).name}; use rtn or gptq"
            )
    for linear in unit.linears:
        q = hqq_weight(
            unit.weight(linear), unit.spec(linear), scale_dtype=unit.scale_dtype, p=p, beta=beta, iterations=iterations
        )
        unit.assign(linear, q, method="hqq")


def hqq_weight(
    w: Tensor, spec: Spec, *, scale_dtype: torch.dtype, p: float = 0.7, beta: float = 10.0, iterations: int = 20
) -> QTensor:
    """Quantize w [out, in] float32 on a grid of integers."""
    groups = grouped(w, spec)
    grid = find_params(w, spec, scale_dtype=scale_dtype)
    best, least = grid, _objective(groups, grid, spec, p)
    unit_step = grid.scale.float().unsqueeze(-1)
    for iteration in range(iterations):
        codes, delta = _round(groups, grid, spec)
        shrunk = _shrink(delta / unit_step, p, beta * 1.01**iteration) * unit_step
        grid = _fit(groups - shrunk, codes, grid, spec)
        error = _objective(groups, grid, spec, p)
        better = error < least
        least = torch.where(better, error, least)
        zero = None if best.zero is None or grid.zero is None else torch.where(better, grid.zero, best.zero)
        best = Grid(torch.where(better, grid.scale, best.scale), zero, None)
    return quantize(w, best, spec)


def _round(groups: Tensor, grid: Grid, spec: Spec) -> tuple[Tensor, Tensor]:
    """Nearest codes less their zero points, and the errors W - Q(W)."""
    s = grid.scale.float().unsqueeze(-1)
    z = 0.0 if grid.zero is None else grid.zero.float().unsqueeze(-1)
    codes = spec.format.round(groups / s + z)
    return codes, groups - (codes - z) * s


def _objective(groups: Tensor, grid: Grid, spec: Spec, p: float) -> Tensor:
    """sum |W - Q(W)|^p of each group."""
    return _round(groups, grid, spec)[1].abs_().pow_(p).sum(-1)


def _shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """The generalised soft threshold of the p-norm (Chartrand 2012)."""
    magnitude = x.abs()
    return x.sign() * (magnitude - magnitude.clamp(min=1e-8) ** (p - 1) / beta).clamp_(min=0)


def _fit(target: Tensor, codes: Tensor, grid: Grid, spec: Spec) -> Grid:
    """Least squares of target ~ (codes - z) s for the codes of each group: s and a float z at once, then z rounded, then s."""
    old, zero = grid.scale.float(), grid.zero
    if zero is not None:
        spread = codes - codes.mean(-1, keepdim=True)
        variance = spread.square().sum(-1)
        slope = torch.where(variance > 0, (spread * target).sum(-1) / variance.clamp(min=1e-30), old)
        slope = torch.where(slope > 0, slope, old)
        middle = codes.mean(-1) - target.mean(-1) / slope
        zero = middle.round().clamp(spec.format.min, spec.format.max).to(torch.int8)
        codes = codes - zero.float().unsqueeze(-1)
    energy = codes.square().sum(-1)
    scale = torch.where(energy > 0, (codes * target).sum(-1) / energy.clamp(min=1e-30), old)
    tiny = torch.finfo(grid.scale.dtype).tiny
    return Grid(torch.where(scale > 0, scale.clamp(min=tiny), old).to(grid.scale.dtype), zero, None)
