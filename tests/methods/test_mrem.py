"""MREM: several blocks at once, their weights and scales, fed by the float model first and by the quantized one last."""

import pytest
import torch
from torch import Tensor
from training import Setting, codes_of

from lowbit import reconstruct as module
from lowbit.methods.mrem import mrem
from lowbit.unit import Unit


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def test_module_of_two_blocks(setting: Setting) -> None:
    """Weights and scales of both blocks train."""
    units = setting.units("w2a16-g32-asym", count=2)
    scales = {name: q.scale for unit in units for name, q in unit.assigned.items()}
    before = codes_of(units)
    mrem(units, steps=20, batch=4, rate=0.05)
    note = units[0].notes[-1]
    assert note["kept"] and note["loss_after"] < 0.9 * note["loss_before"] and note["blocks"] == 2
    for unit in units:
        assert all(not torch.equal(before[name], q.codes) for name, q in unit.assigned.items())
        assert all(not torch.equal(scales[name], q.scale) for name, q in unit.assigned.items())


def test_teacher_forcing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda falls from 1 to 0 over the first half of the steps; the result is judged without the teacher."""
    seen: list[float] = []
    plain = module._Filed.loss

    def loss(self: module._Filed, part: tuple[int, int], parameters: list[dict[str, Tensor]], forcing: float) -> Tensor:
        seen.append(forcing)
        return plain(self, part, parameters, forcing)

    monkeypatch.setattr(module._Filed, "loss", loss)
    units: list[Unit] = setting.units(first=1)
    mrem(units, blocks=1, steps=8, batch=2)
    assert seen == [0.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    seen.clear()
    mrem(setting.units(first=1), blocks=1, inputs="teacher", steps=2, batch=2)
    assert seen == [1.0] * 4
