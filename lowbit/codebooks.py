"""Codebooks: groups of weights in which every code has a value of its own, chosen to fit them.

Two kinds, both solved by alternation: every element takes the nearest value, then the values become the best for what took
them. The sum of importance times squared error never grows.

- k-means: 2^b values a group (Lloyd 1982; SqueezeLLM, Kim et al., ICML 2024, section 4.1). Starts from evenly spaced values and
  from quantiles: each group keeps the better end.
- BCQ, binary coding: sum over planes i of alpha_i b_i + offset, b_i = -1 or 1 (LUT-GEMM, Park et al., ICLR 2024, section 3.1;
  the alternation is that of Xu et al., ICLR 2018, section 3). Starts from the greedy solution, or from evenly spaced values,
  which are such a sum too (alpha_i = s 2^i / 2); the better end again.

A group is one row of `groups` [n, size]; everything is float32.
"""

import torch
from torch import Tensor

ROUNDS = 15  # of alternation


def nearest(groups: Tensor, values: Tensor) -> Tensor:
    """The index, int64 of the shape of `groups` [..., size], of the nearest of `values` [..., K]; of two the lower value."""
    ascending, order = values.sort(-1)
    between = (ascending[..., 1:] + ascending[..., :-1]) / 2
    rank = torch.zeros_like(groups, dtype=torch.int64)
    for i in range(between.shape[-1]):
        rank += groups > between[..., i : i + 1]
    return order.expand(*groups.shape[:-1], -1).gather(-1, rank)


def pick(values: Tensor, codes: Tensor) -> Tensor:
    """The value of each code: values [..., K], codes int64 [..., size]."""
    return values.expand(*codes.shape[:-1], -1).gather(-1, codes)


def even(groups: Tensor, count: int) -> Tensor:
    """`count` evenly spaced values [n, count] from the least to the largest of each group, at least from 0 to 0."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, count, device=groups.device)


def kmeans(groups: Tensor, bits: int, *, importance: Tensor | None = None, rounds: int = ROUNDS) -> Tensor:
    """Values [n, 2^bits], ascending, of groups [n, size]; importance [n, size] or [size] >= 0. With rounds = 0 even ones."""
    weights = torch.ones_like(groups) if importance is None else importance.expand_as(groups)
    spaced = _lloyd(groups, even(groups, 2**bits), weights, rounds)
    if rounds == 0:
        return spaced
    middle = (torch.arange(2**bits, device=groups.device) + 0.5) / 2**bits * groups.shape[-1]
    quantiles = _lloyd(groups, groups.sort(-1).values[:, middle.long()], weights, rounds)
    return _better(groups, (spaced, spaced), (quantiles, quantiles), weights)


def _lloyd(groups: Tensor, values: Tensor, weights: Tensor, rounds: int) -> Tensor:
    """Nearest values, then their means, so many times."""
    for _ in range(rounds):
        codes = nearest(groups, values)
        mass = torch.zeros_like(values).scatter_add_(-1, codes, weights)
        total = torch.zeros_like(values).scatter_add_(-1, codes, weights * groups)
        values = torch.where(mass > 0, total / mass.clamp(min=1e-30), values).sort(-1).values
    return values


def signs(planes: int, device: torch.device | str = "cpu") -> Tensor:
    """b_i of every code, float32 [2^planes, planes]: bit i of the code is 1 where b_i = 1."""
    code = torch.arange(2**planes, device=device).unsqueeze(-1)
    return ((code >> torch.arange(planes, device=device)) & 1) * 2.0 - 1


def levels(alphas: Tensor) -> Tensor:
    """The values [..., 2^planes] of BCQ parameters [..., planes + 1]: alpha_0, alpha_1 .., and the offset last. Summed in the
    order offset, alpha_0, alpha_1 .., so that every reader gets the same bits."""
    planes = alphas.shape[-1] - 1
    values = alphas[..., planes:].expand(*alphas.shape[:-1], 2**planes)
    for i, b in enumerate(signs(planes, alphas.device).T):
        values = values + alphas[..., i : i + 1] * b
    return values


def uniform(low: Tensor, step: Tensor, planes: int) -> Tensor:
    """BCQ parameters [..., planes + 1] of the values low + k step, k = 0 .. 2^planes - 1, which code k then has exactly."""
    halves = step.unsqueeze(-1) * 2.0 ** torch.arange(-1, planes - 1, device=step.device)
    return torch.cat([halves, low.unsqueeze(-1) + halves.sum(-1, keepdim=True)], -1)


def bcq(groups: Tensor, planes: int, *, importance: Tensor | None = None, rounds: int = ROUNDS) -> Tensor:
    """BCQ parameters [n, planes + 1] of groups [n, size]; importance [n, size] or [size] >= 0. With rounds = 0 greedy."""
    weights = torch.ones_like(groups) if importance is None else importance.expand_as(groups)
    greedy = _greedy(groups, planes, weights)
    if rounds == 0:
        return greedy
    low, high = groups.amin(-1), groups.amax(-1)
    spaced = uniform(low, (high - low) / (2**planes - 1), planes)
    first, second = (_alternate(groups, start, weights, rounds) for start in (spaced, greedy))
    return _better(groups, (first, levels(first)), (second, levels(second)), weights)


def _better(groups: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Of two (parameters, values), the parameters of each group with the least error; the first of equals."""
    errors = [_error(groups, values, weights) for _, values in (first, second)]
    return torch.where((errors[1] < errors[0]).unsqueeze(-1), second[0], first[0])


