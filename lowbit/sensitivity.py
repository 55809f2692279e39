"""How much it costs to quantize each linear: what a plan decides by.

Four signals, all measured on calibration text with the float model:

    kl           put one decision's weights, as the recipe's solver makes them (and quantized inputs), into the model: mean
                 KL(float || quantized) of the next token, in nats, on rows that the solver does not see. Nothing is assumed
                 about the loss, but that decisions add up. For every candidate the solver runs once, on the float model's
                 inputs, and the model from the decision's block to the end.
    eigenvalue   Q-BERT (Shen et al., AAAI 2020, section 3.1): Omega = |mean| + std, over subsets of the text, of the largest
                 eigenvalue of the loss's Hessian of a linear, times |W - Q|^2
    trace        HAWQ-V2 (Dong et al., NeurIPS 2020, section 3): mean of the Hessian's diagonal (Hutchinson) times |W - Q|^2
    fisher       sum of F (W - Q)^2 / 2, F the mean of the squared gradient of a token's loss: an estimate of that KL

A decision is one or more linears that get one scheme, because engines keep them in one matrix: linears with one input, and
all experts of a block; or, per block, all linears of one, as Q-BERT decides. A head of its own is one too, and so are token
embeddings, with a head tied to them, where the format holds them quantized; they are rounded to nearest, as `embed` does.

Hessians are those of single linears, or per block of all its linears at once.

The last three see weights only, rounded to nearest: a solver such as gptq lets |W - Q|^2 grow so that the loss does not. Their
loss is that of the text (nats a token); of models that do not predict a next token, the distance of the output from the float
model's (see `Arch.distance`), whose gradient is 0, so that they have no `fisher`. Deviation from Q-BERT: Omega alone ranks
linears, but says nothing about how large an error a scheme makes, so it is multiplied with that error. Where the trace is
negative, because the model is at no minimum of this text's loss, its magnitude counts, as with Omega.

Memory: the whole float model (float32 but for `kl`), hidden states of the text at one block, for `kl` all candidates of one
block, and for `eigenvalue` and `trace` the second-order graph from one block to the end of the model, for one subset of the
text: it cannot be smaller, since the loss is the model's. Attention runs unfused, because fused kernels have no second
derivative.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.arch import Arch, Block, Linear, Site
from lowbit.arguments import shown
from lowbit.outputs import predicts_next_token
from lowbit.qtensor import Scheme, check_shape, dequantize, find_params, quantize
from lowbit.recipe import FLOAT, METHODS, Step
from lowbit.unit import Input, Quantizer, Stream, Unit, fast_products, quantized_inputs

Signal = Literal["kl", "eigenvalue", "trace", "fisher"]
SIGNALS = get_args(Signal)
Per = Literal["linear", "block"]
PER = get_args(Per)
Inputs = dict[Site, Quantizer]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Linears of one block that get one scheme; of block -1 the token embeddings, of the one behind the last the head."""

    name: str
    block: int
    linears: tuple[Linear, ...]

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(map(_weights, self.linears))

    def fits(self, scheme: Scheme) -> bool:
        """Whether the scheme's groups divide the rows of all, and there are inputs to quantize if it quantizes them."""
        if self.block < 0 and scheme.input is not None:
            return False
        try:
            for linear in self.linears:
                check_shape(linear.name, linear.out_features, linear.in_features, scheme)
        except ValueError:
            return False
        return True


def decisions(arch: Arch, *, embeddings: bool = False) -> list[Decision]:
    """The decisions of a probed model, in the order in which they run; those about its token embeddings only if wanted."""
    found = []
    for block in _stages(arch):
        if block.index < 0 and not embeddings:
            continue
        together: dict[str, list[Linear]] = {}
        for linear in block.linears:
            expert = linear.index is not None
            together.setdefault("experts" if expert else linear.shares, []).append(linear)
        for linears in together.values():
            found.append(Decision(name=_name(linears), block=block.index, linears=tuple(linears)))
    return found


def per_block(arch: Arch, every: Sequence[Decision]) -> list[Decision]:
    """One decision about all linears of a block, in place of those about some."""
    found: dict[str, list[Decision]] = {}
    for decision in every:
        inside = 0 <= decision.block < len(arch.blocks)
        found.setdefault(arch.blocks[decision.block].name if inside else decision.name, []).append(decision)
    return [
        Decision(name=name, block=parts[0].block, linears=tuple(linear for part in parts for linear in part.linears))
        for name, parts in found.items()
    ]


