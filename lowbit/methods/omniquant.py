"""OmniQuant: learn how far each group's range is clipped, and how each channel is scaled before rounding; weights stay frozen.

Minimises |f_Q(x) - f(x')|^2 of one block over (Shao et al., ICLR 2024, section 3)

- learnable weight clipping: the range of a group is sigmoid(c1) max w and sigmoid(c2) min w;
- learnable equivalent transformation: what a link's producer puts out is divided by s, its consumers' columns multiplied
  (links.py), and folded into the weights afterwards, so that nothing of it is left at run time.

Starts: the paper's clips begin at sigmoid(4) = 0.982 and its scales at SmoothQuant's; here a `smooth` or `awq` step before
gives the scales to start from, and `start` the clips. Deviations: no shifts (models without biases have no place for them), and
no scales between queries and keys: their products are not quantized, so such a scale, tied over rotary pairs as it must be, is
absorbed by the scales of the rows and changes nothing.
"""

from collections.abc import Sequence
from typing import Annotated

from lowbit.reconstruct import Part, Plan, reconstruct
from lowbit.unit import Between, Unit


def omniquant(
    units: Sequence[Unit],
    *,
    steps: Annotated[int, Between(1, 100_000)] = 400,
    batch: Annotated[int, Between(1, 4096)] = 4,
    clip_rate: Annotated[float, Between(1e-6, 1)] = 1e-2,
    smooth_rate: Annotated[float, Between(0, 1)] = 5e-3,
    start: Annotated[float, Between(0, 20)] = 4.0,
    augmented: bool = False,
    seed: int = 0,
) -> None:
    """Train the clips of a block, and the scales of its links.

    Args:
        steps: of the optimizer (Adam).
        batch: rows of calibration data in each.
        clip_rate: learning rate of the clips' logits.
        smooth_rate: of the logs of the links' scales; 0 leaves links alone, as the paper does for weights alone.
        start: the clips' logit at the start; 20 is the whole range.
        augmented: add the loss against the float block on the quantized model's hidden states (for 2 bits).
        seed: of the order of the rows.
    """
    train: dict[Part, float] = {"clips": clip_rate}
    if smooth_rate:
        train["smoothing"] = smooth_rate
    reconstruct(
        units,
        Plan(
            name="omniquant",
            train=train,
            inputs="student",
            steps=steps,
            batch=batch,
            augmented=augmented,
            schedule="constant",
            start=start,
            seed=seed,
        ),
    )
