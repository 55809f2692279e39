"""Plans: the budget holds on disk, to the byte; the recipe says what was chosen; measurements are kept and used."""

import json
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowbit.cli import main
from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, load, open_checkpoint
from lowbit.planner import candidates, plan
from lowbit.recipe import FLOAT, read_recipe, recipe_from_dict
from lowbit.run import drawn, quantize
from lowbit.source import open_source

DATA = DataSpec(source="random", rows=4, length=32)
NATIVE: dict[str, Any] = {
    "schemes": ["w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16-channel"],
    "data": DATA,
    "rows": 4,
    "length": 16,
    "format": "lowbit",
}
ENGINE: dict[str, Any] = {
    **NATIVE,
    "schemes": ["w4a16-g32", "w4a16-g64", "w8a16-channel", "w8a8"],
    "format": "compressed-tensors",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder, dtype=torch.bfloat16, seed=3)
    return folder


@pytest.fixture(scope="module")
def llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama_untied")
    tiny.save("llama_untied", folder, dtype=torch.bfloat16, seed=3)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    tiny.save("mixtral", folder, dtype=torch.bfloat16, seed=3)
    return folder


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "what", "method"),
    [
        ("llama", NATIVE, "gptq"),
        ("llama", ENGINE, "rotate+rtn"),
        ("llama", NATIVE, "embed+rtn"),
        ("llama_untied", NATIVE, "rtn"),
        ("llama_untied", ENGINE, "gptq"),
        pytest.param("mixtral", NATIVE, "gptq", marks=pytest.mark.slow),
        pytest.param("mixtral", ENGINE, "gptq", marks=pytest.mark.slow),
    ],
)
def test_sizes_hold_on_disk(
    model: str, what: dict[str, Any], method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The files have no byte more than asked for, or than promised, and few less; they hold what was decided, outside the
    blocks too: embeddings in lowbit's own format, and heads of their own."""
    folder = request.getfixturevalue(model)
    kept = tmp_path / "s.json"
    what = {**what, "method": method}
    small = plan(str(folder), bits=1e-9 + 2.5 if what["format"] == "lowbit" else 4.7, sensitivities=kept, **what).output_bytes
    large = plan(str(folder), bits=20, sensitivities=kept, **what).output_bytes
    for share in (0.0, 0.3, 0.7):
        size = int(small + share * (large - small))
        made = plan(str(folder), size=size, sensitivities=kept, **what)
        assert made.output_bytes <= size
        out = tmp_path / f"{share}"
        quantize(str(folder), out, recipe=made.recipe)
        assert made.output_bytes - 16_000 < on_disk(out) <= made.output_bytes
        outside = {name: scheme for name, scheme in made.schemes.items() if name in ("model.embed_tokens", "lm_head")}
        assert ("model.embed_tokens" in outside) == (what["format"] == "lowbit" and "embed" not in method)
        assert ("lm_head" in outside) == (model != "llama" or "rotate" in method)
        stored = QuantizedSource(out).schemes()
        assert {name for name, scheme in outside.items() if scheme != FLOAT} == stored.keys() & outside.keys()
        if what["format"] == "lowbit":
            assert all(stored[name].name == outside[name] for name in stored.keys() & outside.keys())


def test_what_is_ignored_stays_float(llama_untied: Path) -> None:
    """No decision, no rule and no step are about it; to ignore what is not there is an error."""
    every = plan(str(llama_untied), bits=3.0, **NATIVE | {"method": "rtn"})
    assert every.schemes["model.embed_tokens"] != FLOAT and every.recipe.steps[0].method == "embed"
    made = plan(str(llama_untied), bits=3.0, ignore=["embed", "lm_head"], **NATIVE | {"method": "rtn"})
    assert every.schemes.keys() - made.schemes.keys() == {"model.embed_tokens", "lm_head"}
    assert [step.method for step in made.recipe.steps] == ["rtn"]
    with pytest.raises(ValueError, match="nothing to decide about has a name like 'wte'"):
        plan(str(llama_untied), bits=3.0, ignore=["wte"], **NATIVE)


@pytest.mark.parametrize("signal", ["kl", "eigenvalue"])
def test_whole_blocks(signal: Any, llama: Path, tmp_path: Path) -> None:
    """One scheme for all linears of a block, Q-BERT's way, but for those that are ignored; the budget holds all the same."""
    given: dict[str, Any] = NATIVE | {"method": "rtn", "per": "block", "signal": signal, "ignore": ["embed", "down_proj"]}
    made = plan(str(llama), bits=3.3, **given)
    assert [*made.schemes] == [f"model.layers.{i}" for i in range(3)] and made.bits <= 3.3
    quantize(str(llama), tmp_path / "out", recipe=made.recipe)
    stored = {name: scheme.name for name, scheme in QuantizedSource(tmp_path / "out").schemes().items()}
    assert len(stored) == 18 and not any("down_proj" in name for name in stored)
    for block, scheme in made.schemes.items():
        assert {found for name, found in stored.items() if name.startswith(block + ".")} == {scheme}
    with pytest.raises(ValueError, match="per = 'layer'; allowed is one of 'linear', 'block'"):
        plan(str(llama), bits=3.3, **given | {"per": "layer"})


def test_bits_hold_and_count_what_is_stored(llama: Path, tmp_path: Path) -> None:
    """The average is that of the tensors in the files, float linears included."""
    made = plan(str(llama), bits=3.3, **NATIVE)
    assert made.bits <= 3.3
    report = quantize(str(llama), tmp_path / "out", recipe=made.recipe)
    assert report["sizes"]["bits_per_quantized_weight"] == pytest.approx(made.bits, abs=0.02)
    assert len(set(made.schemes.values())) > 1, "a mix"
    stored = open_checkpoint(str(tmp_path / "out")).schemes()  # type: ignore[attr-defined]
    for decision, scheme in made.schemes.items():
        row = made.measured["decisions"][decision]
        assert {stored[name].name for name in row["linears"]} == {scheme}
        assert made.costs[decision] == row["cost"][scheme]


def test_more_bits_cost_less(llama: Path, tmp_path: Path) -> None:
    """The sum of costs falls as bits are added, down to nothing, where all is float."""
    kept = tmp_path / "s.json"
    totals = [
        sum(plan(str(llama), bits=bits, sensitivities=kept, **NATIVE).costs.values()) for bits in (2.6, 3.0, 4.0, 9.0, 16.0)
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5 and totals[-1] == 0


@pytest.mark.slow
def test_ratio_of_perplexities(demo_model: Path, tmp_path: Path) -> None:
    """The ratio found holds on the rows measured on, a stricter one needs more bytes, and the model is float again after it."""
    text = str(demo_model.parent / "public_domain_calibration.txt")
    given = {**NATIVE, "data": text, "rows": 2, "length": 64, "method": "rtn", "sensitivities": tmp_path / "s.json"}
    loose = plan(str(demo_model), max_ppl_ratio=1.5, **given)
    strict = plan(str(demo_model), max_ppl_ratio=1.02, **given)
    assert loose.ppl_ratio is not None and strict.ppl_ratio is not None
    assert strict.ppl_ratio <= 1.02 < loose.ppl_ratio <= 1.5
    assert loose.output_bytes < strict.output_bytes
    assert plan(str(demo_model), max_ppl_ratio=1.5, **given).recipe == loose.recipe


def test_the_ratio_is_that_of_the_checkpoint(llama_untied: Path, tmp_path: Path) -> None:
    """With its head and its embeddings rounded as the recipe will."""
    made = plan(str(llama_untied), max_ppl_ratio=1.05, **NATIVE | {"method": "rtn"})
    assert FLOAT not in (made.schemes["lm_head"], made.schemes["model.embed_tokens"])
    quantize(str(llama_untied), tmp_path / "out", recipe=made.recipe)
    tokens = drawn(replace(DATA, rows=20, length=16), open_source(str(llama_untied))).tokens[-4:]
    losses = [
        float(load(str(folder), dtype=torch.float32)(tokens, labels=tokens).loss) for folder in (llama_untied, tmp_path / "out")
    ]
    assert exp(losses[1] - losses[0]) == pytest.approx(made.ppl_ratio, abs=2e-3)


def test_a_ratio_below_one(llama: Path) -> None:
    """Cannot be asked for."""
    with pytest.raises(ValueError, match="give more than 1"):
        plan(str(llama), max_ppl_ratio=0.9, **NATIVE)


def test_measurements_are_kept_and_may_be_edited(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete file is used without measuring; what a person writes into it counts; one of something else is refused."""
    kept = tmp_path / "s.json"
    first = plan(str(llama), bits=3.0, sensitivities=kept, **NATIVE)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("lowbit.planner.measure", never)
    monkeypatch.setattr("lowbit.planner.Whole", never)
    assert plan(str(llama), bits=3.0, sensitivities=kept, **NATIVE).recipe == first.recipe
    edited = json.loads(kept.read_text())
    worst = list(edited["decisions"])[-1]
    for name in ("w2a16-g32", "w3a16-g32", "w4a16-g32"):
        edited["decisions"][worst]["cost"][name] = 1e6
    kept.write_text(json.dumps(edited))
    assert plan(str(llama), bits=3.5, sensitivities=kept, **NATIVE).schemes[worst] in ("w8a16-channel", FLOAT)
    with pytest.raises(ValueError, match=r"is of something else: signal was \"kl\", is \"trace\""):
        plan(str(llama), bits=3.0, sensitivities=kept, signal="trace", **NATIVE)


def test_an_interrupted_measurement_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first block, the same call measures the rest only and gets the same plan."""
    whole = plan(str(llama), bits=3.0, **NATIVE)
    kept = tmp_path / "s.json"
    import lowbit.sensitivity as sensitivity

    original, done = sensitivity._row, []

    def killed(*args: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return original(*args)

    monkeypatch.setattr(sensitivity, "_row", killed)
    with pytest.raises(KeyboardInterrupt):
        plan(str(llama), bits=3.0, sensitivities=kept, **NATIVE)
    before = len(json.loads(kept.read_text())["decisions"])
    assert 0 < before < len(whole.schemes)
    done.clear()
    monkeypatch.setattr(sensitivity, "_row", lambda *args: done.append(args[1].name) or original(*args))
    again = plan(str(llama), bits=3.0, sensitivities=kept, **NATIVE)
    assert len(done) == len(whole.schemes) - before
    assert again.recipe == whole.recipe and again.costs == whole.costs


def test_candidates_are_what_the_engine_loads() -> None:
    """By default those that it loads; one named that it does not load is an error with the reason."""
    assert set(candidates(None, "compressed-tensors", "vllm")) == {"w4a16-g128", "w4a16-g32", "w8a16-g128"}
    assert {"w2a16-g64", "w3a16-g128"} <= set(candidates(None, "lowbit", "vllm"))
    with pytest.raises(ValueError, match="w3a16-g128 is no candidate for vllm: vLLM has no kernel for 3-bit"):
        candidates(["w3a16-g128"], "compressed-tensors", "vllm")
    with pytest.raises(ValueError, match="no candidates"):
        candidates([FLOAT], "lowbit", "vllm")


def test_goals_that_cannot_be(llama: Path) -> None:
    """Too few bits, two goals or none: an error that says what is possible."""
    with pytest.raises(ValueError, match=r"the smallest mix of these candidates has 2\.5\d* bits a weight, "):
        plan(str(llama), bits=1.5, **NATIVE)
    for goals in ({}, {"bits": 3.0, "size": 1e6}):
        with pytest.raises(ValueError, match="give one of bits, size and max_ppl_ratio"):
            plan(str(llama), **goals, **NATIVE)
    with pytest.raises(ValueError, match="signal = 'guess'; allowed is one of 'kl'"):
        plan(str(llama), bits=3.0, signal="guess", **NATIVE)  # type: ignore[arg-type]


def test_what_an_encoder_has_not(tmp_path: Path) -> None:
    """No perplexity, and no loss with a gradient: said before anything is measured."""
    tiny.save("bert", tmp_path)
    with pytest.raises(ValueError, match="has no perplexity"):
        plan(str(tmp_path), max_ppl_ratio=1.05, **NATIVE)
    with pytest.raises(ValueError, match="has no loss of text"):
        plan(str(tmp_path), bits=3.0, signal="fisher", **NATIVE)


def test_too_little_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring holds the whole model: said before it is loaded."""
    monkeypatch.setattr("lowbit.planner.available_memory", lambda: 100_000)
    with pytest.raises(ValueError, match="measuring holds the whole model"):
        plan(str(llama), bits=3.0, **NATIVE)


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe it writes is the plan's, runs, and is not overwritten."""
    out = tmp_path / "plan.toml"
    schemes = ["--schemes", "w4a16-g32", "w8a16-channel", "float"]
    arguments = ["plan", str(llama), "--size", "150KB", "--data", "random", "--rows", "4", "--length", "16", *schemes]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "bits a weight" in printed and "q_proj+k_proj+v_proj" in printed
    recipe = read_recipe(out)
    assert recipe.data is not None and recipe.data.source == "random"
    report = quantize(str(llama), tmp_path / "out", recipe=replace(recipe, data=DATA))
    assert report["sizes"]["output_bytes"] <= 150_000
    assert main([*arguments, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*arguments[:3], "lots", *arguments[4:], "--out", str(tmp_path / "other.toml")]) == 2
    assert "write a number of bytes" in capsys.readouterr().err


def test_recipes_survive_toml(llama: Path, tmp_path: Path) -> None:
    """A plan written and read is the same plan."""
    made = plan(str(llama), bits=3.0, method="smooth+gptq", options={"damping": 0.02, "smooth.alpha": "auto"}, **NATIVE)
    path = tmp_path / "p.toml"
    path.write_text(made.recipe.to_toml())
    assert read_recipe(path) == made.recipe
    assert recipe_from_dict(made.recipe.to_dict()) == made.recipe
