"""RTN: every weight is rounded to the nearest code of its group. No optimisation; the baseline of all others.

Minimises max |W - Q(W)| over a min-max grid; with `shrink_steps`, sum |W - Q(W)|^2.4 over shrunken ranges (the grid search of
GPTQ's reference code); with `importance`, sum over columns j of E[x_j^2] (W - Q(W))_j^2 over those ranges: the output error, if
inputs did not correlate (the "importance matrix" of llama.cpp, which has no paper).

Cost: one pass over the weights for each range; with `importance` also the block's pass over the data.
"""

from typing import Annotated

from lowbit.qtensor import search_steps
from lowbit.unit import Between, Unit


def rtn(unit: Unit, *, shrink_steps: Annotated[int, Between(0, 95)] | None = None, importance: bool = False) -> None:
    """Round every linear of the unit to nearest.

    Args:
        shrink_steps: 0 for min-max scales; n > 1 searches n shrunken ranges for each group; of codebooks the rounds of
            alternation. By default 0, with importance 20, of codebooks 15.
        importance: weigh the search by the mean square of each input over the calibration data.

    Raises:
        ValueError: importance without a search.
    """
    if importance and shrink_steps is not None and shrink_steps < 2:
        raise ValueError(
            f"rtn: importance = true weighs a search of scales, and shrink_steps = {shrink_steps} is none; give 2 or more"
        )
    for linear in unit.linears:
        usual = 20 if importance else 0
        steps = search_steps(unit.spec(linear), usual, usual) if shrink_steps is None else shrink_steps
        squares = unit.gram(linear).diagonal() if importance else None
        if squares is not None and not bool(squares.any()):
            unit.warn(linear, "no calibration token reached this layer: its scales were not searched")
        unit.assign_nearest(linear, method="rtn", shrink_steps=steps, importance=squares)
