"""Which scheme for which linear: the cheapest mix that fits a budget.

A multiple-choice knapsack: every decision takes one of its candidates, the costs add up, the sizes may not exceed the budget.
HAWQ-V3 (Yao et al., ICML 2021, section 4) states the same integer programme over its sensitivities; here HiGHS solves it,
whatever the costs are: exactly, or as far as it gets within a limit of time.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GAP = 1e-6  # relative: a mix this close to the bound counts as the optimum


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A choice for every decision.

    Attributes:
        chosen: the index of a candidate, by decision.
        gap: by how much of its cost the mix may miss the optimum: 0 where it is proven to be the optimum, None where no bound
            is known.
        seconds: the solver took.
    """

    chosen: list[int]
    gap: float | None
    seconds: float

    def __str__(self) -> str:
        if self.gap == 0:
            return "proven optimal"
        gap = "gap unknown" if self.gap is None else f"gap {self.gap:.2%}"
        return f"best found in {self.seconds:.3g} s ({gap})"


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, seconds: float = 60) -> Mix:
    """A candidate for every decision, so that the sum of costs is least and that of sizes at most `budget`.

    Args:
        costs: costs[decision][candidate], at least 0, in any unit.
        sizes: sizes[decision][candidate], bytes.
        budget: bytes in all.
        seconds: the solver may take; then the best mix found so far counts.

    Raises:
        ValueError: the smallest candidates of all together exceed the budget.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise ValueError(f"the smallest mix has {least:,} bytes, more than the budget of {budget:,}")
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    each = [useful(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    pairs = [(i, j) for i, row in enumerate(each) for j in row]
    cost = np.array([costs[i][j] for i, j in pairs], dtype=np.float64)
    # Sizes from the smallest on, so that what is compared with the budget is no difference of large numbers.
    extra = np.array([sizes[i][j] - min(sizes[i]) for i, j in pairs], dtype=np.float64)
    one = coo_array((np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))), shape=(len(costs), len(pairs)))
    room = budget - least
    unit = max(float(extra.max()), 1.0)
    began = time.monotonic()
    most = max(float(cost.max()), 1e-300)
    found = milp(
        cost / most,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(extra[None] / unit, ub=room / unit)],
        options={"mip_rel_gap": _GAP, "time_limit": seconds},
    )
    took = time.monotonic() - began
    if found.x is None and found.status != 1:  # 1: the limit of time
        raise RuntimeError(f"the solver found no mix: {found.message}")
    chosen = _greedy(each, costs, sizes, budget)
    if found.x is not None:
        solved = [0] * len(costs)
        for (i, j), taken in zip(pairs, found.x, strict=True):
            if taken > 0.5:
                solved[i] = j
        solved = _within(solved, costs, sizes, budget)
        chosen = solved if found.status == 0 else min(chosen, solved, key=lambda mix: _sum(costs, mix))
    bound = getattr(found, "mip_dual_bound", None)
    if found.status == 0:
        gap: float | None = 0.0
    elif bound is None or not np.isfinite(bound):
        gap = None
    else:
        total = _sum(costs, chosen)
        gap = max(0.0, total - float(bound) * most) / max(total, 1e-300)
        gap = 0.0 if gap <= _GAP else gap
    return Mix(chosen=chosen, gap=gap, seconds=took)


def _sum(table: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(row[j] for row, j in zip(table, chosen, strict=True))


def _greedy(
    each: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """From the smallest mix on, the step that saves most cost for its bytes, as long as one fits. `each`: see `useful`."""
    at = [0] * len(each)
    room = budget - sum(sizes[i][row[0]] for i, row in enumerate(each))
    steps: list[tuple[float, int, int, int]] = []  # cost for a byte, decision, from, to

    def offer(i: int) -> None:
        """The steps of decision i from where it is."""
        here = each[i][at[i]]
        for k in range(at[i] + 1, len(each[i])):
            j = each[i][k]
            heapq.heappush(steps, ((costs[i][j] - costs[i][here]) / (sizes[i][j] - sizes[i][here]), i, at[i], k))

    for i in range(len(each)):
        offer(i)
    while steps:
        _, i, start, k = heapq.heappop(steps)
        more = sizes[i][each[i][k]] - sizes[i][each[i][at[i]]]
        if start == at[i] and more <= room:
            at[i], room = k, room - more
            offer(i)
    return [row[k] for row, k in zip(each, at, strict=True)]


def useful(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """The candidates that no other beats in one and equals in the other, by size."""
    order = sorted(range(len(sizes)), key=lambda j: (sizes[j], costs[j]))
    kept: list[int] = []
    for j in order:
        if not kept or costs[j] < costs[kept[-1]]:
            kept.append(j)
    return kept


def _within(chosen: list[int], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Undo what the solver's tolerance (1e-6 of the budget) let pass: smaller candidates where that costs least."""
    while sum(row[j] for row, j in zip(sizes, chosen, strict=True)) > budget:
        steps = [
            (costs[i][j] - costs[i][taken], i, j)
            for i, taken in enumerate(chosen)
            for j in range(len(sizes[i]))
            if sizes[i][j] < sizes[i][taken]
        ]
        _, i, j = min(steps)
        chosen[i] = j
    return chosen
