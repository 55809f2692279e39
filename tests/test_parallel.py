"""Parallel training: what queues keep, that ranks agree with one process where they must, and that a dead one costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from training import Setting

from lowbit import parallel, run
from lowbit.data import DataSpec
from lowbit.journal import _locked
from lowbit.methods.mrem import plan_of
from lowbit.parallel import Message, Passed, Queue, backend_of, judging, launch, lead, parallel_step, shares
from lowbit.qtensor import parse_scheme
from lowbit.recipe import short_recipe
from lowbit.reconstruct import Order, Plan, Span, Training, divided
from lowbit.run import quantize
from lowbit.source import Source

DATA = DataSpec(source="random", rows=16, length=16)


def options(**given: Any) -> dict[str, Any]:
    """A run of mrem on modules of one block."""
    return {
        "scheme": "w3a16-g32",
        "method": "rtn+mrem",
        "data": DATA,
        "engine": "transformers",
        "options": {
            f"mrem.{key}": value for key, value in ({"blocks": 1, "steps": 6, "batch": 2, "rate": 0.02} | given).items()
        },
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, dtype=torch.float32, seed=3)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def notes(folder: Path) -> list[dict[str, Any]]:
    blocks = json.loads((folder / "report.json").read_text())["blocks"]
    return [note for block in blocks for note in block["transforms"]]


# ------------------------------------------------------------------------------------------------------------- in a process


@pytest.mark.parametrize(
    ("count", "span", "world", "expected"),
    [
        (12, 1, 4, [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]),
        (7, 2, 2, [range(0, 4), range(4, 7)]),
        (5, 2, 3, [range(0, 2), range(2, 4), range(4, 5)]),
        (8, 3, 1, [range(0, 8)]),
    ],
)
def test_shares(count: int, span: int, world: int, expected: list[range]) -> None:
    assert shares(count, span, world) == expected
    with pytest.raises(ValueError, match=f"{count + 1} processes, but {count} blocks in modules of {span} are"):
        shares(count, span, count + 1)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["", ""], "gloo"),
        (["gpu-a", "gpu-a"], "gloo"),
        (["gpu-a", "gpu-b", "gpu-a"], "gloo"),
        (["gpu-a", ""], "gloo"),
        (["gpu-a", "gpu-b"], "cpu:gloo,cuda:nccl"),
    ],
)
def test_nccl_where_every_rank_has_a_gpu_to_itself(places: list[str], expected: str) -> None:
    assert backend_of(places) == expected


def queue(capacity: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch, lead: int = 0) -> Queue:
    """A queue whose thread receives nothing."""
    monkeypatch.setattr(Queue, "_receive", lambda self: None)
    given: dict[str, Any] = {"source": 0, "lead": lead, "deterministic": deterministic, "carrier": torch.device("cpu")}
    return Queue(1, 100, (4, 8), capacity=capacity, **given)


def message(number: int) -> Message:
    part = (number, number + 1)
    return Message([part], {part: torch.full((1,), float(number))}, {part: torch.zeros(1)})


def test_queue_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic: what leads is left out, then first in, first out, each once; who puts into a full one waits for room."""
    mine = queue(2, True, monkeypatch, lead=3)
    for number in range(5):
        mine.put(message(number))
    waits: list[float | None] = []

    def wait(timeout: float | None = None) -> bool:
        waits.append(timeout)
        mine.messages.popleft()
        return True

    monkeypatch.setattr(mine.changed, "wait", wait)
    mine.put(message(5))
    assert len(waits) == 1 and [m.parts for m in mine.messages] == [[(4, 5)], [(5, 6)]]
    assert [mine.get().parts[0][0] for _ in range(2)] == [4, 5] and not mine.messages


