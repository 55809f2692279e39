"""Block-AP: train all parameters of a block, weights, scales and zero points, against the float block's output.

Minimises |f_Q(x) - f(x')|^2 (Chen et al., EfficientQAT, ACL 2025, section 3.2). It is the first of two phases; the second
trains the scales of the whole model (`end_to_end`).

Deviation: weights move in units of their own scales, so that one learning rate serves all bits.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from lowbit.reconstruct import ADAM, Part, Plan, reconstruct
from lowbit.unit import Between, Unit


def block_ap(
    units: Sequence[Unit],
    *,
    steps: Annotated[int, Between(1, 100_000)] = 400,
    batch: Annotated[int, Between(1, 4096)] = 8,
    rate: Annotated[float, Between(1e-6, 1)] = 0.01,
    scale_rate: Annotated[float, Between(1e-7, 1)] = 3e-3,
    state_bits: Literal[8, 32] = 32,
    seed: int = 0,
) -> None:
    """Train all of a block.

    Args:
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        rate: learning rate of weights and zero points, in steps of the quantization grid.
        scale_rate: of the logs of the scales.
        state_bits: of each of the optimizer's two moments for a parameter; 8 (torchao) save six bytes a weight.
        seed: of the order of the rows.
    """
    train: dict[Part, float] = {"weights": rate, "zeros": rate, "scales": scale_rate}
    plan = Plan(
        name="block_ap",
        train=train,
        inputs="student",
        steps=steps,
        batch=batch,
        optimizer=ADAM[state_bits],
        schedule="cosine",
        seed=seed,
    )
    reconstruct(units, plan)
