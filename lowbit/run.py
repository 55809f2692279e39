"""The run: from a checkpoint and a recipe to a quantized checkpoint, block by block, so that it can be killed at any moment.

What is finished is kept in a journal (see `journal`), beside the shards that are written. The same command run again goes on
from the last finished block; since every batch is computed as it would have been, the result is the same to the bit.
"""

import gc
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lowbit import __version__
from lowbit.adapter import FOLDER as ADAPTER
from lowbit.adapter import LowRank, write_adapter
from lowbit.arch import Arch, Block, Linear, Site, return_freed_memory
from lowbit.arguments import checked, parse_device
from lowbit.data import Calibration, DataSpec, calibration_tokens, tokenizer_of, without_documents, written_tokens
from lowbit.experts import PerExpert, reason_of_transformers, split_experts
from lowbit.export import (
    NATIVE,
    NATIVE_FILE,
    QuantizedSource,
    check_export,
    check_loading,
    encode,
    encode_static,
    load,
    quantized_sites,
    too_small,
    write_config,
)
from lowbit.files import check_name, load_sealed, read_small, replacing, save_sealed, save_shard, sha256_of, write_json
from lowbit.journal import WORK, Journal, check_apart, check_out, open_journal, place_of, some
from lowbit.methods.embed import Rounded
from lowbit.outputs import positions
from lowbit.parallel import Team, join, judging, launch, parallel_step, say_step, shares, train
from lowbit.qtensor import QTensor, Scheme, check_shape
from lowbit.recipe import METHODS, Recipe, Step, default_of, recipe_from_dict, short_recipe
from lowbit.reconstruct import TRAINED, check_optimizer
from lowbit.report import JSON_NAME, MARKDOWN_NAME, PAGE_NAME, write_report
from lowbit.source import STEM, Source, index_name, open_source, shard_name
from lowbit.unit import LinearRecord, Quantizer, Stream, Unit, check_all_experts, fast_products, quantized_inputs
from lowbit.views import histograms, outliers, watching

_WRITTEN = "written-"  # name of the files with tokens that the model wrote
_ROUNDINGS = 8  # of the checkpoint's dtype that a transform may add to a block's output, relative
_TOKEN = 24  # bytes of memory for a token while it is drawn: int64 three times
GATE_ROWS = 2
GATE_POSITIONS = 256  # of each row, whose logits are compared
GATE_TOKENS = 128  # length of random rows, where a recipe has no calibration data
GATE_TOLERANCE = 1e-4  # of the largest logit: float32 sums of other batch shapes
Progress = Callable[[str, int, int], None]


@checked
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    scheme: str | None = None,
    method: str = "rtn",
    options: dict[str, Any] | None = None,
    ignore: Iterable[str] | None = None,
    data: DataSpec | str | None = None,
    format: str = "compressed-tensors",
    engine: str = "vllm",
    kv_cache: str | None = None,
    all_experts: bool = False,
    revision: str | None = None,
    device: str = "cpu",
    parallel: int = 1,
    deterministic: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint into the folder `out`; run again after an interruption, it resumes.

    Args:
        model: a folder or hub id.
        out: the folder to create.
        recipe: what to do; or, in its place, the short form: `scheme`, `method` with `options`, `ignore`, `data`, `format`,
            `engine`, `kv_cache`, `all_experts` (see `recipe.short_recipe`).
        revision: branch, tag or commit of a hub model.
        device: where blocks run and are solved, such as "cpu" or "cuda"; memory there is that of one block.
        parallel: processes that train modules of blocks side by side, for recipes with mrem; on GPUs, one each.
        deterministic: have their result not depend on timing.
        overwrite: replace `out`, and forget an unfinished run of another recipe or model.
        trust_remote_code: run the Python code in the model's folder or repository, with the rights of this process, where
            transformers does not know the model or its tokenizer itself; only for sources you trust.
        progress: called with (stage, steps done, steps in all).

    Returns:
        the report, as written to report.json.

    Raises:
        ValueError: something is wrong with the input, the data or the disk; the message says what to do. Finished blocks are
            kept.
    """
    model, device = str(model), str(parse_device(device))
    if recipe is None:
        if scheme is None:
            raise ValueError("say what to do: a recipe, or a scheme such as w4a16")
        spec = DataSpec(source=data) if isinstance(data, str) else data
        recipe = short_recipe(
            scheme=scheme,
            method=method,
            options=options,
            ignore=ignore,
            data=spec,
            format=format,
            engine=engine,
            kv_cache=kv_cache,
            all_experts=all_experts,
        )
    elif scheme is not None:
        raise ValueError("give a recipe or a scheme, not both")
    check_name(Path(os.path.abspath(out)))
    place = place_of(out)
    if Path(model).is_dir():
        check_apart(place, Path(model))
    check_out(place, overwrite)
    clock = _Clock()
    say = progress or (lambda stage, done, total: None)
    for step in recipe.steps:
        check_optimizer(step.options, device)
    team = Team.here()
    if team is not None:
        if parallel not in (1, team.world):
            raise ValueError(f"parallel = {parallel}, but torchrun started {team.world} processes; leave it out")
        parallel = team.world
        if team.rank > 0:
            work = team.called()
            if work is not None:
                train_rank(work, team, lambda done: None)
            return {}
    if parallel < 1 or (deterministic and parallel == 1):
        raise ValueError(f"parallel = {parallel}: give the number of processes; deterministic is for two or more")
    source = stored = open_source(model, revision, trust_remote_code=trust_remote_code)
    source.track()
    check_apart(place, source.folder)
    arch = original = opened(source, recipe, device)
    recipe.schemes(_candidates(arch, recipe), _points(arch), tied_head=arch.tied_head)
    side_files, left_out = _side_files(source)
    with open_journal(place, overwrite) as journal:
        data_used, solver_tokens = _calibration(recipe, source, journal, device, say, positions(arch.model))
        job = _job(source, recipe, data_used, device, parallel, deterministic)
        names = {*_checkpoint_names(arch, recipe), *side_files}
        with _saying_what_is_kept(journal), _quick_collections():
            report = journal.begin(job, names, source, blocks=len(arch.blocks), span=recipe.span)
            if report is not None:
                if team is not None:
                    team.call(None)
                journal.publish(report)
                return report
            for name in left_out:
                journal.note(f"{source.folder / name} is left out: {place.out.name}/{name} is a file that lowbit writes")
            boundaries = 4 if recipe.teacher else 2
            if parallel > 1:  # what enters the first block for each process, and what leaves each float module
                boundaries += parallel + -(-len(arch.blocks) // recipe.span)
            _check_disk(journal.folder, source, solver_tokens, boundaries=boundaries)
            arch = rewritten(arch, recipe, say, clock)
            source = arch.source
            linears, schemes = _chosen(arch, recipe)
            _check_linears(linears, schemes)
            check_export(recipe.format, recipe.engine, linears, schemes, str(source.config.get("model_type", "")))
            check_loading(arch, recipe.format, recipe.engine, linears, schemes)
            _check_experts(arch, recipe, linears, schemes)
            if recipe.all_experts:
                check_all_experts(arch)
            _check_head(arch, recipe, schemes)
            _check_memory(arch, schemes)
            _check_training_memory(arch, recipe, schemes)
            _note_source(journal, arch, recipe, linears, schemes)
            journal.know_model(stored)
            if parallel > 1:
                _in_parallel(arch, recipe, schemes, solver_tokens, journal, stored, parallel, team, deterministic, say)
                clock.lap("parallel training")

            stream = Stream(arch, solver_tokens, journal.work, teacher=recipe.teacher, all_experts=recipe.all_experts)
            if parallel > 1 and recipe.needs_data() == ["mrem"]:
                stream.taken = judging(stream, parallel_step(recipe, schemes), GATE_ROWS)
            stream.start()
            clock.lap("embedding")
            steps, searches = _searched(arch, recipe, schemes, solver_tokens, journal.work, say)
            clock.lap("search")
            records = _solve(arch, replace(recipe, steps=steps), schemes, stream, journal, say)
            clock.lap("blocks")
            _assemble(arch, recipe, linears, schemes, records, side_files, journal)
            clock.lap("assembly")
            if recipe.finish is not None:
                records = _finish(arch, recipe, recipe.finish, schemes, stream, records, journal, say)
                clock.lap("whole model")
            after: dict[str, float] = {}
            gate = _gate(arch, stream, records, journal.folder, say, after)
            clock.lap("gate")
            report = _report(stored, model, revision, recipe, data_used, arch, records, searches, gate, clock, journal)
            if any(METHODS[step.method].kind in ("model", "search", "transform") for step in recipe.steps):
                report["outliers"] = {"before": outliers(original, solver_tokens[:GATE_ROWS]), "after": after}
            report["histograms"] = histograms(
                source, QuantizedSource(journal.folder), linears, {row["name"]: row["error"] for row in report["linears"]}
            )
            _check_unchanged(stored)
            journal.check_own()
            write_report(journal.folder, report)
            journal.publish(report)
    return report


def opened(source: Source, recipe: Recipe, device: str) -> Arch:
    """The model of a checkpoint, with experts one by one where the recipe's format needs them so; see `experts`."""
    shown = source if recipe.format == NATIVE else split_experts(source, recipe.quantized)
    arch = Arch(shown, device=device)
    if isinstance(shown, PerExpert) and arch.unused:  # layers for speculation, which are kept as they are
        arch = Arch(shown.without(arch.unused), device=device)
    return arch


