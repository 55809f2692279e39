"""Unit: one block of the model while it is being quantized, and the stream of hidden states that flows through it.

A method sees nothing of hooks, files or Hugging Face call signatures. It asks a `Unit` for its linears, their weights and
statistics, and assigns a quantized tensor to each:

    for linear in unit.linears:
        unit.assign(linear, solve(unit.weight(linear), unit.gram(linear), unit.spec(linear)), method="...")

The statistics come from the block's real inputs in the partly quantized model (the student stream), read from a file one batch
at a time. That file is also what a killed run resumes from.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.arch import Arch, Block, Linear, Observe, Site, site_of
from lowbit.files import replacing
from lowbit.kv import CacheRanges
from lowbit.qtensor import QTensor, Scheme, Spec, dequantize, fake_quantize_input, find_params, quantize, validate

GRAM_BYTES = 8 * 2**30  # statistics of more linears than fit here are gathered in several passes
TOKENS_PER_BATCH = 1024  # of 4096 tokens, activations no longer fit into a CPU's cache: a third slower


@dataclass(frozen=True)
class Between:
    """Bounds of a numeric option of a method, inclusive; written Annotated[float, Between(low, high)] in its signature."""

    low: float
    high: float


@dataclass(frozen=True)
class Input:
    """How the input of a linear is quantized: its spec and, where that needs it, the largest magnitude seen in calibration."""

    spec: Spec
    largest: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the spec needs `largest`."""
        return not self.spec.dynamic or self.spec.scale == "e4m3"

    def quantize(self, x: Tensor) -> Tensor:
        """See `qtensor.fake_quantize_input`."""
        return fake_quantize_input(x, self.spec, self.largest)


@dataclass
class LinearRecord:
    """What happened to one linear; one row of the report.

    `error` is the relative output error trace(D G D^T) / trace(W G W^T), D = W - Q, where a Gram matrix G was gathered, and
    the relative weight error |D|^2 / |W|^2 otherwise; `error_rtn` is the same for rounding to nearest on a min-max grid.
    """

    name: str
    scheme: str
    method: str
    shape: tuple[int, int]
    bits_per_weight: float
    error: float
    error_rtn: float
    error_kind: str
    damping: float | None = None
    warnings: list[str] = field(default_factory=list)