def _stages(arch: Arch) -> list[Block]:
    """The blocks, with the token embeddings before and the head behind them, where these are matrices of their own."""
    return [block for block in (arch.table, *arch.blocks, arch.head) if block is not None]


def _name(linears: Sequence[Linear]) -> str:
    """The first linear's name, and the last parts of the others'."""
    first = linears[0].name
    if linears[0].index is not None:
        return f"{first} and {len(linears) - 1} more experts' matrices"
    return "+".join([first, *(linear.name.rpartition(".")[2] for linear in linears[1:])])


class Solved:
    """What a solver makes of a block under every candidate, from the float model's inputs.

    Attributes:
        step: the solver.
    """

    def __init__(self, arch: Arch, tokens: Tensor, step: Step, folder: Path) -> None:
        """tokens [rows, length] int64: what is solved on; folder: for their hidden states."""
        self.arch, self.step = arch, step
        self.stream = Stream(arch, tokens, folder)
        self.stream.start()

    def weights(self, block: Block, every: Sequence[Decision], schemes: dict[str, Scheme]) -> dict[str, dict[str, Tensor]]:
        """By scheme, the weights [out, in] by linear of the given decisions of a loaded block (or the head) that it fits."""
        found: dict[str, dict[str, Tensor]] = {}
        unit = None
        for name, scheme in schemes.items():
            chosen = {linear.name: scheme for decision in every if decision.fits(scheme) for linear in decision.linears}
            if not chosen:
                continue
            unit = unit.twin(chosen) if unit else Unit(self.arch, block, chosen, self.stream, self.arch.source.dtype())
            METHODS[self.step.method].apply(unit, **self.step.options)
            found[name] = {linear: unit.value(linear) for linear in chosen}
        return found

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Move on to the next block."""
        self.stream.advance(block, lambda hidden, call: self.arch.call(block, hidden, call))
        self.stream.drop(block.index)


class Whole:
    """The float model, whole in memory, which can be run from any block to its end.

    Attributes:
        parts: the rows of every subset of the text.
        at: the block that `states` enter, the hidden states of every subset; -1 where the tokens are still to be embedded.
    """

    def __init__(self, arch: Arch, tokens: Tensor, subsets: int) -> None:
        """tokens: [rows, length] int64."""
        self.arch, self.tokens = arch, tokens
        self.parts = [(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(len(tokens)).chunk(subsets)]
        arch.load_outside()
        for block in arch.blocks:
            arch.load(block.tensors)
        self._calls: dict[Any, list[Any]] = {}
        for part in self.parts:
            if self._key(part) not in self._calls:
                self._calls[self._key(part)] = arch.embed(tokens[slice(*part)])[1]
        self.restart()
        self.ends = [self.end(k).cpu() for k in range(len(self.parts))]

    def _key(self, part: tuple[int, int]) -> Any:
        """What subsets with the same calls have in common."""
        return part if self.arch.calls_differ else part[1] - part[0]

    @torch.no_grad()
    def end(self, k: int, inputs: Inputs | None = None) -> Tensor:
        """Hidden states that leave the last block, of subset `k`, from `at` on; `inputs` of linears are quantized."""
        with fast_products():
            return self._through(k, inputs or {}, {})

    def _through(self, k: int, inputs: Inputs, parameters: dict[str, Tensor]) -> Tensor:
        """`parameters` replace some of the model, by name."""
        calls, hidden = self._calls[self._key(self.parts[k])], self._entering(k, parameters)
        for block in self.arch.blocks[max(self.at, 0) :]:
            observe = quantized_inputs(self.arch.sites(block), inputs) if inputs else None
            prefix = block.name + "."
            given = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
            hidden = self.arch.forward(block, hidden, calls[block.index], observe, given)
        return hidden

    def _entering(self, k: int, parameters: dict[str, Tensor]) -> Tensor:
        """The hidden states of subset `k` that enter block `at`, or the first."""
        return self.states[k] if self.at >= 0 else self.arch.embed(self.tokens[slice(*self.parts[k])], parameters)[0]

    def _output(self, tokens: Tensor, hidden: Tensor, inputs: Inputs, parameters: dict[str, Tensor]) -> Tensor:
        """What comes after the blocks, with the head's input quantized if it is among `inputs`."""
        head = self.arch.head
        if head is None:
            return self.arch.finish(tokens, hidden, parameters)
        observe = quantized_inputs(self.arch.sites(head), inputs) if inputs else None
        return self.arch.forward(head, hidden, tokens, observe, parameters)

    def restart(self) -> None:
        """Go back to before the first block."""
        self.at = -1
        self.states: list[Tensor] = []

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Move on to block `index`; the head counts as the one behind the last, what embeds as -1."""
        while self.at < index:
            with fast_products():
                states = [self._entering(k, {}) for k in range(len(self.parts))]
                if self.at >= 0:
                    calls = [self._calls[self._key(part)][self.at] for part in self.parts]
                    block = self.arch.blocks[self.at]
                    states = [self.arch.call(block, *given) for given in zip(states, calls, strict=True)]
            self.states = [hidden.cpu() for hidden in states]
            self.at += 1

    @torch.no_grad()
    def divergence(self, inputs: Inputs, originals: dict[str, Tensor]) -> float:
        """How far the model, from `at` on, is from the float model; see `Arch.distance`.

        Args:
            originals: of the parameters outside the blocks that were changed, what the float model has, by name.
        """
        total = count = 0.0
        for k, (start, stop) in enumerate(self.parts):
            end = self.end(k, inputs)
            for row in range(stop - start):
                part = slice(row, row + 1)
                tokens = self.tokens[start:stop][part]
                found = self._output(tokens, end[part], inputs, {})
                sums = self.arch.distance(found, self.arch.finish(tokens, self.ends[k][part], originals))
                total, count = total + float(sums[0]), count + float(sums[1])
        return total / count

    @torch.no_grad()
    def loss_of_text(self, ends: Sequence[Tensor], inputs: Inputs | None = None) -> float:
        """Mean negative log-likelihood of the text's tokens, in nats, after hidden states that left the last block."""
        outputs = (
            self._output(self.tokens[slice(*part)], end, inputs or {}, {}) for part, end in zip(self.parts, ends, strict=True)
        )
        losses = [self._nll(self.tokens[slice(*part)], output) for part, output in zip(self.parts, outputs, strict=True)]
        weights = [stop - start for start, stop in self.parts]
        return float(sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights))

    @staticmethod
    def _nll(tokens: Tensor, output: Tensor) -> Tensor:
        logits = output.float()[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device))

    def loss(self, k: int, parameters: dict[str, Tensor]) -> Tensor:
        """The loss of subset `k` as a function of parameters from block `at` on, by name, differentiable twice."""
        tokens = self.tokens[slice(*self.parts[k])]
        output = self._output(tokens, self._through(k, {}, parameters), {}, parameters)
        if predicts_next_token(type(self.arch.model)):
            return self._nll(tokens, output)
        total, count = self.arch.distance(output, self.arch.finish(tokens, self.ends[k]))
        return total / count