def rewritten(arch: Arch, recipe: Recipe, say: Progress, clock: "_Clock | None" = None) -> Arch:
    """Discover the model, and rewrite it as the steps for the whole model say."""
    arch.probe(lambda done, total: say("reading the model", done, total))
    if clock is not None:
        clock.lap("probe")
    for step in recipe.steps:
        kind = METHODS[step.method].kind
        if kind not in ("model", "outside"):
            continue
        say(step.method, 0, 1)
        source = METHODS[step.method].apply(arch, **step.options)
        blocks, arch = arch.blocks, Arch(source, device=str(arch.device))
        if kind == "model":
            arch.probe(lambda done, total: say("reading the rewritten model", done, total))
        else:
            arch.adopt(blocks)
        if clock is not None:
            clock.lap(step.method)
    return arch


def _chosen(arch: Arch, recipe: Recipe) -> tuple[list[Linear], dict[str, Scheme]]:
    """All linears of the model, and the schemes of those that the rules quantize, which are then read as exactly as known."""
    set_aside(arch, recipe)
    chain = arch.blocks if arch.head is None else (*arch.blocks, arch.head)
    linears = [linear for block in chain for linear in block.linears]
    left = [name for block in arch.blocks for name, _ in block.skipped]
    left += [linear.name for block in arch.blocks for linear, _ in block.aside]
    schemes = recipe.schemes((linear.name for linear in linears), _points(arch), tied_head=arch.tied_head, left=left)
    arch.source.unrounded = frozenset(linear.tensor for linear in linears if linear.name in schemes)
    return linears, schemes


def set_aside(arch: Arch, recipe: Recipe) -> None:
    """Leave float the small linears that the recipe's engine cannot multiply, and routers, unless a rule is for them alone."""
    if recipe.format != NATIVE:
        arch.set_aside(too_small(arch, recipe.engine))
    aside = [linear.name for block in arch.blocks for linear, _ in block.aside]
    arch.take_back(recipe.named(aside, (linear.name for block in arch.blocks for linear in block.linears)))


def _points(arch: Arch) -> list[str]:
    """The names of all points of the model."""
    return [point.name for block in arch.blocks for point in block.points]


# ------------------------------------------------------------------------------------------------------ parallel training


def _in_parallel(
    arch: Arch,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    tokens: Tensor,
    journal: Journal,
    model: Source,
    world: int,
    team: Team | None,
    deterministic: bool,
    say: Progress,
) -> None:
    """Have so many processes train all modules; their records are in the journal afterwards, where the walk over the blocks
    finds them. The processes are those of the team, or are started; these read the model as `model` knows it.

    Raises:
        ValueError: the recipe or the model cannot be trained so, or a process died: which, with its blocks and its last words.
    """
    work = journal.work
    step = parallel_step(recipe, schemes)
    blocks = shares(len(arch.blocks), recipe.span, world)
    if journal.recorded("parallel-done"):
        if team is not None:
            team.call(None)
        return
    save_shard({"tokens": tokens}, work / "tokens")
    job = {
        "model": str(model.folder),
        "trust_remote_code": model.trust_remote_code,
        "contents": model.contents(),
        "recipe": recipe.to_dict(),
        "device": str(arch.device),
        "deterministic": deterministic,
        "world": world,
        "meeting": str(work / f"meeting-{os.getpid()}-{time.time_ns()}"),
    }
    write_json(work / "parallel.json", job)
    total = int(step.options.get("steps", default_of(step, "steps")))
    stage = f"{step.method} in {world} processes"
    say(stage, 0, total)
    if team is not None:
        team.call(work)
        train_rank(work, team, lambda done: say(stage, done, total))
    else:
        script = f"from pathlib import Path; from lowbit.run import train_rank; train_rank(Path({str(work)!r}))"
        launch(script, work, blocks, lambda done: say(stage, done, total), [journal.lock])
    journal.record("parallel-done", {}, sorted((work / TRAINED).iterdir()))
    for rank in range(world):
        shutil.rmtree(work / f"rank-{rank}")


