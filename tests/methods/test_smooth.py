"""SmoothQuant: the formula by hand, what it balances, what it does to outliers, and that the model stays what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lowbit.arch import discover
from lowbit.links import Link
from lowbit.methods import smooth as module
from lowbit.methods.smooth import smooth, smoothing_scales
from lowbit.qtensor import Scheme, dequantize, fake_quantize_input, parse_scheme
from lowbit.source import open_source
from lowbit.unit import Stream, Unit

OUTLIER = 5


class Setting:
    """The first block of a tiny model, with an outlier of 200 times in one channel of every norm if wanted."""

    def __init__(self, folder: Path, name: str = "llama", *, outlier: bool = True, scheme: str = "w8a8") -> None:
        tiny.save(name, folder / "model", dtype=torch.float32, seed=3)
        self.arch = discover(open_source(str(folder / "model")))
        self.tokens = tiny.tokens(4, 24)
        (folder / "work").mkdir()
        self.stream = Stream(self.arch, self.tokens, folder / "work")
        self.stream.start()
        self.outlier, self.scheme = outlier, scheme

    def unit(self) -> Unit:
        """The block, loaded anew."""
        block = self.arch.blocks[0]
        self.arch.load(block.tensors)
        part = self.arch.model.get_submodule(block.name)
        if self.outlier:
            for norm, readers in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                part.get_submodule(norm).weight.data[OUTLIER] *= 200
                for reader in readers:
                    part.get_submodule(reader).weight.data[:, OUTLIER] /= 200
        schemes: dict[str, Scheme] = {linear.name: parse_scheme(self.scheme) for linear in block.linears}
        return Unit(self.arch, block, schemes, self.stream, torch.float32)


def output_error(unit: Unit) -> float:
    """The squared error of all linears' outputs with rounded inputs and weights, on every token, relative."""
    total = power = 0.0
    for linear in unit.linears:
        x, w = unit.sample(linear, 10**6), unit.weight(linear)
        spec = unit.scheme(linear).input
        assert spec is not None
        wanted = x @ w.T
        found = fake_quantize_input(x, spec) @ dequantize(unit.nearest(linear, w)).T
        total += float((found - wanted).square().sum())
        power += float(wanted.square().sum())
    return total / power


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_formula(alpha: float) -> None:
    """Equation 4, channel by channel; a channel without inputs or without weights stays."""
    x, w = [4.0, 100.0, 0.25, 0.0, 3.0], [0.5, 0.01, 2.0, 1.0, 0.0]
    expected = [a**alpha / b ** (1 - alpha) if a and b else 1.0 for a, b in zip(x, w, strict=True)]
    torch.testing.assert_close(smoothing_scales(torch.tensor(x), torch.tensor(w), alpha), torch.tensor(expected))


def norm_links(unit: Unit) -> list[Link]:
    return [link for link in unit.links if link.kind == "norm"]


def maxima(unit: Unit, link: Link) -> tuple[Tensor, Tensor]:
    """The largest input and weight of every channel of a norm, over all linears that read it."""
    readers = [linear for linear, _ in unit.consumers(link)]
    x = unit.sample(readers[0], 10**6).abs().amax(0)
    return x, torch.stack([unit.weight(linear).abs().amax(0) for linear in readers]).amax(0)


def test_half_makes_inputs_and_weights_alike(setting: Setting) -> None:
    """max |x_j / s_j| = max |w_j s_j| in every channel, and one of them is 1 everywhere at the ends."""
    for alpha in (0.5, 0.0, 1.0):
        unit = setting.unit()
        smooth(unit, alpha=alpha, links="norm")
        for link in norm_links(unit):
            unit._samples = {}
            x, w = maxima(unit, link)
            if alpha == 0.5:
                torch.testing.assert_close(x, w, rtol=1e-3, atol=1e-5)
            else:
                torch.testing.assert_close(w if alpha == 0 else x, torch.ones_like(x), rtol=1e-3, atol=1e-5)