# ---------------------------------------------------------------------------------------------------------- second order


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, iterations: int = 100, tolerance: float = 1e-3
) -> float:
    """The eigenvalue of largest magnitude, with its sign, of a symmetric operator, by power iteration.

    Args:
        product: v -> H v, tensors of one shape.
        start: where to begin, not 0.
        iterations: at most.
        tolerance: relative change of the eigenvalue at which to stop.
    """
    v = start / start.norm().clamp(min=1e-30)
    value = 0.0
    for _ in range(iterations):
        hv = product(v)
        before, value = value, float((v * hv).sum(dtype=torch.float64))
        length = hv.norm()
        if not float(length) > 0 or abs(value - before) <= tolerance * abs(value):
            break
        v = hv / length
    return value


def traces(product: Callable[[Tensor], Tensor], probes: Sequence[Tensor], sizes: Sequence[int]) -> list[float]:
    """The traces of a symmetric operator's diagonal blocks, of these sizes, by Hutchinson's estimator: the mean over `probes`
    of +1 and -1 of v^T H v, summed over the rows of each block. One product serves all: what is off the blocks has mean 0."""
    totals = [0.0] * len(sizes)
    for v in probes:
        parts = (v * product(v)).split(list(sizes))
        totals = [total + float(part.sum(dtype=torch.float64)) for total, part in zip(totals, parts, strict=True)]
    return [total / len(probes) for total in totals]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to iterate: subsets of the text, power iterations and Hutchinson's probes on each, relative tolerance."""

    subsets: int = 4
    iterations: int = 20
    probes: int = 4
    tolerance: float = 1e-2


