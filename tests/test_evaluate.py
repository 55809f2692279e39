"""Perplexity, divergence and agreement against direct computations, one position at a time where it matters."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit.evaluate
from lowbit.data import evaluation_tokens
from lowbit.evaluate import evaluate_model, plan_windows, run_tasks, score_positions

TEXT = tiny.tokens(1, 150, seed=5)[0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Llama whose predictions are far from uniform."""
    return tiny.build("llama")


@pytest.fixture(scope="module")
def other() -> nn.Module:
    """The same model, its weights disturbed so that it agrees now and then."""
    model = tiny.build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    """[len(ids), vocabulary] float64: what follows each position of one sequence."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)


def direct_nll(model: nn.Module, text: list[int], window: int, bos_id: int | None) -> list[float]:
    """The losses of non-overlapping windows, target by target."""
    losses = []
    for start in range(0, len(text) - window + 1, window):
        ids = ([] if bos_id is None else [bos_id]) + text[start : start + window]
        predicted = log_probabilities(model, ids)
        losses += [-float(predicted[i - 1, ids[i]]) for i in range(1, len(ids))]
    return losses


# -------------------------------------------------------------------------------------------------------------- windows
def test_plan_windows() -> None:
    """The protocol of the module docstring, by hand."""

    def plan(tokens: int, window: int, stride: int, bos: str = "none") -> list[tuple[int, int, int]]:
        return [(w.start, w.end, w.scored) for w in plan_windows(tokens, window=window, stride=stride, bos=bos)]

    assert plan(11, 4, 4) == [(0, 4, 3), (4, 8, 3)]  # the tail 8 .. 10 is dropped
    assert plan(12, 4, 4, "window") == [(0, 4, 4), (4, 8, 4), (8, 12, 4)]
    assert plan(9, 4, 2) == [(0, 4, 3), (2, 6, 2), (4, 8, 2)]
    assert plan(9, 4, 2, "window") == [(0, 4, 4), (2, 6, 2), (4, 8, 2)]
    assert plan(3, 4, 2) == [(0, 3, 2)]  # all the text there is
    assert plan(1, 4, 4, "window") == [(0, 1, 1)]


@given(st.integers(2, 60), st.integers(2, 12), st.data(), st.sampled_from(["none", "window"]))
def test_overlapping_windows_score_each_token_once(tokens: int, window: int, data: st.DataObject, bos: Any) -> None:
    """Targets are consecutive, never repeated, and have the context that was promised."""
    stride = data.draw(st.integers(1, window - 1))
    windows = plan_windows(tokens, window=window, stride=stride, bos=bos)
    targets = [t for w in windows for t in range(w.end - w.scored, w.end)]
    assert targets == list(range(0 if bos == "window" else 1, windows[-1].end))
    assert tokens - windows[-1].end < stride
    assert all(w.end - w.scored - w.start >= window - stride for w in windows[1:])


# ----------------------------------------------------------------------------------------------------------- perplexity
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba2"])
@pytest.mark.parametrize("bos_id", [None, tiny.BOS])
def test_perplexity_is_the_direct_one(name: str, bos_id: int | None) -> None:
    """Against a loop over targets in float64, for any batch size."""
    model = tiny.build(name)
    window = 32
    losses = direct_nll(model, TEXT.tolist(), window, bos_id)
    assert len(losses) == 4 * (32 if bos_id is not None else 31)  # 150 tokens: 4 windows, 22 tokens dropped
    expected = sum(losses) / len(losses)
    assert abs(expected - math.log(tiny.VOCAB)) > 0.1  # else a constant would do
    for batch_size in (1, 3):
        result = evaluate_model(
            model, TEXT, window=window, bos="none" if bos_id is None else "window", bos_id=bos_id, batch_size=batch_size
        )
        assert result.nll == pytest.approx(expected, abs=1e-5)
        assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
        assert (result.tokens, result.windows) == (len(losses), 4)
        assert (result.kl, result.top1_agreement, result.reference_perplexity) == (None, None, None)
        assert (result.window, result.stride, result.dtype, result.device) == (window, window, "float32", "cpu")


@pytest.mark.parametrize("stride", [1, 5, 6, 11])
@pytest.mark.parametrize("bos_id", [None, tiny.BOS])
def test_strided_perplexity_is_the_direct_one(model: nn.Module, stride: int, bos_id: int | None) -> None:
    """Every target alone, with exactly the context that the protocol gives it."""
    text = TEXT[:40].tolist()
    window = 12
    last = len(text) - (len(text) - window) % stride
    losses = []
    for target in range(0 if bos_id is not None else 1, last):
        start = max(0, math.ceil((target + 1 - window) / stride)) * stride
        context = ([] if bos_id is None else [bos_id]) + text[start:target]
        losses.append(-float(log_probabilities(model, context)[-1, text[target]]))
    result = evaluate_model(
        model,
        torch.tensor(text),
        window=window,
        stride=stride,
        bos="none" if bos_id is None else "window",
        bos_id=bos_id,
        batch_size=4,
    )
    assert result.tokens == len(losses)
    assert result.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_partial_and_limited(model: nn.Module) -> None:
    """A text shorter than the window is scored whole; max_windows takes the first ones."""
    short = TEXT[:20]
    losses = direct_nll(model, short.tolist(), 20, None)
    result = evaluate_model(model, short, window=64)
    assert (result.windows, result.tokens) == (1, 19)
    assert result.nll == pytest.approx(sum(losses) / 19, abs=1e-5)
    first = evaluate_model(model, TEXT, window=32, max_windows=2, batch_size=4)
    assert first.windows == 2
    assert first.nll == evaluate_model(model, TEXT[:64], window=32, batch_size=2).nll
    assert first.nll != evaluate_model(model, TEXT, window=32).nll


def test_perplexity_beyond_float_is_infinite() -> None:
    """A model that is sure of the wrong token has a perplexity, not an OverflowError."""
    result = evaluate_model(Fixed(lambda ids: -2000.0 * F.one_hot(ids.roll(-1, 1), 9).float()), torch.arange(8), window=4)
    assert result.nll > 1000
    assert result.perplexity == math.inf


# ------------------------------------------------------------------------------------------------------------ reference
def test_divergence_is_the_direct_one(model: nn.Module, other: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's kl_div in float64, in this direction, with slices that do not divide the window."""
    text = TEXT[:96].tolist()
    kl, agreement, losses = [], [], []
    for start in range(0, 96, 32):
        p = log_probabilities(model, text[start : start + 32])[:-1]
        q = log_probabilities(other, text[start : start + 32])[:-1]
        kl.append(float(F.kl_div(p, q, log_target=True, reduction="sum")))
        agreement.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
        losses.append(float(F.nll_loss(q, torch.tensor(text[start + 1 : start + 32]), reduction="sum")))
    monkeypatch.setattr(lowbit.evaluate, "SLICE_ELEMENTS", 5 * tiny.VOCAB)
    result = evaluate_model(model, TEXT[:96], window=32, reference=other, batch_size=2)
    assert result.kl == pytest.approx(sum(kl) / 93, rel=1e-5)
    assert result.kl > 0.1
    assert result.top1_agreement == sum(agreement) / 93
    assert 0 < result.top1_agreement < 1
    assert result.reference_perplexity == pytest.approx(math.exp(sum(losses) / 93), rel=1e-5)
    assert result.nll == pytest.approx(evaluate_model(model, TEXT[:96], window=32).nll, abs=1e-6)
    backwards = evaluate_model(other, TEXT[:96], window=32, reference=model)
    assert backwards.kl != pytest.approx(result.kl, rel=5e-4)
    assert backwards.perplexity == pytest.approx(result.reference_perplexity, rel=1e-6)


