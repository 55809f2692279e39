"""GPTQ: round one input column at a time and let the columns still to come absorb the error.

Minimises, for each linear layer, sum over tokens ||(W - Q) x||^2 = trace((W - Q) H (W - Q)^T) with H = X^T X, over codes Q on
a fixed grid (Frantar et al., GPTQ, ICLR 2023, section 3, algorithm 1).

With U upper triangular and inv(H) = U^T U, columns are visited left to right: e = (w_j - Q(w_j)) / U_jj, and every later
column k changes by -e U_jk. The changes are exact minimisers for the columns that remain, and the sum of e^2 is the objective.
U comes from one Cholesky factorisation of the reversed H and one triangular inverse, both in place (H = R R^T with R upper
triangular, U = inv(R)), which needs a third of the memory and loses fewer digits than factor, invert, factor again.

Choices, where the paper leaves them open:
- Order "activation": columns with the largest diag(H) first, while they can still be compensated. Groups are static: their
  scales come from the original weights in the original column order, so the checkpoint needs no permutation.
- Scales "static" come from the original weights; "entry" (with the natural order) chooses those of a group when its first
  column is reached, from the weights as compensated until then. `joint` rounds a whole group at once and passes its error
  on as one, E = (W_g - Q_g) inv(U_gg) (Sharify et al., 2405.07135, algorithm 1, with the second update of the columns after
  the block left out: as printed it counts twice).
- Damping: `damping` x mean(diag H) is added to the diagonal. If the factorisation still fails, damping grows tenfold, at most
  `_ESCALATIONS` times, and the value used is recorded; then it is an error. It never falls back to rounding.
- `asymmetry` a makes up for what earlier layers lost: it aims at W x' with the inputs x' of the float model (GPTAQ, Li et al.,
  ICML 2025). sum ||Q x - W x'||^2 differs by a constant from the objective above around W + W D H^-1, D = sum (x' - x) x^T, so
  W + a W D H^-1 is what is rounded. Deviation: GPTAQ folds the second term into the column loop and leaves the column at hand
  out of it.
- `refine` goes on from there: n times the scales that minimise the objective for the codes as they are (least squares, all
  groups of a row at once), then every column once more, rounded to where the objective is least with all others as they are
  (coordinate descent; Behdin et al., QuantEase, 2023). A column now knows what became of those after it.
- A column whose input is always zero (H_jj = 0) cannot matter to the data: damping alone keeps it, so it is rounded to nearest.

Cost: O(in^2 out + in^3) time; memory of one [in, in] matrix (float64 up to 4096 columns, float32 above) beside H and three
[out, in].
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.codebooks import nearest, pick
from lowbit.qtensor import CHANNEL, TENSOR, Grid, QTensor, Spec, dequantize, find_params, search_steps, values_of
from lowbit.unit import Between, Unit

_BLOCK = 128  # columns updated lazily together
_ESCALATIONS = 3
_FLOAT64_COLUMNS = 4096
_SYSTEMS = 2**24  # numbers in the systems of equations that are solved at once


@dataclass(frozen=True)
class Solution:
    """What `gptq_weight` found: the codes, the damping it needed, and the damped objective (sum of e^2)."""

    q: QTensor
    damping: float
    objective: float


def gptq(
    unit: Unit,
    *,
    damping: Annotated[float, Between(1e-6, 1)] = 0.01,
    order: Literal["activation", "natural"] = "activation",
    shrink_steps: Annotated[int, Between(0, 95)] | None = None,
    scales: Literal["static", "entry"] = "static",
    joint: bool = False,
    sequential: bool = False,
    asymmetry: Annotated[float, Between(0, 1)] = 0.0,
    refine: Annotated[int, Between(0, 20)] = 0,
) -> None:
    """Solve every linear of the unit with GPTQ.

    Args:
        damping: fraction of the mean of diag(H) added to the diagonal.
        order: "activation" visits the columns with the largest inputs first, "natural" from left to right.
        shrink_steps: n > 1 searches n shrunken ranges for each group, weighing columns by diag(H); 0 is min-max. By default
            20 below 4 bits, where that is worth a fifth of the divergence, and 0 from 4 bits on (LOG.md). Scales that are
            powers of two or E4M3 are searched among a few neighbours instead, whatever n > 1; for codebooks it is the rounds
            of alternation, 15 by default.
        scales: "static" or "entry", see above; "entry" needs the natural order and groups that divide 128.
        joint: round a group at once instead of column by column; needs "entry".
        sequential: gather each Hessian with the linears before it in the block quantized ("true sequential" in the reference
            code); two to three times the forward passes.
        asymmetry: how much of the earlier layers' error to make up for, see above; another pass over the data in the float
            model.
        refine: rounds of better scales and codes afterwards, see above; each takes about as long as the solver.
    """
    if scales == "entry" and order != "natural":
        raise ValueError('gptq: scales = "entry" needs order = "natural"')
    if joint and scales != "entry":
        raise ValueError('gptq: joint = true needs scales = "entry"')
    if asymmetry and sequential:
        raise ValueError("gptq: asymmetry compares with the float block, which sequential = true has quantized already")
    for linear in unit.linears:
        hessian = unit.gram(linear, sequential=sequential)
        if not bool(hessian.diagonal().any()):
            unit.warn(linear, "no calibration token reached this layer: rounded to nearest instead of gptq")
            unit.assign_nearest(linear, method="rtn (fallback from gptq)")
            continue
        w, cross = unit.weight(linear), unit.cross(linear) if asymmetry else None
        if asymmetry and cross is None:
            unit.warn(
                linear, "not every token reaches this layer, so its inputs in the float model cannot be told: no asymmetry"
            )
        if cross is not None:
            w = w + asymmetry * w @ shift(hessian, cross, damping)
        solution = gptq_weight(
            w,
            hessian,
            unit.spec(linear),
            scale_dtype=unit.scale_dtype,
            damping=damping,
            order=order,
            shrink_steps=search_steps(unit.spec(linear), 0, 20) if shrink_steps is None else shrink_steps,
            scales=scales,
            joint=joint,
            largest=unit.largest(linear),
            name=linear.name,
        )
        if solution.damping != damping:
            unit.warn(linear, f"damping raised from {damping} to {solution.damping} to factorise the Hessian")
        q = refined(w, hessian, solution.q, damping=solution.damping, rounds=refine)
        unit.assign(linear, q, method="gptq", damping=solution.damping)


def shift(hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """D (H + damping mean(diag H) I)^-1 [in, in]: W D H^-1 is what moves the layer's outputs to those of the float model.

    Args:
        hessian: H [in, in] float32.
        cross: D [in, in] float32, see `Unit.cross`.
    """
    dtype = torch.float64 if len(hessian) <= _FLOAT64_COLUMNS else torch.float32
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return torch.linalg.solve(damped, cross.to(dtype).T).T.float()


def gptq_weight(
    w: Tensor,
    hessian: Tensor,
    spec: Spec,
    *,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    order: Literal["activation", "natural"] = "activation",
    shrink_steps: int = 0,
    scales: Literal["static", "entry"] = "static",
    joint: bool = False,
    largest: float | None = None,
    name: str = "weight",
) -> Solution:
    """Quantize one matrix with GPTQ.

    Args:
        w: [out, in] float32.
        hessian: [in, in] float32, the Gram matrix X^T X of the layer's inputs (any positive factor).
        spec: the grid; groups are static.
        scale_dtype: dtype in which scales are stored.
        largest: see `find_params`.
        name: for error messages.

    Raises:
        ValueError: the Hessian cannot be factorised even with the largest damping; "entry" with groups that do not divide 128.
    """
    columns = w.shape[1]
    diagonal = hessian.diagonal()
    grid = find_params(w, spec, scale_dtype=scale_dtype, shrink_steps=shrink_steps, importance=diagonal, largest=largest)
    if order == "activation":
        permutation = torch.argsort(diagonal, descending=True, stable=True)
    else:
        permutation = torch.arange(columns, device=w.device)
    inverse, used = _inverse_factor(hessian, permutation, damping, name)

    # Row j of `rest` is the j-th visited column of w: contiguous, and updated in place.
    rest = w.T[permutation].contiguous()
    size = spec.group_size(columns)
    group_of = permutation // size
    table = values_of(grid.scale, spec).transpose(0, 1).contiguous() if spec.format.codebook else None
    steps = torch.ones(()) if spec.format.codebook else grid.step(spec, len(w)).T.contiguous()
    zeros = _zeros(grid, spec, len(w))
    fixed = spec.group in (CHANNEL, TENSOR) or spec.rows != 1 or grid.outer is not None or spec.format.codebook
    if scales == "entry" and (fixed or _BLOCK % size):
        raise ValueError(f"{name}: scales chosen on entry need groups that divide {_BLOCK} columns, with scales of their own")
    values = torch.empty_like(rest)
    errors = torch.empty(min(_BLOCK, columns), w.shape[0], dtype=w.dtype, device=w.device)
    objective = 0.0
    group_list = group_of.tolist()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        u = inverse[columns - stop : columns - start, : columns - start].flip(0, 1).float()  # U[start:stop, start:]
        diagonal_u = u.diagonal().tolist()
        for j in range(start, start if joint else stop):
            if scales == "entry" and j % size == 0:
                _choose(grid, rest[j : j + size].T, j // size, spec, shrink_steps, diagonal[j : j + size])
                steps, zeros = grid.step(spec, len(w)).T.contiguous(), _zeros(grid, spec, len(w))
            column = rest[j]
            s = steps if table is not None else steps[group_list[j]]
            if table is not None:
                codes = nearest(column.unsqueeze(-1), table[group_list[j]])
                value = codes.squeeze(-1).float()
                error = column - pick(table[group_list[j]], codes).squeeze(-1)
            elif zeros is None:
                value = spec.format.round(column / s)
                error = torch.addcmul(column, value, s, value=-1)
            else:
                z = zeros[group_list[j]]
                value = spec.format.round(column / s + z)
                error = torch.addcmul(column, value - z, s, value=-1)
            values[j] = value
            i = j - start
            error /= diagonal_u[i]
            errors[i] = error
            if j + 1 < stop:
                rest[j + 1 : stop].addr_(u[i, i + 1 : stop - start], error, alpha=-1)
        for j in range(start, stop if joint else start, size):
            mine, i = slice(j, j + size), j - start
            _choose(grid, rest[mine].T, j // size, spec, shrink_steps, diagonal[mine])
            steps, zeros = grid.step(spec, len(w)).T.contiguous(), _zeros(grid, spec, len(w))
            z = torch.zeros(()) if zeros is None else zeros[group_list[j]]
            values[mine] = spec.format.round(rest[mine] / steps[group_list[j]] + z)
            delta = rest[mine] - (values[mine] - z) * steps[group_list[j]]
            corner = u[i : i + size, i : i + size]
            errors[i : i + size] = torch.linalg.solve_triangular(corner.T, delta, upper=False)
            rest[j + size : stop].addmm_(u[i : i + size, i + size : stop - start].T, errors[i : i + size], alpha=-1)
        objective += float(errors[: stop - start].double().square().sum())
        if stop < columns:
            rest[stop:].addmm_(u[:, stop - start :].T, errors[: stop - start], alpha=-1)
    ordered = torch.empty_like(values)
    ordered[permutation] = values
    found = ordered.T.contiguous()
    codes = spec.format.encode(found) if table is None else found.to(torch.uint8)
    return Solution(QTensor(codes, grid.scale, grid.zero, spec, grid.outer), used, objective)


def refined(w: Tensor, hessian: Tensor, q: QTensor, *, damping: float, rounds: int) -> QTensor:
    """Rounds of better scales and better codes; the objective trace((W - Q) (H + damping mean(diag H) I) (W - Q)^T) only falls.

    Scales stay where several rows share one, where they are no floats, and in codebooks; zero points always do.

    Args:
        w: [out, in] float32, what `q` is to be.
        hessian: [in, in] float32.
    """
    if not rounds:
        return q
    spec, columns = q.spec, w.shape[1]
    h = hessian.clone()
    h.diagonal().add_(damping * float(hessian.diagonal().double().mean()))
    curvature, size = h.diagonal().tolist(), spec.group_size(columns)
    table = values_of(q.scale, spec).transpose(0, 1).contiguous() if spec.format.codebook else None
    for _ in range(rounds):
        if table is None and spec.scale == "float" and spec.rows == 1 and spec.group != TENSOR:
            q = replace(q, scale=_fitted_scales(w, h, q))
        value = dequantize(q).T.contiguous()  # row j is column j of the matrix, as in `gptq_weight`
        rest = w.T - value
        codes = (q.codes if table is not None else spec.format.decode(q.codes)).T.float().contiguous()
        grid = Grid(q.scale, q.zero, q.outer)
        steps = torch.ones(()) if table is not None else grid.step(spec, len(w)).T.contiguous()
        zeros = None if table is not None else _zeros(grid, spec, len(w))
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            slope = h[start:stop] @ rest
            for j in range(start, stop):
                group, i = j // size, j - start
                best = value[j] + slope[i] / curvature[j]
                if table is not None:
                    found = nearest(best.unsqueeze(-1), table[group])
                    codes[j], new = found.squeeze(-1), pick(table[group], found).squeeze(-1)
                else:
                    z = 0.0 if zeros is None else zeros[group]
                    codes[j] = spec.format.round(best / steps[group] + z)
                    new = (codes[j] - z) * steps[group]
                change = new - value[j]
                rest[j] -= change
                slope[i + 1 :].addr_(h[j, j + 1 : stop], change, alpha=-1)
        found = codes.T.contiguous()
        q = replace(q, codes=found.to(torch.uint8) if table is not None else spec.format.encode(found))
    return q


def _fitted_scales(w: Tensor, h: Tensor, q: QTensor) -> Tensor:
    """The scales [out, groups] that minimise trace((W - Q) H (W - Q)^T) for the codes of q, in the dtype of q's.

    With v_g the codes less zero points of group g of a row, s solves sum_k v_g^T H_gk v_k s_k = v_g^T (H w)_g. A row whose
    scales, once rounded to their dtype, would be worse, or have another sign, keeps those it had.
    """
    size, count = q.spec.group_size(w.shape[1]), max(1, _SYSTEMS // q.scale.shape[1] ** 2)
    found = []
    for start in range(0, len(w), count):
        rows = slice(start, start + count)
        part = QTensor(q.codes[rows], q.scale[rows], None if q.zero is None else q.zero[rows], q.spec)
        rest = w[rows] - dequantize(part)
        units = dequantize(replace(part, scale=torch.ones_like(part.scale, dtype=torch.float32)))
        v = units.unflatten(1, (-1, size))
        systems = torch.empty(len(v), v.shape[1], v.shape[1], dtype=torch.float64, device=w.device)
        for group in range(v.shape[1]):
            product = v[:, group] @ h[group * size : (group + 1) * size]
            systems[:, group] = (product * units).unflatten(1, (-1, size)).sum(-1)
        systems.diagonal(dim1=1, dim2=2).clamp_(min=torch.finfo(torch.float32).tiny)  # groups of zeros have any scale
        slopes = (rest @ h * units).unflatten(1, (-1, size)).sum(-1).double()
        scale = (part.scale.double() + torch.linalg.solve(systems, slopes)).to(q.scale.dtype)
        trial = w[rows] - dequantize(replace(part, scale=scale))
        before, after = ((x @ h * x).sum(1, dtype=torch.float64) for x in (rest, trial))
        better = (after < before) & (scale.sign() == part.scale.sign()).all(1)
        found.append(torch.where(better.unsqueeze(1), scale, part.scale))
    return torch.cat(found)


def _zeros(grid: Grid, spec: Spec, rows: int) -> Tensor | None:
    """Zero points as float32 [groups, rows]."""
    if grid.zero is None:
        return None
    zero = grid.zero.float()
    return (zero.expand(rows, -1) if spec.group == TENSOR else zero.repeat_interleave(spec.rows, 0)).T.contiguous()


def _choose(grid: Grid, w: Tensor, group: int, spec: Spec, shrink_steps: int, importance: Tensor) -> None:
    """Set the scales of a group by its columns w [out, group size]."""
    chosen = find_params(w, spec, scale_dtype=grid.scale.dtype, shrink_steps=shrink_steps, importance=importance)
    grid.scale[:, group] = chosen.scale[:, 0]
    if grid.zero is not None and chosen.zero is not None:
        grid.zero[:, group] = chosen.zero[:, 0]


def _inverse_factor(hessian: Tensor, permutation: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """inv(L) [in, in], lower triangular: the U of the module's text with rows and columns reversed; and the damping used.

    L L^T = the permuted, reversed H + damping mean(diag H) I.
    """
    dtype = torch.float64 if len(permutation) <= _FLOAT64_COLUMNS else torch.float32
    reverse = permutation.flip(0)
    mean = float(hessian.diagonal().double().mean())
    for attempt in range(_ESCALATIONS + 1):
        used = damping * 10**attempt
        lower = hessian[reverse.unsqueeze(1), reverse].to(dtype).mT  # symmetric; the factorisation works in place by columns
        lower.diagonal().add_(used * mean)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            _invert_lower(lower)
            return lower, used
    raise ValueError(
        f"{name}: the Hessian is not positive definite even with damping {used}; use more or longer calibration rows, "
        "a larger damping, or rtn for this layer"
    )


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix [n, n] in place, stripe by stripe: row k of the inverse needs those above it only."""
    for start in range(0, len(lower), _BLOCK):
        rows = lower[start : start + _BLOCK]
        corner = rows[:, start : start + _BLOCK]
        identity = torch.eye(len(rows), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        rows[:, :start] = -inverse @ (rows[:, :start] @ lower[:start, :start])
        corner.copy_(inverse)
