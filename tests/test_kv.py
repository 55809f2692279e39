"""The simulated key-value cache against loops that do one query at a time, and on tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit.cli import main
from lowbit.data import DataSpec, calibration_tokens
from lowbit.export import QuantizedSource
from lowbit.kv import QuantizedCache, parse_cache, simulate_cache, through_cache
from lowbit.recipe import short_recipe


@pytest.mark.parametrize("text", ["int9", "int4-w", "fp8-g64", "fp8-kchannel", "int4-g0", "int4-w8-g32", "", "fp4"])
def test_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="unknown key-value cache"):
        parse_cache(text)


def test_grammar_reads_everything() -> None:
    spec = parse_cache(" INT3-g16-kchannel-w64 ")
    assert (spec.name, spec.format.name, spec.group, spec.channel_keys, spec.window) == (
        "int3-g16-kchannel-w64",
        "int3",
        16,
        True,
        64,
    )
    plain = parse_cache("fp8-w4")
    assert (plain.format.name, plain.group, plain.channel_keys, plain.window) == ("fp8_e4m3", None, False, 4)


def round_run(values: list[float], bits: int) -> list[float]:
    """Asymmetric rounding of numbers that share a scale, in Python floats."""
    low, high = min(0.0, *values), max(0.0, *values)
    step = max(high - low, 1e-12) / (2**bits - 1)
    least = -(2 ** (bits - 1))
    zero = round(least - low / step)
    return [(min(max(round(v / step + zero), least), -least - 1) - zero) * step for v in values]


@pytest.mark.parametrize("text", ["int4", "int3-g4", "int2-g2-kchannel", "int8-g8"])
def test_what_comes_back(text: str) -> None:
    spec = parse_cache(text)
    x = torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(1))
    for keys in (True, False):
        expected = x.clone()
        size = spec.group or 8
        if keys and spec.channel_keys:  # the last token stays float: its run is not full
            groups = [(slice(start, start + size), c) for start in range(0, 7 - size + 1, size) for c in range(8)]
        else:
            groups = [(token, slice(start, start + size)) for token in range(7) for start in range(0, 8, size)]
        for batch in range(2):
            for head in range(2):
                for rows, columns in groups:
                    values = x[batch, head, rows, columns].tolist()
                    expected[batch, head, rows, columns] = torch.tensor(round_run(values, spec.format.bits))
        torch.testing.assert_close(through_cache(x, spec, keys=keys), expected, rtol=1e-5, atol=1e-6)


def attend(query: Tensor, key: Tensor, value: Tensor, stored: tuple[Tensor, Tensor], window: int) -> Tensor:
    """Causal attention, one query at a time, in float64; keys and values within `window` are the float ones."""
    out = torch.zeros_like(query, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    offset = key.shape[2] - query.shape[2]
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            for row in range(query.shape[2]):
                here = row + offset
                k = [(key if here - j < window else stored[0])[batch, head // groups, j].double() for j in range(here + 1)]
                v = [(value if here - j < window else stored[1])[batch, head // groups, j].double() for j in range(here + 1)]
                scores = torch.stack([query[batch, head, row].double() @ each for each in k]) / math.sqrt(query.shape[3])
                out[batch, head, row] = torch.softmax(scores, 0) @ torch.stack(v)
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_with_a_window(window: int, heads: int) -> None:
    spec = parse_cache(f"int2-w{window}")
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, n, 6, 8, generator=generator) for n in (heads, 2, 2))
    with QuantizedCache(spec) as cache:
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != 2)
    stored = through_cache(key, spec, keys=True), through_cache(value, spec, keys=False)
    torch.testing.assert_close(found.double(), attend(query, key, value, stored, window), rtol=1e-5, atol=1e-5)
    assert cache.calls == 1
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for given in (mask, torch.where(mask, 0.0, -torch.inf)):
        with QuantizedCache(spec):
            masked = F.scaled_dot_product_attention(query, key, value, attn_mask=given, enable_gqa=heads != 2)
        torch.testing.assert_close(masked, found)


@torch.no_grad()
def test_models() -> None:
    """Fewer bits, more error; a window as long as the text, none."""
    tokens = tiny.tokens(2, 24)
    expected = tiny.build("qwen3", seed=3)(tokens).logits
    errors = []
    for text in ("int8", "int4", "int2", "int2-w24"):
        model = tiny.build("qwen3", seed=3)
        simulate_cache(model, parse_cache(text))
        errors.append(float((model(tokens).logits - expected).square().mean()))
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[3] < 1e-6 * errors[2]


def test_refusals() -> None:
    model = tiny.build("mamba")
    simulate_cache(model, parse_cache("int8"))
    with pytest.raises(ValueError, match="does not call scaled_dot_product_attention"):
        model(tiny.tokens(1, 8))
    other = tiny.build("llama")
    simulate_cache(other, parse_cache("int4-g5"))
    with pytest.raises(ValueError, match="groups of 5 do not divide the 16 channels"):
        other(tiny.tokens(1, 8))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option reaches the model, and the record says so."""
    tiny.save("llama", tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words to read, again and again. " * 40)
    command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--window", "32", "--json"]
    main(command)
    plain = capsys.readouterr().out
    main([*command, "--kv-cache", "int2"])
    cached = capsys.readouterr().out
    assert '"kv_cache": "int2"' in cached and "kv_cache" not in plain
    assert cached.split('"nll"')[1].split(",")[0] != plain.split('"nll"')[1].split(",")[0]
    assert main([*command, "--kv-cache", "int1"]) != 0


def test_scales_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the largest key or value of its attention module in the quantized model, over 448."""
    tiny.save("llama", tmp_path / "model")
    data = DataSpec(source="random", rows=4, length=16)
    lowbit.quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w8a16", kv_cache="fp8", data=data)
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["dynamic"]) == (8, "float", "tensor", False)
    source = QuantizedSource(tmp_path / "out")
    known = source.cache_scales()
    assert list(known) == [f"model.layers.{i}.self_attn" for i in range(tiny.LAYERS)]

    seen: list[tuple[float, float]] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((float(key.abs().max()), float(value.abs().max())))
        return attend(query, key, value, **options)

    monkeypatch.setattr(QuantizedSource, "cache_scales", lambda self: {})
    model = lowbit.load(str(tmp_path / "out"), dtype=torch.float32)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    tokens = calibration_tokens(data, None, vocab_size=tiny.VOCAB).tokens
    with torch.no_grad():
        plain = model(tokens).logits
    expected = [(k / 448, v / 448) for k, v in seen]
    assert [pytest.approx(pair, rel=1e-4) for pair in expected] == list(known.values())
    monkeypatch.undo()
    with torch.no_grad():
        cached = lowbit.load(str(tmp_path / "out"), dtype=torch.float32)(tokens).logits
    assert 0 < float((cached - plain).square().mean()) < 0.01 * float(plain.square().mean())


def test_recipes_with_a_cache() -> None:
    data = DataSpec(source="random")
    with pytest.raises(ValueError, match="engines load fp8 only"):
        short_recipe(scheme="w8a16", kv_cache="int4", data=data)
    with pytest.raises(ValueError, match="only vLLM reads its scales"):
        short_recipe(scheme="w8a16", kv_cache="fp8", data=data, format="lowbit")
    with pytest.raises(ValueError, match="kv_cache needs calibration data"):
        short_recipe(scheme="w8a16", kv_cache="fp8")
    assert short_recipe(scheme="w8a16", kv_cache="fp8", data=data).calibrated
    assert not short_recipe(scheme="w8a16").calibrated


def test_a_model_without_attention_has_no_cache(tmp_path: Path) -> None:
    tiny.save("mamba", tmp_path / "model")
    with pytest.raises(ValueError, match="does not call scaled_dot_product_attention; remove kv_cache"):
        data = DataSpec(source="random", rows=2, length=8)
        lowbit.quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w8a16", kv_cache="fp8", data=data)