def test_divergence_from_itself_is_zero(model: nn.Module) -> None:
    """Exactly, and they always agree."""
    result = evaluate_model(model, TEXT, window=32, reference=model, stride=16)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0
    assert result.reference_perplexity == result.perplexity


def test_small_divergence_is_accurate() -> None:
    """KL of a perturbation of 1e-2 is some 5e-5 nats, less than 8 bits cost: float32 must not drown it."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 5000, generator=generator)
    logits = reference + 1e-2 * torch.randn(200, 5000, generator=generator)
    targets = torch.randint(5000, (200,), generator=generator)
    p, q = (torch.log_softmax(x.double(), -1) for x in (logits, reference))
    expected = float(F.kl_div(p, q, log_target=True, reduction="sum"))
    assert 1e-5 < expected / 200 < 1e-4
    assert score_positions(logits, targets, reference)[2] == pytest.approx(expected, rel=1e-3)


def test_excluded_tokens_add_no_divergence() -> None:
    """A token with logit -inf in both models is no NaN; in the model alone it is an infinite divergence."""
    reference = torch.randn(4, 6)
    reference[:, 5] = -math.inf
    logits = torch.randn(4, 6)
    logits[:, 5] = -math.inf
    targets = torch.tensor([0, 1, 2, 3])
    both = score_positions(logits, targets, reference)
    assert both == pytest.approx(score_positions(logits[:, :5], targets, reference[:, :5]))
    logits[:, 4] = -math.inf
    assert score_positions(logits, targets, reference)[2] == math.inf


def test_low_precision_logits_are_scored_in_float32() -> None:
    """bfloat16 logits give the loss of their values, not a loss rounded to bfloat16."""
    logits = torch.randn(64, 500).bfloat16()
    targets = torch.randint(500, (64,))
    expected = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert score_positions(logits, targets, None) == pytest.approx([float(expected), 0, 0, 0], rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors
class Fixed(nn.Module):
    """A model whose logits are a function of the ids alone."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits(input_ids))


