"""Every recipe of recipes/ in a whole run on the demo's model: the gate holds, and the result is as good as it was."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lowbit.data import DataSpec, evaluation_tokens
from lowbit.evaluate import evaluate_model
from lowbit.export import load
from lowbit.recipe import METHODS, Rule, Step, read_recipe
from lowbit.run import quantize

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
DATA = DataSpec(source=str(DEMO / "public_domain_calibration.txt"), rows=16, length=128)
TRAINING = {"tesseraq": 20}  # optimizer steps, where it needs more than 8
# Mean KL divergence from the float model on 4 windows of 256 tokens, in nats, rounded up by a quarter.
MOST = {
    "autoround-w4a16": 0.072,
    "awq-gptq-w3a16": 0.18,
    "awq-gptq-w4a16": 0.051,
    "awq-w4a16": 0.05,
    "efficientqat-w2a16": 0.87,
    "fp8": 0.0071,
    "fp8-block": 0.007,
    "fp8-kv-cache": 0.0097,
    "gptaq-w4a16": 0.055,
    "gptq-signround-w3a16": 0.21,
    "gptq-w3a16": 0.17,
    "gptq-w4a16": 0.052,
    "gptq-w4a16-g64-asym": 0.034,
    "gptq-w8a8": 0.0025,
    "hqq-w4a16": 0.052,
    "imatrix-w4a16": 0.068,
    "lorc-w3a16": 0.16,
    "lut-gemm-bcq3": 0.14,
    "mixed-w8a8-w4a16": 0.043,
    "mr-gptq-mxfp4": 0.17,
    "mrem-w4a8": 0.068,
    "mxfp4-w4a16": 0.053,
    "mxfp4-w4a4": 0.15,
    "mxfp8": 0.0083,
    "mxint4-w4a4": 0.2,
    "nf4": 0.048,
    "nvfp4-w4a4": 0.081,
    "omniquant-w2a16": 0.92,
    "omniquant-w3a16": 0.34,
    "omniquant-w4a4": 0.33,
    "omniquant-w6a6": 0.02,
    "quarot-w4a4": 0.22,
    "q-bert-w4a8": 0.112,
    "quamba2-w8a8": 0.0048,
    "quamba2-w4a8": 0.104,
    "quamba2-w4a16": 0.104,
    "rtn-w4a16": 0.081,
    "signround-mxfp4": 0.057,
    "smoothquant-gptq-w8a8": 0.0017,
    "smoothquant-plus-w4a16": 0.062,
    "smoothquant-w8a8": 0.0021,
    "smoothquant-w8a8-static": 0.0035,
    "squeezellm-w3": 0.19,
    "tesseraq-w2a16": 0.62,
    "two-level-w4a8": 0.064,
    "zeroquant-fp-w4a8": 0.062,
    "zeroquant-lkd-w4-8": 0.098,
    "zeroquant-w4-8": 0.11,
    "zeroquant-w8a8": 0.0031,
}


def shortened(step: Step) -> Step:
    """A step that trains, a few times only, with rates to match."""
    if METHODS[step.method].kind != "trainer":
        return step
    return replace(step, options=step.options | {"steps": TRAINING.get(step.method, 8), "batch": 8})


def _small_groups(rule: Rule) -> Rule:
    """A rule for matrices of 64 columns."""
    return replace(rule, scheme=rule.scheme.replace("g128", "g64"))


@cache
def reference() -> tuple[Any, Tensor]:
    """The float model and the text."""
    from transformers import AutoTokenizer

    tokens = evaluation_tokens(str(DEMO / "public_domain_eval.txt"), AutoTokenizer.from_pretrained(DEMO / "llama-7m"))
    return load(str(DEMO / "llama-7m"), dtype=torch.float32), tokens


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipe_runs(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    recipe = replace(recipe, data=DATA) if recipe.data is not None else recipe
    recipe = replace(recipe, steps=tuple(shortened(step) for step in recipe.steps))
    if path.stem.startswith("quamba2"):  # of scans, which the demo's model has none of
        tiny.save("mamba2", tmp_path / "model")
        recipe = replace(recipe, data=replace(DATA, source="random"), rules=tuple(map(_small_groups, recipe.rules)))
        quantize(str(tmp_path / "model"), tmp_path / "out", recipe=recipe)
        models = [load(str(folder), dtype=torch.float32) for folder in (tmp_path / "out", tmp_path / "model")]
        found = evaluate_model(models[0], tiny.tokens(1, 512)[0], window=256, reference=models[1])
        print(f"{path.stem}: KL {found.kl:.4g}")
        assert found.kl is not None and found.kl < MOST[path.stem]
        return
    report = quantize(str(DEMO / "llama-7m"), tmp_path / "out", recipe=recipe)
    assert report["gate"]["weights_equal"]
    notes = [note for block in report["blocks"] for note in block["transforms"]]
    assert all(note["links"] > 0 for note in notes if note["step"] in ("smooth", "awq"))
    model, tokens = reference()
    found = evaluate_model(load(str(tmp_path / "out"), dtype=torch.float32), tokens, window=256, max_windows=4, reference=model)
    print(f"{path.stem}: KL {found.kl:.4g}")
    assert found.kl is not None and found.kl < MOST[path.stem]


def test_every_recipe_has_a_bound() -> None:
    assert set(MOST) == {path.stem for path in (ROOT / "recipes").glob("*.toml")}
