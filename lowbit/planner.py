"""Plan: the recipe with which a model fits a number of bits, a size, or an accuracy.

`sensitivity` measures what each scheme costs at each linear, `allocate` chooses; the result is a recipe with one rule for every
decision, and the step `embed` for that about token embeddings, which only lowbit's own format holds quantized. What was
measured is kept in a JSON file, block by block, so that an interrupted run goes on and another budget needs no new measurement;
a person may edit it.

Sizes are those of the files that `quantize` will write, to the byte but for the headers of the shards, which are counted as if
every offset had the most digits.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp, isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.allocate import Mix, allocate
from lowbit.arch import Arch
from lowbit.arguments import checked, parse_device, shown
from lowbit.data import DataSpec
from lowbit.export import NATIVE, encode, reason_against
from lowbit.files import remove_unfinished, write_json
from lowbit.journal import differences, working_folder
from lowbit.methods.embed import Rounded
from lowbit.outputs import positions, predicts_next_token
from lowbit.patterns import Matcher
from lowbit.qtensor import Scheme, find_params, parse_scheme, quantize
from lowbit.recipe import FLOAT, METHODS, Recipe, Rule, Step, short_recipe
from lowbit.run import Progress, available_memory, drawn, opened, rewritten, set_aside
from lowbit.sensitivity import (
    Decision,
    Effort,
    Inputs,
    Per,
    Signal,
    Solved,
    Whole,
    check_candidates,
    check_rows,
    decisions,
    measure,
    per_block,
)
from lowbit.source import Source, open_source, read_json
from lowbit.unit import Stream, Unit

# Offered where none are named, as far as the engine loads them.
SCHEMES = ("w2a16-g64", "w3a16-g128", "w4a16-g128", "w4a16-g32", "w8a16-g128", FLOAT)
_OFFSET = 10**13  # of the most digits in a shard's header
_SHARD = 1024  # bytes for what else is in the headers of a shard, and its padding
_LENGTH = 256  # of the rows that are measured on
_SOLVED = 4  # rows that the solver sees for each that is measured on
_TRIALS = 10  # budgets tried for a ratio of perplexities


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and what is expected of it.

    Attributes:
        recipe: one rule for every decision.
        schemes: by decision.
        costs: what each decision costs with its scheme, in the unit of the signal.
        measured: what all candidates cost, as written to the file of sensitivities.
        sizes: by decision and candidate, bytes of the tensors, without headers.
        output_bytes: of all safetensors files, at most.
        bits: stored bits for each weight that was decided about, those left float included.
        ppl_ratio: perplexity over that of the float model on the rows that are measured on, after the recipe's transforms and
            its solver; None where it was not asked for.
        mix: what was chosen, by index, and whether it is proven to be the cheapest within its budget.
        seconds: the choice took.
    """

    recipe: Recipe
    schemes: dict[str, str]
    costs: dict[str, float]
    measured: dict[str, Any]
    sizes: dict[str, dict[str, int]]
    output_bytes: int
    bits: float
    ppl_ratio: float | None
    mix: Mix
    seconds: float


