"""LoRC: what rounding lost, given back in part by a small matrix product beside the quantized weight.

Minimises |W - Q - B A|^2 with A [rank, in] and B [out, rank] (Yao et al., ZeroQuant-V2, 2303.08302, section 5), by the singular
value decomposition of W - Q; with `whiten` trace((W - Q - B A) H (W - Q - B A)^T), H = X^T X, the error of the layer's outputs.

The pair is written as a LoRA adapter into OUT/adapter, which PEFT and vLLM load beside the checkpoint; without it, the
checkpoint is what it was without this step. Later blocks are solved with it in place.

Cost: a singular value decomposition of every matrix. It adds rank (in + out) stored values for in out weights.
"""

from typing import Annotated

from lowbit.adapter import low_rank
from lowbit.qtensor import dequantize
from lowbit.unit import Between, Unit


def lorc(unit: Unit, *, rank: Annotated[int, Between(1, 1024)] = 16, whiten: bool = False) -> None:
    """Add a low-rank correction to every linear of the unit.

    Args:
        rank: of each correction.
        whiten: weigh the error by the inputs.

    Raises:
        ValueError: a matrix is smaller than the rank, or no module of its own that an adapter could name.
    """
    for linear in unit.linears:
        if not unit.owns_module(linear):
            raise ValueError(
                f"lorc: {linear.name} is a part of a larger matrix, for which adapters have no name; leave lorc out"
            )
        if rank > min(linear.out_features, linear.in_features):
            raise ValueError(
                f"lorc: rank {rank} does not fit {linear.name} ({linear.out_features} x {linear.in_features}); use a lower one"
            )
    for linear in unit.linears:
        error = unit.weight(linear) - dequantize(unit.assigned[linear.name].to(unit.arch.device))
        unit.correct(linear, low_rank(error, rank, unit.gram(linear) if whiten else None), method="lorc")
