"""MREM: reconstruct modules of several blocks, their weights and step sizes together.

Minimises |f_Q(x) - f(x')|^2 over all weights and scales of `blocks` consecutive blocks (Bai et al., Towards Efficient Post-
training Quantization of Pre-trained Language Models, NeurIPS 2022, section 3). With annealed teacher forcing, what enters is
lambda x' + (1 - lambda) x, lambda falling from 1 to 0 over the first half of the steps: x' of the float model, x of the
quantized one (section 3.3).

Deviation: the learning rates are in steps of the grid, and in logs of the scales.
"""

from collections.abc import Sequence
from typing import Annotated

from lowbit.reconstruct import Part, Plan, Source, reconstruct
from lowbit.unit import Between, Unit


def mrem(
    units: Sequence[Unit],
    *,
    blocks: Annotated[int, Between(1, 1000)] = 2,
    inputs: Source = "annealed",
    steps: Annotated[int, Between(1, 100_000)] = 400,
    batch: Annotated[int, Between(1, 4096)] = 8,
    rate: Annotated[float, Between(1e-6, 1)] = 0.01,
    scale_rate: Annotated[float, Between(1e-7, 1)] = 3e-3,
    seed: int = 0,
) -> None:
    """Train the weights and scales of a module.

    Args:
        blocks: how many make a module.
        inputs: what enters it: "annealed", or "teacher" or "student" throughout.
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        rate: learning rate of weights and zero points, in steps of the quantization grid.
        scale_rate: of the logs of the scales.
        seed: of the order of the rows.
    """
    train: dict[Part, float] = {"weights": rate, "zeros": rate, "scales": scale_rate}
    reconstruct(units, Plan(name="mrem", train=train, inputs=inputs, steps=steps, batch=batch, seed=seed))
