"""LKD: one block against the float model's hidden states, whatever became of the blocks before."""

import pytest
import torch
from training import Setting, codes_of

from lowbit.methods.lkd import lkd


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def test_blocks_before_do_not_matter(setting: Setting) -> None:
    """The second block's result is the same bits whether the first one has 2 bits or 8; its loss falls."""
    found = []
    for before in ("w2a16-g32", "w8a16"):
        setting.units(before)[0].finish()
        units = setting.units_after("w2a16-g32-asym", 1)
        lkd(units, steps=15, batch=4, rate=0.05)
        note = units[0].notes[-1]
        assert note["kept"] and note["loss_after"] < 0.9 * note["loss_before"]
        found.append(codes_of(units))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_scales_stay(setting: Setting) -> None:
    """Only weights train."""
    units = setting.units("w3a8-g32")
    scales = {name: q.scale for name, q in units[0].assigned.items()}
    before = codes_of(units)
    lkd(units, steps=15, batch=4, rate=0.05)
    assert all(torch.equal(scales[name], q.scale) for name, q in units[0].assigned.items())
    assert any(not torch.equal(before[name], codes) for name, codes in codes_of(units).items())
