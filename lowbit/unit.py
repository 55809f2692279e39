"""Unit: one block of the model while it is being quantized, and the stream of hidden states that flows through it.

A method sees nothing of hooks, files or Hugging Face call signatures. It asks a `Unit` for its linears, their weights and
statistics, and assigns a quantized tensor to each:

    for linear in unit.linears:
        unit.assign(linear, solve(unit.weight(linear), unit.gram(linear), unit.spec(linear)), method="...")

A transform rewrites the float weights before, so that they are easier to round and the block computes the same:

    for link in unit.links:
        unit.rescale(link, s)

The statistics come from the block's real inputs in the partly quantized model (the student stream), read from a file one batch
at a time. That file is also what a killed run resumes from.
"""

import functools
import inspect
import math
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowbit.adapter import LowRank, merged
from lowbit.arch import REARRANGED, Arch, Block, Linear, Observe, Point, Site, leaves, matrix_of, site_of, unflattened
from lowbit.files import replacing, save_shard
from lowbit.kv import CacheRanges
from lowbit.links import Link, Side, find_links, structure
from lowbit.orthogonal import hadamard
from lowbit.qtensor import PointScheme, QTensor, Scheme, Spec, dequantize, fake_quantize_input, find_params, quantize, validate
from lowbit.ssm import Mixer

GRAM_BYTES = 8 * 2**30  # statistics of more linears than fit here are gathered in several passes
STAND_IN_TOKENS = 64  # of the rows on which links are looked for
TOKENS_PER_BATCH = 1024  # of 4096 tokens, activations no longer fit into a CPU's cache: a third slower
_TOKENS_ON_GPU, _ROWS_ON_GPU = 16384, 4  # what fills a GPU, and what no step of a training goes below


@dataclass(frozen=True)
class Between:
    """Bounds of a numeric option of a method, inclusive; written Annotated[float, Between(low, high)] in its signature."""

    low: float
    high: float


