"""Reconstruction: what trains is what the checkpoint gets, inputs and rows are as planned, and a kill costs nothing."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import ROWS, Setting, codes_of

from lowbit import reconstruct as module
from lowbit.methods.gptq import gptq
from lowbit.methods.rtn import rtn
from lowbit.qtensor import dequantize, find_params, parse_scheme, quantize
from lowbit.reconstruct import Part, Plan, Span, Weight, multiplied, reconstruct


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setting]:
    """Settings by model, each made once: blocks are loaded anew by every test."""
    return functools.cache(lambda name: Setting(tmp_path_factory.mktemp(name), name))


@pytest.fixture
def setting(settings: Callable[[str], Setting]) -> Setting:
    return settings("llama")


def plan(train: dict[Part, float] | None = None, **given: Any) -> Plan:
    return Plan(**{"name": "trial", "train": train or {"weights": 0.05}, "inputs": "student", "steps": 20, "batch": 4} | given)


def through(span: Span, pieces: Any, row: int = 0) -> Tensor:
    """What leaves the span for one batch."""
    stream, part = span.units[0].stream, (row, row + 2)
    calls = [stream.calls(part, unit.block.index) for unit in span.units]
    with torch.no_grad():
        return span.forward(stream.read(span.first, *part), calls, span.assembled(pieces))


# ----------------------------------------------------------------------------------------------------- quantized weights


@pytest.mark.parametrize("solver", [rtn, gptq], ids=["rtn", "gptq"])
@pytest.mark.parametrize(
    "scheme",
    ["w3a16-g32", "w2a16-g32-asym", "w4a16-channel", "w4a16-tensor-asym", "w8a16-r16", "mxfp4a16", "mxint4a16", "nf4-g32",
     "nvfp4a16", "fp8a16", "w4a8-g32-two-asym"],
)  # fmt: skip
@pytest.mark.parametrize("train", [{"weights": 1.0}, {"rounding": 1.0}, {"weights": 1.0, "scales": 1.0}], ids="+".join)
def test_training_starts_from_the_solver(train: dict[Part, float], scheme: str, solver: Any, setting: Setting) -> None:
    """Before the first step, the differentiable weight is the assigned one, and so is the result."""
    if "scales" in train and parse_scheme(scheme).weight.scale != "float":
        pytest.skip("scales of 8 bits are not trained")
    (unit,) = setting.units(scheme, solver=solver)
    decode = unit.spec(unit.linears[0]).format.decode  # floats have two zeros
    for linear in unit.linears[:3]:
        weight = Weight(unit, linear, plan(train))
        expected = unit.assigned[linear.name]
        found = weight.result()
        assert torch.equal(decode(found.codes), decode(expected.codes)) and torch.equal(
            found.scale.float(), expected.scale.float()
        )
        assert (found.zero is None) == (expected.zero is None)
        assert found.zero is None or expected.zero is None or torch.equal(found.zero, expected.zero)
        assert torch.allclose(weight.value(), dequantize(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w2a16-g32-asym", "w4a16-channel-asym", "w4a16-tensor", "fp8a16-g32"])
def test_clips_of_the_whole_range_are_none(scheme: str, setting: Setting) -> None:
    """At sigmoid = 1 the result is rounding to nearest, bit for bit; at the paper's start the ranges are 0.982 as wide."""
    (unit,) = setting.units(scheme)
    linear = unit.linears[1]
    w, spec = unit.weight(linear), unit.spec(linear)
    for start, share in ((20.0, 1.0), (4.0, 0.98201379)):
        found = Weight(unit, linear, plan({"clips": 1.0}, start=start)).result()
        grid = find_params(w * share, spec, scale_dtype=torch.float32)
        expected = quantize(w, grid, spec)
        assert torch.allclose(found.scale, expected.scale, rtol=1e-6)
        if share == 1:
            assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
            assert found.zero is None or expected.zero is None or torch.equal(found.zero, expected.zero)
        else:
            assert (found.codes != expected.codes).float().mean() < 0.01
            assert not torch.equal(found.codes, unit.assigned[linear.name].codes)


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w3a16-g32-asym"])
def test_gradients(scheme: str, setting: Setting) -> None:
    """Against differences of the same function with the codes held fixed, where rounding has no part in it."""
    (unit,) = setting.units(scheme)
    linear = unit.linears[0]
    direction = torch.randn(linear.out_features, linear.in_features, generator=torch.Generator().manual_seed(1))
    weight = Weight(unit, linear, plan({"clips": 1.0}, start=2.0))
    logits = weight.trained["clips"].requires_grad_(True)
    (weight.value() * direction).sum().backward()
    assert logits.grad is not None
    with torch.no_grad():
        x, step, zero = weight._codes(weight.w)
        fmt = weight.spec.format
        inside = (x > fmt.min) & (x < fmt.max)
        signs = module.grouped(direction, weight.spec)
        # d value / d step = code - zero - x' inside, code - zero outside; x' = w / step
        code = fmt.round(x) - (0 if zero is None else zero.unsqueeze(-1))
        plain = module.grouped(weight.w, weight.spec) / step.unsqueeze(-1)
        by_step = (signs * torch.where(inside, code - plain, code)).sum(-1)
        groups = module.grouped(weight.w, weight.spec)
        share = torch.sigmoid(logits)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        slope = share * (1 - share)
        if zero is None:
            # the largest magnitude is the lowest code, so that the step has the other sign
            larger = high * share[..., 1] > -low * share[..., 0]
            of_low, of_high = low / fmt.min, high / fmt.min
            expected = torch.stack([torch.where(larger, 0, of_low) * by_step, torch.where(larger, of_high, 0) * by_step], -1)
        else:
            # outside the codes, the zero point moves the value by -step; zero = min - low / step
            by_zero = (signs * torch.where(inside, 0.0, -step.unsqueeze(-1))).sum(-1)
            width, lowest = fmt.max - fmt.min, low * share[..., 0]
            of_low = by_step * (-low / width) + by_zero * (-low / step + lowest / step**2 * (-low / width))
            of_high = by_step * (high / width) + by_zero * (lowest / step**2 * (high / width))
            expected = torch.stack([of_low, of_high], -1)
        expected = expected * slope
    assert torch.allclose(logits.grad, expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "phi3", "opt"])