def train_rank(work: Path, team: Team | None = None, progress: Callable[[int], None] = say_step) -> None:
    """What each process of a parallel training runs: its part of what `_in_parallel` described in the folder `work`.

    Its rank is that in the team, or RANK in the environment.
    """
    job = json.loads((work / "parallel.json").read_text(encoding="utf-8"))
    world, device = job["world"], job["device"]
    if team is not None:
        rank, store = team.rank, team.store
    else:
        rank, store = int(os.environ["RANK"]), dist.FileStore(job["meeting"], world)
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    carrier = join(store, rank, world, torch.device(device))
    recipe = recipe_from_dict(job["recipe"])
    source = open_source(job["model"], trust_remote_code=job["trust_remote_code"])
    source.track(job["contents"])
    arch = opened(source, recipe, device)
    with _quick_collections():
        arch = rewritten(arch, recipe, lambda stage, done, total: None)
    _, schemes = _chosen(arch, recipe)
    tokens = load_file(work / "tokens")["tokens"]
    train(arch, recipe, schemes, tokens, work, progress, carrier=carrier, deterministic=job["deterministic"])
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ the searches


def _searched(
    arch: Arch, recipe: Recipe, schemes: dict[str, Scheme], tokens: Tensor, work: Path, say: Progress
) -> tuple[tuple[Step, ...], list[dict[str, Any]]]:
    """The recipe's steps with every search replaced by what it found, and the rows of the report."""
    steps: list[Step] = []
    rows: list[dict[str, Any]] = []
    for step in recipe.steps:
        if METHODS[step.method].kind != "search":
            steps.append(step)
            continue
        trials = _Trials(arch, schemes, tokens, work, partial(say, step.method), all_experts=recipe.all_experts)
        found, row = METHODS[step.method].apply(trials.loss, **step.options)
        steps += [Step(method=method, options=options) for method, options in found]
        rows.append(row)
        trials.clean()
    return tuple(steps), rows


class _Trials:
    """The whole model quantized in one way or another, without writing it. The journal keeps each loss: trial-*.json."""

    def __init__(
        self,
        arch: Arch,
        schemes: dict[str, Scheme],
        tokens: Tensor,
        work: Path,
        say: Callable[[int, int], None],
        *,
        all_experts: bool = False,
    ) -> None:
        self.all_experts = all_experts
        self.arch, self.schemes, self.tokens, self.work, self.say = arch, schemes, tokens, work, say
        self.done = 0
        self.floats: dict[int, Stream] = {}

    def loss(self, steps: tuple[tuple[str, dict[str, Any]], ...], rows: int) -> float:
        """How far the model's output is from the float model's after these steps (method, options), on some rows: the mean
        KL divergence in nats, or the relative squared error where there are no logits."""
        self.done += 1
        self.say(self.done - 1, self.done)
        key = hashlib.sha256(json.dumps([steps, rows]).encode()).hexdigest()[:16]
        record = self.work / f"trial-{key}.json"
        if not _holds_loss(record):
            taken = [Step(method=method, options=options) for method, options in steps]
            _empty_folder(self.work / "trial")
            loss = self._compared(self._through(self.work / "trial", rows, taken), self._float(rows))
            write_json(record, {"steps": steps, "rows": rows, "loss": loss})
        return float(json.loads(read_small(record))["loss"])

    def clean(self) -> None:
        """Delete the hidden states."""
        for path in (self.work / "trial", *self.work.glob("trial-float-*")):
            shutil.rmtree(path, ignore_errors=True)

    def _float(self, rows: int) -> Stream:
        if rows not in self.floats:
            folder = self.work / f"trial-float-{rows}"
            _empty_folder(folder)
            self.floats[rows] = self._through(folder, rows, [])
        return self.floats[rows]

    def _through(self, folder: Path, rows: int, steps: list[Step]) -> Stream:
        """The hidden states that leave the last block; without steps, those of the float model."""
        stream = Stream(self.arch, self.tokens[:rows], folder, all_experts=self.all_experts)
        stream.start()
        for block in self.arch.blocks:
            values = self.arch.load(block.tensors)
            mine = {linear.name: self.schemes[linear.name] for linear in block.linears if linear.name in self.schemes}
            unit = Unit(self.arch, block, mine if steps else {}, stream, self.arch.source.dtype(), values)
            _take(steps, unit, ("transform", "solver"))
            unit.finish()
            self.arch.free(block.name)
            stream.drop(block.index)
        return stream

    def _compared(self, stream: Stream, reference: Stream) -> float:
        self.arch.load_outside()
        last, total, count = len(self.arch.blocks), 0.0, 0.0
        for row in range(len(stream.tokens)):
            tokens = stream.tokens[row : row + 1]
            found, wanted = (each.read(last, row, row + 1) for each in (stream, reference))
            sums = self.arch.divergence(tokens, found, wanted)
            total, count = total + float(sums[0]), count + float(sums[1])
        self.arch.free_outside()
        return total / count


def _holds_loss(record: Path) -> bool:
    """Whether a trial was finished and its record can be read."""
    try:
        return isinstance(json.loads(read_small(record))["loss"], float)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


# ------------------------------------------------------------------------------------------------------------- the blocks


def _solve(
    arch: Arch, recipe: Recipe, schemes: dict[str, Scheme], stream: Stream, journal: Journal, say: Progress
) -> list[dict[str, Any]]:
    """Quantize every block that is not finished yet, and the head if it has a scheme; returns the records of all."""
    span = recipe.span
    for start in range(journal.done, len(arch.blocks), span):
        say("quantizing", start, len(arch.blocks))
        _solve_blocks(arch, arch.blocks[start : start + span], recipe, schemes, stream, journal, say)
        return_freed_memory()
    say("quantizing", len(arch.blocks), len(arch.blocks))
    count = len(arch.blocks)
    head = _quantized_head(arch, schemes)
    if head is not None:
        count += 1
        if not journal.recorded(_record(head.index)):
            _solve_head(arch, head, recipe, schemes, stream, journal)
    return [journal.value(_record(index)) for index in range(count)]


def _solve_blocks(
    arch: Arch,
    blocks: tuple[Block, ...],
    recipe: Recipe,
    schemes: dict[str, Scheme],
    stream: Stream,
    journal: Journal,
    say: Progress,
) -> None:
    """Quantize consecutive blocks, several only where a step trains them together; their shards, the next hidden states and,
    last, their records are on disk afterwards."""
    started = time.monotonic()
    trainers = [step for step in recipe.steps if METHODS[step.method].kind == "trainer"]
    units, values = [], []
    for block in blocks:
        values.append(arch.load(block.tensors))
        mine = {linear.name: schemes[linear.name] for linear in block.linears if linear.name in schemes}
        points = recipe.point_schemes(point.name for point in block.points)
        unit = Unit(arch, block, mine, stream, arch.source.dtype(), values[-1], points)
        unit.say = say
        _take(recipe.steps, unit, ("transform", "solver"))
        if trainers:
            unit.keep()
        if block is not blocks[-1]:
            unit.finish()
        units.append(unit)
    for step in trainers:
        METHODS[step.method].apply(units, **step.options)
    for unit, given in zip(units, values, strict=True):
        _take(recipe.steps, unit, ("correction",))
        _write_block(unit, given, recipe, journal)
    for unit in units:
        _write_record(unit, recipe, journal, (time.monotonic() - started) / len(units))
    for path in (journal.work / TRAINED).glob(f"training-{blocks[0].index:05d}-*"):
        path.unlink()
    for unit in units:
        stream.drop(unit.block.index)


