"""AWQ: scale up the weight columns of important channels, so that rounding hurts them less.

Minimises, for each link, over s = mean |x|^alpha and no scaling, alpha = 0, 1/20 .. 19/20,

    sum over linears |x (Q(w s) / s - w)^T|^2 = trace(D H D^T), D = Q(w s) / s - w, H = X^T X

with s divided by sqrt(max s min s) (Lin et al., MLSys 2024, section 3.2). The paper runs the block for every alpha; the Gram
matrix that GPTQ needs anyway gives the same error of each linear at once. 1/s is folded into what produces x (links.py).
Its clip search is the range search of the solver that follows: `shrink_steps` of rtn and gptq.

Cost: one pass over the data for a block and kind of link; every weight is rounded 21 times and multiplied by H.
"""

from typing import Literal

import torch
from torch import Tensor

from lowbit.links import Link
from lowbit.qtensor import dequantize
from lowbit.unit import Unit, energy

_ALPHAS = tuple(i / 20 for i in range(20))


def awq(unit: Unit, *, links: Literal["all", "norm", "linear"] = "all") -> None:
    """Rescale every link of the unit by the best scales found.

    Args:
        links: which producers take part.
    """
    chosen = []
    for link in unit.chosen_links("awq", links):
        alpha, s = _search(unit, link)
        chosen.append(alpha)
        if alpha is not None:
            unit.rescale(link, s)
    unit.notes.append({"step": "awq", "links": len(chosen), "alpha": chosen})


def awq_scales(mean: Tensor, alpha: float) -> Tensor:
    """s [channels] float32 from the mean magnitudes of the inputs; 1 where a channel is always 0."""
    s = torch.where(mean > 0, mean.clamp(min=1e-10) ** alpha, 1.0)
    return s / (s.max() * s.min()).sqrt()


def _search(unit: Unit, link: Link) -> tuple[float | None, Tensor]:
    """The alpha of the least error, the lowest of several, and its scales; None if no scaling is best."""
    consumers = unit.consumers(link)
    mean = torch.zeros(link.channels, device=unit.arch.device)
    for linear, channels in consumers:
        mine = channels.to(mean.device)
        mean.scatter_reduce_(0, mine[mine >= 0], unit.absmean(linear)[mine >= 0], "amax")
    best: tuple[float | None, Tensor] = (None, torch.ones_like(mean))
    least = _error(unit, link, best[1])
    for alpha in _ALPHAS:
        s = awq_scales(mean, alpha)
        error = _error(unit, link, s)
        if error < least:
            best, least = (alpha, s), error
    return best


def _error(unit: Unit, link: Link, s: Tensor) -> float:
    """The summed output error of the link's consumers, rounded to nearest with columns multiplied by s."""
    total = 0.0
    for linear, channels in unit.consumers(link):
        mine = channels.to(s.device)
        columns = torch.where(mine >= 0, s[mine.clamp(min=0)], 1.0)
        w = unit.weight(linear)
        total += energy(dequantize(unit.nearest(linear, w * columns)) / columns - w, unit.gram(linear))
    return total
