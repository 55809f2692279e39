"""TesseraQ: choices between two neighbours, made a few at a time."""

import math
from pathlib import Path

import pytest
import torch
from training import Setting, codes_of

from lowbit.methods.gptq import gptq
from lowbit.methods.tesseraq import tesseraq
from lowbit.reconstruct import Plan, Span, Weight


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def plan(**changes: object) -> Plan:
    """Choices alone, in twenty rounds of two steps."""
    given: dict[str, object] = {"name": "tesseraq", "train": {"choices": 0.05}, "inputs": "student", "steps": 40, "batch": 8}
    return Plan(**(given | changes))  # type: ignore[arg-type]


def test_share_that_is_decided() -> None:
    shares = [plan().decided(step) for step in range(41)]
    assert shares[0] == shares[1] == 0 and shares[40] == 1 and shares[39] == 1 - math.exp(-3.8)
    assert shares == sorted(shares) and len(set(shares)) == 21


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w2a16-g32-asym", "w4a16-channel"])
@pytest.mark.parametrize("solver", [None, gptq])
def test_starts_from_the_codes(scheme: str, solver: object, setting: Setting) -> None:
    """Each choice leans to what the solver chose, so that deciding all at once gives its codes back."""
    unit = setting.units(scheme, solver=solver)[0]
    for linear in unit.linears:
        weight = Weight(unit, linear, plan())
        logits = weight.trained["choices"]
        assert bool((logits.abs() < 10).all())
        soft = weight.value()
        logits.copy_(torch.where(logits > 0, 20.0, -20.0))
        before = unit.assigned[linear.name]
        found = weight.result()
        torch.testing.assert_close(weight.value(), unit.value(linear.name).float())
        same = (found.codes.int() - before.codes.int()).abs()
        # a code at the border of the range may lie a half of a step from what it stands for
        assert float((same == 0).float().mean()) > 0.995 and int(same.max()) <= 1
        assert not torch.allclose(soft, weight.value(), atol=1e-4)


def test_learns(setting: Setting) -> None:
    """Better than the solver; what was decided in one round stays so in the next; scales change too."""
    for scheme, solver, most in (("w3a16-g32-asym", None, 0.8), ("w2a16-g32", gptq, 0.95)):
        units = setting.units(scheme, solver=solver)
        scales = {name: q.scale.float() for name, q in units[0].assigned.items()}
        before = codes_of(units)
        tesseraq(units, steps=80, batch=8)
        note = units[0].notes[-1]
        assert note["step"] == "tesseraq" and note["kept"] and note["loss_after"] < most * note["loss_before"]
        moved = [(codes.int() - before[name].int()).abs() for name, codes in codes_of(units).items()]
        assert max(int(each.max()) for each in moved) <= 1 and any(bool(each.any()) for each in moved)
        assert any(not torch.equal(scales[name], q.scale.float()) for name, q in units[0].assigned.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decided_choices_stay(family: str, tmp_path: Path) -> None:
    """Round by round: the decided ones are the share the plan says, and none is taken back. The weights of GPT-2 are views of
    transposed ones, and so are their logits."""
    from lowbit.reconstruct import Order, Training, _Filed, divided

    units = Setting(tmp_path, family).units("w3a16-g32")
    made = plan()
    span = Span(units, made)
    trained, _ = divided(list(units[0].stream.parts()))
    order = Order(made, trained)
    task, training = _Filed(span, order.at(0)), Training(span)
    assert all(logits.is_contiguous() == (family == "llama") for _, _, logits in training.named)
    before: dict[str, torch.Tensor] = {}
    for step in range(made.steps):
        training.step(task, order.at(step))
        for name, _, logits in training.named:
            decided = logits.abs() > 10
            assert abs(float(decided.float().mean()) - made.decided(step + 1)) < 1e-3
            up = torch.where(decided, logits.sign(), 0.0)
            if name in before:
                was = before[name] != 0
                assert torch.equal(up[was], before[name][was])
            before[name] = up
    training.path.unlink()


def test_refuses_floats(setting: Setting) -> None:
    units = setting.units("mxfp4a16")
    with pytest.raises(ValueError, match="tesseraq chooses between integers, but mxfp4a16"):
        tesseraq(units, steps=20)
