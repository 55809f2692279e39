"""Hadamard: the inputs of some linears are multiplied by a Hadamard matrix whenever the model runs, which spreads outliers.

    y W^T = (y H) (W H)^T        H H^T = I

W H is computed once; y H costs n log n operations a token (Quamba, Chiang et al., 2410.13229: the output
of the scan, which out_proj reads, has the outliers of a state space model; QuaRot does the same to down_proj). Only lowbit runs
such checkpoints. Sizes: 2^k, 12 * 2^k, 20 * 2^k and a few more (orthogonal.py). Cost: nothing but the weights is touched.
"""

from lowbit.orthogonal import paley_order
from lowbit.patterns import Matcher
from lowbit.unit import Unit


def hadamard(unit: Unit, *, match: str = "") -> None:
    """Turn the inputs of linears.

    Args:
        match: a regular expression found in the names of those linears; by default, of those that read the output of a scan.

    Raises:
        ValueError: no Hadamard matrix is known for the width of one.
    """
    outputs = {f"{mixer.path}.out_proj.weight" for mixer in unit.mixers}
    found = Matcher("hadamard.match").search
    chosen = [linear for linear in unit.linears if (found(match, linear.name) if match else linear.param in outputs)]
    for linear in chosen:
        if paley_order(linear.in_features) is None:
            raise ValueError(
                f"hadamard: no Hadamard matrix of the {linear.in_features} inputs of {linear.name} is known; leave it out"
            )
    for linear in {linear.shares: linear for linear in chosen}.values():
        unit.turn(linear)
    unit.notes.append({"step": "hadamard", "linears": [linear.name for linear in chosen]})
