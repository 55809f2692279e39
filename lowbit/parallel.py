"""MREM in parallel: every process trains its own modules, and none waits for the one before it.

The blocks are cut into as many runs as there are processes (ranks). A rank keeps its blocks, float and quantized, for the whole
training. In every step it takes hidden states from its queue, takes one step of each of its modules, and sends on what the
float blocks and what the quantized blocks made of them; no gradient crosses (Bai et al., NeurIPS 2022, section 3.2, MREM-P).
Queues are bounded: a thread receives, and the oldest hidden states make room for new ones. A rank draws from whatever is in
its queue, so a slow predecessor means older inputs, not waiting. Annealed teacher forcing keeps what bad predecessors send
early from mattering. What they send late matters: a module learns to undo the errors that enter it, and those of a module in
training are not those that stay. So each rank begins some steps after the one before (`lead`) and takes its last steps on
what a finished module sends.

`deterministic` takes the hidden states of step t + lead in step t instead, so that the result does not depend on timing: then
ranks are a pipeline, which waits while it fills.

The result of a module is the record that a training leaves (`reconstruct.Training`): the walk over the blocks that follows
finds it finished, judges it on held-out rows as any other, and writes the checkpoint. What ranks have trained is kept in
`rank-R` of the journal, so a run with a dead rank goes on from where each rank was.

Processes are started here, on this machine, or by torchrun, on any number of machines that share the output folder. Hidden
states travel from GPU to GPU through NCCL where every rank has a GPU to itself, else through gloo, in the memory of the host.
Which rows they are is sent through gloo in any case, before them: so a GPU waits for hidden states only when they are about
to come, and its training is not held up by a transfer that nobody has begun.
"""

import collections
import math
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.arch import Arch, Block
from lowbit.methods.mrem import plan_of
from lowbit.processes import tied
from lowbit.qtensor import Scheme
from lowbit.recipe import METHODS, Recipe, Step
from lowbit.reconstruct import TRAINED, Order, Plan, Span, Training, divided, mixed, scale_of
from lowbit.unit import Input, Stream, Unit, fast_products

CAPACITY = 8  # messages in a queue
WARM_UP = 4  # messages before a rank begins, at least
DELAY = 0.1  # of the steps: how much later the last rank begins than the first
_PATIENCE = timedelta(days=30)  # a rank that died ends the run; one that is slow does not


# ------------------------------------------------------------------------------------------------------------ the processes


class Team:
    """The processes that torchrun started, of which this is one.

    Attributes:
        rank: of this process; the first does all that is not training.
        world: the number of processes.
    """

    def __init__(self) -> None:
        self.store, self.rank, self.world = next(dist.rendezvous("env://"))

    @staticmethod
    def here() -> "Team | None":
        """The team, where torchrun started this process."""
        return Team() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def call(self, work: Path | None) -> None:
        """Tell all others in which folder the training is described, or that there is nothing to do."""
        self.store.set("lowbit", str(work or ""))

    def called(self) -> Path | None:
        """What `call` tells, waited for."""
        self.store.wait(["lowbit"], _PATIENCE)
        work = self.store.get("lowbit").decode()
        return Path(work) if work else None


def launch(
    script: str, work: Path, owners: Sequence[range], progress: Callable[[int], None], locks: Sequence[int] = ()
) -> None:
    """Run `script` in one process per rank, which finds its rank in RANK, and wait for all; logs are in `work`.

    The processes end with this one, however it ends.

    Args:
        script: Python source.
        owners: the blocks of every rank.
        progress: called again and again with the steps that every rank has done.
        locks: descriptors of files locked by this process, which stay locked until the last rank has ended too.

    Raises:
        ValueError: a process died: which, with its blocks and its last words. The others are stopped.
    """
    logs = [work / f"rank-{rank}.log" for rank in range(len(owners))]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // len(owners)))}
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            given = environment | {"RANK": str(rank)}
            ranks.append(
                subprocess.Popen(tied(script), env=given, stdout=file, stderr=subprocess.STDOUT, pass_fds=tuple(locks))
            )
    try:
        for _ in _until(lambda: all(process.poll() == 0 for process in ranks)):
            for rank, process in enumerate(ranks):
                if process.poll():
                    words = _text(logs[rank]).strip().splitlines()
                    raise ValueError(
                        f"process {rank} of {len(ranks)}, which trains blocks {owners[rank].start} to {owners[rank].stop - 1}, "
                        f"ended with status {process.returncode}: {words[-1] if words else 'no message'}. Nothing trained is "
                        "lost; run the same command again and it goes on from there"
                    )
            progress(min(_steps_done(log) for log in logs))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _until(done: Callable[[], bool]) -> Iterator[None]:
    while not done():
        yield
        time.sleep(0.2)


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def say_step(done: int) -> None:
    """Tell the process that called `launch` how many steps are done."""
    print(f"step {done}", flush=True)