def _error(groups: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """The weighted squared error [n] of groups."""
    return ((pick(values, nearest(groups, values)) - groups).square_() * weights).sum(-1)


def _greedy(groups: Tensor, planes: int, weights: Tensor) -> Tensor:
    """Plane after plane: b = the sign of what is left, alpha = its mean magnitude. The offset is the mean."""
    mass = weights.sum(-1, keepdim=True).clamp(min=1e-30)
    offset = (groups * weights).sum(-1, keepdim=True) / mass
    left, found = groups - offset, []
    for _ in range(planes):
        alpha = (left.abs() * weights).sum(-1, keepdim=True) / mass
        left = left - torch.where(left >= 0, alpha, -alpha)
        found.append(alpha)
    return torch.cat([*found[::-1], offset], -1)


def _alternate(groups: Tensor, alphas: Tensor, weights: Tensor, rounds: int) -> Tensor:
    """Nearest codes, then the least squares of all parameters; a step that is no improvement is not taken."""
    planes = alphas.shape[-1] - 1
    table = torch.cat([signs(planes, groups.device), torch.ones(2**planes, 1, device=groups.device)], 1)
    best = _error(groups, levels(alphas), weights)
    for _ in range(rounds):
        codes = nearest(groups, levels(alphas))
        # The normal equations need only, for each code, how much took it and the sum of that.
        mass = torch.zeros(len(groups), 2**planes, device=groups.device).scatter_add_(-1, codes, weights)
        total = torch.zeros_like(mass).scatter_add_(-1, codes, weights * groups)
        matrix = torch.einsum("nk,ki,kj->nij", mass.double(), table.double(), table.double())
        right = torch.einsum("nk,ki->ni", total.double(), table.double())
        ridge = 1e-9 * matrix.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
        matrix += ridge[:, None, None] * torch.eye(planes + 1, dtype=torch.float64, device=groups.device)
        start = alphas.double()
        change = torch.linalg.solve(matrix, right - torch.einsum("nij,nj->ni", matrix, start) + ridge[:, None] * start)
        tried = (start + change).float()
        error = _error(groups, levels(tried), weights)
        better = (error < best).unsqueeze(-1)
        alphas, best = torch.where(better, tried, alphas), torch.minimum(error, best)
    return alphas
