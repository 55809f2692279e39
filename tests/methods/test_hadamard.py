"""Turned inputs in linears of any model; of a scan's output, see test_reorder."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from lowbit.data import DataSpec
from lowbit.export import load
from lowbit.recipe import Recipe, Rule, Step, read_recipe
from lowbit.run import quantize


def test_turned_inputs_in_a_whole_run(tmp_path: Path) -> None:
    """Of down_proj, as QuaRot does: what is loaded computes nearly what the model did, and nothing like it unturned."""
    model = tiny.save("llama", tmp_path / "model")
    steps = (Step(method="hadamard", options={"match": "down_proj"}), Step(method="rtn"))
    recipe = Recipe(rules=(Rule(match="", scheme="w8a16"),), steps=steps, format="lowbit")
    report = quantize(str(tmp_path / "model"), tmp_path / "out", recipe=recipe)
    assert all(len(block["transforms"][0]["linears"]) == 1 for block in report["blocks"])
    tokens = tiny.tokens(1, 20)
    with torch.no_grad():
        expected, found = (m(tokens).logits for m in (model, load(str(tmp_path / "out"))))
    assert float((found - expected).norm() / expected.norm()) < 0.06


def test_engines_that_do_not_turn_are_refused() -> None:
    with pytest.raises(ValueError, match="no engine turns inputs"):
        Recipe(rules=(Rule(match="", scheme="w8a16"),), steps=(Step(method="hadamard"), Step(method="rtn")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_quantized_scan_decodes_as_it_prefills(name: str, tmp_path: Path) -> None:
    """2,048 tokens of a saved and reloaded model, in one pass, and the last 200 of them step by step."""
    tiny.save(name, tmp_path / "model")
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "quamba2-w8a8.toml")
    data = DataSpec(source="random", rows=8, length=128)
    quantize(str(tmp_path / "model"), tmp_path / "out", recipe=replace(recipe, data=data))
    model = load(str(tmp_path / "out"))
    tokens = tiny.tokens(1, 2048)
    with torch.no_grad():
        whole = model(tokens).logits
        out = model(tokens[:, :1848], use_cache=True)
        found, cache = [], out.cache_params
        for t in range(1848, 2048):
            found.append(model(tokens[:, t : t + 1], cache_params=cache, use_cache=True).logits)
    difference = (torch.cat(found, 1) - whole[:, 1848:]).norm() / whole[:, 1848:].norm()
    assert float(difference) < 0.01, float(difference)
