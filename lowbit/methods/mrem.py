"""MREM: reconstruct modules of several blocks, their weights and step sizes together.

Minimises |f_Q(x) - f(x')|^2 over all weights and scales of `blocks` consecutive blocks (Bai et al., Towards Efficient Post-
training Quantization of Pre-trained Language Models, NeurIPS 2022, section 3). With annealed teacher forcing, what enters is
lambda x' + (1 - lambda) x, lambda falling from 1 to 0 over the first half of the steps: x' of the float model, x of the
quantized one (section 3.3).

Deviation: the learning rates are in steps of the grid, and in logs of the scales.
"""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from lowbit.reconstruct import ADAM, Part, Plan, Source, reconstruct
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
    state_bits: Literal[8, 32] = 32,
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
        state_bits: of each of the optimizer's two moments for a parameter; 8 (torchao) save six bytes a weight.
        seed: of the order of the rows.
    """
    del blocks  # decided before, by the run
    plan = plan_of(inputs=inputs, steps=steps, batch=batch, rate=rate, scale_rate=scale_rate, state_bits=state_bits, seed=seed)
    reconstruct(units, plan)


def plan_of(**options: Any) -> Plan:
    """The plan of a module, from the options of `mrem`."""
    given = {name: parameter.default for name, parameter in inspect.signature(mrem).parameters.items()} | options
    train: dict[Part, float] = {"weights": given["rate"], "zeros": given["rate"], "scales": given["scale_rate"]}
    same = {name: given[name] for name in ("inputs", "steps", "batch", "seed")}
    return Plan(name="mrem", train=train, optimizer=ADAM[given["state_bits"]], **same)