@checked
def plan(
    model: str | Path,
    *,
    bits: float | None = None,
    size: float | None = None,
    max_ppl_ratio: float | None = None,
    schemes: Iterable[str] | None = None,
    signal: Signal = "kl",
    per: Per = "linear",
    effort: Effort | None = None,
    data: DataSpec | str | None = None,
    rows: int = 16,
    length: int | None = None,
    method: str = "gptq",
    options: dict[str, Any] | None = None,
    ignore: Iterable[str] = (),
    format: str = "compressed-tensors",
    engine: str = "vllm",
    sensitivities: str | Path | None = None,
    revision: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Choose a scheme for every linear, a head of its own included, and in lowbit's own format for token embeddings.

    Args:
        model: a folder or hub id.
        bits: stored bits for each weight that is decided about, scales and zero points included, at most.
        size: of all safetensors files of the result, bytes, at most.
        max_ppl_ratio: perplexity over that of the float model, at most; the smallest mix is chosen for which it holds on the
            rows that are measured on, after the recipe's transforms and its solver. Give one of these three.
        schemes: the candidates; "float" leaves a linear as it is. By default what the engine loads of `SCHEMES`.
        signal: what a scheme's cost is measured by, see `sensitivity`.
        per: what gets one scheme: a "linear", with those that engines keep in one matrix with it, or a whole "block".
        data: calibration data of the recipe. Of it, `rows` of `length` tokens are what is measured on, and four times as many
            others what the solver sees for it. The length is 256 by default, or what the model can take. The length that the
            recipe calibrates with is written into it.
        method: what the recipe does, such as "gptq" or "awq+gptq", with `options` as in `recipe.short_recipe`. A model that is
            rotated is measured so; "embed" decides about the embeddings beforehand.
        ignore: regular expressions of what to leave float, and not to decide about.
        sensitivities: the file that keeps what was measured; a present one is gone on with, or used if complete.
        overwrite: measure anew where the file is of something else.
        trust_remote_code: run the Python code in the model's folder or repository, see `run.quantize`.

    Raises:
        ValueError: something is wrong with the input, or no mix is that small or that good.
    """
    model, device = str(model), str(parse_device(device))
    if [bits, size, max_ppl_ratio].count(None) != 2:
        raise ValueError("give one of bits, size and max_ppl_ratio")
    for name, value in (("bits", bits), ("size", size), ("max_ppl_ratio", max_ppl_ratio)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0
        if value is not None and not good:
            raise ValueError(f"{name} = {shown(value)}: give a number above 0")
    for name, value in (("rows", rows), ("length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {shown(value)}: give a whole number of at least 1")
    if max_ppl_ratio is not None and max_ppl_ratio <= 1:
        raise ValueError(f"max_ppl_ratio = {max_ppl_ratio}: give more than 1, such as 1.02")
    say = progress or (lambda stage, done, total: None)
    offered = candidates(schemes, format, engine)
    check_candidates(offered, signal)
    spec = DataSpec(source=data) if isinstance(data, str) else data
    if spec is None or spec.kind == "self":
        raise ValueError("a plan is measured on calibration data: give a text, or random")
    base = short_recipe(
        scheme=next(iter(offered)), method=method, options=options, ignore=[], data=spec, format=format, engine=engine
    )
    effort = effort or Effort()
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    source.track()
    ignore = list(ignore)
    left = (Rule(match=pattern, scheme=FLOAT, optional=True) for pattern in ignore)
    arch = rewritten(opened(source, replace(base, rules=(*left, *base.rules)), device), base, say)
    set_aside(arch, base)
    if isinstance(arch.source, Rounded) and max_ppl_ratio is not None:
        raise ValueError("embed is what a plan for max_ppl_ratio decides about itself; leave it out of the method")
    if not predicts_next_token(type(arch.model)):
        if max_ppl_ratio is not None:
            raise ValueError(f"{type(arch.model).__name__} has no perplexity; plan for --bits or --size")
        if signal == "fisher":
            raise ValueError(f"{type(arch.model).__name__} has no loss of text, so no Fisher information; use another --signal")
    limit = positions(arch.model)
    base = replace(base, data=spec.fitted(limit))
    length = length or min(_LENGTH, limit or _LENGTH)
    calibration = drawn(replace(spec, rows=(_SOLVED + 1) * rows, length=length).fitted(limit), source)
    given, judged = calibration.tokens[:-rows], calibration.tokens[-rows:]
    solver = next(step for step in base.steps if METHODS[step.method].kind == "solver")
    if signal != "kl":
        arch.matrix_dtype = torch.float32
    job = {
        "lowbit": __version__,
        "model": source.fingerprint(),
        "data": calibration.describe(),
        "signal": signal,
        "per": per,
        "solver": vars(solver) if signal == "kl" else None,
        "rewritten": [vars(step) for step in base.steps if METHODS[step.method].kind in ("model", "outside")],
        "effort": vars(effort),
        "schemes": [*offered],
    }
    path = Path(sensitivities) if sensitivities is not None else None
    known = _known(path, job, overwrite)
    every = _decisions(arch, format, ignore, per)
    missing = any(decision.name not in known for decision in every)

    def keep(measured: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, job | {"decisions": measured})

    with _hidden_states(path) as folder:
        whole, solved = None, None
        if max_ppl_ratio is not None or missing:
            say("loading the model", 0, 1)
            _check_memory(arch)
            if missing and signal == "kl":
                solved = Solved(arch, given, solver, folder)
            whole = Whole(arch, judged, effort.subsets)
        found = known
        if whole is not None and missing:
            found = measure(
                whole,
                every,
                offered,
                signal,
                effort,
                per=per,
                solved=solved,
                known=known,
                keep=keep,
                progress=lambda done, total: say(f"measuring {signal}", done, total),
            )
    choices = Choices(arch, every, found, offered, format)
    ratio = None
    began = time.monotonic()
    if max_ppl_ratio is not None:
        assert whole is not None
        chosen, mix, ratio = _smallest(whole, choices, offered, base.steps, given, max_ppl_ratio, path, say)
    elif size is not None:
        chosen, mix = choices.within(int(size) - choices.fixed)
    else:
        assert bits is not None
        chosen, mix = choices.within(int(bits * choices.weights / 8), headers=False)
    return Plan(
        recipe=replace(base, rules=_rules(every, chosen), steps=_steps(base.steps, every, chosen)),
        schemes={decision.name: scheme for decision, scheme in zip(every, chosen, strict=True)},
        costs={d.name: found[d.name]["cost"][scheme] for d, scheme in zip(every, chosen, strict=True)},
        measured=job | {"decisions": found},
        sizes={d.name: {name: data for name, (data, _) in size.items()} for d, size in zip(every, choices.sizes, strict=True)},
        output_bytes=choices.fixed + choices.bytes_of(chosen),
        bits=8 * choices.bytes_of(chosen, headers=False) / choices.weights,
        ppl_ratio=ratio,
        mix=mix,
        seconds=time.monotonic() - began,
    )


@contextmanager
def _hidden_states(path: Path | None) -> Iterator[Path]:
    """A folder for hidden states: beside the file of sensitivities, where what a killed plan left is found, else a temporary
    one."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="lowbit-plan-") as folder:
            yield Path(folder)
    else:
        with working_folder(path.with_name(path.name + ".work")) as folder:
            remove_unfinished(path.parent, re.escape(path.name))
            yield folder


def candidates(names: Iterable[str] | None, format: str, engine: str) -> dict[str, Scheme]:
    """The schemes to choose from, by name; "float", which is always among them, is left out.

    Raises:
        ValueError: no such scheme, the engine does not load one, or there is none.
    """
    found: dict[str, Scheme] = {}
    for name in SCHEMES if names is None else names:
        if name == FLOAT:
            continue
        scheme = parse_scheme(name)
        reason = None if format == NATIVE else reason_against(scheme, engine)
        if reason is not None and names is not None:
            raise ValueError(f"{name} is no candidate for {engine}: {reason}; leave it out, or use --format lowbit")
        if reason is None:
            found[name] = scheme
    if not found:
        raise ValueError("no candidates: name at least one scheme, such as w4a16-g128")
    return found


def _decisions(arch: Arch, format: str, ignore: Iterable[str], per: Per) -> list[Decision]:
    """What there is to decide about in this format.

    Raises:
        ValueError: one of `ignore` matches nothing.
    """
    every = decisions(arch, embeddings=format == NATIVE and not isinstance(arch.source, Rounded))
    found = Matcher("--ignore").search
    for pattern in ignore:
        kept = [decision for decision in every if not any(found(pattern, linear.name) for linear in decision.linears)]
        if len(kept) == len(every):
            raise ValueError(f"nothing to decide about has a name like {pattern!r}; leave it out")
        every = kept
    if not every:
        raise ValueError("--ignore leaves nothing to decide about; ignore fewer linears")
    return per_block(arch, every) if per == "block" else every


def _check_memory(arch: Arch) -> None:
    """The whole model must fit, in the dtypes in which it is filled."""
    width = {torch.float32: 4}.get(arch.matrix_dtype, 2)
    needed = sum(prod(info.shape) for info in arch.source.tensors.values()) * width
    available = available_memory() if arch.device.type == "cpu" else None
    if available is not None and available < needed:
        raise ValueError(
            f"{available / 1e9:.3g} GB of memory are available, but measuring holds the whole model, {needed / 1e9:.3g} GB; "
            "use a machine with more memory, or write the rules by hand"
        )


def _known(path: Path | None, job: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The rows of a file of sensitivities that is of this job."""
    if path is None or not path.exists():
        return {}
    found = read_json(path, "measured sensitivities")
    rows = found.pop("decisions", {})
    unlike = differences(found, json.loads(json.dumps(job)))
    if unlike and not overwrite:
        raise ValueError(
            f"{path} is of something else: {'; '.join(unlike)}. Name another file, or measure anew with --overwrite"
        )
    if unlike:
        return {}
    check_rows(rows, job["schemes"], str(path))
    known: dict[str, Any] = rows
    return known


class Choices:
    """The decisions with their costs and sizes.

    Attributes:
        weights: of all decisions.
        fixed: bytes of what is not decided here: norms, embeddings that no decision is about, headers.
    """

    def __init__(
        self, arch: Arch, every: Sequence[Decision], rows: dict[str, Any], offered: dict[str, Scheme], format: str
    ) -> None:
        self.every, self.rows = every, rows
        self.weights = sum(decision.weights for decision in every)
        self.names = [[name for name in (*offered, FLOAT) if name in rows[decision.name]["cost"]] for decision in every]
        sizes = _Sizes(arch.source, format)
        self.sizes = [
            {name: sizes.of(decision, None if name == FLOAT else offered[name]) for name in names}
            for decision, names in zip(every, self.names, strict=True)
        ]
        decided = {linear.tensor for decision in every for linear in decision.linears}
        self.fixed = _SHARD * (len(arch.blocks) + 1)
        if isinstance(arch.source, Rounded):
            table = Decision(name="", block=-1, linears=(arch.source.linear,))
            self.fixed += sum(sizes.of(table, arch.source.scheme))
            decided.add(arch.source.linear.tensor)
        for name, info in arch.source.tensors.items():
            if name not in decided:
                self.fixed += info.nbytes + _entry(name, info.dtype, info.shape)

    def within(self, budget: int, *, headers: bool = True) -> tuple[list[str], Mix]:
        """The cheapest mix of at most `budget` bytes, by names and as it was found."""
        sizes = [
            [self._bytes(size[name], headers) for name in names] for size, names in zip(self.sizes, self.names, strict=True)
        ]
        costs = [[self.rows[d.name]["cost"][name] for name in names] for d, names in zip(self.every, self.names, strict=True)]
        try:
            found = allocate(costs, sizes, budget)
        except ValueError:
            least = sum(min(row) for row in sizes)
            raise ValueError(
                f"the smallest mix of these candidates has {8 * least / self.weights:.3f} bits a weight, "
                f"{(least + self.fixed) / 1e6:.2f} MB in all; allow more, or offer smaller schemes (--schemes, and "
                "--engine transformers or --format lowbit, which have more)"
            ) from None
        return [names[j] for names, j in zip(self.names, found.chosen, strict=True)], found

    def bytes_of(self, chosen: Sequence[str], *, headers: bool = True) -> int:
        """Bytes of what is decided, in a mix."""
        return sum(self._bytes(size[name], headers) for size, name in zip(self.sizes, chosen, strict=True))

    @staticmethod
    def _bytes(size: tuple[int, int], headers: bool) -> int:
        return size[0] + size[1] if headers else size[0]


class _Sizes:
    """Bytes of a decision's tensors in a checkpoint, and of their entries in the headers."""

    def __init__(self, source: Source, format: str) -> None:
        self.source, self.format = source, format
        self._seen: dict[tuple[int, int, str], dict[str, Any]] = {}

    def of(self, decision: Decision, scheme: Scheme | None) -> tuple[int, int]:
        """scheme None: as in the source."""
        data = entries = 0
        for tensor in dict.fromkeys(linear.tensor for linear in decision.linears if scheme is None):
            info = self.source.tensors[tensor]
            data, entries = data + info.nbytes, entries + _entry(tensor, info.dtype, info.shape)
        for linear in decision.linears if scheme is not None else ():
            assert scheme is not None
            for part, tensor in self._tensors(linear.out_features, linear.in_features, scheme).items():
                data += tensor.nbytes
                entries += _entry(linear.name + part, str(tensor.dtype), tuple(tensor.shape))
        return data, entries

    def _tensors(self, rows: int, columns: int, scheme: Scheme) -> dict[str, Any]:
        key = (rows, columns, scheme.name)
        if key not in self._seen:
            w = torch.zeros(rows, columns)
            q = quantize(w, find_params(w, scheme.weight, scale_dtype=self.source.dtype()), scheme.weight)
            made = encode("", q, scheme, self.format)
            self._seen[key] = {name: tensor.to("meta") for name, tensor in made.items()}
        return self._seen[key]


def _entry(name: str, dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in the header of a shard, at most."""
    return len(json.dumps({name: {"dtype": dtype, "shape": [*shape], "data_offsets": [_OFFSET, _OFFSET]}}))


def _smallest(
    whole: Whole,
    choices: Choices,
    offered: dict[str, Scheme],
    steps: Sequence[Step],
    tokens: Tensor,
    most: float,
    path: Path | None,
    say: Progress,
) -> tuple[list[str], Mix, float]:
    """The smallest mix whose perplexity, after `steps` on `tokens`, is at most `most` times that of the float model."""
    whole.restart()
    base = whole.loss_of_text(whole.ends)
    low = sum(min(size[name][0] for name in names) for size, names in zip(choices.sizes, choices.names, strict=True))
    high = sum(max(size[name][0] for name in names) for size, names in zip(choices.sizes, choices.names, strict=True))
    best: tuple[list[str], Mix, float] | None = None
    for trial in range(_TRIALS):
        say("trying budgets", trial, _TRIALS)
        middle = low if trial == 0 else (low + high) // 2  # first of all the smallest: it may do
        chosen, mix = choices.within(middle, headers=False)
        ratio = exp(_loss(whole, choices.every, chosen, offered, steps, tokens, path) - base)
        if ratio <= most:
            best, high = (chosen, mix, ratio), middle
            if trial == 0:
                break
        else:
            low = middle
    say("trying budgets", _TRIALS, _TRIALS)
    if best is None:
        raise ValueError(f"no mix of these candidates keeps the perplexity within {most} of the float model; offer wider ones")
    return best


def _loss(
    whole: Whole,
    every: Sequence[Decision],
    chosen: Sequence[str],
    offered: dict[str, Scheme],
    steps: Sequence[Step],
    tokens: Tensor,
    path: Path | None,
) -> float:
    """The loss of the text with the whole model transformed and solved on `tokens` as a run would; then it is float again."""
    arch = whole.arch
    inputs: Inputs = {}
    taken = [step for step in steps if METHODS[step.method].kind in ("transform", "solver")]
    solver = next(step for step in taken if METHODS[step.method].kind == "solver")
    source = arch.source
    for step in _steps((), every, chosen):
        arch.source = METHODS[step.method].apply(arch, **step.options)
    schemes = {x.name: offered[name] for d, name in zip(every, chosen, strict=True) if name != FLOAT for x in d.linears}
    with _hidden_states(path) as folder:
        stream = Stream(arch, tokens, folder)
        stream.start()
        for block in arch.blocks:
            mine = {linear.name: schemes[linear.name] for linear in block.linears if linear.name in schemes}
            unit = Unit(arch, block, mine, stream, arch.source.dtype())
            for step in taken if mine else ():
                METHODS[step.method].apply(unit, **step.options)
            unit.finish()
            inputs |= unit.inputs_by_site()
            stream.drop(block.index)
        arch.load_outside()
        if arch.head is not None and arch.head.linears[0].name in schemes:
            mine = {linear.name: schemes[linear.name] for linear in arch.head.linears}
            unit = Unit(arch, arch.head, mine, stream, source.dtype())
            METHODS[solver.method].apply(unit, **solver.options)
            unit.put()
            inputs |= unit.inputs_by_site()
    whole.restart()
    loss = whole.loss_of_text([whole.end(k, inputs) for k in range(len(whole.parts))], inputs)
    arch.source = source
    arch.load_outside()
    for block in arch.blocks:
        arch.load(block.tensors)
    return loss


def _rules(every: Sequence[Decision], chosen: Sequence[str]) -> tuple[Rule, ...]:
    """One rule for each decision but that about token embeddings."""
    return tuple(Rule(match=_pattern(d), scheme=name) for d, name in zip(every, chosen, strict=True) if d.block >= 0)


def _steps(steps: Sequence[Step], every: Sequence[Decision], chosen: Sequence[str]) -> tuple[Step, ...]:
    """The steps, with one that rounds the token embeddings as was decided."""
    rounded = [name for d, name in zip(every, chosen, strict=True) if d.block < 0 and name != FLOAT]
    first = [step for step in steps if METHODS[step.method].kind == "model"]
    return (*first, *(Step(method="embed", options={"scheme": name}) for name in rounded), *steps[len(first) :])


def _pattern(decision: Decision) -> str:
    """A regular expression for exactly the names of a decision."""
    names = [linear.name for linear in decision.linears]
    prefixes = {name.rpartition(".")[0] for name in names}
    if len(prefixes) > 1:
        return f"^(?:{'|'.join(map(re.escape, names))})$"
    prefix, leaves = prefixes.pop(), [re.escape(name.rpartition(".")[2]) for name in names]
    path = re.escape(prefix + ".") if prefix else ""
    return f"^{path}{leaves[0] if len(leaves) == 1 else '(?:' + '|'.join(leaves) + ')'}$"