def test_queue_of_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the oldest makes room; the latest is taken first, and none twice while there are others. What is taken stays,
    and nothing is taken before as many are here as lead."""
    mine = queue(5, False, monkeypatch, lead=7)
    for number in range(6):
        mine.put(message(number))
    late = [message(number) for number in range(6, 9)]

    def wait(timeout: float | None = None) -> bool:
        mine.put(late.pop(0))
        return True

    monkeypatch.setattr(mine.changed, "wait", wait)
    assert mine.get().parts[0][0] == 6 and mine.received == 7
    while late:
        mine.put(late.pop(0))
    assert [m.parts[0][0] for m in mine.messages] == [4, 5, 6, 7, 8]
    assert [mine.get().parts[0][0] for _ in range(4)] == [8, 7, 5, 4]
    assert {mine.get().parts[0][0] for _ in range(200)} == {4, 5, 6, 7, 8} and len(mine.messages) == 5


@pytest.mark.parametrize(
    ("steps", "world", "inputs", "expected"),
    [(250, 2, "annealed", (25, 25)), (250, 3, "student", (13, 13)), (6, 2, "annealed", (1, 4)), (250, 2, "teacher", (0, 4))],
)
def test_lead(steps: int, world: int, inputs: Any, expected: tuple[int, int]) -> None:
    """A tenth of the steps, shared by the ranks, or what warms a queue up; in a fixed order, none where none can help."""
    plan = plan_of(steps=steps, inputs=inputs)
    assert tuple(lead(plan, world, deterministic=fixed) for fixed in (True, False)) == expected


def test_queue_whose_source_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = queue(2, True, monkeypatch)
    mine.failure = RuntimeError("connection closed")
    with pytest.raises(RuntimeError, match="rank 0 sends no more"):
        mine.get()


def test_no_gradient_crosses(tmp_path: Path) -> None:
    """What is sent on is rounded, and of what went before nothing trains with it; only the module's own parameters change."""
    setting = Setting(tmp_path)
    units = setting.units(count=2)
    plan = Plan(name="mrem", train={"weights": 0.05}, inputs="student", steps=4, batch=2)
    spans = [Span([unit], plan) for unit in units]
    tasks, trainings = [Passed(span) for span in spans], [Training(span) for span in spans]
    part = (0, 2)
    states = {part: setting.stream.read(0, *part)}
    tasks[0].take(Message([part], states, states))
    trainings[0].step(tasks[0], [part])
    sent = tasks[0].sent()
    assert not sent.own[part].requires_grad and sent.own[part].grad_fn is None
    assert torch.allclose(sent.taught[part], setting.stream.read(1, *part, teacher=True), rtol=1e-5, atol=1e-6)
    before = [tensor.clone() for _, _, tensor in spans[0].trained()]
    tasks[1].take(sent)
    trainings[1].step(tasks[1], [part])
    assert all(torch.equal(old, new) for old, (_, _, new) in zip(before, spans[0].trained(), strict=True))
    assert all(bool(tensor.any()) for span in spans for _, _, tensor in span.trained())


