"""Reconstruction: train what rounding lost back, a unit of blocks at a time, against the hidden states of the float model.

    minimise |f_Q(x) - f(x')|^2        x: what enters the unit, x': what enters it in the float model

f_Q is the unit with quantized weights and inputs, f the float unit. ZeroQuant's layer-by-layer distillation, MREM, OmniQuant,
AutoRound and EfficientQAT's first phase differ in four choices, which a `Plan` holds: what trains, how many blocks are a unit,
which hidden states enter it, and what is compared. One function of a `Plan` does them all; nothing but codes, scales, zero
points and rescaled float weights is left of what was trained.

Each quantized weight [out, in] is, group by group, a function of what trains:

    (round(w / s + shift + z) - z) s        rounding passes gradients as if it were not there (straight-through)

- "weights": shift [out, in] in steps of the grid around each weight, without bounds: the weight itself in units of its own
  scale, so that one learning rate serves every matrix, width and format.
- "rounding": the same shift within -1/2 .. 1/2: it decides between the two neighbours (SignRound).
- "choices": logits of rounding up: each weight lies between its two neighbours on the grid as it was, and ever more of them,
  the surest first, are made to decide (TesseraQ's progressive adaptive rounding); what has decided, trains no more.
- "scales": log of a factor of every scale (float scales only); "zeros": what is added to every zero point, in steps.
- "clips": what fraction sigmoid(c) of the highest and lowest weight of a group the range covers (OmniQuant's learnable weight
  clipping); s and z follow from the range.
- "smoothing": log of the scale of every channel of every link (OmniQuant's learnable equivalent transformation).

Shifts and choices start where the codes of the solver before are what rounding gives, so that training starts from its result.
Where neither they nor ranges train, the codes stay.
"""

import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowbit.arch import Linear, Observe, site_of
from lowbit.files import load_sealed, save_sealed
from lowbit.links import Link
from lowbit.qtensor import Grid, QTensor, grouped, quantize, steps_of_range, ungrouped, usable_steps
from lowbit.unit import Input, Unit, fast_products

Part = Literal["weights", "rounding", "choices", "scales", "zeros", "clips", "smoothing"]
Source = Literal["teacher", "student", "annealed"]
HELD_OUT = 8  # every so many batches of rows, one is kept out of training and judges the result
TRAINED = "trained"  # folder, beside hidden states, of finished records that stay until the blocks have theirs
_FULL = 20.0  # sigmoid of it is 1 in float32
_SAVED = 60.0  # seconds between two records of an unfinished training
_MARGIN = 0.25  # of a step, between a shifted weight and the border to the next code
_DECIDED, _DOUBT = 20.0, 10.0  # logit of a choice that was made; and what none that was not comes near
_ROUNDS = 20  # times that choices are made
_BETAS = (0.9, 0.99)  # of Adam
ADAM: dict[int, Literal["adam", "adam8bit"]] = {32: "adam", 8: "adam8bit"}  # by the bits of its state


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a reconstruction does.

    Attributes:
        name: of the method, for records.
        train: learning rates of what trains, by `Part`; shifts in steps, logs and logits in their own units.
        inputs: what enters the unit: hidden states of the float model, of the quantized one, or a mix that goes from the former
            to the latter over the first half of the steps (MREM's annealed teacher forcing).
        augmented: also compare with the float unit on the quantized model's hidden states (OmniQuant's second loss).
        optimizer: "adam"; "adam8bit", whose two moments take a byte each; or "sign": steps of the learning rate itself in the
            direction of the gradient's sign.
        schedule: what becomes of the rates: "linear" to 0, "cosine" to a twentieth, or "constant".
        start: the logit at which clips start; 20 is the whole range.
        steps, batch: optimizer steps, and rows of calibration data in each.
        seed: of the order of the rows.
    """

    name: str
    train: dict[Part, float]
    inputs: Source
    steps: int
    batch: int
    augmented: bool = False
    optimizer: Literal["adam", "adam8bit", "sign"] = "adam"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    start: float = _FULL
    seed: int = 0

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a step."""
        t = step / self.steps
        if self.schedule == "linear":
            return 1 - t
        return 0.05 + 0.95 * (1 + math.cos(math.pi * t)) / 2 if self.schedule == "cosine" else 1.0

    def decided(self, step: int) -> float:
        """The share of the choices made after so many steps: in 20 rounds, of what is open ever the same part, at last all."""
        done = step * _ROUNDS // self.steps
        return 1.0 if done == _ROUNDS else 1 - math.exp(-4 * done / _ROUNDS)

    def forcing(self, step: int) -> float:
        """The share of the float model in what enters the unit: lambda of MREM, section 3.3."""
        if self.inputs == "annealed":
            return max(1 - 2 * step / self.steps, 0.0)
        return 1.0 if self.inputs == "teacher" else 0.0