class _Curvature:
    """What a block's linears do to the loss: one graph of first derivatives per subset, from which all products come."""

    def __init__(self, whole: Whole, block: Block, linears: Sequence[Linear]) -> None:
        self.whole, self.linears = whole, linears
        names = dict.fromkeys(linear.param for linear in linears)
        self.parameters = {name: whole.arch.model.get_parameter(name).detach().float() for name in names}
        self.generator = torch.Generator().manual_seed(block.index)

    def _gradients(self, k: int, *, graph: bool) -> dict[str, Tensor]:
        self.leaves = {name: value.clone().requires_grad_() for name, value in self.parameters.items()}
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.whole.loss(k, self.leaves)
            found = torch.autograd.grad(loss, list(self.leaves.values()), create_graph=graph)
        return dict(zip(self.leaves, found, strict=True))

    def _product(self, gradients: dict[str, Tensor], linears: Sequence[Linear]) -> Callable[[Tensor], Tensor]:
        """v [weights] -> H v, H of all weights of the linears, which follow one another in v."""
        names = [*dict.fromkeys(linear.param for linear in linears)]
        leaves = [self.leaves[name] for name in names]
        sizes = [_weights(linear) for linear in linears]

        def product(v: Tensor) -> Tensor:
            given = {name: torch.zeros_like(leaf) for name, leaf in zip(names, leaves, strict=True)}
            for linear, part in zip(linears, v.split(sizes), strict=True):
                view = linear.view(given[linear.param])
                view.copy_(part.view_as(view))
            with sdpa_kernel(SDPBackend.MATH):
                firsts = [gradients[name] for name in names]
                found = dict(zip(names, torch.autograd.grad(firsts, leaves, [*given.values()], retain_graph=True), strict=True))
            return torch.cat([linear.view(found[linear.param]).flatten() for linear in linears])

        return product

    def measure(self, signal: Signal, effort: Effort, together: Sequence[Sequence[Linear]]) -> dict[str, dict[str, Any]]:
        """The signal's values of linears with one Hessian, by linear: what is written down, and as "weigh" what weighs errors
        [out, in]."""
        sizes = [sum(map(_weights, linears)) for linears in together]
        values: list[list[float]] = [[] for _ in together]
        squares: dict[str, Tensor] = {}
        device = self.whole.arch.device
        for k, (start, stop) in enumerate(self.whole.parts):
            if signal == "fisher":
                # The gradient is of the mean over tokens: its square times their number estimates that of single tokens.
                targets = (stop - start) * (self.whole.tokens.shape[1] - 1)
                for name, gradient in self._gradients(k, graph=False).items():
                    squares[name] = squares.get(name, 0) + gradient.square() * targets / len(self.whole.parts)
                continue
            gradients = self._gradients(k, graph=True)
            if signal == "trace":
                product = self._product(gradients, [linear for linears in together for linear in linears])
                draws = [torch.randint(2, (sum(sizes),), generator=self.generator) for _ in range(effort.probes)]
                found = traces(product, [(draw * 2.0 - 1.0).to(device) for draw in draws], sizes)
            else:
                found = [
                    top_eigenvalue(
                        self._product(gradients, linears),
                        torch.randn(size, generator=self.generator).to(device),
                        iterations=effort.iterations,
                        tolerance=effort.tolerance,
                    )
                    for linears, size in zip(together, sizes, strict=True)
                ]
            for measured, value in zip(values, found, strict=True):
                measured.append(value)
        return {
            linear.name: self._summary(signal, linear, measured, squares, size)
            for linears, measured, size in zip(together, values, sizes, strict=True)
            for linear in linears
        }

    def _summary(
        self, signal: Signal, linear: Linear, values: list[float], squares: dict[str, Tensor], size: int
    ) -> dict[str, Any]:
        """Of a linear that is measured together with others, of `size` weights in all."""
        if signal == "fisher":
            diagonal = linear.view(squares[linear.param])
            return {"fisher": float(diagonal.mean()), "weigh": diagonal / 2}
        mean = sum(values) / len(values)
        if signal == "trace":
            return {"trace": mean, "subsets": values, "weigh": abs(mean / size)}
        std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        return {"mean": mean, "std": std, "omega": abs(mean) + std, "subsets": values, "weigh": abs(mean) + std}