@pytest.mark.parametrize("scheme", ["w4a8-g16", "w4a16-g16-asym"])
def test_what_was_trained_is_what_is_assigned(name: str, scheme: str, settings: Callable[[str], Setting]) -> None:
    """The block computes the same in training and after the result is folded in: quantized parts of larger matrices,
    transposed ones and experts, rescaled norms and biases."""
    setting = settings(name)
    units = setting.units(scheme)
    span = Span(units, plan({"clips": 0.1, "smoothing": 0.1}, start=3.0))
    generator = torch.Generator().manual_seed(2)
    for _, part, tensor in span.trained():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.add_(noise, alpha=0.3 if part == "smoothing" else 1.0)
    before = through(span, span.pieces())
    hidden, plain = units[0].outputs()
    span.assign()
    assert torch.allclose(units[0].outputs()[1], plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    units[0].finish()
    after = setting.stream.read(units[0].block.index + 1, 0, 2)
    assert (after - before).norm() < 2e-3 * (before - hidden).norm()
    assert (before - plain).norm() > 2e-2 * (plain - hidden).norm()


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_run(dtype: torch.dtype, tmp_path: Path) -> None:
    """The float unit computes what the run computed for the teacher, to the bit; gradients are float32, also of bfloat16
    matrices."""
    setting = Setting(tmp_path, dtype=dtype)
    (unit,) = setting.units()
    span, stream, part = Span([unit], plan()), setting.stream, (0, 2)
    calls = [stream.calls(part, 0)]
    found = span.float_forward(stream.read(0, *part), calls)
    assert torch.equal(stream.rounded(found), stream.read(1, *part, teacher=True))
    (leaves,) = span.assembled(span.pieces())
    given = multiplied(unit, {name: leaf.requires_grad_(True) for name, leaf in leaves.items()})
    expected = torch.bfloat16 if unit.arch.matrix_dtype == torch.bfloat16 else torch.float32
    assert {value.dtype for value in given.values()} == {expected}
    span.forward(stream.read(0, *part), calls, [leaves]).square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and bool(leaf.grad.any()) for leaf in leaves.values())


def test_rates_and_forcing() -> None:
    """Schedules by hand; teacher forcing begins with the float model's input and ends, at half of the steps, with its own."""
    linear, cosine = plan(steps=100, schedule="linear"), plan(steps=100, schedule="cosine")
    assert [linear.rate(step) for step in (0, 25, 99)] == pytest.approx([1, 0.75, 0.01])
    assert [cosine.rate(step) for step in (0, 50, 100)] == pytest.approx([1, 0.525, 0.05])
    annealed = plan(steps=100, inputs="annealed")
    assert [annealed.forcing(step) for step in (0, 25, 50, 99)] == pytest.approx([1, 0.5, 0, 0])
    assert {plan(inputs="teacher").forcing(step) for step in (0, 19)} == {1.0}
    assert {plan(inputs="student").forcing(step) for step in (0, 19)} == {0.0}


