"""SmoothQuant: move the difficulty of rounding activations into the weights, channel by channel.

    s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)        x_j / s_j, w_j s_j compute the same

with maxima over calibration tokens and over all linears that read channel j (Xiao et al., ICML 2023, section 4, equation 4).
The division is folded into what produces x: a norm, value rows before the output projection, up rows before down (links.py).

alpha = "auto" chooses alpha of every link from 0, 0.05 .. 1 and "no smoothing" by the joint error of weights and activations

    sum over linears |Q(x / s) Q(w s)^T - x w^T|^2

on a sample of tokens, as AQAS does (Lee et al., EMNLP 2023, section 3.1); so it is never worse than none by that measure.

Cost: one pass over the data for a block and kind of statistic; "auto" rounds every weight 22 times. Deviation: channels whose
input or weights are all 0 are left alone instead of clamped.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.links import Link
from lowbit.qtensor import dequantize
from lowbit.unit import Between, Input, Unit

_ALPHAS = tuple(i / 20 for i in range(21))
_SAMPLE = 256  # tokens


def smooth(
    unit: Unit,
    *,
    alpha: Annotated[float, Between(0, 1)] | Literal["auto"] = 0.5,
    links: Literal["all", "norm", "linear"] = "all",
) -> None:
    """Rescale every link of the unit.

    Args:
        alpha: 0 leaves the difficulty in the activations, 1 moves all of it to the weights; or "auto".
        links: which producers take part; the paper's are norms alone.
    """
    chosen = []
    for link in unit.chosen_links("smooth", links):
        best = _best_alpha(unit, link) if alpha == "auto" else float(alpha)
        chosen.append(best)
        if best is not None:
            unit.rescale(link, smoothing_scales(*_maxima(unit, link), best))
    unit.notes.append({"step": "smooth", "links": len(chosen), "alpha": chosen})


def smoothing_scales(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s [channels] float32 from the largest magnitudes x, w [channels] of inputs and weights."""
    s = x.clamp(min=1e-5) ** alpha / w.clamp(min=1e-5) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), s, 1.0).clamp(min=1e-5)


def _maxima(unit: Unit, link: Link) -> tuple[Tensor, Tensor]:
    """Largest magnitudes [channels] of what the link's consumers read, and of the columns with which they read it."""
    x, w = (torch.zeros(link.channels, device=unit.arch.device) for _ in range(2))
    for linear, channels in unit.consumers(link):
        mine = channels.to(x.device)
        known = mine >= 0
        x.scatter_reduce_(0, mine[known], unit.absmax(linear)[known], "amax")
        w.scatter_reduce_(0, mine[known], unit.weight(linear).abs().amax(0)[known], "amax")
    return x, w


def _best_alpha(unit: Unit, link: Link) -> float | None:
    """The alpha of the least joint error, the lowest of several; None if no smoothing is best."""
    x, w = _maxima(unit, link)
    candidates: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(x))]
    candidates += [(alpha, smoothing_scales(x, w, alpha)) for alpha in _ALPHAS]
    errors = [sum(_joint_error(unit, link, s)) for _, s in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)][0]


def _joint_error(unit: Unit, link: Link, s: Tensor) -> list[float]:
    """The error of each consumer's output with its inputs divided by s and its columns multiplied by it."""
    found = []
    for linear, channels in unit.consumers(link):
        mine = channels.to(s.device)
        columns = torch.where(mine >= 0, s[mine.clamp(min=0)], 1.0)
        x, w = unit.sample(linear, _SAMPLE), unit.weight(linear)
        scaled = x / columns
        spec = unit.scheme(linear).input
        if spec is not None:
            scaled = Input(spec, float(scaled.abs().max()) or 1.0).quantize(scaled)
        rounded = dequantize(unit.nearest(linear, w * columns))
        found.append(float((scaled @ rounded.T - x @ w.T).square().sum(dtype=torch.float64)))
    return found