def _steps_done(log: Path) -> int:
    numbers = [line.removeprefix("step ") for line in _text(log).splitlines() if line.startswith("step ")]
    return int(numbers[-1]) if numbers else 0


# ---------------------------------------------------------------------------------------------------------------- one process


def join(store: dist.Store, rank: int, world: int, device: torch.device) -> torch.device:
    """Set up the process group of ranks that train on `device` each; returns where hidden states are when they are sent.

    Raises:
        RuntimeError: a rank does not answer.
    """
    store.set(f"place-{rank}", _place(device))
    backend = backend_of([store.get(f"place-{other}").decode() for other in range(world)])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    if backend == "gloo":
        return torch.device("cpu")
    torch.cuda.set_device(device)
    first = torch.zeros(1, device=device)  # makes the connections, one after the other: two threads would make two at once
    if rank > 0:
        dist.recv(first, rank - 1)
    if rank + 1 < world:
        dist.send(first, rank + 1)
    torch.cuda.synchronize(device)
    return device


def _place(device: torch.device) -> str:
    """What a rank trains on: which GPU of all there are, or nothing."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" and dist.is_nccl_available() else ""


def backend_of(places: Sequence[str]) -> str:
    """What messages go through, by the GPUs of the ranks ("": none): NCCL wants one for each."""
    alone = "" not in places and len(set(places)) == len(places)
    return "cpu:gloo,cuda:nccl" if alone else "gloo"


def parallel_step(recipe: Recipe, schemes: dict[str, Scheme]) -> Step:
    """The step that trains.

    Raises:
        ValueError: the recipe cannot be trained in parallel, with the reason.
    """
    trainers = [step for step in recipe.steps if METHODS[step.method].kind == "trainer"]
    if [step.method for step in trainers] != ["mrem"]:
        raise ValueError(
            "--parallel is for recipes with one step that trains, mrem; other steps need the blocks before finished"
        )
    for step in recipe.steps:
        kind = METHODS[step.method].kind
        if kind in ("search", "transform") or (step.calibrated and kind == "solver"):
            raise ValueError(
                f"--parallel: {step.method} needs the inputs of a quantized model, which processes do not have before they "
                "train; use rtn or hqq before mrem"
            )
    for scheme in schemes.values():
        if scheme.input is not None and Input(scheme.input).calibrated:
            raise ValueError(f"--parallel: the static inputs of {scheme.name} need calibration first; use dynamic ones")
    return trainers[0]


def shares(count: int, span: int, world: int) -> list[range]:
    """The blocks of every rank: whole modules of `span` blocks, as evenly as can be.

    Raises:
        ValueError: there are fewer modules than ranks.
    """
    modules = -(-count // span)
    if modules < world:
        raise ValueError(
            f"{world} processes, but {count} blocks in modules of {span} are {modules}; use fewer, or smaller modules"
        )
    cuts = [min(count, span * (modules * rank // world)) for rank in range(world + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def lead(plan: Plan, world: int, *, deterministic: bool) -> int:
    """By how many steps every rank begins after the one before. Where all inputs are the float model's, it would be in vain."""
    steps = 0 if plan.inputs == "teacher" else math.ceil(DELAY * plan.steps / (world - 1))
    return steps if deterministic else max(WARM_UP, steps)


def judging(stream: Stream, step: Step, rows: int) -> list[tuple[int, int]]:
    """The batches that the walk over trained modules reads: those that judge, those of the first step, which losses are
    relative to, and those of the first rows, which the gate compares."""
    trained, held = divided(list(stream.parts()))
    wanted = {*held, *Order(plan_of(**step.options), trained).at(0)}
    return [part for part in stream.parts() if part in wanted or part[0] < rows]


@dataclass
class Message:
    """Hidden states [rows, length, width] of one step, by the rows: of the float model and of the quantized one; and whether
    they were taken from a queue."""

    parts: list[tuple[int, int]]
    taught: dict[tuple[int, int], Tensor]
    own: dict[tuple[int, int], Tensor]
    taken: bool = False


