"""Which scheme for which linear: the cheapest mix that fits a budget.

A multiple-choice knapsack: every decision takes one of its candidates, the costs add up, the sizes may not exceed the budget.
HAWQ-V3 (Yao et al., ICML 2021, section 4) states the same integer programme over its sensitivities; here it is solved exactly
by HiGHS, whatever the costs are.
"""

from collections.abc import Sequence

import numpy as np


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For every decision the index of its candidate, so that the sum of costs is least and that of sizes at most `budget`.

    Args:
        costs: costs[decision][candidate], at least 0, in any unit.
        sizes: sizes[decision][candidate], bytes.
        budget: bytes in all.

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
    found = milp(
        cost / max(float(cost.max()), 1e-300),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(extra[None] / unit, ub=room / unit)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no mix: {found.message}")
    chosen = [0] * len(costs)
    for (i, j), taken in zip(pairs, found.x, strict=True):
        if taken > 0.5:
            chosen[i] = j
    return _within(chosen, costs, sizes, budget)


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