def _write_block(unit: Unit, values: dict[str, Tensor], recipe: Recipe, journal: Journal) -> None:
    """Move the stream past a solved block, free it, and write its shard."""
    changed = unit.changed()
    scales = unit.finish(cache=recipe.kv_cache is not None)
    unit.arch.free(unit.block.name)
    shard = journal.folder / _shard(unit.arch, recipe, unit.block.index)
    _write_tensors(unit, values | changed | scales, recipe, journal.work, shard)
    if recipe.finish is not None:
        save_shard(_parts(unit.assigned), _solved(journal.work, unit.block.index))


def _write_tensors(unit: Unit, values: dict[str, Tensor], recipe: Recipe, work: Path, path: Path) -> None:
    """Write a solved block's tensors with quantized linears in the place of float ones, and its corrections to the journal."""
    replaced = {linear.tensor for linear in unit.linears}
    replaced |= {point.tensor for point, _ in unit.points.values() if point.tensor is not None}
    tensors = {name: value for name, value in values.items() if name not in replaced}
    for name, q in unit.parameters.items():
        tensors |= encode(name, q, Scheme(name="", weight=q.spec), recipe.format)
    for name, static in unit.ranges().items():
        tensors |= encode_static(name, static)
    inputs = unit.inputs()
    for name, q in unit.assigned.items():
        tensors |= encode(name, q, unit.schemes[name], recipe.format, inputs.get(name))
    save_shard(tensors, path)
    parts = {f"{name}.{part}": value for name, low in unit.corrections.items() for part, value in low._asdict().items()}
    if parts:
        save_shard(parts, _correction(work, unit.block.index))


def _quantized_head(arch: Arch, schemes: dict[str, Scheme]) -> Block | None:
    """The head, if it is to be quantized."""
    return arch.head if arch.head is not None and arch.head.linears[0].name in schemes else None


def _solve_head(arch: Arch, head: Block, recipe: Recipe, schemes: dict[str, Scheme], stream: Stream, journal: Journal) -> None:
    """Quantize the head from the last hidden states, by the solver and what corrects it; other steps are for blocks.

    Its tensors wait in the journal for the last shard, and the model's logits, now that all of it is solved, for the gate.
    """
    started = time.monotonic()
    work = journal.work
    arch.load_outside()
    values = arch.source.read(list(head.tensors))
    chosen = {linear.name: schemes[linear.name] for linear in head.linears}
    unit = Unit(arch, head, chosen, stream, arch.source.dtype(), values)
    _take(recipe.steps, unit, ("solver", "correction"))
    unit.put()
    rows = min(len(stream.tokens), GATE_ROWS)
    logits = _logits(arch, stream.tokens[:rows], stream.read(head.index, 0, rows), unit.inputs_by_site())
    save_shard({"logits": logits}, _head_logits(work))
    _write_tensors(unit, values, recipe, work, _head_tensors(work))
    arch.free_outside()
    _write_record(unit, recipe, journal, time.monotonic() - started)


def _head_tensors(work: Path) -> Path:
    """Where the tensors of a quantized head wait for the last shard."""
    return work / "head.safetensors"


def _head_logits(work: Path) -> Path:
    """Where the logits of a model with a quantized head wait for the gate."""
    return work / "logits.safetensors"


def _write_record(unit: Unit, recipe: Recipe, journal: Journal, seconds: float) -> None:
    """Record that a block, or the head, is finished."""
    index, work, stream = unit.block.index, journal.work, unit.stream
    if unit.block is unit.arch.head:
        files, states = [_head_tensors(work), _head_logits(work)], []
    else:
        files = [journal.folder / _shard(unit.arch, recipe, index)]
        states = [stream.file(index + 1, teacher=which) for which in sorted({False, stream.teacher})]
    files += [path for path in (_correction(work, index), _solved(work, index)) if path.exists()]
    value = {
        "block": unit.block.name,
        "seconds": seconds,
        "peak_rss": _peak_rss(),
        "transforms": unit.notes,
        "linears": [asdict(record) for record in unit.records.values()],
        "sha256": {name: _sha256(unit.value(name)) for name in unit.assigned},
        "points": {name: scheme.name for name, (_, scheme) in unit.points.items()},
        "turned": [name for name, given in unit.inputs().items() if given.turned],
    }
    journal.record(_record(index), value, files, [path for path in states if path.exists()])


def _take(steps: Iterable[Step], unit: Unit, kinds: tuple[str, ...]) -> None:
    """Do with one block what the steps of some kinds say."""
    for step in steps:
        method = METHODS[step.method]
        if method.kind not in kinds:
            continue
        if method.kind == "transform":
            with _unchanged(unit, step.method):
                method.apply(unit, **step.options)
        else:
            unit.settle()
            method.apply(unit, **step.options)
    assert set(unit.assigned) == {linear.name for linear in unit.linears}, f"{unit.block.name}: not every linear was assigned"


@contextmanager
def _unchanged(unit: Unit, method: str) -> Iterator[None]:
    """Compare what the block adds to its input before and after a transform, on one batch.

    Raises:
        RuntimeError: it is not the same up to the rounding of the checkpoint's dtype, which would be an error in lowbit.
    """
    hidden, before = unit.outputs()
    yield
    after = unit.outputs()[1]
    difference = float((after - before).norm() / (before - hidden.to(before)).norm().clamp(min=1e-30))
    allowed = max(1e-4, _ROUNDINGS * torch.finfo(unit.scale_dtype).eps)
    if not difference <= allowed:
        raise RuntimeError(
            f"{method}: {unit.block.name} computes something else afterwards ({difference:.2g}, allowed {allowed:.2g})"
        )


def _record(index: int) -> str:
    return f"block-{index:05d}"


def _correction(work: Path, index: int) -> Path:
    """Where the low-rank corrections of a block wait for the others."""
    return work / f"correction-{index:05d}.safetensors"


def _shard(arch: Arch, recipe: Recipe, index: int) -> str:
    stem = NATIVE if recipe.format == NATIVE else STEM
    return shard_name(index + 1, len(arch.blocks) + 1, stem)


