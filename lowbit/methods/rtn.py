"""RTN: every weight is rounded to the nearest code of its group. No data, no optimisation; the baseline of all others.

Minimises max |W - Q(W)| over a min-max grid, or, with `shrink_steps`, sum |W - Q(W)|^2.4 over shrunken ranges (the grid search
of GPTQ's reference code). Cost: one pass over the weights.
"""

from typing import Annotated

from lowbit.unit import Between, Unit


def rtn(unit: Unit, *, shrink_steps: Annotated[int, Between(0, 95)] = 0) -> None:
    """Round every linear of the unit to nearest.

    Args:
        shrink_steps: 0 for min-max scales; n > 1 searches n shrunken ranges for each group.
    """
    for linear in unit.linears:
        unit.assign_nearest(linear, method="rtn", shrink_steps=shrink_steps)
