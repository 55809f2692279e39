"""What models with task heads give out: quantized with the head untouched, and judged by what the task needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from lowbit import cli
from lowbit.comparison import compare
from lowbit.data import DataSpec
from lowbit.evaluate import evaluate_outputs, sentence_pooling
from lowbit.export import load
from lowbit.outputs import distance, gives_choices, output_of, predicts_next_token
from lowbit.planner import plan
from lowbit.recipe import short_recipe
from lowbit.run import quantize
from lowbit.source import open_source

# Class, what its config needs besides, and whether its output are logits of alternatives.
TASKS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "classifier": ("BertForSequenceClassification", {"num_labels": 3}, True),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}, False),
    "several labels": (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        False,
    ),
    "tagger": ("BertForTokenClassification", {"num_labels": 5}, True),
    "answers": ("BertForQuestionAnswering", {}, True),
    "choices": ("BertForMultipleChoice", {}, False),
    "embeddings": ("BertModel", {}, False),
    "masked": ("RobertaForMaskedLM", {}, True),
    "roberta tagger": ("RobertaForTokenClassification", {"num_labels": 4}, True),
    "decoder classifier": ("LlamaForSequenceClassification", {"num_labels": 3, "pad_token_id": 2}, True),
}
RANDOM = DataSpec(source="random", rows=8, length=24)


def saved(task: str, folder: Path) -> Any:
    """A tiny model of a task, with weights like trained ones, saved with a tokenizer."""
    name, extra, _ = TASKS[task]
    base = name[: name.index("For")].lower() if "For" in name else "bert"
    config = tiny.config(base)
    for key, value in extra.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            path, _, leaf = key.rpartition(".")
            generator = torch.Generator().manual_seed(len(key))
            parameter.copy_(tiny._value(model.get_submodule(path), leaf, parameter.clone(), generator))
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return model


def given_out(model: Any, tokens: Tensor) -> Tensor:
    """By a call as a user would write it."""
    ids = tokens[:, None] if "MultipleChoice" in type(model).__name__ else tokens
    with torch.no_grad():
        out = model(input_ids=ids)
    if hasattr(out, "start_logits"):
        return torch.stack((out.start_logits, out.end_logits), 1)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_head(task: str, tmp_path: Path) -> None:
    """rtn and gptq quantize the blocks and nothing else; the output is near the float model's, and transformers' own."""
    model = saved(task, tmp_path / "model")
    assert gives_choices(model) == TASKS[task][2]
    assert not predicts_next_token(type(model))
    source = open_source(str(tmp_path / "model"))
    tokens = tiny.tokens(2, 20, seed=3)
    plain = given_out(model, tokens)
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        report = quantize(str(tmp_path / "model"), out, scheme="w8a16-g32", method=method, data=RANDOM, engine="transformers")
        assert report["model"]["class"] == TASKS[task][0]
        twin = load(str(out), dtype=torch.float32)
        blocks = {name: value for name, value in model.state_dict().items() if ".layer." in name or ".layers." in name}
        rest = {name: value for name, value in model.state_dict().items() if name not in blocks}
        found = twin.state_dict()
        assert all(torch.equal(found[name], value) for name, value in rest.items())
        assert any(not torch.equal(found[name], value) for name, value in blocks.items())
        quantized = given_out(twin, tokens)
        assert 0 < float((quantized - plain).norm() / plain.norm()) < 0.05
        engine = getattr(transformers, TASKS[task][0]).from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(given_out(engine.eval(), tokens), quantized, rtol=1e-5, atol=1e-6)
    assert source.config["architectures"] == [TASKS[task][0]]


def test_distances() -> None:
    """KL of alternatives, squares of values, by hand."""
    found, wanted = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    total, count = distance(found, wanted, choices=True)
    p, q = wanted.double().softmax(-1), found.double().softmax(-1)
    assert int(count) == 6 and float(total) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    total, count = distance(found, wanted, choices=False)
    assert float(total) == pytest.approx(float((found - wanted).square().sum()), rel=1e-6)
    assert float(count) == pytest.approx(float(wanted.square().sum()), rel=1e-6)


def test_an_output_of_nothing_known() -> None:
    with pytest.raises(ValueError, match="returns a BaseModelOutput with hidden_states; lowbit compares logits"):
        output_of(transformers.modeling_outputs.BaseModelOutput(hidden_states=(torch.ones(1),)))


@pytest.mark.parametrize("task", ["classifier", "answers", "embeddings", "choices"])
def test_evaluate_outputs(task: str, tmp_path: Path) -> None:
    """Figures as computed window by window by hand; 0 from itself; windows no longer than the model's positions."""
    model = saved(task, tmp_path / "model")
    other = load(str(tmp_path / "model"), dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    tokens = tiny.tokens(1, 150, seed=4)[0]
    found = evaluate_outputs(
        other, tokens, reference=model, window=30, max_windows=4, pooling="mean" if task == "embeddings" else None
    )
    pairs = [(given_out(other, row), given_out(model, row)) for row in tokens[:120].view(4, 1, 30)]
    if TASKS[task][2]:
        p, q = (torch.cat([pair[i].double().softmax(-1).flatten(0, -2) for pair in pairs]) for i in (1, 0))
        assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        assert found.relative_error is None and found.cosine is None
    else:
        a, b = (torch.cat([pair[i].double().flatten(0, -2) for pair in pairs]) for i in (0, 1))
        assert found.relative_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)
        assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-5)
        assert found.kl is None
    if task == "embeddings":
        cosines = [torch.cosine_similarity(a.mean(1), b.mean(1)) for a, b in pairs]
        assert found.sentence_cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-5)
    assert (found.windows, found.window) == (4, 30)
    same = evaluate_outputs(model, tokens, reference=model)
    assert (same.kl or same.relative_error or 0.0) == pytest.approx(0.0, abs=1e-9)
    assert same.window <= model.config.max_position_embeddings