def _assemble(
    arch: Arch,
    recipe: Recipe,
    linears: list[Linear],
    schemes: dict[str, Scheme],
    records: list[dict[str, Any]],
    side_files: list[str],
    journal: Journal,
) -> None:
    """Write everything beside the blocks: the last shard, index, configuration, and the side files as they were."""
    folder = journal.folder
    outside, table = [*arch.outside, *sorted(arch.unused)], _rounded(arch)
    head = _quantized_head(arch, schemes)
    written = {*(() if table is None else (table.linear.tensor,)), *(() if head is None else head.tensors)}
    tensors = arch.source.read([name for name in outside if name not in written])
    if head is not None:
        tensors |= load_file(_head_tensors(journal.work))
    if table is not None:
        tensors |= encode(table.linear.name, table.q, table.scheme, recipe.format)
        linears, schemes = [*linears, table.linear], schemes | {table.linear.name: table.scheme}
    save_shard(tensors, folder / _shard(arch, recipe, len(arch.blocks)))
    del tensors
    return_freed_memory()
    stem = NATIVE if recipe.format == NATIVE else STEM
    write_config(
        folder,
        arch,
        linears,
        schemes,
        recipe.format,
        kv_cache=recipe.kv_cache is not None,
        points=recipe.point_schemes(_points(arch)),
        turned=[name for record in records for name in record["turned"]],
    )
    weight_map, total = {}, 0
    for index in range(len(arch.blocks) + 1):
        name = _shard(arch, recipe, index)
        with (folder / name).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                weight_map[tensor] = name
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    write_json(folder / index_name(stem), {"metadata": {"total_size": total}, "weight_map": weight_map})
    if any(METHODS[step.method].kind == "correction" for step in recipe.steps):
        _assemble_adapter(arch, linears, folder)
    for name in side_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as temporary:
            shutil.copyfile(arch.source.folder / name, temporary)


