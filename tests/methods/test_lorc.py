"""LoRC in whole runs: what it gives back, what is written, and that PEFT computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, load
from lowbit.recipe import Recipe, Rule, Step
from lowbit.run import quantize
from lowbit.source import open_source

DATA = DataSpec(source="random", rows=8, length=16)


def recipe(*steps: Step, scheme: str = "w3a16-g32", **what: Any) -> Recipe:
    return Recipe(rules=(Rule(match="", scheme=scheme),), steps=steps, data=DATA, **{"engine": "transformers"} | what)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny.save("llama", tmp_path / "llama", dtype=torch.bfloat16, seed=4)
    return tmp_path / "llama"


@pytest.mark.parametrize("whiten", [False, True])
def test_run(whiten: bool, llama: Path, tmp_path: Path) -> None:
    """The error falls in every linear, the weights read back are those with the correction, and bits are counted."""
    plain = quantize(str(llama), tmp_path / "plain", recipe=recipe(Step(method="rtn")))
    steps = (Step(method="rtn"), Step(method="lorc", options={"rank": 8, "whiten": whiten}))
    found = quantize(str(llama), tmp_path / "out", recipe=recipe(*steps))
    assert plain["adapter"] is None and not (tmp_path / "plain" / "adapter").exists()
    assert found["adapter"] == "adapter" and found["gate"]["weights_equal"]
    for before, after in zip(plain["linears"], found["linears"], strict=True):
        assert after["method"] == "rtn+lorc"
        if whiten:
            assert after["error_kind"] == "output" and after["error"] < 0.9 * after["error_rtn"]
        else:
            assert after["error"] < 0.9 * before["error"]
        out, inner = after["shape"]
        assert after["bits_per_weight"] == pytest.approx(before["bits_per_weight"] + 16 * 8 * (out + inner) / (out * inner))
    source = QuantizedSource(tmp_path / "out")
    name = found["linears"][0]["name"]
    assert source.bits_per_weight(name) == pytest.approx(found["linears"][0]["bits_per_weight"], rel=0.1)
    original = open_source(str(llama)).read([f"{name}.weight"])[f"{name}.weight"].double()
    errors = [
        (QuantizedSource(tmp_path / folder).read([f"{name}.weight"])[f"{name}.weight"].double() - original).norm()
        for folder in ("plain", "out")
    ]
    assert whiten or errors[1] < 0.95 * errors[0]
    assert "LoRA adapter in adapter/" in (tmp_path / "out" / "report.md").read_text()


def test_resumed_run_has_every_correction(llama: Path, tmp_path: Path) -> None:
    steps = (Step(method="rtn"), Step(method="lorc", options={"rank": 4}))
    quantize(str(llama), tmp_path / "whole", recipe=recipe(*steps))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(llama), tmp_path / "out", recipe=recipe(*steps), progress=stop)
    quantize(str(llama), tmp_path / "out", recipe=recipe(*steps))
    a, b = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "out"))
    assert a == b


def test_peft_loads_it(llama: Path, tmp_path: Path) -> None:
    """transformers with the adapter computes what lowbit.load computes, and something else without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    steps = (Step(method="rtn"), Step(method="lorc", options={"rank": 8}))
    quantize(str(llama), tmp_path / "out", recipe=recipe(*steps))
    rows = tiny.tokens(2, 24, seed=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = load(str(tmp_path / "out"), dtype=torch.float32)(rows).logits
        without = base(rows).logits
        model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        found = model(rows).logits
    corrected = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(corrected) == 7 * tiny.LAYERS
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (without - expected).norm() > 0.05 * expected.norm()
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_rank_that_does_not_fit(llama: Path, tmp_path: Path) -> None:
    steps = (Step(method="rtn"), Step(method="lorc", options={"rank": 33}))  # keys and values have 32 rows
    with pytest.raises(ValueError, match="lorc: rank 33 does not fit .*k_proj.* use a lower one"):
        quantize(str(llama), tmp_path / "out", recipe=recipe(*steps))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_matrices_that_are_no_module(name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path / name, dtype=torch.bfloat16)
    steps = (Step(method="rtn"), Step(method="lorc", options={"rank": 2}))
    with pytest.raises(ValueError, match="is a part of a larger matrix|leave lorc out"):
        quantize(str(tmp_path / name), tmp_path / "out", recipe=recipe(*steps, format="lowbit"))
