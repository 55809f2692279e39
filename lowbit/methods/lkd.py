"""LKD: distil each block alone from the float model, so that the whole model need never be in memory twice.

Minimises |f_Q(x') - f(x')|^2 over the weights of one block, x' the hidden states that enter it in the float model (Yao et al.,
ZeroQuant, NeurIPS 2022, section 4.3). The input does not depend on the blocks before, so errors that these make are not seen.

Deviation: weights move in units of their own scales, and the learning rate is one in those units; the paper's 5e-6 is for
weights themselves and has to be found for every model.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from lowbit.reconstruct import ADAM, Plan, reconstruct
from lowbit.unit import Between, Unit


def lkd(
    units: Sequence[Unit],
    *,
    steps: Annotated[int, Between(1, 100_000)] = 200,
    batch: Annotated[int, Between(1, 4096)] = 8,
    rate: Annotated[float, Between(1e-6, 1)] = 0.01,
    state_bits: Literal[8, 32] = 32,
    seed: int = 0,
) -> None:
    """Train the weights of a block.

    Args:
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        rate: learning rate, in steps of the quantization grid.
        state_bits: of each of the optimizer's two moments for a parameter; 8 (torchao) save six bytes a weight.
        seed: of the order of the rows.
    """
    plan = Plan(
        name="lkd",
        train={"weights": rate},
        inputs="teacher",
        steps=steps,
        batch=batch,
        optimizer=ADAM[state_bits],
        seed=seed,
    )
    reconstruct(units, plan)
