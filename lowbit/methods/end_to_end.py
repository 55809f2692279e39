"""E2E-QP: train the scales of all blocks at once, through the whole model, with the codes as they are.

The second phase of EfficientQAT (Chen et al., ACL 2025, section 3.3), after `block_ap` or any other step: what blocks cannot
know of each other is learned here. With `rate` > 0 the codes train too (straight-through), which few bits need and which
takes as much memory as training the model.

Deviation: the loss is KL(float || quantized) of the next token, not the likelihood of the text, so that what little text there
is teaches no more than what the float model says of it; for models without a head the relative squared error of the last
hidden states. Scales train in logs, so that one learning rate serves all.

Cost: the whole model in float32, some four times, is in memory; hidden states are kept once a block and blocks recomputed.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowbit.reconstruct import ADAM, Order, Part, Plan, Span, divided, fit, multiplied
from lowbit.unit import Between, Unit

Taught = Callable[[tuple[int, int]], Tensor]


def end_to_end(
    units: Sequence[Unit],
    taught: Taught,
    *,
    steps: Annotated[int, Between(1, 100_000)] = 200,
    batch: Annotated[int, Between(1, 4096)] = 8,
    scale_rate: Annotated[float, Between(0, 1)] = 1e-3,
    rate: Annotated[float, Between(0, 1)] = 0.0,
    state_bits: Literal[8, 32] = 32,
    seed: int = 0,
) -> None:
    """Train the scales of all units, which are all blocks of the model.

    Args:
        taught: the hidden states [rows, length, width] that leave the float model's last block, for some rows.
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        scale_rate: learning rate of the logs of the scales.
        rate: of weights and zero points, in steps of the quantization grid.
        state_bits: of each of the optimizer's two moments for a parameter; 8 (torchao) save six bytes a weight.
        seed: of the order of the rows.

    Raises:
        ValueError: both rates are 0.
    """
    train: dict[Part, float] = {"scales": scale_rate, "weights": rate, "zeros": rate}
    train = {part: given for part, given in train.items() if given}
    if not train:
        raise ValueError("end_to_end: scale_rate and rate are both 0, so nothing would train")
    plan = Plan(
        name="end_to_end",
        train=train,
        inputs="student",
        steps=steps,
        batch=batch,
        optimizer=ADAM[state_bits],
        schedule="cosine",
        seed=seed,
    )
    trained, held = divided(list(units[0].stream.parts()))
    fit(_Whole(Span(units, plan), taught), Order(plan, trained), held)


class _Whole:
    """A `Task`: what the whole model says, beside what the float model says."""

    def __init__(self, span: Span, taught: Taught) -> None:
        self.span, self.taught = span, taught
        self.stream, self.arch = span.units[0].stream, span.units[0].arch

    def loss(self, part: tuple[int, int], parameters: Sequence[dict[str, Tensor]], forcing: float) -> Tensor:
        """See `Task`; there is nothing to force here."""
        hidden = self.stream.read(0, *part)
        for i, unit in enumerate(self.span.units):
            call = self.stream.calls(part, i)
            given = multiplied(unit, parameters[i])
            args = (unit.block, hidden, call, self.span.observer(i, given), given)
            if torch.is_grad_enabled():
                hidden = checkpoint(unit.arch.forward, *args, use_reentrant=False)
            else:
                hidden = unit.arch.forward(*args)
        total, count = self.arch.divergence(self.stream.tokens[slice(*part)], hidden, self.taught(part))
        return (total / count).float()