def test_the_float_module_runs_once_for_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path)
    span = Span(setting.units(), Plan(name="mrem", train={"weights": 0.05}, inputs="student", steps=4, batch=2))
    plain, calls = span.float_forward, list[Any]()
    monkeypatch.setattr(span, "float_forward", lambda *given: calls.append(given) or plain(*given))
    expected = {part: setting.stream.read(1, *part, teacher=True) for part in ((4, 6), (0, 2))}
    setting.stream.file(1, teacher=True).unlink()
    task = Passed(span)
    for part in [*expected, *expected]:
        states = {part: setting.stream.read(0, *part)}
        task.take(Message([part], states, states))
        torch.testing.assert_close(task.targets[part], expected[part], rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


def test_batches_that_the_walk_reads(tmp_path: Path) -> None:
    """Those that judge, those of the first step, and the first rows."""
    stream = Setting(tmp_path).stream
    step = short_recipe(scheme="w3a16-g32", method="rtn+mrem", options={"mrem.batch": 4}, data=DATA).steps[-1]
    trained, held = divided(list(stream.parts()))
    found = judging(stream, step, 3)
    assert found == sorted({*held, *Order(plan_of(batch=4), trained).at(0), (0, 2), (2, 4)})
    assert held == [(14, 16)] and 4 <= len(found) <= 5 < len(list(stream.parts()))


@pytest.mark.parametrize(
    ("method", "scheme", "message"),
    [
        ("rtn+lkd", "w3a16-g32", "for recipes with one step that trains, mrem"),
        ("rtn", "w3a16-g32", "for recipes with one step that trains, mrem"),
        ("gptq+mrem", "w3a16-g32", "gptq needs the inputs of a quantized model"),
        ("smooth+rtn+mrem", "w3a16-g32", "smooth needs the inputs of a quantized model"),
        ("rtn+mrem", "w8a8-astatic", "the static inputs of w8a8-astatic need calibration first"),
    ],
)
def test_recipes_that_cannot_be_parallel(method: str, scheme: str, message: str) -> None:
    recipe = short_recipe(scheme=scheme, method=method, data=DATA, engine="transformers")
    with pytest.raises(ValueError, match=message):
        parallel_step(recipe, {"a": parse_scheme(scheme)})


@pytest.mark.parametrize(("world", "deterministic"), [(0, False), (-1, False), (1, True)])
def test_numbers_that_mean_nothing(world: int, deterministic: bool, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"parallel = {world}: give the number of processes"):
        quantize(str(llama), tmp_path / "out", parallel=world, deterministic=deterministic, **options())


def test_disk_for_hidden_states(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every process what enters the first block, and of each of three float modules what leaves it, beside what any run
    with a teacher keeps."""
    needed, boundary = Source(llama).nbytes(), 16 * 16 * tiny.HIDDEN * 4
    for free, message in ((10, "are free, but up to"), (4 + 4 + 3, "4 processes, but 3 blocks")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=needed + free * boundary))
        with pytest.raises(ValueError, match=message):
            quantize(str(llama), tmp_path / "out", parallel=4, **options())


# ------------------------------------------------------------------------------------------------------------ in processes

MESSAGES = """
import collections, os, torch, torch.distributed as dist
from lowbit.parallel import Message, Queue, _send, join

rank, device = int(os.environ["RANK"]), torch.device({devices!r}[int(os.environ["RANK"])])
carrier = join(dist.FileStore({meeting!r}, 2), rank, 2, device)
assert carrier.type == {carrier!r}, carrier
part, generator = (4, 6), torch.Generator().manual_seed(7)
sent = [[torch.randn(2, 5, 3, generator=generator) for _ in range(2)] for _ in range(20)]
if rank == 0:
    pending = collections.deque([(dist.isend(first := torch.tensor([0]), 1), first)])
    for taught, own in sent:
        _send(Message([part], {{part: taught.to(device)}}, {{part: own.to(device)}}), 1, pending, carrier)
    for handle, _ in pending:
        handle.wait()
else:
    queue = Queue(1, len(sent), (5, 3), source=0, lead=0, deterministic=True, carrier=carrier, capacity=2)
    for taught, own in sent:
        message = queue.get()
        assert message.own[part].device == carrier and message.parts == [part]
        assert torch.equal(message.taught[part].cpu(), taught) and torch.equal(message.own[part].cpu(), own)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("devices", "carrier"),
    [
        pytest.param(["cpu", "cpu"], "cpu", marks=pytest.mark.slow),
        pytest.param(["cuda:0", "cuda:0"], "cpu", marks=pytest.mark.gpu),
        pytest.param(["cuda:0", "cuda:1"], "cuda", marks=pytest.mark.gpu),
    ],
)
def test_messages_arrive_as_they_were_sent(devices: list[str], carrier: str, tmp_path: Path) -> None:
    """Through gloo, and through NCCL between two GPUs; the memory of a queue of two messages is used again and again."""
    if torch.cuda.device_count() < len(set(devices) - {"cpu"}):
        pytest.skip("needs two GPUs")
    script = MESSAGES.format(devices=devices, carrier=carrier, meeting=str(tmp_path / "meeting"))
    launch(script, tmp_path, [range(0, 1), range(1, 2)], lambda done: None)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_processes_on_gpus(llama: Path, tmp_path: Path, deterministic: bool) -> None:
    """Whether they share one or have one each."""
    what = options(steps=12, rate=0.03)
    quantize(str(llama), tmp_path / "out", device="cuda", parallel=2, deterministic=deterministic, **what)
    assert all(note["loss_after"] < note["loss_before"] for note in notes(tmp_path / "out"))


@pytest.mark.slow
def test_with_the_teacher_alone_processes_do_not_matter(llama: Path, tmp_path: Path) -> None:
    """Fed by the float model throughout, modules know nothing of each other: three processes give the bits of one. The rows
    are ten batches, of which the walk after training takes four."""
    what = options(inputs="teacher") | {"data": replace(DATA, rows=80, length=128)}
    quantize(str(llama), tmp_path / "one", **what)
    quantize(str(llama), tmp_path / "three", parallel=3, deterministic=True, **what)
    assert weights(tmp_path / "three") == weights(tmp_path / "one")
    assert notes(tmp_path / "three") == notes(tmp_path / "one")
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of it in a fixed order."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(str(llama), out, parallel=2, deterministic=True, **options(steps=12))
    return out


@pytest.mark.slow
def test_torchrun(llama: Path, whole: Path, tmp_path: Path) -> None:
    """The processes of torchrun give the bits of those that lowbit starts, and better modules; only the first speaks."""
    what = options(steps=12)
    given = [text for key, value in what["options"].items() for text in ("--option", f"{key}={value}")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lowbit",
        "quantize",
    ]
    command += [str(llama), "--out", str(tmp_path / "out"), "--scheme", what["scheme"], "--method", what["method"], *given]
    command += ["--data", "random", "--rows", "16", "--length", "16", "--engine", "transformers", "--deterministic"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("read back and equal") == 1
    assert weights(tmp_path / "out") == weights(whole)
    assert all(note["steps"] == 12 and note["loss_after"] < note["loss_before"] for note in notes(whole))


@pytest.mark.slow
def test_processes_that_do_not_wait(llama: Path, tmp_path: Path) -> None:
    """Without an order of messages, training helps all the same."""
    report = quantize(str(llama), tmp_path / "out", parallel=2, **options(steps=40, rate=0.03))
    found = notes(tmp_path / "out")
    assert len(found) == 3 and all(note["loss_after"] < note["loss_before"] for note in found)
    assert "parallel training" in [stage["stage"] for stage in report["stages"]]


@pytest.mark.slow
def test_killed_while_modules_are_judged(llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a block has its record, what was trained stays, because the walk has not the rows to train again."""

    plain = run._write_record

    def killed(unit: Any, *given: Any) -> None:
        if unit.block.index == 1:
            raise KeyboardInterrupt
        plain(unit, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_write_record", killed)
        quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, **options(steps=12))
    monkeypatch.setattr(run, "launch", None)
    quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, **options(steps=12))
    assert weights(tmp_path / "out") == weights(whole) and notes(tmp_path / "out") == notes(whole)


@pytest.mark.slow
def test_a_dead_process(llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the process and its blocks; the same command goes on and gives what an undisturbed run gives."""
    what = options(steps=12)
    started: list[Any] = []
    plain: Callable[..., Any] = parallel.subprocess.Popen

    def popen(*given: Any, **named: Any) -> Any:
        started.append(plain(*given, **named))
        return started[-1]

    def progress(stage: str, done: int, total: int) -> None:
        if "processes" in stage and done >= 3:
            os.kill(started[1].pid, signal.SIGKILL)

    monkeypatch.setattr(parallel.subprocess, "Popen", popen)
    with pytest.raises(
        ValueError, match=r"process 1 of 2, which trains blocks 1 to 2, ended with status -9: .*goes on from there"
    ):
        quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, progress=progress, **what)
    assert all(process.poll() is not None for process in started)
    quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, **what)
    assert weights(tmp_path / "out") == weights(whole)


@pytest.mark.parametrize("survive", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the lock is shared")
def test_processes_of_a_dead_parent(survive: bool, tmp_path: Path) -> None:
    """They end with it; while one of them lives, whatever happens, the journal's lock is held."""
    free = "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n" if survive else ""
    script = f"{free}import os, time; print('step', os.getpid(), flush=True); time.sleep(100)"
    code = (
        "from pathlib import Path; from lowbit.journal import _locked; from lowbit.parallel import launch\n"
        f"work = Path({str(tmp_path)!r})\n"
        "with _locked(work, 'busy') as lock:\n"
        f"    launch({script!r}, work, [range(1), range(1, 2)], lambda done: None, [lock.fileno()])"
    )
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        while not all(log.exists() and "step" in log.read_text() for log in logs):
            assert parent.poll() is None
            time.sleep(0.02)
        with pytest.raises(ValueError, match="busy"), _locked(tmp_path, "busy"):
            pass
        parent.kill()
    ranks = [int(log.read_text().split()[1]) for log in logs]
    if survive:
        with pytest.raises(ValueError, match="busy"), _locked(tmp_path, "busy"):
            pass
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
    with _locked(tmp_path, "busy"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", [".work/trained/training-00001-mrem", ".work/parallel-done.json", ".work/block-00000.json"])
def test_damage_after_a_parallel_training(
    name: str, llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is trained again, since what it went through is not kept."""
    plain = run._write_record

    def killed(unit: Any, *given: Any) -> None:
        plain(unit, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_write_record", killed)
        quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, **options(steps=12))
    path = tmp_path / "out.partial" / name
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.warns(UserWarning, match="was damaged"):
        quantize(str(llama), tmp_path / "out", parallel=2, deterministic=True, **options(steps=12))
    assert weights(tmp_path / "out") == weights(whole)
