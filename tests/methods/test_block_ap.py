"""Block-AP: weights, scales and zero points of one block train together."""

import pytest
import torch
from training import Setting, codes_of

from lowbit.methods.block_ap import block_ap


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def test_all_of_it_trains(setting: Setting) -> None:
    units = setting.units("w2a16-g32-asym")
    before = {name: (q.codes, q.scale, q.zero) for name, q in units[0].assigned.items()}
    block_ap(units, steps=40, batch=4, rate=0.05, scale_rate=0.01)
    note = units[0].notes[-1]
    assert note["kept"] and note["loss_after"] < 0.9 * note["loss_before"]
    for name, q in units[0].assigned.items():
        codes, scale, zero = before[name]
        assert not torch.equal(codes, q.codes) and not torch.equal(scale, q.scale)
    zeros = [(before[name][2], q.zero) for name, q in units[0].assigned.items()]
    assert any(old is not None and new is not None and not torch.equal(old, new) for old, new in zeros)
    assert codes_of(units)
