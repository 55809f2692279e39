"""Reorder: heads and channels of a scan sorted by magnitude, so that a few scales serve all (Quamba2's sort-and-cluster).

With clusters S of channels, each under one scale, rounding x costs about the sum of squared scales, so this minimises

    sum over clusters S of |S| max over channels c in S of r_c^2        r_c = max |x_c| on the calibration data

(Chiang et al., 2503.22879). Channels keep their magnitudes through the scan, so the state is clustered alike. Channels are
sorted inside their head, and heads, inside their state group, by their largest channel; heads are cut into `heads` runs and the
channels of a run into `channels` runs, by dynamic programming on that sum. Deviation: the paper clusters heads by Ward's method
and channels by k-means on normalised magnitudes. A Mamba scan, for which the public code refuses to reorder, is one head here:
its channels are independent. Everything indexed by channel or head follows (`ssm.Mixer.indexed`), which is exact.

Cost: one pass over the data. Groups of a gated norm contain whole state groups, in which everything stays.
"""

from typing import Annotated

import torch
from torch import Tensor

from lowbit.ssm import Mixer
from lowbit.unit import Between, Unit


def reorder(unit: Unit, *, heads: Annotated[int, Between(1, 64)] = 4, channels: Annotated[int, Between(1, 64)] = 4) -> None:
    """Sort and cluster the scan of the unit, if it has one.

    Args:
        heads: clusters of heads in a state group, as many as it has heads at most.
        channels: clusters of channels in a cluster of heads.

    Raises:
        ValueError: a gated norm has groups that cut state groups.
    """
    prefixes = {point.mixer: point.name.removesuffix("x") for point in unit.block.points if point.local == "x"}
    for mixer in unit.mixers:
        if mixer.second and mixer.groups % mixer.norm_groups():
            raise ValueError(f"reorder: the groups of {mixer.path}.norm cut state groups in two; leave reorder out")
        reach = unit.point_maxima(f"{prefixes[mixer.path]}x").cpu()
        heads_order, channel_order, labels = sort_and_cluster(
            reach.view(mixer.groups, mixer.heads // mixer.groups, -1), heads, channels
        )
        _permute(unit, mixer, heads_order, channel_order)
        unit.clusters[mixer.path] = labels
        unit.notes.append({"step": "reorder", "mixer": mixer.path, "clusters": int(labels.max()) + 1})


def sort_and_cluster(reach: Tensor, heads: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of heads [groups * h] and channels [groups * h * p], and the cluster of each channel in that order.

    Args:
        reach: [groups, h, p], the largest magnitude of each channel.
    """
    groups, count, size = reach.shape
    heads_order, channel_order, labels = [], [], []
    known = 0
    for group in range(groups):
        sorted_channels = reach[group].argsort(dim=1, descending=True, stable=True)
        profiles = reach[group].gather(1, sorted_channels)
        by_head = profiles[:, 0].argsort(descending=True, stable=True)
        heads_order.append(group * count + by_head)
        base = (group * count + by_head).unsqueeze(1) * size
        channel_order.append((base + sorted_channels[by_head]).flatten())
        for run in partition(profiles[by_head].double(), heads):
            envelope = profiles[by_head[run]].amax(0)
            mine = torch.zeros(size, dtype=torch.int64)
            runs = partition(envelope.double().unsqueeze(1), channels)
            for i, part in enumerate(runs):
                mine[part] = known + i
            known += len(runs)
            labels.append(mine.repeat(run.stop - run.start))
    return torch.cat(heads_order), torch.cat(channel_order), torch.cat(labels)


def partition(rows: Tensor, parts: int) -> list[slice]:
    """Cut rows [n, k] into at most `parts` runs of the least sum of (rows of the run) * |elementwise largest row|^2."""
    n = len(rows)
    parts = min(parts, n)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for start in range(n):
        envelope = rows[start:].cummax(0).values.square().sum(1)
        cost[start, start + 1 :] = envelope * torch.arange(1, n - start + 1)
    best, cuts = cost[0].clone(), []
    best[0] = 0
    for _ in range(parts - 1):
        best, cut = (best.unsqueeze(1) + cost).min(0)
        best[0] = 0
        cuts.append(cut)
    runs, stop = [], n
    for cut in reversed(cuts):
        runs.append(slice(int(cut[stop]), stop))
        stop = int(cut[stop])
        if stop == 0:
            return runs[::-1]
    return [slice(0, stop), *runs[::-1]]


def _permute(unit: Unit, mixer: Mixer, heads: Tensor, channels: Tensor) -> None:
    for part in mixer.indexed():
        name = f"{mixer.path}.{part.param}"
        order = torch.arange(unit.arch.model.get_parameter(name).shape[part.axis])
        wanted = heads if part.heads else channels
        order[part.start : part.start + len(wanted)] = part.start + wanted
        unit.permute(name, part.axis, order)
