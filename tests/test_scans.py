"""Quantized scans in models on the kernels compute what the simulation does: in one pass, step by step, padded, in beams."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lowbit import export, runtime, scans
from lowbit.arch import Arch
from lowbit.data import DataSpec
from lowbit.decoding import Decoder, generate, reason_against_graph
from lowbit.export import QuantizedSource
from lowbit.recipe import Rule, read_recipe
from lowbit.run import quantize
from lowbit.scans import ScanMixer
from lowbit.ssm import CHUNK

FEWER = {"w4a8-g128-astatic": "w4a8-g32-astatic", "w4a16-g128": "w4a16-g32"}  # columns of a tiny model
LENGTH = CHUNK + 20
# KL to the simulation in float32, on packed weights in float16. Scans round what is computed in other last bits, which a random
# model amplifies: the simulation with its weights in bfloat16 is as far away. In float32 nothing differs.
MOST = 0.01
EXACT = 1e-6


def quamba(name: str, folder: Path, variant: str, *rules: Rule, skip: float = 1.0) -> str:
    """A tiny model, quantized by one of the recipes, `rules` before its own; on disk. skip: its D are so much larger."""
    model = tiny.save(name, folder / "model", dtype=torch.float32)
    if skip != 1:
        for key, parameter in model.named_parameters():
            parameter.data *= skip if key.endswith(".D") else 1
        model.save_pretrained(folder / "model", max_shard_size="64KB")
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / f"quamba2-{variant}.toml")
    own = tuple(replace(rule, scheme=FEWER.get(rule.scheme, rule.scheme)) for rule in recipe.rules)
    data = DataSpec(source="random", rows=4, length=LENGTH)
    steps = tuple(step for step in recipe.steps if step.method != "embed")
    quantize(str(folder / "model"), str(folder / "out"), recipe=replace(recipe, rules=(*rules, *own), steps=steps, data=data))
    return str(folder / "out")


def in_float32(out: str) -> Any:
    """Int8 scans between dequantized projections, so that nothing but the scans differs from the simulation."""
    source = QuantizedSource(Path(out))
    arch = Arch(source, torch.float32)
    model: Any = arch.fill()
    assert not any(scans.place(arch, source)[0].values())
    sites = {arch.site(source.modules[name].tensor): given for name, given in source.inputs().items()}
    export.quantize_inputs(model, sites)
    return model


def kl(wanted: Tensor, found: Tensor) -> float:
    p, q = (logits.float().log_softmax(-1) for logits in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def in_parts(model: Any, tokens: Tensor) -> Tensor:
    """Logits of 30 tokens, then of 25 more, then of one after the other past the end of a run."""
    out = model(tokens[:, :30], use_cache=True)
    found = [out.logits]
    for part in (tokens[:, 30:55], *tokens[:, 55:].split(1, 1)):
        found.append(model(part, cache_params=out.cache_params, use_cache=True).logits)
    return torch.cat(found, 1)


@torch.no_grad()
def test_equals_the_simulation(tmp_path: Path) -> None:
    """In float32, whatever the lengths of the calls, with padded rows, and where beams select rows of the cache."""
    out = quamba("mamba2", tmp_path, "w8a8")
    simulated, model, tokens = export.load(out), in_float32(out), tiny.tokens(2, LENGTH)
    assert sum(isinstance(module, ScanMixer) for module in model.modules()) == tiny.LAYERS
    wanted = simulated(tokens).logits
    assert kl(wanted, model(tokens).logits) < EXACT and kl(wanted, in_parts(model, tokens)) < EXACT
    floats = export.load(str(tmp_path / "model"))
    assert kl(floats(tokens).logits, wanted) > 1e-4
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    a, b = (each(tokens, attention_mask=mask).logits for each in (simulated, model))
    assert kl(a[0, 9:], b[0, 9:]) < EXACT and kl(a[1], b[1]) < EXACT and kl(a[0, 9:], wanted[0, 9:]) > 1e-4
    options: dict[str, Any] = {"max_new_tokens": CHUNK, "num_beams": 3, "eos_token_id": None, "pad_token_id": tiny.PAD}
    a, b = (each.generate(tokens[:, :9], **options) for each in (simulated, model))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "variant"), [("mamba2", "w4a8"), ("bamba", "w8a8"), ("mamba2", "w4a16")])
@torch.no_grad()
def test_recipes_on_packed_weights(name: str, variant: str, tmp_path: Path) -> None:
    """Every linear is packed and every quantized scan in int8; steps are the prefill, to the rounding of 16 bits."""
    out, tokens = quamba(name, tmp_path, variant), tiny.tokens(2, LENGTH)
    model = runtime.load(out, dtype=torch.float16, kernels=True)
    assert {row.runs for row in model.lowbit} == ({"packed"} if variant == "w4a16" else {"packed", "int8"})
    wanted, found = export.load(out)(tokens).logits, model(tokens).logits
    assert kl(wanted, found) < MOST
    if name == "bamba":  # transformers' own model decodes otherwise than it fills
        return
    assert kl(found, in_parts(model, tokens)) < 1e-4
    prompt = tokens[:, :9]
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(model, prompt, tokens=20), plain)


@pytest.mark.parametrize("rules", [(), (Rule(match="out_proj$", scheme="w4a16-g32"),)], ids=["codes", "floats"])
@torch.no_grad()
def test_scans_beyond_float16(rules: tuple[Rule, ...], tmp_path: Path) -> None:
    """What a scan gives may be more than float16 holds; only its norm need not be. At once and step by step."""
    out, tokens = quamba("mamba2", tmp_path, "w8a8", *rules, skip=1e5), tiny.tokens(2, 60)
    model, scanned = runtime.load(out, dtype=torch.float16, kernels=True), []
    norm = model.get_submodule("backbone.layers.0.mixer.norm")
    norm.register_forward_pre_hook(lambda module, args: scanned.append(float(args[0].abs().max())))
    wanted = export.load(out)(tokens).logits
    assert kl(wanted, model(tokens).logits) < MOST and kl(wanted, in_parts(model, tokens)) < MOST
    assert torch.finfo(torch.float16).max < max(scanned) < torch.inf


def test_scans_without_a_kernel_are_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba's, those with points in other formats and those with long convolutions, on packed weights all the same; said, and
    never a graph."""
    tokens, left = tiny.tokens(2, 20), [Rule(match=r"\.state$", scheme="float")]
    cases: list[tuple[str, list[Rule], int, str]] = [
        ("mamba", [], scans.LONGEST, "no kernel for the scans of Mamba"),
        ("mamba2", left, scans.LONGEST, "the kernels of scans need int8 state"),
        ("mamba2", [], 3, "its convolution has more than 3 taps"),
    ]
    for case, (name, rules, longest, reason) in enumerate(cases):
        monkeypatch.setattr(scans, "LONGEST", longest)
        out = quamba(name, tmp_path / str(case), "w8a8", *rules)
        with pytest.warns(UserWarning, match=f"3 scans simulated: .*{reason}"):
            model = runtime.load(out, dtype=torch.float16, kernels=True)
        with torch.no_grad():
            wanted, found = export.load(out)(tokens).logits, model(tokens).logits
        assert kl(wanted, found) < MOST
        assert {row.runs for row in model.lowbit} == {"packed", "simulated"}
        assert any(isinstance(module, nn.Conv1d) for module in model.modules())


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(tmp_path: Path) -> None:
    """Prefill, steps, and steps in a CUDA graph that is replayed past the end of a run, and for a second prompt."""
    out, tokens = quamba("mamba2", tmp_path, "w4a8"), tiny.tokens(2, LENGTH)
    model = runtime.load(out, dtype=torch.float16, device="cuda")
    wanted = export.load(out)(tokens).logits
    assert {row.runs for row in model.lowbit} == {"packed", "int8"}
    assert kl(wanted, model(tokens.cuda()).logits.cpu()) < MOST
    assert kl(wanted, in_parts(model, tokens.cuda()).cpu()) < MOST
    assert reason_against_graph(model, LENGTH) is None
    decoder = Decoder(model, 1, LENGTH)
    for row in range(2):
        found = [decoder.prefill(tokens[row : row + 1, :9].cuda()).clone()]
        if row == 0:
            decoder.capture()
        for token in tokens[row, 9:]:
            decoder.token.fill_(int(token))
            found.append(decoder.step().clone())
        assert kl(wanted[row, 8:], torch.stack([each[0] for each in found]).cpu()) < MOST
