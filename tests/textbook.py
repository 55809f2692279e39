"""Slow float64 references of rounding with error compensation, written from the definitions."""

from collections.abc import Callable
from itertools import product
from typing import Literal

import torch
from torch import Tensor

# group weights [out, group] -> scale [out], zero [out]
FindParams = Callable[[Tensor], tuple[Tensor, Tensor]]
# column [out], scale [out], zero [out], bits, symmetric -> codes [out], dequantized [out]
Quantize = Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code: signed where symmetric, else from zero."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def quantize(column: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Round values to the nearest point of the grid `scale * (code - zero)`."""
    codes = (torch.round(column / scale) + zero).clamp(*code_range(bits, symmetric))
    return codes, scale * (codes - zero)


def absmax_params(bits: int) -> FindParams:
    """Return the symmetric rule: the largest magnitude gets the largest code."""

    def find_params(weights: Tensor) -> tuple[Tensor, Tensor]:
        largest = weights.abs().amax(dim=1)
        scale = largest / (2 ** (bits - 1) - 1)
        return torch.where(largest > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)

    return find_params


def minmax_params(bits: int) -> FindParams:
    """Return the asymmetric rule: the range of the group and 0 are covered, 0 exactly."""

    def find_params(weights: Tensor) -> tuple[Tensor, Tensor]:
        low, high = weights.amin(dim=1).clamp(max=0), weights.amax(dim=1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(high > low, scale, torch.ones_like(scale))
        return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)

    return find_params


def group_params(w: Tensor, group: int | None, find_params: FindParams) -> tuple[Tensor, Tensor]:
    """Return scale and zero [out, groups] of consecutive groups of `group` columns; None is one group per row."""
    found = [find_params(part) for part in torch.split(w, group or w.shape[1], dim=1)]
    return torch.stack([scale for scale, _ in found], dim=1), torch.stack([zero for _, zero in found], dim=1)


def nearest_textbook(
    w: Tensor,
    *,
    bits: int,
    symmetric: bool,
    group: int | None,
    find_params: FindParams,
    quantize: Quantize = quantize,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round every weight to the nearest code; the results are those of `gptq_textbook`."""
    w = w.double()
    scale, zero = group_params(w, group, find_params)
    codes, dequantized = torch.empty_like(w), torch.empty_like(w)
    for j in range(w.shape[1]):
        g = j // (group or w.shape[1])
        codes[:, j], dequantized[:, j] = quantize(w[:, j], scale[:, g], zero[:, g], bits, symmetric)
    return codes.long(), scale, zero, dequantized


def gptq_textbook(
    w: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    symmetric: bool,
    group: int | None,
    damping: float,
    find_params: FindParams,
    order: Literal["natural", "descending"] = "natural",
    quantize: Quantize = quantize,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize w [out, in] column by column, each error being compensated by the columns not yet visited.

    A column whose hessian diagonal is 0 is dead: its weights become 0 and its diagonal 1, before all else. Then
    `damping` times the mean of the diagonal is added to the diagonal. The parameters of all groups are found once,
    before the loop, from the weights in their own column order, whatever the order of the visits: "descending"
    visits by falling diagonal (of equals, the first column first).

    Returns codes [out, in] as int64, scale and zero [out, groups] and the dequantized weights [out, in].
    """
    w, hessian = w.double().clone(), hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    w[:, dead] = 0.0
    diagonal += damping * diagonal.mean()

    scale, zero = group_params(w, group, find_params)
    codes, dequantized = torch.empty_like(w), torch.empty_like(w)
    columns = list(range(w.shape[1]))
    if order == "descending":
        columns = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    for step, j in enumerate(columns):
        rest = columns[step:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        g = j // (group or w.shape[1])
        codes[:, j], dequantized[:, j] = quantize(w[:, j], scale[:, g], zero[:, g], bits, symmetric)
        error = w[:, j] - dequantized[:, j]
        w[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes.long(), scale, zero, dequantized


def quadratic_loss(w: Tensor, wq: Tensor, hessian: Tensor) -> float:
    """Return trace((w - wq) H (w - wq)^T)."""
    error = w.double() - wq.double()
    return float(((error @ hessian.double()) * error).sum())


def best_of_exhaustive(
    w: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    symmetric: bool,
    group: int | None,
    find_params: FindParams,
) -> tuple[Tensor, Tensor]:
    """Return codes and dequantized weights [1, in] of least quadratic loss among all the codes of one short row."""
    if w.shape[0] != 1 or bits * w.shape[1] > 12:
        raise ValueError("one row of at most 12 bits in all can be searched")
    w = w.double()
    scale, zero = (
        part.repeat_interleave(group or w.shape[1], dim=1)[:, : w.shape[1]] for part in group_params(w, group, find_params)
    )
    low, high = code_range(bits, symmetric)
    codes = torch.tensor(list(product(range(low, high + 1), repeat=w.shape[1])), dtype=torch.float64)
    dequantized = scale * (codes - zero)
    error = w - dequantized
    best = ((error @ hessian.double()) * error).sum(dim=1).argmin()
    return codes[best : best + 1].long(), dequantized[best : best + 1]