def _weights(linear: Linear) -> int:
    return linear.out_features * linear.in_features


# ----------------------------------------------------------------------------------------------------------- the costs


@torch.no_grad()
def rounded(arch: Arch, decision: Decision, scheme: Scheme) -> dict[str, Tensor]:
    """The weights of a decision rounded to nearest, as a checkpoint would hold them: [out, in] float32 by name."""
    weights = {linear.name: linear.view(arch.param(linear)).float() for linear in decision.linears}
    found = {}
    for linear in decision.linears:
        same = [weights[other.name] for other in decision.linears if other.shares == linear.shares]
        largest = max(float(w.abs().max()) for w in same) if scheme.weight.scale == "e4m3" else None
        w = weights[linear.name]
        grid = find_params(w, scheme.weight, scale_dtype=arch.source.dtype(), largest=largest)
        found[linear.name] = dequantize(quantize(w, grid, scheme.weight), arch.source.dtype()).float()
    return found


def check_candidates(schemes: dict[str, Scheme], signal: Signal) -> None:
    """Refuse schemes whose cost cannot be measured.

    Raises:
        ValueError: with the reason.
    """
    for name, scheme in schemes.items():
        if scheme.input is not None and Input(scheme.input).calibrated:
            raise ValueError(f"{name}: a plan calibrates no static inputs; use a scheme that quantizes them for each token")
    if signal != "kl" and len({scheme.input for scheme in schemes.values()}) > 1:
        raise ValueError(f"{signal} sees weights only, not inputs: give all schemes the same inputs, or use --signal kl")