class Stream:
    """Hidden states between blocks, for rows of calibration tokens, on disk: one file a block boundary, read batch by batch.

    Between blocks they are rounded to the checkpoint's dtype, as engines keep them. Memory is one batch of at most
    `TOKENS_PER_BATCH` tokens (at least one row), whatever the number of rows.
    """

    def __init__(self, arch: Arch, tokens: Tensor, folder: Path) -> None:
        """tokens: [rows, length] int64; folder: where the files `hidden-K` are kept."""
        self.arch = arch
        self.tokens = tokens
        self.folder = folder
        self.dtype = arch.source.dtype()
        self._rows = min(len(tokens), max(1, TOKENS_PER_BATCH // tokens.shape[1]))
        self._width = 0
        self._calls: dict[int, list[Any]] = {}

    def file(self, boundary: int) -> Path:
        """Hidden states that enter block `boundary`: [rows, length, width] in `dtype`, no header."""
        return self.folder / f"hidden-{boundary:05d}"

    def start(self) -> None:
        """Run the part before the blocks: writes boundary 0 unless a later boundary exists already."""
        self.arch.load_outside()
        present = any(self.folder.glob("hidden-*"))
        with replacing(self.file(0)) if not present else nullcontext(os.devnull) as path, open(path, "wb") as file:
            for start in range(0, len(self.tokens), self._rows):
                rows = self.tokens[start : start + self._rows]
                if present and len(rows) in self._calls:
                    continue
                with fast_products():
                    hidden, calls = self.arch.embed(rows)
                self._calls.setdefault(len(rows), calls)
                self._width = hidden.shape[-1]
                file.write(self._bytes(hidden))
        self.arch.free_outside()

    def read(self, boundary: int, start: int, stop: int) -> Tensor:
        """Rows start..stop of a boundary: float32 [stop - start, length, width]."""
        length = self.tokens.shape[1]
        row = length * self._width * self.dtype.itemsize
        data = np.fromfile(self.file(boundary), np.uint8, count=(stop - start) * row, offset=start * row)
        return torch.from_numpy(data).view(self.dtype).view(stop - start, length, self._width).float()

    def rounded(self, hidden: Tensor) -> Tensor:
        """Hidden states as they come back after being written."""
        return hidden.to(self.dtype).float()

    def batches(self, boundary: int) -> Iterator[tuple[Tensor, Any]]:
        """(hidden states, other arguments of the block's call) for every batch that enters block `boundary`."""
        for start in range(0, len(self.tokens), self._rows):
            stop = min(start + self._rows, len(self.tokens))
            yield self.read(boundary, start, stop), self._calls[stop - start][boundary]

    def advance(self, block: Block, forward: Callable[[Tensor, Any], Tensor]) -> None:
        """Write the next boundary: forward(hidden, call) of every batch that enters `block`."""
        with fast_products(), replacing(self.file(block.index + 1)) as path, path.open("wb") as file:
            for hidden, call in self.batches(block.index):
                file.write(self._bytes(forward(hidden, call)))

    def _bytes(self, hidden: Tensor) -> memoryview:
        return hidden.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().data.cast("B")

    def drop(self, boundary: int) -> None:
        """Delete a boundary that no one needs any more."""
        self.file(boundary).unlink(missing_ok=True)


class _Captured(Exception):
    """Every wanted input of this batch was seen; the rest of the block need not run."""


class Unit:
    """One loaded block and the schemes of its linears.

    Attributes:
        linears: the linears to quantize, those with a common input next to each other.
        scale_dtype: the dtype in which the checkpoint keeps scales.
        records: one row for each linear assigned so far.
    """

    def __init__(self, arch: Arch, block: Block, schemes: dict[str, Scheme], stream: Stream, scale_dtype: torch.dtype) -> None:
        self.arch = arch
        self.block = block
        self.stream = stream
        self.scale_dtype = scale_dtype
        self.records: dict[str, LinearRecord] = {}
        self.assigned: dict[str, QTensor] = {}
        self._schemes = schemes
        order = {linear.name: i for i, linear in enumerate(block.linears)}
        chosen = [linear for linear in block.linears if linear.name in schemes]
        self.linears = tuple(sorted(chosen, key=lambda linear: (order[linear.shares], order[linear.name])))
        self._warnings: dict[str, list[str]] = {}
        self._grams: dict[Any, Tensor] = {}
        self._inputs: dict[str, Input] | None = None

    def scheme(self, linear: Linear) -> Scheme:
        """The scheme the rules chose for a linear."""
        return self._schemes[linear.name]

    def spec(self, linear: Linear) -> Spec:
        """How the weight of a linear is to be quantized."""
        return self._schemes[linear.name].weight

    def weight(self, linear: Linear) -> Tensor:
        """The float weight [out, in] float32."""
        return linear.view(self.arch.param(linear)).float()

    def largest(self, linear: Linear) -> float | None:
        """The largest weight of all linears with the same input, where they must share one outer scale (E4M3), else None."""
        if self.spec(linear).scale != "e4m3":
            return None
        return max(float(self.weight(other).abs().max()) for other in self.linears if other.shares == linear.shares)

    @torch.no_grad()
    def inputs(self) -> dict[str, Input]:
        """How the input of each linear is quantized; absent where it stays float. May take a pass over the data."""
        if self._inputs is None:
            self._inputs = {
                linear.name: Input(spec) for linear in self.linears if (spec := self.scheme(linear).input) is not None
            }
            wanted = {linear.site: 0.0 for linear in self.linears if linear.name in self._inputs}
            if any(each.calibrated for each in self._inputs.values()):
                sites = self.arch.sites(self.block)

                def observe(weight: Tensor, x: Tensor, transposed: bool) -> Tensor:
                    site = site_of(weight, sites)
                    if site in wanted and x.numel():
                        wanted[site] = max(wanted[site], float(x.abs().max()))
                    return x

                for hidden, call in self.stream.batches(self.block.index):
                    with fast_products():
                        self.arch.call(self.block, hidden, call, observe)
            for linear in self.linears:
                known = self._inputs.get(linear.name)
                if known is not None and known.calibrated:
                    self._inputs[linear.name] = self._storable(known.spec, wanted[linear.site] or 1.0)
        return self._inputs

    def _storable(self, spec: Spec, largest: float) -> Input:
        """An input whose static scale is what the checkpoint will hold."""
        if spec.dynamic:
            return Input(spec, largest)
        scale = torch.tensor(largest / spec.format.max).to(self.scale_dtype)
        return Input(spec, float(scale) * spec.format.max)

    def gram(self, linear: Linear, *, sequential: bool = False) -> Tensor:
        """X^T X [in, in] float32, summed over all calibration tokens that reach the linear, with inputs as the quantized
        model sees them (earlier blocks quantized; its own input quantized if the scheme says so). Linears with the same
        input share one matrix.

        Args:
            sequential: linears of this block assigned before now are quantized too, at the price of a pass over the data
                for every matrix; otherwise the block's own linears are all still float.
        """
        key = self._gram_key(linear)
        if key not in self._grams:
            if sequential:
                self._apply()
            self._grams = self._gather(linear, alone=sequential)
        return self._grams[key]

    def warn(self, linear: Linear, text: str) -> None:
        """Keep a warning for the linear's row of the report."""
        self._warnings.setdefault(linear.name, []).append(text)

    def assign(self, linear: Linear, q: QTensor, *, method: str, damping: float | None = None) -> None:
        """Set the result for a linear and record its error against that of rounding to nearest."""
        validate(q, linear.name)
        w, spec = self.weight(linear), self.spec(linear)
        gram = self._grams.get(self._gram_key(linear))
        grid = find_params(w, spec, scale_dtype=self.scale_dtype, largest=self.largest(linear))
        nearest = quantize(w, grid, spec)
        total = energy(w, gram) or 1.0  # where it is 0, so are the errors
        self.assigned[linear.name] = q.to("cpu")
        self.records[linear.name] = LinearRecord(
            name=linear.name,
            scheme=self.scheme(linear).name,
            method=method,
            shape=(linear.out_features, linear.in_features),
            bits_per_weight=q.bits_per_weight,
            error=energy(w - dequantize(q), gram) / total,
            error_rtn=energy(w - dequantize(nearest), gram) / total,
            error_kind="weight" if gram is None else "output",
            damping=damping,
            warnings=self._warnings.pop(linear.name, []),
        )

    def assign_nearest(self, linear: Linear, *, method: str, shrink_steps: int = 0) -> None:
        """Round a linear to nearest; see `qtensor.find_params` for `shrink_steps`."""
        w, spec = self.weight(linear), self.spec(linear)
        largest = self.largest(linear)
        grid = find_params(w, spec, scale_dtype=self.scale_dtype, shrink_steps=shrink_steps, largest=largest)
        self.assign(linear, quantize(w, grid, spec), method=method)

    @torch.no_grad()
    def finish(self, *, cache: bool = False) -> dict[str, Tensor]:
        """Put the dequantized weights into the block and move the stream past it.

        Args:
            cache: also find the scales of an FP8 key-value cache.

        Returns:
            these scales, by tensor name; see `kv.CacheRanges`.

        Raises:
            ValueError: the block has no attention that could have a cache.
        """
        self._grams = {}
        known = self.inputs()
        self._apply()
        inputs = {linear.site: known[linear.name] for linear in self.linears if linear.name in known}
        observe = quantized_inputs(self.arch.sites(self.block), inputs)
        ranges = CacheRanges(self.arch.model.get_submodule(self.block.name), self.block.name) if cache else None
        with ranges or nullcontext():
            self.stream.advance(self.block, lambda hidden, call: self.arch.call(self.block, hidden, call, observe))
        if ranges is None:
            return {}
        if not ranges.largest:
            raise ValueError(f"{self.block.name} does not call scaled_dot_product_attention; remove kv_cache from the recipe")
        return ranges.scales()

    @torch.no_grad()
    def _apply(self) -> None:
        """Put the dequantized weights of the linears assigned so far, as the checkpoint will hold them, into the block."""
        for linear in self.linears:
            if linear.name in self.assigned:
                q = self.assigned[linear.name]
                linear.view(self.arch.param(linear)).copy_(dequantize(q, self.scale_dtype))

    def _gram_key(self, linear: Linear) -> tuple[str, Spec | None]:
        return linear.shares, self.scheme(linear).input

    @torch.no_grad()
    def _gather(self, first: Linear, *, alone: bool) -> dict[Any, Tensor]:
        """Gram matrices of `first` and of as many linears after it as fit into `GRAM_BYTES`, in one pass over the data."""
        wanted: dict[Site, Any] = {}
        grams: dict[Any, Tensor] = {}
        size = 0
        for linear in self.linears[self.linears.index(first) :]:
            key = self._gram_key(linear)
            if key in grams:
                continue
            size += linear.in_features**2 * 4
            if grams and (alone or size > GRAM_BYTES):
                break
            grams[key] = torch.zeros(linear.in_features, linear.in_features, device=self.arch.device)
            wanted[linear.site] = key
        known = self.inputs()
        inputs = {linear.site: known[linear.name] for linear in self.linears if linear.name in known}
        sites = self.arch.sites(self.block)
        pending: set[Site] = set()

        def observe(weight: Tensor, x: Tensor, transposed: bool) -> Tensor:
            site = site_of(weight, sites)
            if site is None:
                return x
            if site in inputs:
                x = inputs[site].quantize(x)
            if site in wanted:
                add_gram(grams[wanted[site]], x.reshape(-1, x.shape[-1]))
                pending.discard(site)
                if not pending:
                    raise _Captured
            return x

        for hidden, call in self.stream.batches(self.block.index):
            pending = set(wanted)
            try:
                with fast_products():
                    self.arch.call(self.block, hidden, call, observe)
            except _Captured as stop:
                traceback.clear_frames(stop.__traceback__)  # they hold every activation of the batch
        for gram in grams.values():
            _mirror(gram)
        return grams


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 products of activations use bfloat16 or TF32 multipliers where the machine has them; sums stay float32.

    Solvers stay outside. On CPUs without such multipliers this only selects oneDNN's kernels, which took half
    the time of the default ones, at the same accuracy.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quantized_inputs(sites: dict[int, str], inputs: dict[Site, Input]) -> Observe:
    """What a `Tap` must do for the inputs of the linears at the given sites to be quantized as said."""

    def observe(weight: Tensor, x: Tensor, transposed: bool) -> Tensor:
        site = site_of(weight, sites)
        return x if site is None or site not in inputs else inputs[site].quantize(x)

    return observe


def energy(w: Tensor, gram: Tensor | None) -> float:
    """trace(W G W^T) of w [out, in] float32, with the upper triangle of stripes of G alone; G [in, in], or the identity."""
    if gram is None:
        return float(w.square().sum(dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    with fast_products():
        for start, stop in _stripes(len(gram)):
            x = w[:, start:stop]
            product = x @ gram[start:stop, start:]
            product[:, stop - start :] *= 2  # what stands left of the diagonal is the same
            total += product.mul_(w[:, start:]).sum(dtype=torch.float64)
    return float(total)


_STRIPES = 4  # a Gram matrix is symmetric: used in stripes from the diagonal on, 5/8 of the work


def _stripes(width: int) -> list[tuple[int, int]]:
    """Rows start..stop of each stripe of a matrix [width, width]."""
    step = width if width < 256 else -(-width // _STRIPES)
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """gram [in, in] += x^T x for x [tokens, in] float32, in the upper triangle of stripes only; `_mirror` completes it."""
    for start, stop in _stripes(len(gram)):
        gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _mirror(gram: Tensor) -> None:
    """Copy the upper triangle onto the lower, in place."""
    step = 1024
    for start in range(0, gram.shape[0], step):
        stop = min(start + step, gram.shape[0])
        corner = gram[start:stop, start:stop]
        gram[start:stop, start:stop] = corner.triu() + corner.triu(1).T
        gram[stop:, start:stop] = gram[start:stop, stop:].T