class Queue:
    """What arrives from the rank before, received by a thread, at most `capacity` messages."""

    def __init__(
        self,
        count: int,
        steps: int,
        shape: tuple[int, ...],
        *,
        source: int,
        lead: int,
        deterministic: bool,
        carrier: torch.device,
        capacity: int = CAPACITY,
    ) -> None:
        """count: of batches in a message; steps: messages in all; shape: of a row of hidden states; lead: messages
        that come before the first is taken, and if deterministic are left out; carrier: where they are when they arrive."""
        self.count, self.steps, self.shape, self.source, self.carrier = count, steps, shape, source, carrier
        self.lead, self.deterministic, self.capacity = lead, deterministic, capacity
        self.messages: collections.deque[Message] = collections.deque()
        self.received = 0
        self.failure: RuntimeError | None = None
        self.changed = threading.Condition()
        self.random = random.Random(source)
        self.thread = threading.Thread(target=self._receive, daemon=True)
        self.thread.start()

    def _receive(self) -> None:
        try:
            header = torch.zeros(1, dtype=torch.int64)
            dist.recv(header, self.source)
            for _ in range(int(header), self.steps):
                rows = torch.zeros(self.count, 2, dtype=torch.int64)
                dist.recv(rows, self.source)
                parts = [(int(start), int(stop)) for start, stop in rows]
                message = Message(parts, {}, {})
                for part in parts:
                    for states in (message.taught, message.own):
                        states[part] = torch.empty(part[1] - part[0], *self.shape, device=self.carrier)
                with _beside(self.carrier):
                    for part in parts:
                        for states in (message.taught, message.own):
                            dist.recv(states[part], self.source)
                self.put(message)
        except RuntimeError as error:
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def put(self, message: Message) -> None:
        """Take in a message; where there is no room, the oldest goes, or, deterministic, it waits."""
        with self.changed:
            self.received += 1
            if self.deterministic and self.received <= self.lead:
                return
            while len(self.messages) >= self.capacity:
                if self.deterministic:
                    self.changed.wait()
                else:
                    self.messages.popleft()
            self.messages.append(message)
            self.changed.notify_all()

    def get(self) -> Message:
        """The next message in their order (deterministic); or the latest that was not taken yet, else any of those that are
        here, which stays."""
        with self.changed:
            while not self.messages or (self.received < self.lead and self.failure is None):
                if self.failure is not None:
                    raise RuntimeError(f"rank {self.source} sends no more") from self.failure
                self.changed.wait()
            if not self.deterministic:
                new = [message for message in self.messages if not message.taken]
                message = new[-1] if new else self.random.choice(self.messages)
                message.taken = True
                return message
            message = self.messages.popleft()
            self.changed.notify_all()
            return message


@contextmanager
def _beside(carrier: torch.device) -> Iterator[None]:
    """Receive into tensors made before, which what a GPU is given to compute meanwhile does not wait for; at the end they are
    filled."""
    if carrier.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(carrier)
    stream.wait_stream(torch.cuda.current_stream(carrier))  # what used the memory of the tensors before
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class Passed:
    """A `Task` on the hidden states of one message; keeps what the module makes of them. What the float module makes of a batch
    is computed once and then read from the stream's file."""

    def __init__(self, span: Span) -> None:
        self.span, self.stream = span, span.units[0].stream
        self.scale = 0.0
        self.written = set[tuple[int, int]]()

    @torch.no_grad()
    def take(self, message: Message) -> None:
        """Go on to another message."""
        self.message, self.outputs = message, dict[tuple[int, int], Tensor]()
        taught = {part: states.to(self.stream.arch.device) for part, states in message.taught.items()}
        self.targets = {part: self._target(part, states) for part, states in taught.items()}
        if not self.scale:
            self.scale = scale_of([(target, taught[part]) for part, target in self.targets.items()])

    def _target(self, part: tuple[int, int], taught: Tensor) -> Tensor:
        last = self.span.last
        if part not in self.written:
            with fast_products(), self.stream.file(last, teacher=True).open("r+b" if self.written else "wb") as file:
                self.stream.write(file, part, self.span.float_forward(taught, self.calls(part)))
            self.written.add(part)
        return self.stream.read(last, *part, teacher=True)

    def calls(self, part: tuple[int, int]) -> list[Any]:
        """The other arguments of the calls of the module's blocks."""
        return [self.stream.calls(part, unit.block.index) for unit in self.span.units]

    def loss(self, part: tuple[int, int], parameters: Sequence[dict[str, Tensor]], forcing: float) -> Tensor:
        """See `Task`."""
        hidden = mixed(lambda: self.message.taught[part], lambda: self.message.own[part], forcing)
        found = self.span.forward(hidden.to(self.targets[part].device), self.calls(part), parameters)
        self.outputs[part] = found.detach()
        return (found - self.targets[part]).square().mean() * self.scale

    def sent(self) -> Message:
        """What the next module gets, rounded as hidden states are between blocks."""
        own = {part: self.stream.rounded(x) for part, x in self.outputs.items()}
        return Message(self.message.parts, self.targets, own)


