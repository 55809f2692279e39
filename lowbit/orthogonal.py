"""Hadamard matrices, applied as the product of two of about sqrt(n) columns: n sqrt(n) operations, two products on a GPU.

Sylvester's construction gives H of 2^k, Paley's first one (q prime, q = 3 mod 4) H of q + 1; their Kronecker product gives
every size 2^k, 12 * 2^k, 20 * 2^k (so 40 * 2^k) and more, the widths of real models.
"""

from functools import cache

import torch
from torch import Tensor


def paley_order(size: int) -> int | None:
    """The least order m, 1 or q + 1, such that `size` is m times a power of two; None: there is none."""
    for order in (1, 12, 20, 24, 44, 48, 60, 68, 72, 80, 84):
        if size % order == 0 and (size // order) & (size // order - 1) == 0:
            return order
    return None


@cache
def _paley(order: int) -> Tensor:
    """The Hadamard matrix of `order` = q + 1 (Paley, 1933, construction I), float64 with entries 1 and -1."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index.unsqueeze(1) - index) % q]
    return skew + torch.eye(order, dtype=torch.float64)


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(n) of x [..., n], with H = H_(2^k) (x) H_m and m from `paley_order`.

    Raises:
        ValueError: no Hadamard matrix of this size is known here.
    """
    width = x.shape[-1]
    if paley_order(width) is None:
        raise ValueError(f"no Hadamard matrix of {width} columns is known; there are 2^k, 12 * 2^k, 20 * 2^k and a few others")
    outer, inner = _factors(width, x.dtype, x.device)
    return (outer @ (x.unflatten(-1, (len(outer), -1)) @ inner)).flatten(-2) * width**-0.5


@cache
def _factors(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two Hadamard matrices of about one size, the first symmetric, whose Kronecker product is that of `width`."""
    order = paley_order(width)
    assert order is not None
    outer, inner = torch.ones(1, 1, dtype=torch.float64), _paley(order) if order > 1 else torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(outer) * len(inner) < width:
        if len(outer) < len(inner):
            outer = torch.kron(outer, pair)
        else:
            inner = torch.kron(pair, inner)
    return outer.to(device, dtype), inner.to(device, dtype)