def uniform(ids: Tensor, vocabulary: int = tiny.VOCAB) -> Tensor:
    """Logits that know nothing."""
    return torch.zeros(*ids.shape, vocabulary)


def test_uniform_model() -> None:
    """Any callable with logits will do, and knowing nothing costs log(vocabulary)."""
    result = evaluate_model(Fixed(uniform), TEXT, window=16, source="noise")
    assert result.perplexity == pytest.approx(tiny.VOCAB, rel=1e-6)
    assert result.source == "noise"
    assert evaluate_model(lambda input_ids: SimpleNamespace(logits=uniform(input_ids)), TEXT, window=16).nll == result.nll


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window = 1"),
        ({"window": 8, "stride": 0}, "stride = 0: give 1 to 8"),
        ({"window": 8, "stride": 9}, "stride = 9: give 1 to 8"),
        ({"bos": "first", "bos_id": 0}, "bos = 'first'"),
        ({"bos": "window"}, "bos = 'window' with bos_id = None"),
        ({"bos_id": 0}, "bos = 'none' with bos_id = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_windows": 0}, "max_windows = 0"),
        ({"tokens": TEXT[:1]}, "1 tokens, too few"),
        ({"tokens": TEXT[:0]}, "0 tokens, too few"),
        ({"tokens": TEXT[:0], "bos": "window", "bos_id": 0}, "0 tokens, too few"),
        ({"tokens": TEXT[None]}, r"tokens are \[1, 150\]"),
        ({"tokens": TEXT.float()}, "float32: give one row"),
        ({"tokens": torch.tensor([3, -100, 4])}, "the id -100"),
        ({"tokens": torch.tensor([3, tiny.VOCAB])}, "id 128 in the text, but the model has vocab_size 128"),
        ({"bos": "window", "bos_id": tiny.VOCAB}, "id 128 in the text"),
        ({"window": 512, "tokens": tiny.tokens(1, 600)[0]}, "window of 512 tokens, but the model has 256 positions"),
        ({"reference": Fixed(lambda ids: uniform(ids, 200))}, "the model gives 128 logits a token, the reference 200"),
    ],
)
def test_bad_arguments(model: nn.Module, options: dict[str, Any], message: str) -> None:
    """Refused before the first forward pass (the reference's vocabulary: after it), with what is allowed."""
    with pytest.raises(ValueError, match=message):
        evaluate_model(model, **({"tokens": TEXT, "window": 16} | options))


