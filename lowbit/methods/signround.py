"""SignRound: learn by the sign of the gradient whether each weight is rounded up or down, and how far each range is clipped.

Minimises |f_Q(x) - f(x')|^2 of one block over shifts V in -1/2 .. 1/2 steps, w_Q = round(w / s + V) s, and the clips of every
group, with signed gradient descent: every step moves each V by the learning rate, which falls linearly to 0 (Cheng et al.,
AutoRound, EMNLP 2024, section 3). With 200 steps of 1/200, a weight can cross half a step and no more.

Deviations: V starts from the codes of the solver before, and clips only where ranges are searched for from the weights, as the
formats with float scales allow; the result is judged on rows kept out of training instead of by the least training loss.
"""

from collections.abc import Sequence
from typing import Annotated

from lowbit.reconstruct import Part, Plan, reconstruct
from lowbit.unit import Between, Unit


def signround(
    units: Sequence[Unit],
    *,
    steps: Annotated[int, Between(1, 100_000)] = 200,
    batch: Annotated[int, Between(1, 4096)] = 8,
    rate: Annotated[float, Between(0, 1)] = 0.0,
    scales: bool = True,
    seed: int = 0,
) -> None:
    """Train the rounding of a block.

    Args:
        steps: of the optimizer.
        batch: rows of calibration data in each.
        rate: learning rate, in steps of the quantization grid; 0 stands for 1 / steps.
        scales: train the scales too, where they are floats.
        seed: of the order of the rows.
    """
    rate = rate or 1 / steps
    floats = all(unit.spec(linear).scale == "float" for unit in units for linear in unit.linears)
    train: dict[Part, float] = {"rounding": rate}
    if scales and floats:
        train["scales"] = rate / 4
        train["zeros"] = rate
    plan = Plan(name="signround", train=train, inputs="student", steps=steps, batch=batch, optimizer="sign", seed=seed)
    reconstruct(units, plan)