def test_outliers_are_gone(setting: Setting) -> None:
    """The outputs of rounded linears are far better, and the block computes what it did."""
    plain = output_error(setting.unit())
    unit = setting.unit()
    before = unit.outputs()[1]
    smooth(unit)
    unit._samples = {}
    assert output_error(unit) < 0.05 * plain
    assert float((unit.outputs()[1] - before).norm()) < 1e-5 * float(before.norm())
    (note,) = unit.notes
    assert json.loads(json.dumps(note)) == {"step": "smooth", "links": 4, "alpha": [0.5] * 4}


def test_auto_is_the_best_of_its_grid(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the joint error, which is recomputed here on the same tokens; never worse than none."""
    monkeypatch.setattr(module, "_ALPHAS", (0.0, 0.25, 0.5, 0.75, 1.0))
    unit = setting.unit()
    link = norm_links(unit)[0]
    readers = [linear for linear, _ in unit.consumers(link)]
    x_largest, w_largest = maxima(unit, link)
    losses: dict[float | None, float] = {}
    for alpha in (None, 0.0, 0.25, 0.5, 0.75, 1.0):
        s = torch.ones_like(x_largest) if alpha is None else x_largest**alpha / w_largest ** (1 - alpha)
        losses[alpha] = 0.0
        for linear in readers:
            x, w = unit.sample(linear, 256), unit.weight(linear)
            spec = unit.scheme(linear).input
            assert spec is not None
            rounded = fake_quantize_input(x / s, spec) @ dequantize(unit.nearest(linear, w * s)).T
            losses[alpha] += float((rounded - x @ w.T).square().sum())
    smooth(unit, alpha="auto", links="norm")
    best = min(losses, key=losses.__getitem__)
    assert unit.notes[0]["alpha"][0] == best and losses[best] < 0.1 * losses[None]


def test_auto_leaves_alone_what_is_best_alone(tmp_path: Path) -> None:
    """With float inputs and weights on the grid, any scaling can only lose."""
    setting = Setting(tmp_path, outlier=False, scheme="w2a16-channel-asym")
    unit = setting.unit()
    for linear in unit.linears:
        param = linear.view(setting.arch.param(linear))
        param.copy_(torch.where(param > 0, 0.25, 0.0).detach())
    smooth(unit, alpha="auto", links="norm")
    assert unit.notes[0]["alpha"] == [None, None]


def test_links_of_a_kind(setting: Setting) -> None:
    """Norms alone leave values and up rows as they were."""
    for kind, touched in (("norm", {"input_layernorm", "post_attention_layernorm"}), ("linear", set())):
        unit = setting.unit()
        part = setting.arch.model.get_submodule(unit.block.name)
        before = {name: value.clone() for name, value in part.state_dict().items()}
        smooth(unit, links=kind)  # type: ignore[arg-type]
        after = part.state_dict()
        changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in changed if "norm" in name} == touched
        assert ("mlp.down_proj" in changed) == (kind == "linear")


def test_nothing_to_rescale(tmp_path: Path) -> None:
    """BERT's norms are no links; the error says what was tried."""
    unit = Setting(tmp_path, "bert", outlier=False).unit()
    message = "smooth: .* has no links of kind 'norm' to rescale .attention.output.LayerNorm: what it puts out also flows past"
    with pytest.raises(ValueError, match=message):
        smooth(unit, links="norm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "gemma3", "phi3", "opt", "gptj", "falcon_old", "mixtral", "qwen2_moe", "bert"]
)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_every_architecture_computes_the_same(name: str, alpha: Any, tmp_path: Path) -> None:
    unit = Setting(tmp_path, name, outlier=False).unit()
    before = unit.outputs()[1]
    smooth(unit, alpha=alpha)
    assert float((unit.outputs()[1] - before).norm()) < 1e-4 * float(before.norm())
    assert unit.notes[0]["links"] == len(unit.links) > 0