def test_short_text_needs_no_long_window(model: nn.Module) -> None:
    """The limit on positions holds for what is fed, not for what was asked for."""
    assert evaluate_model(model, TEXT, window=512).tokens == 149


def test_models_that_predict_no_next_token(model: nn.Module) -> None:
    """Bodies without head, classifiers and masked LMs are refused, not scored."""
    with pytest.raises(ValueError, match="without logits: load it with a causal LM head"):
        evaluate_model(model.model, TEXT, window=16)
    with pytest.raises(ValueError, match="not over the vocabulary"):
        evaluate_model(Fixed(lambda ids: torch.zeros(len(ids), 2)), TEXT, window=16)
    with pytest.raises(ValueError, match="not over the vocabulary"):
        evaluate_model(Fixed(lambda ids: torch.zeros(*ids.shape, 2)), TEXT, window=16)
    with pytest.raises(ValueError, match="BertForMaskedLM, which sees the token it predicts"):
        evaluate_model(tiny.build("bert"), TEXT, window=16)
    with pytest.raises(ValueError, match="the reference is a RobertaForMaskedLM"):
        evaluate_model(model, TEXT, window=16, reference=tiny.build("roberta"))


def test_training_mode_and_meta_weights() -> None:
    """Dropout and absent weights would give figures that mean nothing."""
    with pytest.raises(ValueError, match=r"the model is in training mode: call \.eval\(\)"):
        evaluate_model(tiny.build("llama").train(), TEXT, window=16)
    with pytest.raises(ValueError, match="meta device"):
        evaluate_model(tiny.build("llama").to("meta"), TEXT, window=16)


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_loss_that_is_not_finite_names_its_window(broken: str) -> None:
    """NaN in one window of a batch is found there."""
    text = torch.arange(3, 83)  # window 3 of 16 tokens holds the ids 51 .. 66

    def nan_at_60(ids: Tensor) -> Tensor:
        return torch.where((ids == 60)[..., None], math.nan, uniform(ids))

    good, bad = Fixed(uniform), Fixed(nan_at_60)
    options = {"model": bad} if broken == "model" else {"model": good, "reference": bad}
    what = "loss" if broken == "model" else "reference loss"
    with pytest.raises(ValueError, match=rf"the {what} of window 3 \(tokens 48 \.\. 63\) is nan"):
        evaluate_model(tokens=text, window=16, batch_size=2, **options)
    assert evaluate_model(bad, text[:48], window=16).windows == 3


# --------------------------------------------------------------------------------------------------------------- record
def test_record_and_progress(model: nn.Module) -> None:
    """The record survives JSON; progress counts windows."""
    seen: list[tuple[int, int]] = []
    result = evaluate_model(
        model, TEXT, window=32, batch_size=3, reference=model, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(3, 4), (4, 4)]
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.seconds > 0
    assert result.to_dict()["bos"] == "none"


