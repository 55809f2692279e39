"""What the page of a run shows of weights and activations: histograms with their grids, and outliers before and after."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.arch import Arch, Block, Linear, Observe, matrix_of, site_of
from lowbit.export import QuantizedSource
from lowbit.source import Source

_KINDS = 6  # histograms at most
_BINS = 80
_SAMPLED = 2**18  # weights in a histogram
_LARGEST_GRID = 64  # points of a grid that are shown


def histograms(
    source: Source, quantized: QuantizedSource, linears: Sequence[Linear], errors: dict[str, float]
) -> list[dict[str, Any]]:
    """Weights before and after, and the grid of the first group: of each kind of linear that with the largest error, the
    worst first. JSON types.

    Args:
        source: the checkpoint as it was before its linears were solved.
        errors: by the names of the quantized linears.
    """
    by_name = {linear.name: linear for linear in linears}
    worst: dict[str, Linear] = {}
    for name in sorted((name for name in errors if name in by_name), key=lambda name: -errors[name]):
        worst.setdefault(name.rpartition(".")[2], by_name[name])
    return [_histogram(source, quantized, linear) for linear in list(worst.values())[:_KINDS]]


def _histogram(source: Source, quantized: QuantizedSource, linear: Linear) -> dict[str, Any]:
    before, after = (matrix_of(linear, each.read([linear.tensor])).float() for each in (source, quantized))
    group = quantized.schemes()[linear.name].weight.group
    grid = after[0, : group if 0 < group < after.shape[1] else after.shape[1]].unique()
    low, high = float(before.min()), float(before.max())
    flat = [value.flatten()[:_SAMPLED].clamp(low, high) for value in (before, after)]  # a grid may reach a little further
    counts = [torch.histc(value, _BINS, low, high).long().tolist() for value in flat]
    return {
        "linear": linear.name,
        "low": low,
        "high": high,
        "float": counts[0],
        "quantized": counts[1],
        "grid": grid.tolist() if len(grid) <= _LARGEST_GRID else [],
    }


@torch.no_grad()
def outliers(arch: Arch, tokens: Tensor) -> dict[str, float]:
    """By linear, its largest input channel over its median one, by their largest magnitudes on tokens [rows, length] int64.

    The model runs block by block from its checkpoint, with one of them in memory.
    """
    found: dict[str, float] = {}
    arch.load_outside()
    hidden, calls = arch.embed(tokens)
    arch.free_outside()
    for block in arch.blocks:
        arch.load(block.tensors)
        hidden = arch.call(block, hidden, calls[block.index], watching(arch, block, found))
        arch.free(block.name)
    return found


def watching(arch: Arch, block: Block, found: dict[str, float], then: Observe | None = None) -> Observe:
    """What a `Tap` must do to enter the outliers of a loaded block's linears into `found`; `then` sees the inputs after it."""
    sites = arch.sites(block)
    names = {linear.site: linear.name for linear in block.linears}

    def observe(weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
        site = site_of(weight, sites)
        if site is not None and site in names and x.numel():
            sizes = x.detach().abs().flatten(0, -2).amax(0).float()
            found[names[site]] = float(sizes.max() / sizes.median().clamp(min=1e-12))
        return x if then is None else then(weight, x, transposed)

    return observe
