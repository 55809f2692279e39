"""OmniQuant: clips and links' scales train, weights do not."""

import pytest
import torch
from training import Setting

from lowbit.methods.omniquant import omniquant


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def test_clips_alone(setting: Setting) -> None:
    """Ranges become narrower, the float weights and everything outside of the quantized matrices stay."""
    units = setting.units("w2a16-g32-asym")
    floats = {linear.name: units[0].weight(linear).clone() for linear in units[0].linears}
    scales = {name: q.scale for name, q in units[0].assigned.items()}
    omniquant(units, steps=30, clip_rate=0.1, smooth_rate=0.0)
    note = units[0].notes[-1]
    assert note["kept"] and note["loss_after"] < note["loss_before"]
    assert all(torch.equal(floats[linear.name], units[0].weight(linear)) for linear in units[0].linears)
    assert not units[0].changed()
    narrower = [float((q.scale <= scales[name]).float().mean()) for name, q in units[0].assigned.items()]
    assert min(narrower) > 0.95


def test_scales_of_links_are_folded(setting: Setting) -> None:
    """Norms change, the float block does not, and two learnt things are better than one."""
    loss = {}
    for rate in (0.0, 0.02):
        units = setting.units("w4a4-g32")
        hidden, before = units[0].outputs()
        omniquant(units, steps=30, clip_rate=0.05, smooth_rate=rate)
        assert units[0].notes[-1]["kept"]
        loss[rate] = units[0].notes[-1]["loss_after"]
        after = units[0].outputs()[1]
        assert (after - before).norm() < 1e-4 * (before - hidden).norm()
        norm = f"{units[0].block.name}.input_layernorm.weight"
        assert (norm in units[0].changed()) == (rate > 0)
    assert loss[0.02] < loss[0.0]


def test_augmented(setting: Setting) -> None:
    """Another loss, another result."""
    found = []
    for augmented in (False, True):
        units = setting.units("w2a16-g32-asym", first=1)
        omniquant(units, steps=5, augmented=augmented)
        found.append(units[0].notes[-1]["curve"][0])
    assert found[1] > 1.2 * found[0]
