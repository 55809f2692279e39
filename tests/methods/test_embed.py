"""Rounded embeddings in whole runs: what is written, what later steps see, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowbit import run
from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, load
from lowbit.qtensor import dequantize, find_params, parse_scheme, quantize
from lowbit.recipe import Recipe, Rule, Step
from lowbit.run import quantize as quantize_model
from lowbit.source import open_source

DATA = DataSpec(source="random", rows=4, length=16)
NAME = "model.embed_tokens.weight"


def recipe(*steps: Step, **what: Any) -> Recipe:
    return Recipe(rules=(Rule(match="", scheme="w8a16"),), steps=steps, data=DATA, **{"format": "lowbit"} | what)


def embedded(scheme: str = "w4a16-g32", *others: Step) -> Recipe:
    return recipe(*others, Step(method="embed", options={"scheme": scheme}), Step(method="rtn"))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym", "w3a16-g16", "nf4"])
@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_run(name: str, scheme: str, tmp_path: Path) -> None:
    """The table is stored in few bits, reads back as rounded to nearest, and the head is rounded only where it is tied."""
    tiny.save(name, tmp_path / "model", dtype=torch.bfloat16, seed=4)
    report = quantize_model(str(tmp_path / "model"), tmp_path / "out", recipe=embedded(scheme))
    original = open_source(str(tmp_path / "model")).read([NAME])[NAME]
    spec = parse_scheme(scheme).weight
    w = original.float()
    expected = dequantize(quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec), torch.bfloat16)
    source = QuantizedSource(tmp_path / "out")
    assert torch.equal(source.read([NAME])[NAME], expected) and not torch.equal(expected, original)
    row = report["linears"][-1]
    assert (row["name"], row["scheme"], row["shape"]) == (NAME.removesuffix(".weight"), scheme, (tiny.VOCAB, tiny.HIDDEN))
    assert row["error"] == pytest.approx(float((expected.float() - w).square().sum() / w.square().sum()), rel=0.05)
    assert source.bits_per_weight(row["name"]) == pytest.approx(
        row["bits_per_weight"], abs=0.15
    )  # zero points take a byte there
    assert not any(left["name"] == row["name"] for left in report["float_matrices"])
    model = load(str(tmp_path / "out"))
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert torch.equal(model.get_output_embeddings().weight, expected) == (name == "llama")


def test_rotated_embeddings(tmp_path: Path) -> None:
    """After rotate it is the rotated table that is rounded, and the rotated head stays as it is."""
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, seed=4)
    plain = quantize_model(
        str(tmp_path / "model"), tmp_path / "plain", recipe=recipe(Step(method="rotate"), Step(method="rtn"))
    )
    found = quantize_model(str(tmp_path / "model"), tmp_path / "out", recipe=embedded("w8a16", Step(method="rotate")))
    assert len(found["linears"]) == len(plain["linears"]) + 1
    a, b = (QuantizedSource(tmp_path / folder) for folder in ("plain", "out"))
    turned, rounded = a.read([NAME])[NAME].float(), b.read([NAME])[NAME].float()
    assert 0 < float((turned - rounded).norm()) < 0.02 * float(turned.norm())
    assert torch.equal(a.read(["lm_head.weight"])["lm_head.weight"], b.read(["lm_head.weight"])["lm_head.weight"])


def test_the_gate_compares_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, seed=4)
    original = run.encode

    def wrong(name: str, q: Any, *rest: Any) -> Any:
        tensors = original(name, q, *rest)
        if name.endswith("embed_tokens"):
            tensors[f"{name}.scale"] = tensors[f"{name}.scale"] * 1.5
        return tensors

    monkeypatch.setattr(run, "encode", wrong)
    with pytest.raises(RuntimeError, match="gate: model.embed_tokens reads back with other values"):
        quantize_model(str(tmp_path / "model"), tmp_path / "out", recipe=embedded())


def test_refused(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, seed=4)
    with pytest.raises(ValueError, match="no engine loads quantized embeddings; use format"):
        embedded().__class__(rules=(Rule(match="", scheme="w8a16"),), steps=(Step(method="embed"), Step(method="rtn")))
    for scheme, message in (("w8a8", "embeddings have no input to quantize"), ("w4a16-g48", "do not divide its 64 input")):
        with pytest.raises(ValueError, match=message):
            quantize_model(str(tmp_path / "model"), tmp_path / "out", recipe=embedded(scheme))
    with pytest.raises(ValueError, match="steps embed, rotate, rtn: first what rewrites the model"):
        recipe(Step(method="embed"), Step(method="rotate"), Step(method="rtn"))
