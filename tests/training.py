"""Blocks of tiny models, rounded and with a teacher beside the stream, as trainers get them."""

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from lowbit.arch import discover
from lowbit.methods.rtn import rtn
from lowbit.qtensor import Scheme, parse_scheme
from lowbit.source import open_source
from lowbit.unit import Stream, Unit

ROWS, LENGTH = 24, 48


class Setting:
    """A tiny model with a stream and a teacher, whose blocks are solved up to where training begins."""

    def __init__(self, folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        tiny.save(name, folder / "model", dtype=dtype, seed=5)
        self.arch = discover(open_source(str(folder / "model")))
        (folder / "work").mkdir()
        self.stream = Stream(self.arch, tiny.tokens(ROWS, LENGTH), folder / "work", teacher=True)
        self.stream._rows = 2  # twelve batches instead of two
        self.stream.taken = list(self.stream.parts())
        self.stream.start()

    def units(self, scheme: str = "w3a16-g32", first: int = 0, count: int = 1, solver: Any = None) -> list[Unit]:
        """Blocks from `first` on, loaded anew and rounded."""
        made = []
        for index in range(first + count):
            made += self.units_after(scheme, index, solver)
            if len(made) < first + count:
                made[-1].finish()
        return made[first:]

    def units_after(self, scheme: str, index: int, solver: Any = None) -> list[Unit]:
        """One block, behind whatever became of those before."""
        block = self.arch.blocks[index]
        self.arch.load(block.tensors)
        schemes: dict[str, Scheme] = {linear.name: parse_scheme(scheme) for linear in block.linears}
        unit = Unit(self.arch, block, schemes, self.stream, torch.float32)
        (solver or rtn)(unit)
        unit.keep()
        return [unit]


def codes_of(units: list[Unit]) -> dict[str, Tensor]:
    """What the linears became."""
    return {name: q.codes for unit in units for name, q in unit.assigned.items()}