def _checkpoint_names(arch: Arch, recipe: Recipe) -> list[str]:
    """Of all files that lowbit itself writes into this checkpoint but the report, with /."""
    names = [_shard(arch, recipe, index) for index in range(len(arch.blocks) + 1)]
    names += ["config.json", index_name(NATIVE if recipe.format == NATIVE else STEM)]
    names += [NATIVE_FILE] if recipe.format == NATIVE else []
    if any(METHODS[step.method].kind == "correction" for step in recipe.steps):
        names += [f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"]
    return names


def _side_files(source: Source) -> tuple[list[str], list[str]]:
    """Names of the files beside the weights that the checkpoint gets too, and of those it cannot have, because lowbit writes
    files by these names, or looks for them.

    Raises:
        ValueError: one cannot be read.
    """
    copied, left_out = [], []
    for path in source.side_files():
        name = path.relative_to(source.folder).as_posix()
        if name in (NATIVE_FILE, JSON_NAME, MARKDOWN_NAME, PAGE_NAME) or name.startswith(f"{ADAPTER}/"):
            left_out.append(name)
            continue
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise ValueError(
                f"{path}, which the checkpoint gets too, cannot be read ({error.strerror}); make it readable, or move it away"
            ) from error
        copied.append(name)
    return copied, left_out


# -------------------------------------------------------------------------------------------------------- the whole model


def _finish(
    arch: Arch,
    recipe: Recipe,
    step: Step,
    schemes: dict[str, Scheme],
    stream: Stream,
    records: list[dict[str, Any]],
    journal: Journal,
    say: Progress,
) -> list[dict[str, Any]]:
    """Train all blocks of the checkpoint at once, as `step` says; returns their records anew.

    New shards are written beside the old and renamed only when all are there, so that a killed run finds either.
    """
    shards = [journal.folder / _shard(arch, recipe, block.index) for block in arch.blocks]
    end = stream.file(len(arch.blocks))
    if not journal.recorded("whole"):
        own = journal.whole(end).parent
        own.mkdir(exist_ok=True)
        for path in own.glob("hidden-*"):  # of a killed process; they are made again
            path.unlink()
        units = _reopened(arch, schemes, records, stream.tokens, journal, own)
        for unit in units:
            unit.say = say
        last = len(units)
        METHODS[step.method].apply(units, lambda part: stream.read(last, *part, teacher=True), **step.options)
        for unit in units:
            unit.put()
        with fast_products(), replacing(journal.whole(end)) as path, path.open("wb") as file:
            for part in stream.parts():
                hidden = units[0].stream.read(0, *part)
                for unit in units:
                    observe = quantized_inputs(unit.arch.sites(unit.block), unit.inputs_by_site())
                    hidden = stream.rounded(unit.arch.call(unit.block, hidden, stream.calls(part, unit.block.index), observe))
                file.write(stream.bytes(hidden))
        for unit, record, shard in zip(units, records, shards, strict=True):
            tensors = load_file(shard)
            for name, q in unit.assigned.items():
                tensors |= encode(name, q, schemes[name], recipe.format)
                record["sha256"][name] = _sha256(unit.value(name))
            save_shard(tensors, journal.whole(shard))
            record["transforms"] += unit.notes
            record["linears"] = [asdict(row) for row in unit.records.values()]
        journal.record_whole({"records": records}, [*shards, end])
    journal.move_whole()
    found: list[dict[str, Any]] = journal.value("whole")["records"]
    return found


def _reopened(
    arch: Arch, schemes: dict[str, Scheme], records: list[dict[str, Any]], tokens: Tensor, journal: Journal, own: Path
) -> list[Unit]:
    """The blocks of the checkpoint, all in memory, as they were solved, with a stream in the folder `own`."""
    checkpoint = QuantizedSource(journal.folder, trust_remote_code=arch.source.trust_remote_code)
    twin = Arch(checkpoint, device=str(arch.device))
    twin.adopt(arch.blocks)
    stream = Stream(twin, tokens, own)
    stream.start()
    twin.load_outside()
    inputs = checkpoint.inputs()
    units = []
    for block, record in zip(twin.blocks, records, strict=True):
        twin.load(block.tensors)
        chosen = {linear.name: schemes[linear.name] for linear in block.linears if linear.name in schemes}
        unit = Unit(twin, block, chosen, stream, arch.source.dtype())
        parts = load_file(_solved(journal.work, block.index))
        rows = {row["name"]: LinearRecord(**row) for row in record["linears"]}
        unit.reopen({name: _from_parts(name, parts, schemes[name]) for name in rows}, rows, inputs)
        units.append(unit)
    return units


def _solved(work: Path, index: int) -> Path:
    """Where the quantized matrices of a block wait for the step that trains them all."""
    return work / f"solved-{index:05d}.safetensors"


def _parts(assigned: dict[str, QTensor]) -> dict[str, Tensor]:
    found = {f"{name}.{part}": getattr(q, part) for name, q in assigned.items() for part in ("codes", "scale", "zero", "outer")}
    return {name: value for name, value in found.items() if value is not None}


def _from_parts(name: str, parts: dict[str, Tensor], scheme: Scheme) -> QTensor:
    codes, scale, zero, outer = (parts.get(f"{name}.{part}") for part in ("codes", "scale", "zero", "outer"))
    assert codes is not None and scale is not None
    return QTensor(codes, scale, zero, scheme.weight, outer)


def _rounded(arch: Arch) -> Rounded | None:
    """The checkpoint as `embed` shows it."""
    return arch.source if isinstance(arch.source, Rounded) else None


def _assemble_adapter(arch: Arch, linears: list[Linear], folder: Path) -> None:
    """Write the low-rank corrections of all blocks as one adapter."""
    parts: dict[str, Tensor] = {}
    for path in sorted((folder / WORK).glob("correction-*.safetensors")):
        parts |= load_file(path)
    corrected = {name.rpartition(".")[0] for name in parts}
    modules = {linear.name: linear.param.removesuffix(".weight") for linear in linears if linear.name in corrected}
    corrections = {name: LowRank(parts[f"{name}.a"], parts[f"{name}.b"]) for name in modules}
    write_adapter(folder, corrections, modules, causal=type(arch.model).__name__.endswith("ForCausalLM"))


# --------------------------------------------------------------------------------------------------------------- the gate


def _gate(
    arch: Arch, stream: Stream, records: list[dict[str, Any]], folder: Path, say: Progress, seen: dict[str, float]
) -> dict[str, Any]:
    """Read the output back and compare: every dequantized weight bit for bit, and logits on calibration rows. `seen` gets the
    outliers of the quantized model's activations, see `views`.

    Raises:
        RuntimeError: they differ, which would be an error in lowbit. The output keeps its temporary name.
    """
    reloaded = QuantizedSource(folder, trust_remote_code=arch.source.trust_remote_code)
    twin = Arch(reloaded, device=str(arch.device))
    twin.adopt(arch.blocks)
    expected = {name: digest for record in records for name, digest in record["sha256"].items()}
    dtype = arch.source.dtype()
    tokens = stream.tokens[:GATE_ROWS]
    quantized = quantized_sites(twin, reloaded)
    twin.load_outside()
    with fast_products():
        hidden, calls = twin.embed(tokens)
    hidden = stream.rounded(hidden)
    twin.free_outside()
    compared = 0
    for block in twin.blocks:
        say("checking the output", block.index, len(twin.blocks))
        twin.load(block.tensors)
        compared += _compared(twin, block, expected, dtype)
        observe = watching(twin, block, seen, quantized_inputs(twin.sites(block), quantized))
        with fast_products():
            hidden = stream.rounded(twin.call(block, hidden, calls[block.index], observe))
        twin.free(block.name)
    say("checking the output", len(twin.blocks), len(twin.blocks))
    if table := _rounded(arch):
        name = table.linear.tensor
        if not torch.equal(reloaded.read([name])[name], table.read([name])[name]):
            raise RuntimeError(f"gate: {table.linear.name} reads back with other values than were solved")
        compared += 1
        expected[table.linear.name] = ""
    twin.load_outside()
    if twin.head is not None:
        compared += _compared(twin, twin.head, expected, dtype)
    logits = _logits(twin, tokens, hidden, quantized)
    twin.free_outside()
    if _head_logits(folder / WORK).exists():
        solved = load_file(_head_logits(folder / WORK))["logits"].to(logits.device)
    else:
        arch.load_outside()
        solved = _logits(arch, tokens, stream.read(len(arch.blocks), 0, len(tokens)), {})
        arch.free_outside()
    if compared != len(expected):
        raise RuntimeError(f"gate: {compared} of {len(expected)} quantized linears were found in the output")
    largest = float(solved.abs().max())
    difference = float(solved.sub_(logits).abs_().max())
    if difference > GATE_TOLERANCE * largest:
        raise RuntimeError(f"gate: logits of the reloaded model differ by {difference:.3g} (largest {largest:.3g})")
    return {
        "weights_compared": compared,
        "weights_equal": True,
        "rows": len(tokens),
        "length": min(tokens.shape[1], GATE_POSITIONS),
        "largest_logit": largest,
        "largest_logit_difference": difference,
    }


def _compared(twin: Arch, block: Block, expected: dict[str, str], dtype: torch.dtype) -> int:
    """How many matrices of a loaded block were to be compared, all of them being equal."""
    chosen = [linear for linear in block.linears if linear.name in expected]
    for linear in chosen:
        if _sha256(linear.view(twin.param(linear)).to(dtype).cpu()) != expected[linear.name]:
            raise RuntimeError(f"gate: {linear.name} reads back with other weights than were solved")
    return len(chosen)


@torch.no_grad()
def _logits(arch: Arch, tokens: Tensor, hidden: Tensor, inputs: Mapping[Site, Quantizer]) -> Tensor:
    """Logits of the first `GATE_POSITIONS` of every row, from the last block's output; the head's input is quantized as it is
    in `inputs`. What is outside the blocks is loaded."""
    tokens, hidden = tokens[:, :GATE_POSITIONS], hidden[:, :GATE_POSITIONS]
    if arch.head is None:
        logits = arch.finish(tokens, hidden)
    else:
        logits = arch.call(arch.head, hidden, tokens, quantized_inputs(arch.sites(arch.head), inputs))
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("gate: the quantized model's logits are not finite")
    return logits


def _sha256(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()


# ----------------------------------------------------------------------------------------------------------- before the work


def _candidates(arch: Arch, recipe: Recipe) -> list[str]:
    """Names of which the linears are a subset, known before the model is read."""
    names = [name for block in arch.blocks for name in block.tensors if len(arch.source.tensors[name].shape) >= 2]
    names = [name.removesuffix(".weight") for name in names]
    if arch.head is not None:
        names.append(arch.head.linears[0].name)
    elif arch.tied_head is not None and any(METHODS[step.method].kind == "model" for step in recipe.steps):
        names.append(arch.tied_head)  # a rotated model has a head of its own
    return names


def _calibration(
    recipe: Recipe, source: Source, journal: Journal, device: str, say: Progress, limit: int | None
) -> tuple[Calibration, Tensor]:
    """The calibration data, and the rows of it that stream through the model [rows, length] int64."""
    spec = recipe.data
    if spec is None:
        spec = DataSpec(source="random", rows=GATE_ROWS, length=max(2, min(GATE_TOKENS, (limit or GATE_TOKENS) // 2)))
    rows, length = spec.size
    spec = spec.fitted(limit)
    if not recipe.calibrated:
        spec = replace(spec, rows=min(rows, GATE_ROWS))
    if spec.kind == "self":
        say("writing calibration text", 0, 1)
        calibration = _written(spec, source, journal, device)
    else:
        calibration = drawn(spec, source)
    if calibration.tokens.shape != (spec.rows or rows, length):
        found = calibration.tokens
        say(f"calibrating on {len(found)} rows of {found.shape[1]} tokens, all that the model and the text have", 0, 1)
    return calibration, calibration.tokens


def drawn(spec: DataSpec, source: Source) -> Calibration:
    """Calibration data from a file, a hub or at random, in the tokens of a model.

    Raises:
        ValueError: the model has no tokenizer, there is too little text, or random tokens do not fit into memory.
    """
    tokenizer = tokenizer_of(source) if spec.source != "random" else None
    if spec.kind == "random":  # no text ends before there are so many
        _check_rows(spec)
    return calibration_tokens(spec, tokenizer, vocab_size=_vocabulary(source))


def _check_rows(spec: DataSpec) -> None:
    """Raise a ValueError where the tokens of a source without end do not fit into memory."""
    rows, length = spec.size
    needed, available = rows * length * _TOKEN, available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{rows} rows of {length} tokens take {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB of memory are available; "
            "use fewer or shorter rows"
        )


def _vocabulary(source: Source) -> int:
    vocabulary = source.config.get("vocab_size") or source.config.get("text_config", {}).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ValueError(f"{source.folder / 'config.json'} has no vocab_size")
    return vocabulary


def _written(spec: DataSpec, source: Source, journal: Journal, device: str) -> Calibration:
    """Calibration text by the model itself, kept in the journal: it is costly, and a resumed run must have the same.

    The float model is whole in memory meanwhile, in its own dtype.
    """
    asked = json.dumps([asdict(spec), source.fingerprint(), device, torch.get_num_threads()], sort_keys=True)
    name = f"{_WRITTEN}{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    path = journal.work / name
    kept = load_sealed(path) or load_sealed(journal.left / name)
    if kept is not None:
        return without_documents(kept["tokens"], spec)
    _check_rows(spec)
    model = load(str(source.folder), device=device, trust_remote_code=source.trust_remote_code)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} writes no text; calibrate it on a text file, or on random tokens")
    tokens = written_tokens(spec, model, tokenizer_of(source), vocab_size=_vocabulary(source))
    del model
    return_freed_memory()
    save_sealed({"tokens": tokens}, path)
    return without_documents(tokens, spec)


def _check_linears(linears: list[Linear], schemes: dict[str, Scheme]) -> None:
    sites: dict[Any, Linear] = {}
    stacks: dict[str, set[bool]] = {}
    for linear in linears:
        scheme = schemes.get(linear.name)
        if scheme is not None:
            check_shape(linear.name, linear.out_features, linear.in_features, scheme)
        other = sites.setdefault(linear.site, linear)
        theirs = schemes.get(other.name)
        if (scheme and scheme.input) != (theirs and theirs.input):
            raise ValueError(
                f"{other.name} and {linear.name} are one matrix in the model, so their inputs must be quantized alike; "
                "give them one scheme"
            )
        if linear.stacked:
            stacks.setdefault(linear.tensor, set()).add(scheme is None)
    for tensor, kinds in stacks.items():
        if len(kinds) > 1:
            raise ValueError(f"{tensor} holds several experts in one tensor: quantize all of them or none")


def _check_experts(arch: Arch, recipe: Recipe, linears: list[Linear], schemes: dict[str, Scheme]) -> None:
    reason = _against_experts(arch, recipe, linears, schemes)
    if reason is not None and recipe.engine == "transformers":
        raise ValueError(
            f"experts cannot be exported for transformers: {reason}; use --engine vllm, leave them float with --ignore "
            "'.*experts.*', or write lowbit's own format with --format lowbit"
        )


def _against_experts(arch: Arch, recipe: Recipe, linears: list[Linear], schemes: dict[str, Scheme]) -> str | None:
    """Why transformers would not load the quantized experts of the output; None if it would."""
    if recipe.format == NATIVE:
        return None
    fused = [linear for linear in linears if linear.name in schemes and linear.index is not None and not linear.stacked]
    return reason_of_transformers(arch.model, [linear.tensor for linear in fused])


def _note_source(journal: Journal, arch: Arch, recipe: Recipe, linears: list[Linear], schemes: dict[str, Scheme]) -> None:
    """Tell whoever uses the output what the source and its experts mean for it."""
    if arch.source.quantization is not None:
        journal.note(
            f"The source was quantized already ({arch.source.quantization}): what was lost before is lost, and errors are "
            "measured against its dequantized weights."
        )
    reason = _against_experts(arch, recipe, linears, schemes)
    if reason is not None:
        journal.note(
            f"This checkpoint is for vLLM, which reads these experts one by one; transformers does not load it: {reason}."
        )


def _check_unchanged(source: Source) -> None:
    """Refuse to finish if the model is no longer what was read."""
    changed = source.changes(source.contents())
    if changed:
        raise ValueError(
            f"{source.folder} has changed while it was quantized: {some(changed)}. Put the model back as it was and run the "
            "same command again, or start anew with --overwrite"
        )


def _check_head(arch: Arch, recipe: Recipe, schemes: dict[str, Scheme]) -> None:
    if _quantized_head(arch, schemes) is not None and recipe.finish is not None:
        raise ValueError(
            f"{recipe.finish.method} trains by the logits of the float head, so the head cannot be quantized too; leave one out"
        )


def _check_disk(folder: Path, source: Source, tokens: Tensor, *, boundaries: int) -> None:
    """The output is at most as large as the source; so many boundaries of hidden states lie beside it."""
    width = source.config.get("hidden_size") or source.config.get("n_embd") or source.config.get("d_model") or 0
    needed = source.nbytes() + boundaries * tokens.numel() * width * source.dtype().itemsize
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + present < needed:
        raise ValueError(
            f"{folder.parent}: {_size(free)} are free, but up to {_size(needed)} are needed while quantizing; free some "
            "space or choose another --out"
        )


def _check_memory(arch: Arch, schemes: dict[str, Scheme]) -> None:
    """One block in float32, as read, and its largest Gram matrix three times over must fit into memory."""
    infos = arch.source.tensors
    largest = 0
    head = _quantized_head(arch, schemes)
    for block in arch.blocks if head is None else (*arch.blocks, head):
        count = sum(infos[name].nbytes for name in block.tensors)
        widest = max((linear.in_features for linear in block.linears), default=0)
        largest = max(largest, 3 * count + 3 * widest**2 * 4)
    outside = 2 * sum(infos[name].nbytes for name in arch.outside)
    needed = max(largest, outside)
    available = available_memory()
    if available is not None and available < needed:
        raise ValueError(
            f"{_size(available)} of memory are available, but the largest block of this model needs about {_size(needed)}; use "
            "a machine with more memory"
        )


# For each weight that trains: it, its shift, gradients, two moments, and what rounding keeps for the way back; measured on a
# GPU, 51 to 65 (section `blocks` of benchmarks/RESULTS.md), and without shifts about half.
_TRAINING_BYTES = {True: 64, False: 32}


def _check_training_memory(arch: Arch, recipe: Recipe, schemes: dict[str, Scheme]) -> None:
    """What is trained together must fit into the memory of the device."""
    weights = [
        sum(linear.in_features * linear.out_features for linear in block.linears if linear.name in schemes)
        for block in arch.blocks
    ]
    needed, together = 0, ""
    if any(METHODS[step.method].kind == "trainer" for step in recipe.steps):
        most = max(sum(weights[i : i + recipe.span]) for i in range(0, len(weights), recipe.span))
        needed, together = most * _TRAINING_BYTES[True], f"{recipe.span} block(s)"
    if recipe.finish is not None:
        all_of_it = sum(weights) * _TRAINING_BYTES[bool(recipe.finish.options.get("rate"))]
        if all_of_it > needed:
            needed, together = all_of_it, f"all blocks at once, as {recipe.finish.method} does,"
    cuda = arch.device.type == "cuda"
    available = torch.cuda.mem_get_info(arch.device)[0] if cuda else available_memory()
    if available is not None and available < needed:
        raise ValueError(
            f"{_size(available)} of memory are available on {arch.device}, but to train {together} takes about "
            f"{_size(needed)}; use a device with more memory, modules of fewer blocks, or steps that do not train"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can have without swapping; None where the system does not tell.

    The least of what the machine has free and what the limits of its control groups leave, of version 1 or 2: a container's.
    """
    found = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers == "":
            names = _CGROUP2
        elif "memory" in controllers.split(","):
            names = _CGROUP1
        else:
            continue
        top = root / names.mount
        own = top / path.strip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            found += _left(group, names)
    return min(found, default=None)


@dataclass(frozen=True)
class _Cgroup:
    """What a version of control groups calls its files: limit, usage, and cached pages that can be given up."""

    mount: str
    limit: str
    usage: str
    cached: str


_CGROUP1 = _Cgroup("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP2 = _Cgroup("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _left(group: Path, names: _Cgroup) -> list[int]:
    """The bytes that a group's limit leaves, nothing if it has none."""
    limit, usage = _lines(group / names.limit), _lines(group / names.usage)
    if not limit or not usage or limit[0] == "max":
        return []
    cached = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[:1] == [names.cached]]
    return [max(0, int(limit[0]) - int(usage[0]) + sum(cached))]


def _lines(path: Path) -> list[str]:
    """The lines of a file of the system, none where it is not there or not readable."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------------ the journal


def _job(source: Source, recipe: Recipe, data: Calibration, device: str, parallel: int, deterministic: bool) -> dict[str, Any]:
    """What makes two runs the same run."""
    settings = recipe.to_dict()
    settings["data"] = data.describe()
    libraries = ("torch", "transformers", "compressed-tensors", "safetensors")
    return {
        "recipe": settings,
        "model": source.files(),
        "versions": {"lowbit": __version__} | {name: version(name) for name in libraries},
        "device": device,
        "threads": torch.get_num_threads(),
        "parallel": [parallel, deterministic] if parallel > 1 else None,
    }


@contextmanager
def _saying_what_is_kept(journal: Journal) -> Iterator[None]:
    """Turn a failed write into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = len(list(journal.work.glob("block-*.json")))
        raise ValueError(
            f"writing to {journal.folder} failed: {error}. {kept} finished blocks are kept; when the cause is gone (disk "
            "space?), run the same command again and it goes on from there"
        ) from error


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Spare the many objects that the libraries made at import from the collection after every block (see `Arch.free`).

    A caller who has frozen objects himself keeps them so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------------------------------------- the report


class _Clock:
    """Seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The stage `name` ends here."""
        now = time.monotonic()
        self.stages.append({"stage": name, "seconds": now - self._last, "peak_rss": _peak_rss()})
        self._last = now


def _peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux tells it in VmHWM; elsewhere it is ru_maxrss, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(
    source: Source,
    model: str,
    revision: str | None,
    recipe: Recipe,
    data: Calibration,
    arch: Arch,
    records: list[dict[str, Any]],
    searches: list[dict[str, Any]],
    gate: dict[str, Any],
    clock: _Clock,
    journal: Journal,
) -> dict[str, Any]:
    folder = journal.folder
    rows = [row for record in records for row in record["linears"]]
    if table := _rounded(arch):
        rows.append(asdict(_record_of(table)))
    points = {name: scheme for record in records for name, scheme in record["points"].items()}
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    bits = sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in rows)
    shards = sum(path.stat().st_size for pattern in ("*.safetensors", f"{ADAPTER}/*") for path in folder.glob(pattern))
    parameters = sum(_count(source, name) for name in source.tensors)
    return {
        "lowbit": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "compressed-tensors", "safetensors")},
        "device": str(arch.device),
        "threads": torch.get_num_threads(),
        "model": {
            "name": Path(model).name if Path(model).is_dir() else model,
            "revision": revision,
            "class": type(arch.model).__name__,
            "dtype": str(source.dtype()).removeprefix("torch."),
            "source_quantization": source.quantization,
            "fingerprint": source.fingerprint(),
        },
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.hash(),
        "data": data.describe(),
        "searches": searches,
        "outliers": None,
        "histograms": [],
        "linears": rows,
        "float_matrices": [{"name": name, "reason": reason} for name, reason in _left_float(arch, rows, points)],
        "points": points,
        "blocks": [{key: record[key] for key in ("block", "seconds", "peak_rss", "transforms")} for record in records],
        "stages": clock.stages,
        "sizes": {
            "source_bytes": source.stored_bytes(),
            "output_bytes": shards,
            "quantized_weights": weights,
            "parameters": parameters,
            "bits_per_quantized_weight": bits / weights,
            "bits_per_parameter": 8 * shards / parameters,
        },
        "adapter": ADAPTER if (folder / ADAPTER).is_dir() else None,
        "job": journal.job,
        "files": _hashes(journal, len(records)),
        "notes": journal.notes,
        "gate": gate,
        "evaluations": [],
    }


def _hashes(journal: Journal, count: int) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint by its path in the folder; the journal and the report itself are left out. That
    of shards is known from their records."""
    known = {name: found for index in range(count) for name, found in journal.hashes(_record(index)).items()}
    known |= journal.hashes("whole") if journal.recorded("whole") else {}
    folder, own = journal.folder, (JSON_NAME, MARKDOWN_NAME, PAGE_NAME)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in own and not name.startswith(f"{WORK}/")]
    return {name: known.get(name) or sha256_of(folder / name) for name in names}


def _record_of(table: Rounded) -> LinearRecord:
    """The report's row of rounded embeddings."""
    return LinearRecord(
        name=table.linear.name,
        scheme=table.scheme.name,
        method="rtn",
        shape=(table.linear.out_features, table.linear.in_features),
        bits_per_weight=table.q.bits_per_weight,
        error=table.error,
        error_rtn=table.error,
        error_kind="weight",
    )


def _left_float(arch: Arch, rows: list[dict[str, Any]], points: Iterable[str]) -> list[tuple[str, str]]:
    """Every matrix that was not quantized, with the reason."""
    quantized = {row["name"] for row in rows} | {name.removesuffix(".weight") for name in points}
    left: list[tuple[str, str]] = []
    for block in arch.blocks:
        left += [(name, reason) for name, reason in block.skipped if name not in quantized]
        left += [(linear.name, reason) for linear, reason in block.aside]
        left += [(linear.name, "left float by the rules") for linear in block.linears if linear.name not in quantized]
    head = {linear.name for linear in arch.head.linears} if arch.head is not None else set()
    outside = [name.removesuffix(".weight") for name in arch.outside if len(arch.source.tensors[name].shape) > 1]
    reasons = [(name, "left float by the rules" if name in head else "outside the blocks") for name in outside]
    reasons += [(name.removesuffix(".weight"), "kept as it is: the model has no place for it") for name in sorted(arch.unused)]
    return [*left, *((name, reason) for name, reason in reasons if name not in quantized)]


def _count(source: Source, name: str) -> int:
    count = 1
    for size in source.tensors[name].shape:
        count *= size
    return count


def _size(count: float) -> str:
    unit = next((unit for unit in (1e9, 1e6, 1e3) if count >= unit), 1)
    return f"{count / unit:.{0 if unit == 1 else 2}f} {_UNITS[unit]}"


_UNITS = {1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "bytes"}