def test_evaluation_changes_nothing(model: nn.Module) -> None:
    """Neither the gradient mode nor the model, whose outputs can still be trained on."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = []
    handle = model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    evaluate_model(model, TEXT, window=32)
    handle.remove()
    assert modes == [False] * 4
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model(input_ids=TEXT[None, :16]).logits.requires_grad


def test_module_can_be_called(model: nn.Module) -> None:
    """`lowbit.evaluate(...)` is `evaluate_model(...)`."""
    assert lowbit.evaluate(model, TEXT, window=32).nll == evaluate_model(model, TEXT, window=32).nll


# ---------------------------------------------------------------------------------------------------------------- tasks
@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An `lm_eval` that knows one task; the list collects what was asked of it."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.append(options)
        per_task = {key: {"arc_easy": 1} for key in ("versions", "n-shot", "n-samples")}
        return {"results": {"arc_easy": {"acc,none": 0.5}}, "samples": [1], "config": {"model": object()}, **per_task}

    class Manager:
        all_tasks = ("arc_easy",)

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.0"},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: options},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_run_tasks(harness: list[dict[str, Any]], model: nn.Module) -> None:
    """The model and the options reach the harness; what comes back is JSON."""
    tokenizer: Any = object()
    scores = run_tasks(model, ["arc_easy"], tokenizer=tokenizer, limit=5, batch_size=2)
    assert json.loads(json.dumps(scores)) == {
        "results": {"arc_easy": {"acc,none": 0.5}},
        "versions": {"arc_easy": 1},
        "n-shot": {"arc_easy": 1},
        "n-samples": {"arc_easy": 1},
        "limit": 5,
        "lm_eval_version": "0.0",
    }
    assert harness[0]["model"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2}
    assert (harness[0]["tasks"], harness[0]["limit"]) == (["arc_easy"], 5)
    run_tasks(Path("folder"), ["arc_easy"], device="cpu")
    assert harness[1]["model"] == {"pretrained": "folder", "device": "cpu", "batch_size": 1, "trust_remote_code": False}


def test_run_tasks_refuses(harness: list[dict[str, Any]], model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown tasks, half a model, and a missing library."""
    with pytest.raises(ValueError, match=r"unknown \['arc_hard'\]"):
        run_tasks("folder", ["arc_easy", "arc_hard"])
    with pytest.raises(ValueError, match=r"tasks = \[\]"):
        run_tasks("folder", [])
    with pytest.raises(ValueError, match="without a tokenizer"):
        run_tasks(model, ["arc_easy"])
    with pytest.raises(ValueError, match="device = 'cpu' with a loaded model"):
        run_tasks(model, ["arc_easy"], tokenizer=object(), device="cpu")
    with pytest.raises(ValueError, match="leave it out"):
        run_tasks("folder", ["arc_easy"], tokenizer=object())
    assert not harness
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'lowbit\[tasks\]'"):
        run_tasks("folder", ["arc_easy"])


@pytest.mark.slow
def test_run_tasks_with_the_harness(tmp_path: Path, model: nn.Module) -> None:
    """A multiple-choice task of our own gets the accuracy that a direct computation gives."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lowbit[tasks]'")
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    choices = [" dog", " the error", " care.", " 32 bits"]
    rows = [{"q": text[:20], "choices": choices, "label": n % 4} for n, text in enumerate(tiny.TEXT * 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "lowbit_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML

    def score(question: str, choice: str) -> float:
        start = tokenizer(question, add_special_tokens=False)["input_ids"]
        ids = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
        predicted = log_probabilities(model, ids)
        return sum(float(predicted[i - 1, ids[i]]) for i in range(len(start), len(ids)))

    right = [
        max(range(4), key=lambda n, row=row: score(row["q"], choices[n])) == row["label"]  # type: ignore[misc]
        for row in rows[:8]
    ]
    assert 0 < sum(right) < 8
    scores = run_tasks(model, [str(tmp_path / "task.yaml")], tokenizer=tokenizer, limit=8)
    assert scores["results"]["lowbit_choice"]["acc,none"] == sum(right) / 8
    assert json.dumps(scores)


# ----------------------------------------------------------------------------------------------------------- real model
@pytest.mark.slow
def test_wikitext2_of_a_real_model(shared_dir: Path) -> None:
    """The first 4 windows of WikiText-2; the whole test split (356 windows) in float32 has perplexity 30.65."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = shared_dir / "models" / "llama-7m", shared_dir / "text" / "wikitext2_test.txt"
    if not folder.is_dir() or not text.is_file():
        pytest.skip(f"needs models/{folder.name} and text/{text.name} in the folder of shared models and texts")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(folder))
    assert len(tokens) // 1024 == 356
    result = evaluate_model(model, tokens, max_windows=4)
    assert result.tokens == 4 * 1023
    assert result.perplexity == pytest.approx(33.496, rel=1e-3)