@dataclass(frozen=True)
class Input:
    """How the input of a linear is quantized: its spec and, where that needs it, the largest magnitude seen in calibration."""

    spec: Spec | None
    largest: float | None = None
    turned: bool = False  # by a Hadamard matrix, before it is quantized

    @property
    def calibrated(self) -> bool:
        """Whether the spec needs `largest`."""
        return self.spec is not None and (not self.spec.dynamic or self.spec.scale == "e4m3")

    def quantize(self, x: Tensor) -> Tensor:
        """See `qtensor.fake_quantize_input`."""
        x = hadamard(x) if self.turned else x
        return x if self.spec is None else fake_quantize_input(x, self.spec, self.largest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Static:
    """How a point is quantized: integers under scales from calibration.

    Attributes:
        largest: float32 [scales, inner], the largest magnitudes; inner: of every feature within a set, or 1.
        labels: [sets] int64, which row of `largest` each set of features has.
    """

    spec: Spec
    largest: Tensor
    labels: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """x [..., sets * features of a set] quantized and dequantized in float32, in the dtype of x."""
        scale = (self.largest / self.spec.format.max).to(x.device)[self.labels.to(x.device)]
        values = x.float().unflatten(-1, (len(self.labels), -1))
        return (self.spec.format.round(values / scale) * scale).flatten(-2).to(x.dtype)


Quantizer = Input | Static


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

    Beside those of the partly quantized model (the student) there may be those of the float model (the teacher).

    Attributes:
        shape: of a row of hidden states, once `start` was called: [length, width], or more where the model keeps several.
        taken: the batches that go through the blocks: all, unless fewer were set before `start`. No one may read the others.
    """

    def __init__(self, arch: Arch, tokens: Tensor, folder: Path, *, teacher: bool = False, all_experts: bool = False) -> None:
        """tokens: [rows, length] int64; folder: where the files `hidden-K` are kept, and `teacher-K` if there is one;
        all_experts: units gather the statistics of every expert from all tokens."""
        self.arch = arch
        self.tokens = tokens
        self.folder = folder
        self.teacher = teacher
        self.all_experts = all_experts
        self.dtype = arch.source.dtype()
        if arch.device.type == "cpu":
            self._rows = min(len(tokens), max(1, TOKENS_PER_BATCH // tokens.shape[1]))
        else:
            self._rows = min(len(tokens), _ROWS_ON_GPU, max(1, _TOKENS_ON_GPU // tokens.shape[1]))
        self.shape = torch.Size((tokens.shape[1], 0))
        self.taken = list(self.parts())
        self._calls: dict[int, list[Any]] = {}  # by the number of rows, without what depends on the tokens
        self._short_calls: list[Any] = []
        # Links by the structure of the blocks that have them; see `Unit.links`.
        self.links: dict[Any, tuple[tuple[Link, ...], tuple[tuple[str, str], ...]]] = {}

    @property
    def taken(self) -> list[tuple[int, int]]:
        """See the class."""
        return self._taken

    @taken.setter
    def taken(self, parts: list[tuple[int, int]]) -> None:
        self._taken, self._taken_rows = parts, {row for part in parts for row in range(*part)}

    def file(self, boundary: int, *, teacher: bool = False) -> Path:
        """Hidden states that enter block `boundary`: [rows, length, width] in `dtype`, no header."""
        return self.folder / f"{'teacher' if teacher and boundary else 'hidden'}-{boundary:05d}"

    def complete(self, boundary: int) -> bool:
        """Whether the hidden states that enter block `boundary` are on disk."""
        return all(self.file(boundary, teacher=which).exists() for which in {False, self.teacher})

    def start(self) -> None:
        """Run the part before the blocks: writes boundary 0 unless a later boundary exists already."""
        self.arch.load_outside()
        present = any(self.complete(boundary) for boundary in range(len(self.arch.blocks) + 1))
        with replacing(self.file(0)) if not present else nullcontext(os.devnull) as path, open(path, "wb") as file:
            for part in self.taken:
                rows = self.tokens[slice(*part)]
                own = self._own_arguments(part)
                if present and len(rows) in self._calls and (own.exists() or not self.arch.calls_differ):
                    continue
                with fast_products():
                    hidden, calls = self.arch.embed(rows)
                self._calls.setdefault(len(rows), calls if not self.arch.calls_differ else self._kept(calls, own))
                self.shape = hidden.shape[1:]
                self.write(file, part, hidden)
        hidden, self._short_calls = self.arch.embed(self.tokens[:1, :STAND_IN_TOKENS])
        self._short_shape = hidden.shape
        self.arch.free_outside()

    def stand_in(self, boundary: int) -> tuple[Tensor, Any]:
        """A short row of random hidden states [1, length, width] float32 and the other arguments of the block's call."""
        generator = torch.Generator().manual_seed(0)
        call = self._filled(boundary, self._short_calls[boundary], None, self.folder / "carried-short")
        return torch.randn(self._short_shape, generator=generator), call

    def _own_arguments(self, part: tuple[int, int]) -> Path:
        """Where the arguments of blocks that depend on a batch's tokens are kept."""
        return self.folder / f"arguments-{part[0]:05d}"

    def _kept(self, calls: list[Any], path: Path) -> list[Any]:
        """Write the arguments that depend on the tokens, each tensor once; returns the calls without them."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        kept = []
        for block, call in zip(self.arch.blocks, calls, strict=True):
            found, shape = leaves(call)
            for i in block.varying:
                name = names.setdefault(id(found[i]), f"{block.index}.{i}")
                tensors[name] = found[i]
                found[i] = _Kept(name)
            kept.append(unflattened(found, shape))
        save_shard({name: tensor.cpu().clone() for name, tensor in tensors.items()}, path)
        return kept

    def _filled(self, boundary: int, call: Any, stored: Path | None, carried: Path) -> Any:
        """A block's call with what depends on the batch: tensors from the file `stored`, mappings kept at `carried`."""
        block = self.arch.blocks[boundary]
        if not block.varying and not block.carried:
            return call
        found, shape = leaves(call)
        for i in block.carried:
            found[i] = _OnDisk(Path(f"{carried}-{i}"), self.arch.device)
        if stored is not None and block.varying:
            with safe_open(stored, "pt") as file:
                for i in block.varying:
                    found[i] = file.get_tensor(found[i].name).to(self.arch.device)
        return unflattened(found, shape)

    def read(self, boundary: int, start: int, stop: int, *, teacher: bool = False) -> Tensor:
        """Rows start..stop of a boundary, on the model's device: float32 [stop - start, *shape]."""
        assert self._taken_rows.issuperset(range(start, stop)), f"rows {start} to {stop} were not taken"
        row = self._row
        file = self.file(boundary, teacher=teacher)
        device = self.arch.device
        data = torch.empty((stop - start) * row, dtype=torch.uint8, pin_memory=device.type == "cuda")
        with file.open("rb", buffering=0) as stored:
            stored.seek(start * row)
            if stored.readinto(data.numpy().data) != len(data):
                raise ValueError(f"{file} is shorter than it was when it was written; delete its folder and start again")
        given = data.view(self.dtype).view(stop - start, *self.shape)
        return given.to(device, non_blocking=True).float()

    def rounded(self, hidden: Tensor) -> Tensor:
        """Hidden states as they come back after being written."""
        return hidden.to(self.dtype).float()

    def parts(self) -> Iterator[tuple[int, int]]:
        """First and last row of every batch."""
        for start in range(0, len(self.tokens), self._rows):
            yield start, min(start + self._rows, len(self.tokens))

    def calls(self, part: tuple[int, int], boundary: int, *, teacher: bool = False) -> Any:
        """The other arguments of the call of block `boundary` for a batch; of the head, the tokens."""
        if boundary == len(self.arch.blocks):
            return self.tokens[slice(*part)]
        carried = self.folder / f"carried{'-teacher' if teacher else ''}-{part[0]:05d}"
        return self._filled(boundary, self._calls[part[1] - part[0]][boundary], self._own_arguments(part), carried)

    def batches(self, boundary: int, *, teacher: bool = False) -> Iterator[tuple[Tensor, Any]]:
        """(hidden states, other arguments of the block's call) for every batch taken that enters block `boundary`."""
        for part in self.taken:
            yield self.read(boundary, *part, teacher=teacher), self.calls(part, boundary, teacher=teacher)

    def advance(self, block: Block, forward: Callable[[Tensor, Any], Tensor], *, teacher: bool = False) -> None:
        """Write the next boundary: forward(hidden, call) of every batch that enters `block`."""
        target = self.file(block.index + 1, teacher=teacher)
        with fast_products(), replacing(target) as path, path.open("wb") as file:
            for part, (hidden, call) in zip(self.taken, self.batches(block.index, teacher=teacher), strict=True):
                self.write(file, part, forward(hidden, call))
        if block.carried and not teacher:
            with torch.no_grad():
                forward(*self.stand_in(block.index))  # later blocks read what this one adds for the short row

    def write(self, file: BinaryIO, part: tuple[int, int], hidden: Tensor) -> None:
        """Write the hidden states of a batch to their place in the file of a boundary."""
        file.seek(part[0] * self._row)
        file.write(self.bytes(hidden))

    @property
    def _row(self) -> int:
        """Bytes of the hidden states of a row."""
        return self.shape.numel() * self.dtype.itemsize

    def bytes(self, hidden: Tensor) -> memoryview:
        """Hidden states as they are written."""
        return hidden.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().data.cast("B")

    def drop(self, boundary: int) -> None:
        """Delete a boundary that no one needs any more."""
        for teacher in (False, True):
            self.file(boundary, teacher=teacher).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Kept:
    """Stands in a call for an argument that is in a file, under this name."""

    name: str


class _OnDisk(MutableMapping[Any, Any]):
    """A mapping that blocks fill with tensors, or tuples of them, for later blocks: a file for every key, so that memory holds
    none and a killed run finds them. Gradients do not pass.

    A block that runs again overwrites what it wrote. The last run of a block before the next is the quantized one.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        """path: what the names of the files start with."""
        self._path, self._device = path, device

    def _file(self, key: Any) -> Path:
        return self._path.with_name(f"{self._path.name}-{re.sub(r'[^A-Za-z0-9_]', '-', repr(key))}")

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(f"a block keeps {type(value).__name__} for later blocks; lowbit can hand on tensors only")
        kind = "tuple" if isinstance(value, tuple) else "tensor"
        save_shard({f"{kind}.{i}": part.detach().cpu().clone() for i, part in enumerate(parts)}, self._file(key))

    def __getitem__(self, key: Any) -> Any:
        if not self._file(key).exists():
            raise KeyError(key)
        tensors = load_file(self._file(key))
        parts = tuple(tensors[name].to(self._device) for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])))
        return parts if next(iter(tensors)).startswith("tuple") else parts[0]

    def __delitem__(self, key: Any) -> None:
        self._file(key).unlink()

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("keys of tensors on disk are not listed")

    def __len__(self) -> int:
        raise TypeError("keys of tensors on disk are not counted")

    def __bool__(self) -> bool:
        return True


class _Captured(Exception):
    """Every wanted input of this batch was seen; the rest of the block need not run."""


class Unit:
    """One loaded block and the schemes of its linears.

    Attributes:
        schemes: by the names of the linears to quantize.
        linears: these linears, those with a common input next to each other.
        unlinked: (producer, reason) for what is no link, once `links` was asked for.
        scale_dtype: the dtype in which the checkpoint keeps scales.
        records: one row for each linear assigned so far.
        notes: what transforms and trainers did, one row each, JSON types only.
        say: say(stage, steps done, steps in all) shows progress within the block.
        corrections: low-rank corrections by linear.
    """

    def __init__(
        self,
        arch: Arch,
        block: Block,
        schemes: dict[str, Scheme],
        stream: Stream,
        scale_dtype: torch.dtype,
        values: dict[str, Tensor] | None = None,
        points: dict[str, PointScheme] | None = None,
    ) -> None:
        """values: tensors of the block as they were read; linears of which more is known there than the model holds, because
        they were rotated, start from these. points: schemes of the block's points, by name. With a
        teacher in the stream, it moves past the block now."""
        self.arch = arch
        self.block = block
        self.stream = stream
        self.scale_dtype = scale_dtype
        self.records: dict[str, LinearRecord] = {}
        self.notes: list[dict[str, Any]] = []
        self.assigned: dict[str, QTensor] = {}
        self.corrections: dict[str, LowRank] = {}
        self.say: Callable[[str, int, int], None] = lambda stage, done, total: None
        self.schemes = schemes
        order = {linear.name: i for i, linear in enumerate(block.linears)}
        chosen = [linear for linear in block.linears if linear.name in schemes]
        self.linears = tuple(sorted(chosen, key=lambda linear: (order[linear.shares], order[linear.name])))
        self.points = {point.name: (point, points[point.name]) for point in block.points if points and point.name in points}
        self.clusters: dict[str, Tensor] = {}  # of each mixer: the cluster of every channel [channels]
        self.parameters: dict[str, QTensor] = {}  # rounded parameters among the points
        self._turned: set[str] = set()  # linears whose inputs are turned
        self._ranges: dict[str, Static] | None = None
        self._earlier: dict[str, LinearRecord] = {}
        self._warnings: dict[str, list[str]] = {}
        self._grams: dict[Any, Tensor] = {}
        self._inputs: dict[str, Input] | None = None
        self.unlinked: tuple[tuple[str, str], ...] = ()
        self._links: tuple[Link, ...] | None = None
        self._weights: dict[str, Tensor] = {}  # of rewritten linears, not rounded to the dtype of the parameters
        for linear in self.linears:
            if values is not None and values[linear.tensor].dtype != arch.stored_dtype(linear.tensor):
                self._weights[linear.name] = matrix_of(linear, values).to(arch.device, torch.float32, copy=True)
        self._touched: set[str] = set()  # parameters that were rescaled
        self._sizes: dict[str, tuple[Tensor, Tensor]] = {}  # of each distinct input: largest and mean magnitude
        self._samples: dict[tuple[str, int], Tensor] = {}
        self._crosses: dict[Any, Tensor | None] = {}
        if stream is not None and stream.teacher and block is not arch.head:
            with torch.no_grad():
                stream.advance(block, lambda hidden, call: arch.call(block, hidden, call), teacher=True)

    def twin(self, schemes: dict[str, Scheme]) -> "Unit":
        """The same block, not rewritten, with other schemes and with the Gram matrices gathered so far."""
        other = Unit(self.arch, self.block, schemes, self.stream, self.scale_dtype)
        other._grams = self._grams
        return other

    def scheme(self, linear: Linear) -> Scheme:
        """The scheme the rules chose for a linear."""
        return self.schemes[linear.name]

    def spec(self, linear: Linear) -> Spec:
        """How the weight of a linear is to be quantized."""
        return self.schemes[linear.name].weight

    def weight(self, linear: Linear) -> Tensor:
        """The float weight [out, in] float32, exact also where it was rescaled."""
        if linear.name in self._weights:
            return self._weights[linear.name].float()
        return linear.view(self.arch.param(linear)).float()

    def largest(self, linear: Linear) -> float | None:
        """The largest weight of all linears with the same input, where they must share one outer scale (E4M3), else None."""
        if self.spec(linear).scale != "e4m3":
            return None
        return max(float(self.weight(other).abs().max()) for other in self.linears if other.shares == linear.shares)

    def nearest(
        self,
        linear: Linear,
        w: Tensor,
        *,
        shrink_steps: int = 0,
        importance: Tensor | None = None,
        largest: float | None = None,
    ) -> QTensor:
        """w [out, in] float32 rounded to nearest as the scheme of a linear says; see `qtensor.find_params`."""
        spec = self.spec(linear)
        grid = find_params(
            w, spec, scale_dtype=self.scale_dtype, shrink_steps=shrink_steps, importance=importance, largest=largest
        )
        return quantize(w, grid, spec)

    def inputs(self) -> dict[str, Input]:
        """How the input of each linear is quantized; absent where it stays float. May take a pass over the data."""
        if self._inputs is None:
            self._inputs = {}
            for linear in self.linears:
                spec, turned = self.scheme(linear).input, linear.name in self._turned
                if spec is not None or turned:
                    given = Input(spec, turned=turned)
                    if spec is not None and given.calibrated:
                        largest = float(self.absmax(linear).max())
                        if largest == 0:
                            self.warn(linear, "no calibration token reached this layer: its input has the scale of magnitude 1")
                            largest = 1.0
                        given = replace(self._storable(spec, largest), turned=turned)
                    self._inputs[linear.name] = given
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
                self.put()
            self._grams = self._gather(linear, alone=sequential)
        return self._grams[key]

    def cross(self, linear: Linear) -> Tensor | None:
        """(X' - X)^T X [in, in] float32 over all calibration tokens, X the inputs of `gram` and X' those of the float model,
        which a teacher in the stream provides. None where a linear does not read every token (experts), because then
        the inputs have no counterparts. Linears with the same input share one matrix."""
        assert self.stream.teacher, "the stream has no teacher"
        key = self._gram_key(linear)
        if key not in self._crosses:
            self._crosses = self._gather_cross(linear)
        return self._crosses[key]

    # ------------------------------------------------------------------------------------------------------- transforms

    @property
    def links(self) -> tuple[Link, ...]:
        """The links of the block with a linear to quantize among their consumers; see `lowbit.links`."""
        if self._links is None:
            module = self.arch.model.get_submodule(self.block.name)
            key = structure(module)
            if key not in self.stream.links:
                hidden, call = self.stream.stand_in(self.block.index)
                heads = getattr(self.arch.model.config.get_text_config(), "num_attention_heads", None)
                self.stream.links[key] = find_links(
                    module, lambda observe: self.arch.call(self.block, hidden, call, observe), heads
                )
            found, rejected = self.stream.links[key]
            kept = []
            for link in found:
                if not self.consumers(link):
                    rejected = (*rejected, (link.name, "none of the linears that read it is quantized"))
                elif not all(self._whole(side) for side in (*link.producers, *link.consumers)):
                    rejected = (*rejected, (link.name, "transformers stores a tensor of it rearranged"))
                else:
                    kept.append(link)
            self._links, self.unlinked = tuple(kept), rejected
        return self._links

    def chosen_links(self, step: str, kinds: str = "all") -> list[Link]:
        """The links of the wanted kind, "norm", "linear" or "all".

        Raises:
            ValueError: there is none, with what was tried and why it is none.
        """
        found = [link for link in self.links if kinds in ("all", link.kind)]
        if not found:
            tried = "; ".join(f"{name}: {reason}" for name, reason in self.unlinked[:6])
            raise ValueError(f"{step}: {self.block.name} has no links of kind {kinds!r} to rescale ({tried}); leave {step} out")
        return found

    def consumers(self, link: Link) -> list[tuple[Linear, Tensor]]:
        """The linears to quantize that a link's channels flow into, each with the channel of every input column [in]."""
        return [(linear, side.channels) for side in link.consumers for linear in self._at(side)]

    def absmax(self, linear: Linear) -> Tensor:
        """The largest magnitude [in] float32 of every input over all calibration tokens that reach the linear, with earlier
        blocks quantized and this block float; 0 where no token does. One pass serves all linears of the block."""
        return self._size(linear)[0]

    def absmean(self, linear: Linear) -> Tensor:
        """The mean magnitude [in] float32 of every input; as `absmax`."""
        return self._size(linear)[1]

    def sample(self, linear: Linear, tokens: int) -> Tensor:
        """Inputs [T, in] float32 of at most `tokens` tokens that reach the linear, at even distances among all of them; as
        `absmax`. One pass serves all linears that are asked for the same number of tokens."""
        if (linear.shares, tokens) not in self._samples:
            samples = {other.shares: _Sample(tokens, other.in_features) for other in self.linears}
            self._visit(self._distinct_inputs(), {}, lambda key, x: samples[key].add(x))
            self._samples = {(key, tokens): sample.rows() for key, sample in samples.items()}
        return self._samples[linear.shares, tokens]

    @torch.no_grad()
    def rescale(self, link: Link, s: Tensor) -> None:
        """Divide the channels of a link's producer by s [channels] > 0 and multiply its consumers' columns by s.

        A norm's new weight is rounded to the checkpoint's dtype first, and the consumers get what it really lost, so the
        rounding costs nothing. Linears to quantize keep their product unrounded; other matrices and biases are rounded to the
        checkpoint's dtype. Where a norm's weight is 0, or would become 0, the channel stays as it is.
        """
        assert not self.assigned, "rescaled after a linear was assigned"
        assert s.shape == (link.channels,) and bool(torch.isfinite(s).all()) and bool((s > 0).all()), link.name
        s = s.double().to(self.arch.device)
        producers = link.producers
        if link.kind == "norm":
            s = self._rescale_norm(producers[0], s)
            producers = producers[1:]
        for side in producers:
            self._scale(side, 1 / s, rows=True)
        for side in link.consumers:
            self._scale(side, s, rows=False)
        for linear, _ in self.consumers(link):
            self._sizes.pop(linear.shares, None)
            self._samples = {key: x for key, x in self._samples.items() if key[0] != linear.shares}
        self._grams = {}  # of all: where inputs are quantized, those of later linears change too
        self._inputs = None

    def changed(self) -> dict[str, Tensor]:
        """The checkpoint's tensors that were rewritten by `rescale` and are not quantized, as the checkpoint holds them."""
        quantized = {linear.tensor for linear in self.linears}
        quantized |= {point.tensor for point, _ in self.points.values() if point.tensor is not None}
        names = [name for name in self.block.tensors if self.arch.place(name) in self._touched and name not in quantized]
        return {name: self.arch.held(name) for name in names}

    @torch.no_grad()
    def outputs(self) -> tuple[Tensor, Tensor]:
        """The first batch of hidden states [rows, length, width] that enter the block, and what it makes of them as it is."""
        hidden, call = next(self.stream.batches(self.block.index))
        turns = {linear.site: Input(None, turned=True) for linear in self.linears if linear.name in self._turned}
        observe = quantized_inputs(self.arch.sites(self.block), turns)
        return hidden, self.arch.call(self.block, hidden, call, observe).cpu()

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The state space mixers of the block."""
        paths = dict.fromkeys(point.mixer for point in self.block.points)
        return tuple(Mixer(self.arch.model.get_submodule(path), path) for path in paths)

    @torch.no_grad()
    def permute(self, param: str, axis: int, order: Tensor) -> None:
        """Take the entries of a parameter of the model along an axis in another order, which is exact in every dtype."""
        assert not self.assigned, "permuted after a linear was assigned"
        order = order.to(self.arch.device)
        value = self.arch.model.get_parameter(param)
        value.copy_(value.index_select(axis, order))
        self._touched.add(param)
        for linear in self.linears:
            if linear.param == param and linear.name in self._weights:
                self._weights[linear.name] = self._weights[linear.name].index_select(axis, order)
        self._forget()

    @torch.no_grad()
    def turn(self, linear: Linear) -> None:
        """Have the input of a linear, and of all that share it, multiplied by a Hadamard matrix whenever the model runs, and
        their weights too, so that they compute the same."""
        for other in self.linears:
            if other.shares != linear.shares:
                continue
            w = hadamard(self.weight(other).double())
            exact = torch.float64 if self.arch.dtype == torch.float64 else torch.float32
            self._weights[other.name] = w.to(exact)
            other.view(self.arch.param(other)).copy_(w)
            self._touched.add(other.param)
            self._turned.add(other.name)
        kept = [link for link in self.links if not any(c.name in self._turned for c, _ in self.consumers(link))]
        self._links = tuple(kept)
        self._forget()

    def _forget(self) -> None:
        """Drop what was measured on inputs that are other ones now."""
        self._sizes, self._samples, self._grams, self._inputs, self._ranges = {}, {}, {}, None, None

    @torch.no_grad()
    def point_maxima(self, name: str) -> Tensor:
        """The largest magnitude [features] float32 of a point over the calibration data, by its name, in the float block."""
        return self._magnitudes([point for point in self.block.points if point.name == name])[name]

    def _magnitudes(self, points: list[Point]) -> dict[str, Tensor]:
        device = self.arch.device
        found = {point.name: torch.zeros(point.sets * point.inner, device=device) for point in points}

        def visit(name: str, x: Tensor) -> None:
            torch.maximum(found[name], x.abs().amax(0).float(), out=found[name])

        self._visit({point.site: point.name for point in points}, {}, visit, whole=True)
        return found

    def _histograms(self, points: list[tuple[Point, PointScheme]]) -> dict[str, Tensor]:
        """How often magnitudes of points occur, by label and by the upper 16 bits of the float32 (7 bits of mantissa)."""
        labels = {point.name: self._labels(point, scheme) for point, scheme in points}
        found = {name: torch.zeros(int(each.max()) + 1, 2**15, dtype=torch.int64) for name, each in labels.items()}

        def visit(name: str, x: Tensor) -> None:
            bins = (x.abs().float().view(torch.int32) >> 16).long().cpu()
            flat = (labels[name] * 2**15 + bins).flatten()
            found[name] += torch.bincount(flat, minlength=found[name].numel()).view_as(found[name])

        self._visit({point.site: point.name for point, _ in points}, {}, visit, whole=True)
        return found

    def _labels(self, point: Point, scheme: PointScheme) -> Tensor:
        """Which scale each set of features of a point has [sets]."""
        if scheme.scales == "clusters":
            return self.clusters[point.mixer]
        if scheme.scales == "groups":
            assert point.groups is not None
            return point.groups
        return torch.zeros(point.sets, dtype=torch.int64)

    @torch.no_grad()
    def ranges(self) -> dict[str, Static]:
        """How each activation among the points is quantized, by name; takes a pass or two over the data."""
        if self._ranges is None:
            chosen = [(point, scheme) for point, scheme in self.points.values() if point.tensor is None]
            clipped = [(point, scheme) for point, scheme in chosen if scheme.quantile < 1 and point.inner == 1]
            maxima = self._magnitudes([point for point, _ in chosen]) if chosen else {}
            histograms = self._histograms(clipped) if clipped else {}
            self._ranges = {}
            for point, scheme in chosen:
                labels = self._labels(point, scheme)
                inner = 1 if scheme.scales == "tensor" else point.inner
                sets = maxima[point.name].cpu().view(point.sets, -1)
                sets = sets.amax(1, keepdim=True) if inner == 1 else sets
                largest = torch.zeros(int(labels.max()) + 1, inner)
                largest.scatter_reduce_(0, labels.unsqueeze(1).expand_as(sets), sets, "amax")
                if point.name in histograms:
                    seen = histograms[point.name].cumsum(1)
                    index = (seen < seen[:, -1:] * scheme.quantile).sum(1, keepdim=True)
                    edge = ((index + 1) << 16).to(torch.int32).view(torch.float32)
                    largest = torch.minimum(largest, edge)
                largest = torch.where(largest > 0, largest, 1.0)
                self._ranges[point.name] = Static(spec=scheme.spec, largest=largest, labels=labels)
        return self._ranges

    @torch.no_grad()
    def settle(self) -> None:
        """Round the parameters among the points to nearest: transforms are over.

        Raises:
            ValueError: a scheme needs clusters, and no step found them; or state groups, and there are none.
        """
        for point, scheme in self.points.values():
            if scheme.scales == "clusters" and (point.local not in ("x", "state") or point.mixer not in self.clusters):
                raise ValueError(f"{point.name}: scheme {scheme.name} is for x and state, after the step reorder; use s8")
            if scheme.scales == "groups" and point.groups is None:
                raise ValueError(f"{point.name}: scheme {scheme.name} needs state groups, and it has none; use s8")
            if point.tensor is not None and point.name not in self.parameters:
                param = self.arch.model.get_parameter(point.site[0])
                w = param.float().reshape(len(param), -1)
                w = w if param.dim() > 1 else w.view(1, -1)
                q = quantize(w, find_params(w, scheme.spec, scale_dtype=torch.float32), scheme.spec)
                self.parameters[point.name] = q.to("cpu")
                param.copy_(dequantize(q).view(param.shape))

    def _at(self, side: Side) -> list[Linear]:
        """The linears to quantize in a side's parameter."""
        name = f"{self.block.name}.{side.param}"
        return [linear for linear in self.linears if linear.param == name and side.index in (None, linear.index)]

    def _whole(self, side: Side) -> bool:
        """Whether the checkpoint's tensors, or slices of a side's parameter that correspond to them, cover it exactly."""
        name = f"{self.block.name}.{side.param}"
        rearranged = {matrix for matrix, reason in self.block.skipped if reason == REARRANGED}
        tensors = [tensor for tensor in self.block.tensors if self.arch.place(tensor) == name]
        if any(tensor.removesuffix(".weight") in rearranged for tensor in tensors):
            return False
        covered = sum(math.prod(self.arch.source.tensors[tensor].shape) for tensor in tensors)
        return covered == self.arch.model.get_parameter(name).numel()

    def _stored_dtype(self, param: str) -> torch.dtype:
        """The checkpoint's dtype of a parameter."""
        return next(self.arch.stored_dtype(name) for name in self.block.tensors if self.arch.place(name) == param)

    def _rescale_norm(self, side: Side, s: Tensor) -> Tensor:
        """Divide a norm's weight by s; returns what it was divided by after rounding, float64."""
        name = f"{self.block.name}.{side.param}"
        self._touched.add(name)
        param = self.arch.model.get_parameter(name)
        old = param.float() + side.plus  # as the model adds it, in float32
        rounded = (old.double() / s - side.plus).to(self._stored_dtype(name))
        new = rounded.float() + side.plus
        kept = (old == 0) | (new == 0) | (new.sign() != old.sign()) | ~new.isfinite()
        param.copy_(torch.where(kept, param, rounded.to(param.dtype)))
        return torch.where(kept, 1.0, old.double() / new.double())

    def _scale(self, side: Side, by_channel: Tensor, *, rows: bool) -> None:
        """Multiply a parameter by the factors of its channels; see `rescale` for what is rounded."""
        name = f"{self.block.name}.{side.param}"
        self._touched.add(name)
        param = self.arch.model.get_parameter(name)
        weights = {linear.name: self._weights.get(linear.name) for linear in self._at(side)}
        exact = torch.float64 if self.arch.dtype == torch.float64 else torch.float32
        factors = side.factors(by_channel)
        for linear in self._at(side):
            w = weights[linear.name]
            w = linear.view(param).to(exact, copy=True) if w is None else w
            self._weights[linear.name] = w.mul_((factors[slice(*linear.rows)].unsqueeze(1) if rows else factors).to(exact))
        value = param.to(exact, copy=True)
        side.scale(value, by_channel)
        param.copy_(value.to(self._stored_dtype(name)))
        for linear in self._at(side):
            linear.view(param).copy_(self._weights[linear.name])

    def _distinct_inputs(self) -> dict[Site, str]:
        """The sites of one linear for each distinct input, and the input's name."""
        leaders: dict[str, Linear] = {}
        for linear in self.linears:
            leaders.setdefault(linear.shares, linear)
        return {linear.site: shares for shares, linear in leaders.items()}

    def _size(self, linear: Linear) -> tuple[Tensor, Tensor]:
        if linear.shares not in self._sizes:
            widths = {other.shares: other.in_features for other in self.linears}
            largest = {key: torch.zeros(width, device=self.arch.device) for key, width in widths.items()}
            total = {key: torch.zeros(width, dtype=torch.float64, device=self.arch.device) for key, width in widths.items()}
            count = dict.fromkeys(widths, 0)

            def visit(key: str, x: Tensor) -> None:
                magnitude = x.abs()
                largest[key] = torch.maximum(largest[key], magnitude.amax(0).float()) if len(x) else largest[key]
                total[key] += magnitude.sum(0, dtype=torch.float64)
                count[key] += len(x)

            self._visit(self._distinct_inputs(), {}, visit)
            self._sizes = {key: (largest[key], (total[key] / max(1, count[key])).float()) for key in widths}
        return self._sizes[linear.shares]

    # ----------------------------------------------------------------------------------------------------------- results

    def warn(self, linear: Linear, text: str) -> None:
        """Keep a warning for the linear's row of the report."""
        known = self.records.get(linear.name)
        (self._warnings.setdefault(linear.name, []) if known is None else known.warnings).append(text)

    def release(self) -> dict[str, LinearRecord]:
        """Take back what was assigned, with its records, which are returned; the linears are to be assigned again."""
        before, self.records, self.assigned = self.records, {}, {}
        for name, record in before.items():
            self._warnings[name] = record.warnings
        return before

    def reopen(self, assigned: dict[str, QTensor], records: dict[str, LinearRecord], inputs: dict[str, Input]) -> None:
        """Take up what was assigned to this block in a checkpoint, to be trained further; errors stay those of that time."""
        self.assigned, self.records, self._earlier = assigned, records, dict(records)
        self._inputs = {linear.name: inputs[linear.name] for linear in self.linears if linear.name in inputs}

    def keep(self) -> None:
        """Remember the float weights beyond `finish`, so that linears can be assigned again."""
        for linear in self.linears:
            self._weights.setdefault(linear.name, self.weight(linear).clone())

    def assign(self, linear: Linear, q: QTensor, *, method: str, damping: float | None = None) -> None:
        """Set the result for a linear and record its error against that of rounding to nearest."""
        validate(q, linear.name)
        error, error_rtn, kind = self._errors(linear, dequantize(q))
        self.assigned[linear.name] = q.to("cpu")
        self.records[linear.name] = LinearRecord(
            name=linear.name,
            scheme=self.scheme(linear).name,
            method=method,
            shape=(linear.out_features, linear.in_features),
            bits_per_weight=q.bits_per_weight,
            error=error,
            error_rtn=error_rtn,
            error_kind=kind,
            damping=damping,
            warnings=self._warnings.pop(linear.name, []),
        )

    def _errors(self, linear: Linear, value: Tensor) -> tuple[float, float, str]:
        """error, error_rtn and error_kind of `LinearRecord` for a linear that becomes `value`."""
        if linear.name in self._earlier:
            known = self._earlier[linear.name]
            return known.error, known.error_rtn, known.error_kind
        w = self.weight(linear)
        gram = self._grams.get(self._gram_key(linear))
        nearest = self.nearest(linear, w, largest=self.largest(linear))
        total = energy(w, gram) or 1.0  # where it is 0, so are the errors
        errors = [energy(w - q.to(w), gram) / total for q in (value, dequantize(nearest))]
        return errors[0], errors[1], "weight" if gram is None else "output"

    def owns_module(self, linear: Linear) -> bool:
        """Whether the linear is the whole weight of a module [out, in] of the model."""
        whole = linear.rows == (0, linear.out_features) and linear.index is None and not linear.transposed
        return whole and linear.param.endswith(".weight") and self.arch.param(linear).dim() == 2

    def correct(self, linear: Linear, low: LowRank, *, method: str) -> None:
        """Add a low-rank correction to an assigned linear, rounded to the checkpoint's dtype."""
        low = LowRank(*(part.to("cpu", self.scale_dtype) for part in low))
        if not all(bool(torch.isfinite(part).all()) for part in low):
            raise ValueError(f"{linear.name}: the correction of {method} is not finite")
        self.corrections[linear.name] = low
        record = self.records[linear.name]
        record.error, record.error_rtn, record.error_kind = self._errors(linear, self.value(linear.name))
        record.method += f"+{method}"
        record.bits_per_weight += 8 * sum(part.nbytes for part in low) / (linear.out_features * linear.in_features)

    def value(self, name: str) -> Tensor:
        """The matrix [out, in] that the checkpoint stands for, of a linear assigned, in its dtype, on the CPU."""
        w = dequantize(self.assigned[name], self.scale_dtype)
        return merged(w, self.corrections[name]) if name in self.corrections else w

    def assign_nearest(self, linear: Linear, *, method: str, shrink_steps: int = 0, importance: Tensor | None = None) -> None:
        """Round a linear to nearest; see `qtensor.find_params` for `shrink_steps` and `importance`."""
        w, largest = self.weight(linear), self.largest(linear)
        q = self.nearest(linear, w, shrink_steps=shrink_steps, importance=importance, largest=largest)
        self.assign(linear, q, method=method)

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
        self._grams, self._crosses = {}, {}
        inputs = self.inputs_by_site()
        self.put()
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
    def put(self) -> None:
        """Put the dequantized weights of the linears assigned so far, as the checkpoint will hold them, into the block."""
        for linear in self.linears:
            if linear.name in self.assigned:
                linear.view(self.arch.param(linear)).copy_(self.value(linear.name))

    def _gram_key(self, linear: Linear) -> tuple[str, Spec | None]:
        return linear.shares, self.scheme(linear).input

    @torch.no_grad()
    def _gather(self, first: Linear, *, alone: bool) -> dict[Any, Tensor]:
        """Gram matrices of `first` and of as many linears after it as fit into `GRAM_BYTES`, in one pass over the data."""
        wanted, grams = self._room(first, alone=alone)
        self._visit(wanted, self.inputs_by_site(), lambda key, x: add_gram(grams[key], x))
        for gram in grams.values():
            _mirror(gram)
        return grams

    def _room(self, first: Linear, *, alone: bool = False) -> tuple[dict[Site, Any], dict[Any, Tensor]]:
        """Zeros [in, in] for the inputs of `first` and of as many linears after it as fit; and the sites of these inputs."""
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
        return wanted, grams

    @torch.no_grad()
    def _gather_cross(self, first: Linear) -> dict[Any, Tensor | None]:
        """`cross` of `first` and of as many linears after it as fit, in one pass over the data of each model."""
        wanted, sums = self._room(first)
        unpaired: set[Any] = set()
        inputs, boundary = self.inputs_by_site(), self.block.index
        both = zip(self.stream.batches(boundary, teacher=True), self.stream.batches(boundary), strict=True)
        for (taught, call), (hidden, _) in both:
            theirs, own = (self._collect(wanted, given, h, call) for given, h in (({}, taught), (inputs, hidden)))
            for key, total in sums.items():
                a, b = theirs.get(key), own.get(key)
                if a is None or b is None or not len(a) == len(b) == hidden.shape[:-1].numel():
                    unpaired.add(key)
                else:
                    total.addmm_((a - b).T, b)
        return {key: None if key in unpaired else total for key, total in sums.items()}

    def _collect(self, wanted: dict[Site, Any], inputs: dict[Site, Quantizer], hidden: Tensor, call: Any) -> dict[Any, Tensor]:
        """The inputs [tokens, in] at the wanted sites, for one batch."""
        found: dict[Any, list[Tensor]] = {}
        self._visit(wanted, inputs, lambda key, x: found.setdefault(key, []).append(x), [(hidden, call)])
        return {key: torch.cat(parts) for key, parts in found.items()}

    def inputs_by_site(self) -> dict[Site, Quantizer]:
        """`inputs`, by where the model multiplies, and `ranges`, by where it computes the point."""
        known = self.inputs()
        found: dict[Site, Quantizer] = {linear.site: known[linear.name] for linear in self.linears if linear.name in known}
        return found | {self.points[name][0].site: static for name, static in self.ranges().items()}

    @torch.no_grad()
    def _visit(
        self,
        wanted: dict[Site, Any],
        inputs: dict[Site, Quantizer],
        visit: Callable[[Any, Tensor], None],
        batches: Iterable[tuple[Tensor, Any]] | None = None,
        whole: bool = False,
    ) -> None:
        """One pass over the data, or over the given batches: visit(key, x [tokens, in]) for the input at each wanted site,
        which stands for `key`. `inputs` are quantized. whole: a site may come several times in a batch."""
        sites = self.arch.sites(self.block)
        turns = {linear.site: Input(None, turned=True) for linear in self.linears if linear.name in self._turned}
        inputs = {**turns, **inputs}
        pending: set[Site] = set()
        routed = _Routed()

        def observe(weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
            site = site_of(weight, sites)
            if site is None:
                return x
            if site in inputs:
                x = inputs[site].quantize(x)
            if site in wanted and not routed.running:
                visit(wanted[site], x.reshape(-1, x.shape[-1]))
                pending.discard(site)
                if not pending and not whole:
                    raise _Captured
            return x

        for hidden, call in self.stream.batches(self.block.index) if batches is None else batches:
            pending = set(wanted)
            try:
                with fast_products(), self._all_experts(routed):
                    self.arch.call(self.block, hidden, call, observe)
            except _Captured as stop:
                traceback.clear_frames(stop.__traceback__)  # they hold every activation of the batch

    @contextmanager
    def _all_experts(self, routed: "_Routed") -> Iterator[None]:
        """While active, and if the stream says so, experts run once more on all tokens after they ran as the router says; the
        block's output is that of the first run, during which `routed` is running."""
        experts = {linear.param.rpartition(".")[0]: linear.param for linear in self.linears if linear.index is not None}
        with ExitStack() as stack:
            for path, param in experts.items() if self.stream.all_experts else ():
                module = self.arch.model.get_submodule(path)
                module.forward = _EveryToken(module.forward, len(self.arch.model.get_parameter(param)), routed)
                stack.callback(module.__dict__.pop, "forward")
            yield


@dataclass
class _Routed:
    """Whether experts run for the block's output at the moment, rather than for statistics."""

    running: bool = False


@dataclass(frozen=True)
class _EveryToken:
    """Stands in for the forward of a module of `count` experts; see `Unit._all_experts`."""

    original: Callable[..., Tensor]
    count: int
    routed: _Routed

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.routed.running = True
        try:
            out = self.original(hidden_states, top_k_index, top_k_weights)
        finally:
            self.routed.running = False
        for expert in range(self.count):  # one at a time, since the masks of all at once would be large
            index, weights = torch.full_like(top_k_index[..., :1], expert), torch.ones_like(top_k_weights[..., :1])
            self.original(hidden_states, index, weights)
        return out


def check_all_experts(arch: Arch) -> None:
    """Raises:
    ValueError: statistics of all experts cannot be gathered from all tokens.
    """
    params = {linear.param for block in arch.blocks for linear in block.linears if linear.index is not None}
    modules = [arch.model.get_submodule(param.rpartition(".")[0]) for param in params]
    if not modules:
        raise ValueError("all_experts: no linear of this model is one of several experts that get a part of the tokens")
    for module in modules:
        if list(inspect.signature(module.forward).parameters)[:3] != ["hidden_states", "top_k_index", "top_k_weights"]:
            raise ValueError(f"all_experts: {type(module).__name__} is not called with the experts of each token; leave it out")


class _Sample:
    """Rows at even distances out of many whose number is not known before: whenever there are too many, every second goes."""

    def __init__(self, size: int, width: int) -> None:
        self.size = size
        self.kept = [torch.empty(0, width)]
        self.step = 1
        self.seen = 0

    def add(self, x: Tensor) -> None:
        """Take the rows of x [tokens, in] that are due."""
        first = -self.seen % self.step
        self.kept = [part.to(x.device) for part in self.kept]
        self.kept.append(x[first :: self.step].float().clone())
        self.seen += len(x)
        while sum(map(len, self.kept)) > 2 * self.size:
            self.kept = [torch.cat(self.kept)[::2].clone()]
            self.step *= 2

    def rows(self) -> Tensor:
        """[T, in], T <= size."""
        rows = torch.cat(self.kept)
        if len(rows) <= self.size:
            return rows
        return rows[torch.linspace(0, len(rows) - 1, self.size, device=rows.device).round().long()]


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 products of activations take faster kernels: TF32 on GPUs, and on CPUs those of oneDNN, as far as these do
    not round what they multiply. Solvers stay outside.

    On a CPU with AVX2, oneDNN's kernels take half the time of the default ones, at the same accuracy. On one with bfloat16
    multipliers they would round to bfloat16, but only from some size on: then a batch of another size gives other results.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_exact_precision())
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _exact_precision() -> str:
    """The lowest precision for float32 products, in torch's words, at which this CPU multiplies without rounding to less."""
    before = torch.get_float32_matmul_precision()
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double().T
    try:
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            if float((torch.nn.functional.linear(x, x) - exact).norm() / exact.norm()) < 1e-5:
                return precision
    finally:
        torch.set_float32_matmul_precision(before)
    return "highest"


def quantized_inputs(sites: dict[int, str], inputs: Mapping[Site, Quantizer]) -> Observe:
    """What a `Tap` must do for the inputs of the linears, and the points, at the given sites to be quantized as said."""

    def observe(weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
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
