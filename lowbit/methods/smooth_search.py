"""SmoothQuant+: one smoothing strength for the whole model, the one with which the whole model loses least.

For alpha = none, 0, `step` .. 1 the model is smoothed (see smooth.py) and rounded to nearest, block after block on the hidden
states of the quantized model, and its output compared with that of the float model on some calibration rows: the mean KL
divergence of the next token's distribution, or the relative squared error where there are no logits. The least wins, of equals
the lowest alpha, and takes the place of this step (Pan et al., SmoothQuant+, 2312.03788, section 3.2). The curve is in the
report.

Cost: 22 passes of `rows` rows through the model with `step` = 0.05. Deviation: the paper's search was never published; its loss
is said to be that of all layers' outputs.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from lowbit.unit import Between

Steps = tuple[tuple[str, dict[str, Any]], ...]  # method and options of each


def smooth_search(
    trial: Callable[[Steps, int], float],
    *,
    step: Annotated[float, Between(0.01, 1)] = 0.05,
    rows: Annotated[int, Between(1, 10000)] = 16,
    links: Literal["all", "norm", "linear"] = "all",
) -> tuple[Steps, dict[str, Any]]:
    """Choose the strength.

    Args:
        trial: trial(steps, rows) is the loss of the model after these steps, on so many rows of the calibration data.
        step: distance between the strengths tried.
        rows: of the calibration data, at most all.
        links: which producers take part, see smooth.py.

    Returns:
        the steps to take instead, and the row of the report.
    """
    alphas = [round(i * step, 6) for i in range(int(1 / step + 1e-9) + 1)]
    smoothings: list[Steps] = [(), *((("smooth", {"alpha": alpha, "links": links}),) for alpha in alphas)]
    losses = [trial((*smoothing, ("rtn", {})), rows) for smoothing in smoothings]
    best = min(range(len(losses)), key=losses.__getitem__)
    curve = [{"alpha": alpha, "loss": loss} for alpha, loss in zip([None, *alphas], losses, strict=True)]
    return smoothings[best], {"step": "smooth_search", "alpha": curve[best]["alpha"], "curve": curve}
