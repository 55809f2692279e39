"""TesseraQ: learn which neighbour each weight goes to; ever more of the choices are made for good, the others adapt to them.

Minimises |f_Q(x) - f(x')|^2 of one block over w_Q = (floor(w / s) + h) s', with h = sigmoid(v) between the two neighbours until
it is decided (Li and Panda, TesseraQ, 2024, progressive adaptive rounding): in 20 rounds the surest h become 0 or 1, so that
the last few choices are made knowing all others. The scales s' that codes are multiplied by train along; floor(w / s) stays.

Deviations: v starts from the codes of the solver before; the number of steps is that of the other methods here, a tenth of the
paper's 5,000, at a rate higher by as much; zero points train too.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from lowbit.reconstruct import ADAM, Part, Plan, reconstruct
from lowbit.unit import Between, Unit


def tesseraq(
    units: Sequence[Unit],
    *,
    steps: Annotated[int, Between(20, 100_000)] = 400,
    batch: Annotated[int, Between(1, 4096)] = 8,
    rate: Annotated[float, Between(1e-6, 1)] = 0.02,
    scale_rate: Annotated[float, Between(0, 1)] = 1e-3,
    state_bits: Literal[8, 32] = 32,
    seed: int = 0,
) -> None:
    """Train the rounding of a block.

    Args:
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        rate: learning rate of the logits v.
        scale_rate: of the logs of the scales; 0 leaves them.
        state_bits: of each of the optimizer's two moments for a parameter; 8 (torchao) save six bytes a weight.
        seed: of the order of the rows.
    """
    train: dict[Part, float] = {"choices": rate}
    if scale_rate and all(unit.spec(linear).scale == "float" for unit in units for linear in unit.linears):
        train["scales"] = scale_rate
    plan = Plan(
        name="tesseraq",
        train=train,
        inputs="student",
        steps=steps,
        batch=batch,
        optimizer=ADAM[state_bits],
        schedule="constant",
        seed=seed,
    )
    reconstruct(units, plan)