def test_what_enters(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states of the float model, those of the quantized one, or their mix, to the bit."""
    units = setting.units(first=1)
    span = Span(units, plan(inputs="annealed"))
    task = module._Filed(span, [(0, 2)])
    seen: list[Tensor] = []
    plain = Span.forward

    def forward(self: Span, hidden: Tensor, calls: Any, parameters: Any) -> Tensor:
        seen.append(hidden)
        return plain(self, hidden, calls, parameters)

    monkeypatch.setattr(Span, "forward", forward)
    own, taught = (setting.stream.read(1, 4, 6, teacher=teacher) for teacher in (False, True))
    assert not torch.equal(own, taught)
    with torch.no_grad():
        for forcing in (1.0, 0.0, 0.25):
            task.loss((4, 6), span.assembled(span.assigned()), forcing)
    assert torch.equal(seen[0], taught) and torch.equal(seen[1], own)
    assert torch.equal(seen[2], 0.25 * taught + 0.75 * own)


def test_the_loss_by_hand(setting: Setting) -> None:
    """|f_Q(x) - f(x')|^2 and |f_Q(x) - f(x)|^2, relative to what the float blocks add to their input in the first step."""
    units = setting.units(first=1, count=2)
    found = {}
    for augmented in (False, True):
        task = module._Filed(Span(units, plan(augmented=augmented)), [(6, 8)])
        with torch.no_grad():
            found[augmented] = float(task.loss((0, 2), task.span.assembled(task.span.assigned()), 0.0))
    span, stream = Span(units, plan()), setting.stream
    quantized = through(span, span.assigned())
    target = stream.read(3, 0, 2, teacher=True)
    added = stream.read(3, 6, 8, teacher=True) - stream.read(1, 6, 8, teacher=True)
    scale = 1 / added.square().mean()
    assert found[False] == pytest.approx(float((quantized - target).square().mean() * scale), rel=1e-4)
    calls = [stream.calls((0, 2), unit.block.index) for unit in units]
    plain = span.float_forward(stream.read(1, 0, 2), calls)
    assert found[True] - found[False] == pytest.approx(float((quantized - plain).square().mean() * scale), rel=1e-3)
    assert not torch.allclose(plain, target, rtol=1e-3)


def test_rows_kept_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of eight judges and never trains; every other trains once an epoch."""
    seen: list[list[tuple[int, int]]] = []
    plain = module._step

    def step(task: Any, parts: list[tuple[int, int]], *given: Any) -> float:
        seen.append(parts)
        return plain(task, parts, *given)

    monkeypatch.setattr(module, "_step", step)
    units = setting.units()
    reconstruct(units, plan(steps=11, batch=2))
    flat = [part for parts in seen for part in parts]
    assert sorted(flat) == [(row, row + 2) for row in range(0, ROWS, 2) if row != 14]
    note = units[0].notes[-1]
    assert (note["rows"], note["held_out_rows"], note["steps"]) == (22, 2, 11)
    assert len(note["curve"]) == 11


# ---------------------------------------------------------------------------------------------------------- the training

TRAINED: list[dict[Part, float]] = [
    {"scales": 0.003},
    {"weights": 0.05},
    {"rounding": 0.05},
    {"weights": 0.05, "scales": 0.003},
    {"clips": 0.1},
    {"clips": 0.1, "smoothing": 0.02},
]


@pytest.mark.parametrize("train", TRAINED, ids="+".join)
@pytest.mark.parametrize("scheme", ["w2a16-g32-asym", "w3a4-g32"])
def test_training_helps(scheme: str, train: dict[Part, float], setting: Setting) -> None:
    """The loss on rows kept out falls; float parameters outside of links stay, and so do the weights that are rounded."""
    units = setting.units(scheme)
    floats = {linear.name: units[0].weight(linear).clone() for linear in units[0].linears}
    before = {name: q.codes.clone() for name, q in units[0].assigned.items()}
    reconstruct(units, plan(train, steps=40, start=4.0))
    note = units[0].notes[-1]
    assert (
        note["kept"]
        and note["loss_after"]
        < (0.995 if set(train) == {"scales"} else 0.98 if "clips" in train else 0.9) * note["loss_before"]
    )
    assert note["curve"][-1] < note["curve"][0] or set(train) == {"scales"}  # which help by less than rows differ
    same = [torch.equal(before[name], q.codes) for name, q in units[0].assigned.items()]
    assert all(same) if set(train) == {"scales"} else not any(same)
    assert all(record.method == "rtn+trial" for record in units[0].records.values())
    if "smoothing" not in train:
        assert all(torch.equal(floats[linear.name], units[0].weight(linear)) for linear in units[0].linears)
        assert not units[0].changed()
    else:
        assert set(units[0].changed()) >= {f"{units[0].block.name}.input_layernorm.weight"}


def test_units_of_several_blocks(setting: Setting) -> None:
    """Blocks that are trained together leave less error behind the last than one after the other at the same steps."""
    together = setting.units("w2a16-g32-asym", count=2)
    reconstruct(together, plan(steps=60))
    assert [unit.block.index for unit in together] == [0, 1] and together[0].notes[-1]["blocks"] == 2
    assert together[0].notes[-1]["loss_after"] < 0.9 * together[0].notes[-1]["loss_before"]
    assert all("+trial" in record.method for unit in together for record in unit.records.values())


def test_only_the_seed_decides(setting: Setting) -> None:
    """The same seed gives the same bits, another one does not."""
    found = []
    for seed in (0, 0, 1):
        units = setting.units("w2a16-g32-asym")
        reconstruct(units, plan(steps=8, seed=seed))
        found.append(codes_of(units))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("adam8bit", marks=pytest.mark.slow), "sign"])
def test_killed_within_a_unit(optimizer: Any, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on from its last record and ends with the same bits."""
    if optimizer == "adam8bit":
        if "LOWBIT_TORCHAO" not in os.environ:
            pytest.skip("LOWBIT_TORCHAO, the folder of torchao, is not set; `make test` does")
        monkeypatch.syspath_prepend(os.environ["LOWBIT_TORCHAO"])
    given = plan({"weights": 0.05, "scales": 0.003}, steps=12, optimizer=optimizer)
    units = setting.units("w2a16-g32-asym")
    reconstruct(units, given)
    expected = codes_of(units)
    monkeypatch.setattr(module, "_SAVED", 0.0)
    done: list[int] = []

    class Killed(BaseException):
        pass

    def say(stage: str, step: int, steps: int) -> None:
        done.append(step)
        if step == 7 and done.count(7) == 1:
            raise Killed

    for _ in range(2):
        units = setting.units("w2a16-g32-asym")
        units[0].say = say
        try:
            reconstruct(units, given)
        except Killed:
            (record,) = setting.stream.folder.glob("training-*")
            assert any(name.endswith(".codes") for name in load_file(record)) == (optimizer == "adam8bit")
    assert done == [*range(8), *range(7, 12)]
    assert not list(setting.stream.folder.glob("training-*"))
    found = codes_of(units)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert units[0].notes[-1]["curve"][0] > 0 and len(units[0].notes[-1]["curve"]) == 12


def test_what_got_worse_is_undone(setting: Setting) -> None:
    """The result before stays, and the report says so."""
    units = setting.units("w4a16-g32")
    before = codes_of(units)
    reconstruct(units, plan({"weights": 1.0}, steps=5, schedule="constant"))
    note = units[0].notes[-1]
    assert not note["kept"] and note["loss_after"] > note["loss_before"]
    assert all(torch.equal(before[name], codes) for name, codes in codes_of(units).items())
    for record in units[0].records.values():
        assert record.method == "rtn" and "trial did not help (loss" in record.warnings[0]


def test_shifts_of_rounding_are_bounded(setting: Setting) -> None:
    """No weight moves further than to the other neighbour."""
    units = setting.units("w3a16-g32")
    before = {name: q.codes.int() for name, q in units[0].assigned.items()}
    reconstruct(units, plan({"rounding": 0.1}, steps=20, optimizer="sign"))
    moved = [(codes.int() - before[name]).abs().max() for name, codes in codes_of(units).items()]
    assert units[0].notes[-1]["kept"] and max(moved) == 1


def test_a_loss_that_is_not_finite(setting: Setting) -> None:
    with pytest.raises(ValueError, match=r"trial: the loss of model.layers.0 is not finite at step \d; use lower rates"):
        reconstruct(setting.units("w3a16-g32"), plan({"weights": 0.1, "scales": 1e4}, steps=5))


@pytest.mark.parametrize(
    ("scheme", "train", "message"),
    [
        ("kmeans3", {"weights": 0.1}, "has the codebook kmeans3, which is not trained; use gptq"),
        ("mxfp4a16", {"scales": 0.1}, "trains scales, but mxfp4a16 .* has scales of 8 bits; use signround or lkd"),
        ("nvfp4a16", {"clips": 0.1}, "trains clips, but nvfp4a16"),
        (
            "w8a8-astatic",
            {"clips": 0.1, "smoothing": 0.1},
            "the static inputs of w8a8-astatic .* would change with the smoothing",
        ),
    ],
)
def test_refused(scheme: str, train: dict[Part, float], message: str, setting: Setting) -> None:
    with pytest.raises(ValueError, match=f"^trial.*{message}"):
        reconstruct(setting.units(scheme), plan(train))


def test_progress(setting: Setting) -> None:
    units = setting.units()
    seen: list[tuple[str, int, int]] = []
    units[0].say = lambda *what: seen.append(what)
    reconstruct(units, replace(plan(steps=3), name="mine"))
    assert seen == [("mine", step, 3) for step in range(3)]
