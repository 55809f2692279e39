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
- Damping: `damping` x mean(diag H) is added to the diagonal. If the factorisation still fails, damping grows tenfold, at most
  `_ESCALATIONS` times, and the value used is recorded; then it is an error. It never falls back to rounding.
- A column whose input is always zero (H_jj = 0) cannot matter to the data: damping alone keeps it, so it is rounded to nearest.

Cost: O(in^2 out + in^3) time; memory of one [in, in] matrix (float64 up to 4096 columns, float32 above) beside H and three
[out, in].
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.qtensor import QTensor, Spec, find_params
from lowbit.unit import Between, Unit

_BLOCK = 128  # columns updated lazily together
_ESCALATIONS = 3
_FLOAT64_COLUMNS = 4096


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
    sequential: bool = False,
) -> None:
    """Solve every linear of the unit with GPTQ.

    Args:
        damping: fraction of the mean of diag(H) added to the diagonal.
        order: "activation" visits the columns with the largest inputs first, "natural" from left to right.
        shrink_steps: n > 1 searches n shrunken ranges for each group, weighing columns by diag(H); 0 is min-max. By default
            20 below 4 bits, where that is worth a fifth of the divergence, and 0 from 4 bits on (LOG.md).
        sequential: gather each Hessian with the linears before it in the block quantized ("true sequential" in the reference
            code); two to three times the forward passes.
    """
    for linear in unit.linears:
        few_bits = unit.spec(linear).format.bits < 4
        hessian = unit.gram(linear, sequential=sequential)
        if not bool(hessian.diagonal().any()):
            unit.warn(linear, "no calibration token reached this layer: rounded to nearest instead of gptq")
            unit.assign_nearest(linear, method="rtn (fallback from gptq)")
            continue
        solution = gptq_weight(
            unit.weight(linear),
            hessian,
            unit.spec(linear),
            scale_dtype=unit.scale_dtype,
            damping=damping,
            order=order,
            shrink_steps=(20 if few_bits else 0) if shrink_steps is None else shrink_steps,
            name=linear.name,
        )
        if solution.damping != damping:
            unit.warn(linear, f"damping raised from {damping} to {solution.damping} to factorise the Hessian")
        unit.assign(linear, solution.q, method="gptq", damping=solution.damping)


def gptq_weight(
    w: Tensor,
    hessian: Tensor,
    spec: Spec,
    *,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    order: Literal["activation", "natural"] = "activation",
    shrink_steps: int = 0,
    name: str = "weight",
) -> Solution:
    """Quantize one matrix with GPTQ.

    Args:
        w: [out, in] float32.
        hessian: [in, in] float32, the Gram matrix X^T X of the layer's inputs (any positive factor).
        spec: the grid; groups are static.
        scale_dtype: dtype in which scales are stored.
        name: for error messages.

    Raises:
        ValueError: the Hessian cannot be factorised even with the largest damping.
    """
    columns = w.shape[1]
    diagonal = hessian.diagonal()
    scale, zero = find_params(w, spec, scale_dtype=scale_dtype, shrink_steps=shrink_steps, importance=diagonal)
    if order == "activation":
        permutation = torch.argsort(diagonal, descending=True, stable=True)
    else:
        permutation = torch.arange(columns, device=w.device)
    inverse, used = _inverse_factor(hessian, permutation, damping, name)

    # Row j of `rest` is the j-th visited column of w: contiguous, and updated in place.
    rest = w.T[permutation].contiguous()
    group_of = permutation // spec.group_size(columns)
    scales = scale.float().T.expand(-1, w.shape[0])
    zeros = None if zero is None else zero.float().T
    values = torch.empty_like(rest)
    errors = torch.empty(min(_BLOCK, columns), w.shape[0], dtype=w.dtype, device=w.device)
    objective = 0.0
    group_list = group_of.tolist()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        u = inverse[columns - stop : columns - start, : columns - start].flip(0, 1).float()  # U[start:stop, start:]
        diagonal_u = u.diagonal().tolist()
        for j in range(start, stop):
            s = scales[group_list[j]]
            column = rest[j]
            if zeros is None:
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
        objective += float(errors[: stop - start].double().square().sum())
        if stop < columns:
            rest[stop:].addmm_(u[:, stop - start :].T, errors[: stop - start], alpha=-1)
    ordered = torch.empty_like(values)
    ordered[permutation] = values
    codes = spec.format.encode(ordered.T.contiguous())
    return Solution(QTensor(codes, scale, zero, spec), used, objective)


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
