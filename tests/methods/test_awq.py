"""AWQ: its scales by hand, its choice recomputed on explicit inputs, and what it is worth where few inputs are large."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from lowbit.arch import discover
from lowbit.links import Link
from lowbit.methods.awq import awq, awq_scales
from lowbit.methods.rtn import rtn
from lowbit.qtensor import Scheme, dequantize, parse_scheme
from lowbit.source import open_source
from lowbit.unit import Stream, Unit


class Setting:
    """The first block of a tiny model; the norms' weights follow a steep curve, so that few inputs matter most."""

    def __init__(self, folder: Path, name: str = "llama", scheme: str = "w3a16-g32") -> None:
        tiny.save(name, folder / "model", dtype=torch.float32, seed=3)
        self.arch = discover(open_source(str(folder / "model")))
        (folder / "work").mkdir()
        self.stream = Stream(self.arch, tiny.tokens(4, 24), folder / "work")
        self.stream.start()
        self.scheme = scheme

    def unit(self) -> Unit:
        """The block, loaded anew."""
        block = self.arch.blocks[0]
        self.arch.load(block.tensors)
        part = self.arch.model.get_submodule(block.name)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            if hasattr(part, norm):
                weight = part.get_submodule(norm).weight.data
                weight.copy_(torch.where(torch.arange(len(weight)) % 16 == 3, 12.0, 0.5))
        schemes: dict[str, Scheme] = {linear.name: parse_scheme(self.scheme) for linear in block.linears}
        return Unit(self.arch, block, schemes, self.stream, torch.float32)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def error_on_inputs(unit: Unit, link: Link, s: Tensor) -> float:
    """sum |x (Q(w s) / s - w)^T|^2 over all tokens and linears that read the link."""
    total = 0.0
    for linear, channels in unit.consumers(link):
        x, w, columns = unit.sample(linear, 10**6), unit.weight(linear), s[channels]
        q = dequantize(unit.nearest(linear, w * columns)) / columns
        total += float((x.double() @ (q - w).double().T).square().sum())
    return total


def test_scales_by_hand() -> None:
    """mean |x|^alpha over the root of the largest times the smallest; channels without inputs count as 1."""
    mean = torch.tensor([4.0, 1.0, 0.25, 0.0])
    torch.testing.assert_close(awq_scales(mean, 0.5), torch.tensor([2.0, 1.0, 0.5, 1.0]))
    torch.testing.assert_close(awq_scales(mean[:2], 0.5), torch.tensor([2.0, 1.0]) / 2**0.5)
    assert torch.equal(awq_scales(mean, 0.0), torch.ones(4))


def test_the_best_alpha_wins(setting: Setting) -> None:
    """Recomputed with the inputs themselves instead of their Gram matrix; and much better than none."""
    unit = setting.unit()
    links = list(unit.links)
    expected = []
    for link in links[:2]:  # of norms, whose scales leave the other links' inputs as they are
        assert link.kind == "norm"
        mean = unit.sample(unit.consumers(link)[0][0], 10**6).abs().mean(0)
        losses = {alpha / 20: error_on_inputs(unit, link, awq_scales(mean, alpha / 20)) for alpha in range(20)}
        best = min(losses, key=losses.__getitem__)
        assert losses[best] < 0.8 * error_on_inputs(unit, link, torch.ones(link.channels))
        expected.append(best)
    awq(unit)
    assert unit.notes[0]["step"] == "awq" and unit.notes[0]["links"] == len(links)
    assert unit.notes[0]["alpha"][:2] == pytest.approx(expected)


def test_weights_on_the_grid_stay(setting: Setting) -> None:
    """Nothing is better than no error at all."""
    setting.scheme = "w2a16-channel-asym"
    unit = setting.unit()
    for linear in unit.linears:
        param = linear.view(setting.arch.param(linear))
        param.copy_(torch.where(param > 0, 0.25, 0.0).detach())
    awq(unit)
    assert unit.notes[0]["alpha"] == [None] * 4


def test_the_block_computes_the_same_and_rounds_better(setting: Setting) -> None:
    errors = {}
    for scaled in (False, True):
        unit = setting.unit()
        before = unit.outputs()[1]
        if scaled:
            awq(unit)
            assert float((unit.outputs()[1] - before).norm()) < 1e-5 * float(before.norm())
        for linear in unit.linears:
            unit.gram(linear)
        rtn(unit)
        errors[scaled] = {name.rpartition(".")[2]: record.error for name, record in unit.records.items()}
        assert {record.error_kind for record in unit.records.values()} == {"output"}
    assert all(errors[True][name] < 0.8 * errors[False][name] for name in ("q_proj", "k_proj", "gate_proj"))


def test_links_of_a_kind(setting: Setting) -> None:
    unit = setting.unit()
    awq(unit, links="linear")
    assert unit.notes[0]["links"] == 2
    bare = Setting(setting.stream.folder, "bert")
    with pytest.raises(ValueError, match="awq: .* has no links of kind 'norm'"):
        awq(bare.unit(), links="norm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "opt", "gpt2", "falcon_old", "mixtral", "qwen2_moe", "bert"])
def test_every_architecture_computes_the_same(name: str, tmp_path: Path) -> None:
    unit = Setting(tmp_path, name).unit()
    before = unit.outputs()[1]
    awq(unit)
    assert float((unit.outputs()[1] - before).norm()) < 1e-4 * float(before.norm())
    assert any(alpha is not None for alpha in unit.notes[0]["alpha"])