def train(
    arch: Arch,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    tokens: Tensor,
    work: Path,
    progress: Callable[[int], None],
    *,
    carrier: torch.device,
    deterministic: bool = False,
) -> None:
    """What one rank does after `join`, which gave the carrier. Its modules' records are in `work` / `TRAINED` afterwards.

    `progress` is called with the steps done.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = plan_of(**parallel_step(recipe, schemes).options)
    folder = work / f"rank-{rank}"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("hidden-*"):  # of a killed process; they are made again
        path.unlink()
    stream = Stream(arch, tokens, folder)
    stream.start()
    mine = [arch.blocks[i] for i in shares(len(arch.blocks), recipe.span, world)[rank]]
    spans = [
        Span([_unit(arch, block, recipe, schemes, stream) for block in mine[i : i + recipe.span]], plan)
        for i in range(0, len(mine), recipe.span)
    ]
    order = Order(plan, divided(list(stream.parts()))[0])
    trainings = [Training(span) for span in spans]
    first = min(len(training.losses) for training in trainings)
    if deterministic and not _agreed(first, world):
        for training in trainings:
            training.path.unlink(missing_ok=True)
        spans = [Span(span.units, plan) for span in spans]
        trainings, first = [Training(span) for span in spans], 0
    tasks = [Passed(span) for span in spans]
    ahead = lead(plan, world, deterministic=deterministic)
    steps = plan.steps + ahead * (world - 1 - rank)  # those after training are for the ranks behind
    queue = None
    if rank > 0:
        shape = tuple(stream.shape)
        queue = Queue(
            order.count, steps + ahead, shape, source=rank - 1, lead=ahead, deterministic=deterministic, carrier=carrier
        )
    pending: collections.deque[Any] = collections.deque()
    if rank + 1 < world:
        pending.append((dist.isend(header := torch.tensor([first]), rank + 1), header))
    for step in range(first, steps):
        message = queue.get() if queue is not None else _embedded(stream, order.at(step))
        for task, training in zip(tasks, trainings, strict=True):
            task.take(message)
            if training.done:
                _forward(task)
            else:
                training.step(task, message.parts)
            message = task.sent()
        if rank + 1 < world:
            _send(message, rank + 1, pending, carrier)
        progress(min(step + 1, plan.steps))
    for handle, _ in pending:
        handle.wait()
    if queue is not None:
        queue.thread.join()
    dist.barrier()
    (work / TRAINED).mkdir(exist_ok=True)
    for training in trainings:
        training.path.replace(work / TRAINED / training.path.name)
    dist.barrier()


def _unit(arch: Arch, block: Block, recipe: Recipe, schemes: dict[str, Scheme], stream: Stream) -> Unit:
    """A block rounded as the recipe's solver does it."""
    values = arch.load(block.tensors)
    chosen = {linear.name: schemes[linear.name] for linear in block.linears if linear.name in schemes}
    unit = Unit(arch, block, chosen, stream, arch.source.dtype(), values)
    for step in recipe.steps:
        if METHODS[step.method].kind == "solver":
            METHODS[step.method].apply(unit, **step.options)
    unit.keep()
    return unit


def _agreed(value: int, world: int) -> bool:
    """Whether all ranks have the same value."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(found, torch.tensor([value]))
    return len({int(each) for each in found}) == 1


def _embedded(stream: Stream, parts: list[tuple[int, int]]) -> Message:
    """What enters the first block, the same in both models."""
    states = {part: stream.read(0, *part) for part in parts}
    return Message(parts, states, states)


@torch.no_grad()
def _forward(task: Passed) -> None:
    """Only pass on: the module is finished."""
    parameters = task.span.assembled(task.span.pieces())
    with fast_products():
        for part in task.message.parts:
            task.loss(part, parameters, 0.0)


def _send(message: Message, target: int, pending: collections.deque[Any], carrier: torch.device) -> None:
    """Send on from the carrier; what was sent is kept until it has arrived."""
    tensors = [torch.tensor(message.parts)]
    tensors += [states[part].to(carrier).contiguous() for part in message.parts for states in (message.taught, message.own)]
    pending.extend((dist.isend(tensor, target), tensor) for tensor in tensors)
    while len(pending) > 4 * CAPACITY * len(tensors):
        pending.popleft()[0].wait()
    with suppress(IndexError):
        while pending[0][0].is_completed():
            pending.popleft()