# ------------------------------------------------------------------------------------------------------- quantized weights


def passed(value: Tensor, x: Tensor) -> Tensor:
    """`value`, with the gradient of x (straight-through)."""
    return x + (value - x).detach()


class Weight:
    """A linear of the unit, its weight a differentiable function of what trains.

    Attributes:
        trained: what trains, by part; all float32.
    """

    def __init__(self, unit: Unit, linear: Linear, plan: Plan) -> None:
        self.unit, self.linear, self.spec = unit, linear, unit.spec(linear)
        self.w = unit.weight(linear).clone()
        q = unit.assigned[linear.name].to(self.w.device)
        self.grid = Grid(q.scale, q.zero, q.outer)
        self.ranged = "clips" in plan.train
        self.trained: dict[Part, Tensor] = {}
        self.codes = grouped(self.spec.format.decode(q.codes), self.spec)  # of the solver
        if plan.train.keys() & {"weights", "rounding"}:
            self.base = self._shift_to_codes()
            self.trained["weights" if "weights" in plan.train else "rounding"] = torch.zeros_like(self.w)
        if "choices" in plan.train:
            x = self._steps(self.w, self.grid.steps, self.grid.zero) + grouped(self._shift_to_codes(), self.spec)
            self.lower = x.floor().clamp(self.spec.format.min, self.spec.format.max - 1)
            self.trained["choices"] = ungrouped(torch.logit(x - self.lower, eps=0.01), self.w.shape, self.spec)
        if "scales" in plan.train:
            self.trained["scales"] = torch.zeros(q.scale.shape, device=self.w.device)
        if "zeros" in plan.train and q.zero is not None:
            self.trained["zeros"] = torch.zeros(q.scale.shape, device=self.w.device)
        if self.ranged:
            self.trained["clips"] = torch.full((*q.scale.shape, 2), plan.start, device=self.w.device)

    def _shift_to_codes(self) -> Tensor:
        """The least shift [out, in], in steps, that rounds the weight to the codes it has, and a margin."""
        x = self._steps(self.w, self.grid.steps, self.grid.zero)
        wanted = self.codes
        reach = 0.5 - _MARGIN if self.spec.format.kind == "int" else 0.0
        moved = torch.clamp(x, wanted - reach, wanted + reach)
        kept = self.spec.format.round(x) == wanted
        return ungrouped(torch.where(kept, 0, (moved - x) / self._spacing(x)), self.w.shape, self.spec)

    def _spacing(self, x: Tensor) -> Tensor:
        return self.spec.format.spacing(x.clamp(self.spec.format.min, self.spec.format.max))

    def _steps(self, w: Tensor, step: Tensor, zero: Tensor | None) -> Tensor:
        """`grouped` weights in steps from the lowest code's value."""
        x = grouped(w, self.spec) / step.unsqueeze(-1)
        return x if zero is None else x + zero.float().unsqueeze(-1)

    def _grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales, as stored but float32 and with their second factor, and zero points, with gradients."""
        dtype = self.unit.scale_dtype
        if self.ranged:
            groups = grouped(w, self.spec)
            share = torch.sigmoid(self.trained["clips"])
            low, high = groups.amin(-1).clamp(max=0) * share[..., 0], groups.amax(-1).clamp(min=0) * share[..., 1]
            step = steps_of_range(low, high, self.spec)
            step = usable_steps(step, dtype)
            step = passed(step.to(dtype).float(), step)
            if self.spec.symmetric:
                return step, None
            zero = (self.spec.format.min - low / step).clamp(self.spec.format.min, self.spec.format.max)
            return step, passed(zero.round(), zero)
        step, given = self.grid.steps, None if self.grid.zero is None else self.grid.zero.float()
        if "scales" in self.trained:
            step = step * torch.exp(self.trained["scales"])
            step = passed(step.to(dtype).float(), step)
        if given is not None and "zeros" in self.trained:
            zero = (given + self.trained["zeros"]).clamp(self.spec.format.min, self.spec.format.max)
            given = passed(zero.round(), zero)
        return step, given

    def _codes(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`grouped` weights in steps, before they are rounded; scales; zero points."""
        step, zero = self._grid(w)
        if "choices" in self.trained:
            logits = grouped(self.trained["choices"], self.spec)
            return self.lower + torch.where(logits.abs() > _DOUBT, (logits > 0).float(), torch.sigmoid(logits)), step, zero
        shift = self.trained.get("weights", self.trained.get("rounding"))
        if shift is None and not self.ranged:
            return self.codes, step, zero
        x = self._steps(w, step, zero)
        if shift is not None:
            x = x + grouped(self.base + shift, self.spec) * self._spacing(x.detach())
        return x, step, zero

    def value(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The quantized weight [out, in] float32, with gradients; of the weight with its rows and columns multiplied."""
        w = self.w if rows is None else self.w * rows.unsqueeze(1)
        w = w if columns is None else w * columns
        x, step, zero = self._codes(w)
        fmt = self.spec.format
        inside = x.clamp(fmt.min, fmt.max)
        code = inside if "choices" in self.trained else passed(fmt.round(x.detach()), inside)
        code = code if zero is None else code - zero.unsqueeze(-1)
        return ungrouped(code * step.unsqueeze(-1), w.shape, self.spec)

    @torch.no_grad()
    def result(self) -> QTensor:
        """What the checkpoint gets; the unit has been rescaled by now."""
        w = self.unit.weight(self.linear)
        x, step, zero = self._codes(w)
        if self.ranged:
            grid = Grid(step.to(self.unit.scale_dtype), None if zero is None else zero.to(torch.int8), None)
            return quantize(w, grid, self.spec)
        codes = ungrouped(self.spec.format.encode(x), w.shape, self.spec)
        if not self.trained.keys() & {"scales", "zeros"}:
            return QTensor(codes, self.grid.scale, self.grid.zero, self.spec, self.grid.outer)
        return QTensor(codes, step.to(self.unit.scale_dtype), None if zero is None else zero.to(torch.int8), self.spec)


# ------------------------------------------------------------------------------------------------------------ the unit


@dataclass
class Span:
    """The units of consecutive blocks that are trained together, as one function of what trains."""

    units: Sequence[Unit]
    plan: Plan
    weights: list[dict[str, Weight]] = field(init=False)
    links: list[list[Link]] = field(init=False)
    smoothing: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        for unit in self.units:
            _check(unit, self.plan)
        self.weights = [{linear.name: Weight(unit, linear, self.plan) for linear in unit.linears} for unit in self.units]
        smooth = "smoothing" in self.plan.train
        self.links = [unit.chosen_links(self.plan.name) if smooth else [] for unit in self.units]
        device = self.units[0].arch.device
        self.smoothing = [[torch.zeros(link.channels, device=device) for link in links] for links in self.links]

    @property
    def first(self) -> int:
        """The boundary before the span."""
        return self.units[0].block.index

    @property
    def last(self) -> int:
        """The boundary after it."""
        return self.units[-1].block.index + 1

    def trained(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Name, part and tensor of everything that trains."""
        for weights in self.weights:
            for name, weight in weights.items():
                for part, tensor in weight.trained.items():
                    yield f"{name}.{part}", part, tensor
        for unit, links, logs in zip(self.units, self.links, self.smoothing, strict=True):
            for link, log in zip(links, logs, strict=True):
                yield f"{unit.block.name}.{link.name}.smoothing", "smoothing", log

    def pieces(self) -> list[list["Piece"]]:
        """Of each block, what differs from the float model's parameters, with gradients."""
        every = zip(self.units, self.weights, self.links, self.smoothing, strict=True)
        return [_pieces(unit, weights, _factors(unit, links, logs)) for unit, weights, links, logs in every]

    def assembled(self, pieces: Sequence[Sequence["Piece"]]) -> list[dict[str, Tensor]]:
        """The parameters of each block, by name within it, with the pieces in their places; without gradients."""
        return [_assembled(unit, mine) for unit, mine in zip(self.units, pieces, strict=True)]

    def assigned(self) -> list[list["Piece"]]:
        """What the units have now, as `pieces`."""
        return [[(linear.param, linear, unit.value(linear.name).float()) for linear in unit.linears] for unit in self.units]

    def forward(self, hidden: Tensor, calls: Sequence[Any], parameters: Sequence[dict[str, Tensor]]) -> Tensor:
        """Hidden states that leave the span [rows, length, width] float32, the inputs of its linears quantized."""
        for i, (unit, call, mine) in enumerate(zip(self.units, calls, parameters, strict=True)):
            given = multiplied(unit, mine)
            hidden = unit.arch.forward(unit.block, hidden, call, self.observer(i, given), given)
        return hidden

    def observer(self, index: int, parameters: dict[str, Tensor]) -> Observe:
        """What quantizes the inputs of a unit's linears, where the unit's parameters are those given."""
        unit = self.units[index]
        inputs = unit.inputs_by_site()
        sites = unit.arch.sites(unit.block)
        sites |= {value.untyped_storage().data_ptr(): f"{unit.block.name}.{name}" for name, value in parameters.items()}

        def observe(weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
            site = site_of(weight, sites)
            if site is None or site not in inputs:
                return x
            return passed(inputs[site].quantize(x.detach()), x)

        return observe

    @torch.no_grad()
    def float_forward(self, hidden: Tensor, calls: Sequence[Any]) -> Tensor:
        """The same of the float unit."""
        for unit, weights, call in zip(self.units, self.weights, calls, strict=True):
            floats = _assembled(unit, [(linear.param, linear, weights[linear.name].w) for linear in unit.linears])
            hidden = unit.arch.forward(unit.block, hidden, call, None, multiplied(unit, floats))
        return hidden

    def assign(self) -> None:
        """Give the units what was trained."""
        for unit, weights, links, logs in zip(self.units, self.weights, self.links, self.smoothing, strict=True):
            before = unit.release()
            for link, log in zip(links, logs, strict=True):
                unit.rescale(link, torch.exp(log.detach()))
            for linear in unit.linears:
                unit.assign(linear, weights[linear.name].result(), method=f"{before[linear.name].method}+{self.plan.name}")


def multiplied(unit: Unit, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a block by their names in it, the matrices of its linears in bfloat16 where the run multiplies them so: it
    takes half of the time. Gradients are summed in float32; float16 would have no room for them."""
    dtype = torch.bfloat16 if unit.arch.matrix_dtype == torch.bfloat16 else torch.float32
    matrices = {linear.param.removeprefix(f"{unit.block.name}.") for linear in unit.block.linears}
    return {name: value.to(dtype) if name in matrices else value for name, value in parameters.items()}


def _check(unit: Unit, plan: Plan) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: with the linear and what to use instead.
    """
    for linear in unit.linears:
        spec, name = unit.spec(linear), unit.scheme(linear).name
        if spec.format.codebook:
            raise ValueError(f"{plan.name}: {linear.name} has the codebook {name}, which is not trained; use gptq")
        if "choices" in plan.train and spec.format.kind != "int":
            raise ValueError(f"{plan.name} chooses between integers, but {name} ({linear.name}) has none; use signround")
        needs = {"scales", "clips"} & plan.train.keys()
        if needs and spec.scale != "float":
            raise ValueError(
                f"{plan.name} trains {' and '.join(sorted(needs))}, but {name} ({linear.name}) has scales of 8 bits; "
                "use signround or lkd"
            )
        given = unit.scheme(linear).input
        if "smoothing" in plan.train and given is not None and Input(given).calibrated:
            raise ValueError(
                f"{plan.name}: the static inputs of {name} ({linear.name}) would change with the smoothing; use dynamic "
                "inputs, or smooth_rate = 0"
            )


Factors = dict[str, list[tuple[Any, Tensor, bool]]]  # parameter -> (side, factors by channel, whether of rows)


def _factors(unit: Unit, links: Sequence[Link], logs: Sequence[Tensor]) -> Factors:
    found: Factors = {}
    for link, log in zip(links, logs, strict=True):
        s = torch.exp(log)
        for side in link.producers:
            found.setdefault(f"{unit.block.name}.{side.param}", []).append((side, 1 / s, True))
        for side in link.consumers:
            found.setdefault(f"{unit.block.name}.{side.param}", []).append((side, s, False))
    return found


Piece = tuple[str, Linear | None, Tensor]  # a parameter, the linear in it or None for all of it, and the value


def _pieces(unit: Unit, weights: dict[str, Weight], factors: Factors) -> list[Piece]:
    """Every quantized weight of a block [out, in], and its other parameters that links rescale, with gradients."""
    found: list[Piece] = []
    quantized = {linear.param for linear in unit.linears if _whole(linear)}
    for name in sorted(factors.keys() - quantized):
        value = unit.arch.model.get_parameter(name).detach().float()
        for side, by_channel, _ in factors[name]:
            value = side.scaled(value, by_channel)
        found.append((name, None, value))
    for linear in unit.linears:
        rows = columns = None
        for side, by_channel, of_rows in factors.get(linear.param, []):
            if side.index not in (None, linear.index):
                continue
            scale = side.factors(by_channel)
            if of_rows:
                scale = scale[slice(*linear.rows)]
                rows = scale if rows is None else rows * scale
            else:
                columns = scale if columns is None else columns * scale
        found.append((linear.param, linear, weights[linear.name].value(rows, columns)))
    return found


def _whole(linear: Linear) -> bool:
    """Whether the linear is all of its parameter, in the same layout."""
    return linear.index is None and not linear.transposed and linear.rows == (0, linear.out_features)


def _assembled(unit: Unit, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Parameters float32 by name within the block."""
    found: dict[str, Tensor] = {}
    for name, linear, value in pieces:
        if linear is None or _whole(linear):
            found[name] = value.detach().to(unit.arch.device).clone()
            continue
        if name not in found:
            found[name] = unit.arch.model.get_parameter(name).detach().float().clone()
        linear.view(found[name]).copy_(value.detach())
    return {name.removeprefix(f"{unit.block.name}."): value for name, value in found.items()}


def _gradients(unit: Unit, pieces: Sequence[Piece], leaves: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece with the gradient of its place."""
    parts = {name for name, linear, _ in pieces if linear is not None and not _whole(linear)}
    for name, linear, value in pieces:
        grad = leaves[name.removeprefix(f"{unit.block.name}.")].grad
        if grad is None or not value.requires_grad:
            continue
        if linear is not None and not _whole(linear):
            grad = linear.view(grad)
        elif linear is None and name in parts:  # what quantized weights have replaced
            grad = grad.clone()
            for other, inside, _ in pieces:
                if other == name and inside is not None:
                    inside.view(grad).zero_()
        yield value, grad


# ---------------------------------------------------------------------------------------------------------- the training


def reconstruct(units: Sequence[Unit], plan: Plan) -> None:
    """Train the assigned linears of consecutive blocks and assign the result, if it is better on rows kept out of training.

    The units' stream has a teacher. Everything is decided by the seed; a killed training goes on from its last record.
    """
    trained, held = divided(list(units[0].stream.parts()))
    order = Order(plan, trained)
    fit(_Filed(Span(units, plan), order.at(0)), order, held)


def fit(task: "Task", order: "Order", held: list[tuple[int, int]]) -> None:
    """Take the steps of a plan and assign the result, if it is better on the held-out rows."""
    span, units, plan = task.span, task.span.units, task.span.plan
    training = Training(span)
    before = _judged(task, held, span.assembled(span.assigned()))
    while not training.done:
        units[0].say(plan.name, len(training.losses), plan.steps)
        training.step(task, order.at(len(training.losses)))
    training.path.unlink(missing_ok=True)  # it is elsewhere if it was trained before
    with torch.no_grad():
        after = _judged(task, held, span.assembled(span.pieces()))
    kept = after < before
    if kept:
        span.assign()
    else:
        for unit in units:
            for linear in unit.linears:
                unit.warn(
                    linear, f"{plan.name} did not help (loss {before:.4g} -> {after:.4g} on held-out rows): left as it was"
                )
    units[0].notes.append(
        {
            "step": plan.name,
            "blocks": len(units),
            "rows": sum(stop - start for start, stop in order.rows),
            "held_out_rows": sum(stop - start for start, stop in held),
            "steps": plan.steps,
            "loss_before": before,
            "loss_after": after,
            "kept": kept,
            "curve": training.curve(),
        }
    )


def divided(rows: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The batches that train, and those that judge."""
    held = rows[HELD_OUT - 1 :: HELD_OUT] if len(rows) >= HELD_OUT else rows[-1:]
    return [part for part in rows if part not in held] or rows, held


def scale_of(pairs: Sequence[tuple[Tensor, ...]]) -> float:
    """What makes losses relative: one over the mean square of what a module adds, from pairs (what leaves it, what enters)."""
    energy = sum(float((after - before).square().mean()) for after, before in pairs) / len(pairs)
    return 1 / energy if energy else 1.0


def mixed(taught: Callable[[], Tensor], own: Callable[[], Tensor], forcing: float) -> Tensor:
    """What enters a module: hidden states of the float model and of the quantized one, by teacher forcing; read if needed."""
    return taught() if forcing == 1 else own() if forcing == 0 else forcing * taught() + (1 - forcing) * own()


class Task(Protocol):
    """Where the loss on some rows comes from."""

    span: Span

    def loss(self, part: tuple[int, int], parameters: Sequence[dict[str, Tensor]], forcing: float) -> Tensor:
        """The mean squared error of the span with these parameters on some rows; `forcing`: see `Plan.forcing`."""


class _Filed:
    """Hidden states from the stream's files, and the loss on them, relative to what the float unit adds in the first step."""

    def __init__(self, span: Span, first: list[tuple[int, int]]) -> None:
        """first: the rows of the first step."""
        self.span, self.plan, self.stream = span, span.plan, span.units[0].stream
        pairs = [tuple(self.stream.read(b, *part, teacher=True) for b in (span.last, span.first)) for part in first]
        self.scale = scale_of(pairs)

    def loss(self, part: tuple[int, int], parameters: Sequence[dict[str, Tensor]], forcing: float) -> Tensor:
        """See `Task`."""
        first, calls = self.span.first, [self.stream.calls(part, unit.block.index) for unit in self.span.units]
        taught, own = (partial(self.stream.read, first, *part, teacher=teacher) for teacher in (True, False))
        hidden = mixed(taught, own, forcing)
        found = self.span.forward(hidden, calls, parameters)
        loss = (found - self.stream.read(self.span.last, *part, teacher=True)).square().mean()
        if self.plan.augmented:
            loss = loss + (found - self.span.float_forward(hidden, calls)).square().mean()
        return loss * self.scale


@torch.no_grad()
def _judged(task: Task, held: list[tuple[int, int]], parameters: Sequence[dict[str, Tensor]]) -> float:
    """The loss on the held-out rows with the inputs of the last step."""
    total, plan = 0.0, task.span.plan
    with fast_products():
        for part in held:
            total += float(task.loss(part, parameters, plan.forcing(plan.steps))) * (part[1] - part[0])
    return total / sum(stop - start for start, stop in held)


class Training:
    """The steps of one span: what trains, its optimizer, and the record from which a killed training goes on.

    Attributes:
        losses: of every step done.
        done: whether all of them are.
    """

    def __init__(self, span: Span) -> None:
        self.span, self.plan = span, span.plan
        folder, name = span.units[0].stream.folder, f"training-{span.first:05d}-{span.plan.name}"
        self.path = folder / name
        self.named = list(span.trained())
        self.optimizer = _optimizer(span.plan, self.named)
        self.losses = _resumed(self.path if self.path.exists() else folder / TRAINED / name, self.named, self.optimizer)
        self.saved = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return len(self.losses) >= self.plan.steps

    def step(self, task: "Task", parts: list[tuple[int, int]]) -> None:
        """Train on some rows."""
        step = len(self.losses)
        for _, _, tensor in self.named:
            tensor.requires_grad_(True)
        self.losses.append(_step(task, parts, step, self.named))
        for group in self.optimizer.param_groups:
            rate = self.plan.train[group["part"]] * self.plan.rate(step)
            group["lr"] = torch.tensor(rate) if self.plan.optimizer == "adam8bit" else rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        rounds = self.plan.decided(step), self.plan.decided(step + 1)
        for _, part, tensor in self.named:
            tensor.requires_grad_(False)
            if part == "rounding":
                tensor.clamp_(-0.5, 0.5)
            if part == "choices" and rounds[0] < rounds[1]:
                _decide(tensor, rounds[1])
        if time.monotonic() - self.saved > _SAVED or self.done:
            _save(self.path, self.named, self.optimizer, self.losses)
            self.saved = time.monotonic()

    def curve(self) -> list[float]:
        """The loss over the steps, at most 50 means."""
        size = -(-len(self.losses) // 50)
        return [sum(self.losses[i : i + size]) / len(self.losses[i : i + size]) for i in range(0, len(self.losses), size)]


def _decide(logits: Tensor, share: float) -> None:
    """Make the surest choices, until a share of all is made; keep the logits of the others away from those of the made ones."""
    made = logits.abs() > _DOUBT
    logits.clamp_(1 - _DOUBT, _DOUBT - 1)
    sure = torch.where(made, _DECIDED, logits.abs()).flatten()
    chosen = torch.unravel_index(sure.topk(round(share * sure.numel())).indices, logits.shape)
    logits[chosen] = torch.where(logits[chosen] > 0, _DECIDED, -_DECIDED)


def _step(task: Task, parts: list[tuple[int, int]], step: int, named: Sequence[tuple[str, Part, Tensor]]) -> float:
    """Gradients of one step over some parts of rows; returns the loss.

    Quantized weights are computed once; parts run one after the other, so that memory is that of one.
    """
    with fast_products():
        made = task.span.pieces()
        leaves = task.span.assembled(made)
        for mine in leaves:
            for value in mine.values():
                value.requires_grad_(True)
        losses, count = [], sum(stop - start for start, stop in parts)
        for part in parts:
            loss = task.loss(part, leaves, task.span.plan.forcing(step)) * ((part[1] - part[0]) / count)
            loss.backward()
            losses.append(loss.detach())
        total = sum(float(loss) for loss in losses)  # only now, so that a GPU computes while the next part is read
    if not math.isfinite(total):
        raise ValueError(
            f"{task.span.plan.name}: the loss of {task.span.units[0].block.name} is not finite at step {step}; use lower rates"
        )
    every = zip(task.span.units, made, leaves, strict=True)
    used = [pair for unit, mine, values in every for pair in _gradients(unit, mine, values)]
    torch.autograd.backward([value for value, _ in used], [grad for _, grad in used])
    for _, _, tensor in named:
        if tensor.grad is None:  # an expert that no token reached
            tensor.grad = torch.zeros_like(tensor)
    return total


class Order:
    """Which rows belong to which step: every epoch in an order of its own."""

    def __init__(self, plan: Plan, rows: list[tuple[int, int]]) -> None:
        self.rows, self.seed = rows, plan.seed
        size = max(stop - start for start, stop in rows)
        self.count = min(len(rows), max(1, -(-plan.batch // size)))

    def at(self, step: int) -> list[tuple[int, int]]:
        """The parts of one step."""
        found = []
        for i in range(step * self.count, (step + 1) * self.count):
            epoch, place = divmod(i, len(self.rows))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found.append(self.rows[int(torch.randperm(len(self.rows), generator=generator)[place])])
        return found


class _Sign(torch.optim.Optimizer):
    """Steps of the learning rate in the direction of the gradient's sign (signSGD, as SignRound uses it)."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad.sign())


def _optimizer(plan: Plan, named: Sequence[tuple[str, Part, Tensor]]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [  # few, so that a GPU takes few launches
        {"params": [tensor for _, each, tensor in named if each == part], "lr": rate, "part": part}
        for part, rate in plan.train.items()
    ]
    if plan.optimizer == "adam8bit":
        from torchao.optim import Adam8bit

        return Adam8bit(groups, betas=_BETAS)
    return _Sign(groups) if plan.optimizer == "sign" else torch.optim.Adam(groups, betas=_BETAS)


def check_optimizer(options: dict[str, Any], device: str) -> None:
    """Refuse a method's option `state_bits` = 8 where what it needs is missing.

    Raises:
        ValueError: with what to install.
    """
    if options.get("state_bits") != 8:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("state_bits = 8 needs torchao: pip install 'lowbit[adam8bit]', or leave state_bits out")
    if device == "cpu" and shutil.which("g++") is None:
        raise ValueError(
            "state_bits = 8 needs a C++ compiler on CPUs, and there is no g++; install it, or leave state_bits out"
        )


def _save(path: Any, named: Sequence[tuple[str, Part, Tensor]], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write what trains and the optimizer's state, so that training can go on from here."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, _, tensor in named:
        tensors[name] = tensor.detach()
        for key, value in optimizer.state[tensor].items():
            tensors |= {f"{name}:{key}{inner}": plain for inner, plain in _plain(value)}
    save_sealed(tensors, path)


def _plain(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that make up a tensor, with what their names get added: those of 8-bit moments, else the tensor itself."""
    if hasattr(value, "__tensor_flatten__"):
        yield from ((f".{name}", getattr(value, name)) for name in value.__tensor_flatten__()[0])
    else:
        yield "", value


def _resumed(path: Any, named: Sequence[tuple[str, Part, Tensor]], optimizer: torch.optim.Optimizer) -> list[float]:
    """Take up what `_save` wrote, if it did and it is not damaged; returns the losses so far."""
    tensors = load_sealed(path)
    if tensors is None:
        return []
    for _, _, tensor in named:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()  # makes the state that is filled now
    optimizer.zero_grad()
    for name, _, tensor in named:
        tensor.copy_(tensors[name])
        for key, value in optimizer.state[tensor].items():
            for inner, plain in _plain(value):
                plain.copy_(tensors[f"{name}:{key}{inner}"])
    return [float(loss) for loss in tensors["losses"]]
