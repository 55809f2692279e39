"""A unit with given weights and no data, for methods that need none."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.arch import Block, Linear
from lowbit.qtensor import parse_scheme
from lowbit.unit import Unit


class Blind(Unit):
    """A unit with given weights that has no data."""

    def __init__(self, schemes: dict[str, str], weights: dict[str, Tensor]) -> None:
        linears = tuple(
            Linear(
                name=name,
                tensor=f"{name}.weight",
                param=f"{name}.weight",
                index=None,
                rows=(0, len(w)),
                transposed=False,
                stacked=False,
                out_features=w.shape[0],
                in_features=w.shape[1],
                shares=name,
            )
            for name, w in weights.items()
        )
        arch = SimpleNamespace(param=lambda linear: weights[linear.name], device=torch.device("cpu"))
        block = Block(index=0, name="block", tensors=(), linears=linears)
        parsed = {name: parse_scheme(scheme) for name, scheme in schemes.items()}
        super().__init__(cast(Any, arch), block, parsed, cast(Any, None), torch.float32)

    def gram(self, linear: Linear, *, sequential: bool = False) -> Tensor:
        """Not to be asked for."""
        raise AssertionError("rounding to nearest needs no data")
