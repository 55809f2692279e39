"""SignRound: weights move to one of their two neighbours, by signed gradients."""

import pytest
import torch
from training import Setting, codes_of

from lowbit.methods.gptq import gptq
from lowbit.methods.signround import signround


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def test_by_default(setting: Setting) -> None:
    """In n steps of 1/n, falling to 0, a weight can move half a step in all."""
    units = setting.units("w3a16-g32-asym")
    before = {name: codes.int() for name, codes in codes_of(units).items()}
    signround(units, steps=40, batch=4, scales=False)
    note = units[0].notes[-1]
    assert note["kept"] and note["loss_after"] < 0.9 * note["loss_before"]
    moved = [(codes.int() - before[name]).abs() for name, codes in codes_of(units).items()]
    assert max(int(each.max()) for each in moved) == 1
    assert all(0.02 < float(each.float().mean()) < 0.5 for each in moved)


@pytest.mark.parametrize("scheme", ["mxfp4a16", "nvfp4a16", "nf4-g32", "mxint3-g16"])
def test_formats_whose_scales_do_not_train(scheme: str, setting: Setting) -> None:
    """Their rounding does."""
    units = setting.units(scheme)
    scales = {name: q.scale.float() for name, q in units[0].assigned.items()}
    signround(units, steps=30, batch=4)
    assert units[0].notes[-1]["kept"]
    if scheme != "nf4-g32":
        assert all(torch.equal(scales[name], q.scale.float()) for name, q in units[0].assigned.items())


def test_from_gptq(setting: Setting) -> None:
    """What gptq found is where it starts."""
    rounded, solved = (setting.units("w3a16-g32-asym", solver=solver) for solver in (None, gptq))
    losses = []
    for units in (rounded, solved):
        signround(units, steps=20, batch=24, rate=0.01)
        losses.append(units[0].notes[-1])
    assert losses[1]["loss_before"] < 0.5 * losses[0]["loss_before"]
    assert losses[1]["curve"][0] < 0.5 * losses[0]["curve"][0] and losses[1]["curve"][-1] < 0.9 * losses[1]["curve"][0]