def test_sentence_pooling(tmp_path: Path) -> None:
    """As a sentence-transformers folder describes it."""
    assert sentence_pooling(tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    ways = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    for wanted, changed in (("mean", {}), ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | ways | changed))
        assert sentence_pooling(tmp_path) == wanted
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(ways | {"pooling_mode_max_tokens": True}))
    assert sentence_pooling(tmp_path) is None


def test_the_commands_judge_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """eval needs the original, and says so; plan and compare decide by KL of the labels."""
    saved("classifier", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.TEXT * 20))
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    common = ["--scheme", "w4a16-g32", "--data", str(text), "--rows", "4", "--length", "24"]
    assert cli.main(["quantize", model, "--out", out, *common]) == 0
    assert cli.main(["eval", out, "--data", str(text)]) == 2
    assert "BertForSequenceClassification, which predicts no next token" in capsys.readouterr().err
    assert cli.main(["eval", out, "--data", str(text), "--reference", model, "--window", "32", "--dtype", "float32"]) == 0
    assert "nats an output, same first choice" in capsys.readouterr().out
    (evaluation,) = json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"]
    assert evaluation["kl"] > 0 and "perplexity" not in evaluation
    assert "same choice" in (tmp_path / "out" / "report.md").read_text()

    found = plan(model, bits=5.5, schemes=["w4a16-g32", "w8a16-g32"], data=str(text), rows=2, length=24, method="rtn")
    assert set(found.schemes.values()) == {"w4a16-g32", "w8a16-g32"}
    recipes = {scheme: short_recipe(scheme=scheme) for scheme in ("w4a16-g32", "w8a16-g32")}
    result = compare(model, recipes, tmp_path / "compared", texts=[str(text)], window=32)
    losses = {row["name"]: row["loss"] for row in result["rows"]}
    assert 0 < 10 * losses["w8a16-g32"] < losses["w4a16-g32"]
    assert result["float"]["samples"] == []
    assert "same choice" in (tmp_path / "compared" / "comparison.html").read_text()