def measure(
    whole: Whole,
    every: Sequence[Decision],
    schemes: dict[str, Scheme],
    signal: Signal,
    effort: Effort,
    *,
    per: Per = "linear",
    solved: Solved | None = None,
    known: dict[str, dict[str, Any]],
    keep: Callable[[dict[str, dict[str, Any]]], None],
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """The cost of every decision under every scheme that fits it.

    Args:
        per: what Hessians are of: each linear, or all linears of a decision, which is a block.
        solved: for `kl`, what is put into the model; None rounds to nearest.
        known: rows measured before, by decision; they are not measured again.
        keep: called with all rows whenever those of a block are finished.
        progress: called with (decisions done, in all).

    Returns:
        by decision: its block, linears, number of weights, "cost" by scheme, and of second-order signals their values by linear
        as "sensitivity".
    """
    arch, rows = whole.arch, dict(known)
    progress(len(rows), len(every))
    for block in _stages(arch):
        whole.advance(block.index)
        new = [decision for decision in every if decision.block == block.index and decision.name not in rows]
        if new:
            values: dict[str, dict[str, Any]] = {}
            if signal != "kl":
                linears = [linear for decision in new for linear in decision.linears]
                together = [decision.linears for decision in new] if per == "block" else [[linear] for linear in linears]
                values = _Curvature(whole, block, linears).measure(signal, effort, together)
            made = solved.weights(block, new, schemes) if solved is not None and block.index >= 0 else {}
            for decision in new:
                rows[decision.name] = _row(whole, decision, schemes, values, made)
                progress(len(rows), len(every))
            keep(rows)
        if solved is not None and block in arch.blocks:
            solved.advance(block)
    return {decision.name: rows[decision.name] for decision in every}


def check_rows(rows: Any, schemes: Collection[str], where: str) -> None:
    """Check what `measure` gave, read from a file that a person may have edited.

    Args:
        schemes: names of the candidates; "float" is one anyhow.
        where: the file, for the message.

    Raises:
        ValueError: a row lacks something or has a value of another type.
    """
    if not isinstance(rows, dict):
        raise ValueError(f"{where}: decisions = {shown(rows)}; allowed is an object of what was measured, by decision")
    remedy = "Take the decision out to have it measured again"
    for name, row in rows.items():
        row = row if isinstance(row, dict) else {}
        costs: Any
        costs, linears, block = row.get("cost"), row.get("linears"), row.get("block")
        numbers = isinstance(costs, dict) and all(type(cost) in (int, float) and isfinite(cost) for cost in costs.values())
        if not numbers or not any(each in costs for each in (*schemes, FLOAT)):
            raise ValueError(
                f"{where}: decision {shown(name)} has cost = {shown(costs)}; allowed is an object with a number for each "
                f"scheme. {remedy}"
            )
        if not isinstance(linears, list) or not linears or not all(isinstance(each, str) for each in linears):
            raise ValueError(
                f"{where}: decision {shown(name)} has linears = {shown(linears)}; allowed is a list of names. {remedy}"
            )
        if type(block) is not int:
            raise ValueError(f"{where}: decision {shown(name)} has block = {shown(block)}; allowed is a whole number. {remedy}")


def check_measured(measured: dict[str, Any], where: str) -> None:
    """Check a file of sensitivities, of whatever model.

    Raises:
        ValueError: it is not one that `planner.plan` wrote.
    """
    schemes = measured.get("schemes")
    if not isinstance(schemes, list) or not all(isinstance(each, str) for each in schemes):
        raise ValueError(f"{where}: schemes = {shown(schemes)}; allowed is a list of names, as lowbit plan writes it")
    for name, allowed in (("signal", SIGNALS), ("per", PER)):
        if measured.get(name) not in [*allowed]:
            raise ValueError(f"{where}: {name} = {shown(measured.get(name))}; allowed are {', '.join(allowed)}")
    check_rows(measured.get("decisions"), schemes, where)


def _row(
    whole: Whole,
    decision: Decision,
    schemes: dict[str, Scheme],
    values: dict[str, dict[str, Any]],
    made: dict[str, dict[str, Tensor]],
) -> dict[str, Any]:
    cost = {FLOAT: 0.0}
    for name, scheme in schemes.items():
        if not decision.fits(scheme):
            continue
        if values:
            cost[name] = _error(whole.arch, decision, scheme, values)
        else:
            cost[name] = _measured(whole, decision, scheme, made.get(name) or rounded(whole.arch, decision, scheme))
    row: dict[str, Any] = {
        "block": decision.block,
        "linears": [linear.name for linear in decision.linears],
        "weights": decision.weights,
        "cost": cost,
    }
    if values:
        names = [linear.name for linear in decision.linears]
        row["sensitivity"] = {n: {key: value for key, value in values[n].items() if key != "weigh"} for n in names}
    return row


@torch.no_grad()
def _error(arch: Arch, decision: Decision, scheme: Scheme, values: dict[str, dict[str, Any]]) -> float:
    """The squared errors of the weights, weighed by what was measured."""
    total = 0.0
    quantized = rounded(arch, decision, scheme)
    for linear in decision.linears:
        error = (linear.view(arch.param(linear)).float() - quantized[linear.name]).square()
        total += float((error * values[linear.name]["weigh"]).sum(dtype=torch.float64))
    return total


def _measured(whole: Whole, decision: Decision, scheme: Scheme, weights: dict[str, Tensor]) -> float:
    """The divergence of the model with one decision quantized."""
    arch = whole.arch
    outside = () if 0 <= decision.block < len(arch.blocks) else decision.linears
    originals = {linear.param: arch.param(linear).clone() for linear in outside}
    with ExitStack() as stack:
        return max(whole.divergence(_put(arch, decision, scheme, weights, stack), originals), 0.0)


@torch.no_grad()
def _put(arch: Arch, decision: Decision, scheme: Scheme, weights: dict[str, Tensor], stack: ExitStack) -> Inputs:
    """Put weights of a decision into the model until the stack is left; returns how its inputs are quantized."""
    for linear in decision.linears:
        view = linear.view(arch.param(linear))
        stack.callback(view.copy_, view.clone())
        view.copy_(weights[linear.name])
    return {} if scheme.input is None else {linear.site: Input(scheme.input) for linear in decision.linears}
