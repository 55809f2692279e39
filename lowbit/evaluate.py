"""How good a model still is: perplexity, divergence from a reference model, and tasks.

Perplexity is exp of the mean negative log-likelihood of the scored tokens. The text is cut into windows of `window`
tokens that begin every `stride` tokens; the model sees nothing outside the window.

    bos="none"    the window is the input. Its first token has no context, so it is never a target of its own window:
                  window - 1 targets (the protocol of GPTQ and most published WikiText-2 figures).
    bos="window"  the input is bos and the window's tokens but the last, so the input still has `window` positions, and
                  all `window` tokens are targets.

With stride = window (the default) windows do not overlap and all their targets are scored. With stride < window the
first window is scored whole and each later one in its last `stride` tokens only, so that every scored token but those
of the first window has at least window - stride tokens of context, and no token is scored twice.
A trailing part of the text that does not fill a window is dropped, unless it is all the text there is.

Perplexities of different windows, strides, bos policies or tokenizers do not compare.

Numbers: log-softmax in float32, a slice of positions at a time; sums in float64. A loss or divergence is so good to
about 1e-6 nats a position.
"""

import inspect
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowbit.arguments import checked, parse_device
from lowbit.outputs import distance, gives_choices, input_ids, output_of, positions
from lowbit.source import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bos = Literal["none", "window"]

SLICE_ELEMENTS = 2**24  # logits in float32 at a time: 64 MiB a copy, 128 positions of a vocabulary of 128k


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_model` measured.

    Attributes:
        perplexity: exp(nll); infinity where that overflows.
        nll: mean negative log-likelihood of the targets, nats.
        tokens: scored targets.
        windows: windows run.
        window, stride, bos: the protocol, see the module docstring.
        kl: mean over the targets' positions of KL(reference || model), nats; None without a reference.
        top1_agreement: share of positions where both rank the same token first, 0 .. 1; None without a reference.
        reference_perplexity: perplexity of the reference on the same targets; None without one.
        seconds: wall time, the reference's part included.
        source: what the text was, as the caller named it.
        device: where the input ids were.
        dtype: of the model's logits.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    stride: int
    bos: Bos
    kl: float | None
    top1_agreement: float | None
    reference_perplexity: float | None
    seconds: float
    source: str | None
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON types only."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class OutputDivergence:
    """How far a model that predicts no next token is from its reference: `evaluate_outputs`.

    Attributes:
        kl: mean KL(reference || model) of the alternatives, nats; None for values (see `outputs`).
        top1_agreement: share of outputs whose first alternative is the same, 0 .. 1; None for values.
        relative_error: square root of the squared error over the squared values; None for alternatives.
        cosine: mean cosine between the vectors [width] of both; None for alternatives.
        sentence_cosine: mean cosine between the sentence embeddings of a sentence-transformers folder; None for others.
        windows, window: runs of tokens, and tokens in each.
        seconds: wall time, the reference's part included.
        source: what the text was, as the caller named it.
        device: where the input ids were.
        dtype: of the model's output.
    """

    kl: float | None
    top1_agreement: float | None
    relative_error: float | None
    cosine: float | None
    sentence_cosine: float | None
    windows: int
    window: int
    seconds: float
    source: str | None
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON types only."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens start .. end - 1 of the text, of which the last `scored` are targets."""

    start: int
    end: int
    scored: int


def plan_windows(tokens: int, *, window: int, stride: int, bos: Bos) -> list[Window]:
    """The windows of a text of `tokens` tokens, in order.

    Raises:
        ValueError: a window, stride or bos out of range, or too little text for one target.
    """
    without_context = 0 if bos == "window" else 1
    if bos not in ("none", "window"):
        raise ValueError(f"bos = {bos!r}: give 'none' or 'window'")
    if window < 2:
        raise ValueError(f"window = {window}: give at least 2 tokens")
    if not 1 <= stride <= window:
        raise ValueError(f"stride = {stride}: give 1 to {window} (the window) tokens, or None for the window")
    if tokens <= without_context:
        raise ValueError(f"the text has {tokens} tokens, too few to predict one: give more text")
    if tokens < window:
        return [Window(start=0, end=tokens, scored=tokens - without_context)]
    most = window - without_context
    return [
        Window(start=start, end=start + window, scored=most if start == 0 else min(stride, most))
        for start in range(0, tokens - window + 1, stride)
    ]


@checked
@torch.no_grad()
def evaluate_model(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    bos: Bos = "none",
    bos_id: int | None = None,
    reference: Callable[..., Any] | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    device: torch.device | str | None = None,
    source: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a causal language model, and its divergence from a reference on the same windows.

    Args:
        model: called as model(input_ids=[batch, positions] int64), returns an object with
            .logits [batch, positions, vocabulary]; a transformers causal LM, in eval mode.
        tokens: [n] integers, the text (`data.evaluation_tokens`).
        window, stride, bos: the protocol, see the module docstring; stride None means window.
        bos_id: id put before each window for bos="window".
        reference: a second model of the same vocabulary, usually the float model, run on the device it is on.
        batch_size: windows in one forward pass.
        max_windows: run the first so many windows only; None for all.
        device: where to put the input ids; None for the device of the model's first parameter. No model is moved.
        source: name of the text, copied into the result.
        progress: called with (windows done, windows in all) after each forward pass.

    Raises:
        ValueError: an argument out of range, too little text, ids outside the vocabulary, a window longer than the
            model's positions, a model in training mode, a masked LM, output without logits over the vocabulary,
            a reference of another vocabulary, or a loss that is not finite (with its window).
    """
    stride = window if stride is None else stride
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens are {list(tokens.shape)} {tokens.dtype}: give one row [n] of integers")
    if (bos == "window") != (bos_id is not None):
        raise ValueError(f"bos = {bos!r} with bos_id = {bos_id}: give bos='window' and its id together, or neither")
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: give at least 1")
    tokens = tokens.to("cpu", torch.int64)
    windows = plan_windows(len(tokens), window=window, stride=stride, bos=bos)[:max_windows]
    prefix = tokens.new_tensor([] if bos_id is None else [bos_id])
    largest = int(torch.cat((prefix, tokens)).max())
    if int(torch.cat((prefix, tokens)).min()) < 0:
        raise ValueError(f"tokens hold the id {int(tokens.min())}: give ids of the vocabulary, without padding marks")
    for name, candidate in (("model", model), ("reference", reference)):
        if candidate is not None:
            _check_model(name, candidate, length=windows[0].end, largest=largest)
    device = _input_device("model", model, device)
    reference_device = None if reference is None else _input_device("reference", reference, None)

    began = time.perf_counter()
    totals = [0.0, 0.0, 0.0, 0.0]
    dtype = ""
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        texts = torch.stack([tokens[w.start : w.end] for w in batch])
        inputs = texts
        if bos_id is not None:
            inputs = torch.cat((prefix.expand(len(batch), 1), texts[:, :-1]), dim=1)
        logits = _logits("model", model, inputs.to(device), largest)
        dtype = str(logits.dtype).removeprefix("torch.")
        reference_logits = None
        if reference is not None:
            reference_logits = _logits("reference", reference, inputs.to(reference_device), largest).to(logits.device)
            if reference_logits.shape != logits.shape:
                raise ValueError(
                    f"the model gives {logits.shape[-1]} logits a token, the reference {reference_logits.shape[-1]}: "
                    "give two models of one vocabulary"
                )
        for row, w in enumerate(batch):
            # logits at a position predict the next token; with no bos the last position predicts beyond the window
            end = inputs.shape[1] - (bos_id is None)
            part = slice(end - w.scored, end)
            sums = score_positions(
                logits[row, part],
                texts[row, -w.scored :].to(logits.device),
                None if reference_logits is None else reference_logits[row, part],
            )
            for what, score in zip(("loss", "reference loss", "KL divergence"), sums[:3], strict=True):
                if not math.isfinite(score):
                    raise ValueError(
                        f"the {what} of window {first + row} (tokens {w.start} .. {w.end - 1}) is {score}: "
                        "look for NaN or infinite values among the weights, scales and activations"
                    )
            totals = [total + score for total, score in zip(totals, sums, strict=True)]
        if progress is not None:
            progress(first + len(batch), len(windows))

    count = sum(w.scored for w in windows)
    nll, reference_nll, kl, agreement = (total / count for total in totals)
    return Evaluation(
        perplexity=_exp(nll),
        nll=nll,
        tokens=count,
        windows=len(windows),
        window=window,
        stride=stride,
        bos=bos,
        kl=None if reference is None else kl,
        top1_agreement=None if reference is None else agreement,
        reference_perplexity=None if reference is None else _exp(reference_nll),
        seconds=time.perf_counter() - began,
        source=source,
        device=str(device),
        dtype=dtype,
    )


@checked
@torch.no_grad()
def evaluate_outputs(
    model: "PreTrainedModel",
    tokens: Tensor,
    *,
    reference: "PreTrainedModel",
    window: int = 1024,
    max_windows: int | None = None,
    pooling: str | None = None,
    source: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OutputDivergence:
    """Divergence of a model that predicts no next token (an encoder, a classifier, a tagger ...) from its float model.

    Args:
        model, reference: transformers models of one class, in eval mode.
        tokens: [n] integers, the text; it is cut into windows of `window` tokens, at most as long as the model allows.
        max_windows: run the first so many windows only; None for all.
        pooling: "mean" or "cls": how hidden states become a sentence embedding (`sentence_pooling`); None for no embedding.
        source: name of the text, copied into the result.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: an argument out of range, too little text, ids outside the vocabulary, outputs of two shapes, or one that
            is not finite (with its window).
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows = {max_windows}: give at least 1")
    tokens = tokens.to("cpu", torch.int64)
    window = min(window, len(tokens), positions(model) or window)
    windows = plan_windows(len(tokens), window=window, stride=window, bos="none")[:max_windows]
    for name, candidate in (("model", model), ("reference", reference)):
        _check_model(name, candidate, length=window, largest=int(tokens.max()))
    choices = gives_choices(model)
    began = time.perf_counter()
    sums = torch.zeros(2, dtype=torch.float64)
    likeness: list[Tensor] = []
    sentences: list[Tensor] = []
    found = torch.empty(0)
    for k, each in enumerate(windows):
        row = tokens[None, each.start : each.end]
        found, wanted = (
            output_of(run(input_ids=input_ids(run, row).to(_input_device(name, run, None))))
            for name, run in (("model", model), ("reference", reference))
        )
        wanted = wanted.to(found.device)
        if found.shape != wanted.shape:
            raise ValueError(f"the model gives out {list(found.shape)}, the reference {list(wanted.shape)}: give one's own")
        if not (bool(torch.isfinite(found).all()) and bool(torch.isfinite(wanted).all())):
            raise ValueError(f"the output of window {k} (tokens {each.start} .. {each.end - 1}) is not finite")
        sums += torch.stack(distance(found, wanted, choices=choices)).cpu()
        likeness.append(_likeness(found, wanted, choices).cpu())
        if pooling is not None:
            mine, theirs = (x[:, 0] if pooling == "cls" else x.mean(1) for x in (found.float(), wanted.float()))
            sentences.append(torch.cosine_similarity(mine, theirs, dim=-1).cpu())
        if progress is not None:
            progress(k + 1, len(windows))
    error, alike = float(sums[0] / sums[1]), float(torch.cat(likeness).mean())
    return OutputDivergence(
        kl=error if choices else None,
        top1_agreement=alike if choices else None,
        relative_error=None if choices else error**0.5,
        cosine=None if choices else alike,
        sentence_cosine=float(torch.cat(sentences).mean()) if sentences else None,
        windows=len(windows),
        window=window,
        seconds=time.perf_counter() - began,
        source=source,
        device=str(found.device),
        dtype=str(found.dtype).removeprefix("torch."),
    )


def _likeness(found: Tensor, wanted: Tensor, choices: bool) -> Tensor:
    """Of every output, whether its first alternative is the same, or its cosine, float64 [n]."""
    if choices:
        return (found.argmax(-1) == wanted.argmax(-1)).double().flatten()
    return torch.cosine_similarity(found.double(), wanted.double(), dim=-1).flatten()


def sentence_pooling(folder: Path) -> str | None:
    """How a sentence-transformers folder makes an embedding of hidden states: "mean" or "cls"; None for other folders."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    pooling = read_json(path, "how sentence embeddings are pooled")
    ways = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    used = [ways.get(key) for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    return used[0] if len(used) == 1 else None


def score_positions(logits: Tensor, targets: Tensor, reference: Tensor | None) -> list[float]:
    """Sums over positions, in SLICE_ELEMENTS of float32 at a time.

    Args:
        logits: [positions, vocabulary], any float dtype.
        targets: [positions] int64.
        reference: [positions, vocabulary] or None.

    Returns:
        [negative log-likelihood of the targets (nats), the same under the reference, KL(reference || model) (nats),
        positions where both rank the same token first]; the last three are 0 without a reference.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    step = max(1, SLICE_ELEMENTS // logits.shape[-1])
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        target = targets[part, None]
        log_p = torch.log_softmax(logits[part].float(), dim=-1)
        sums[0] -= log_p.gather(-1, target).sum(dtype=torch.float64)
        if reference is None:
            continue
        log_q = torch.log_softmax(reference[part].float(), dim=-1)
        sums[1] -= log_q.gather(-1, target).sum(dtype=torch.float64)
        sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        q = log_q.exp()
        # a token that the reference excludes adds nothing, even where the model excludes it too (inf - inf)
        sums[2] += torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dtype=torch.float64)
    return sums.tolist()


def run_tasks(
    model: "PreTrainedModel | str | Path",
    tasks: list[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limit: int | float | None = None,
    batch_size: int = 1,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Task scores of the LM Evaluation Harness (`lm-eval`), which downloads the tasks' data.

    Args:
        model: a loaded causal LM with `tokenizer`, or the folder of a checkpoint that transformers loads.
        tasks: names of tasks or groups of the harness, or paths of task .yaml files.
        tokenizer: of a loaded model; None for a folder (its own is loaded).
        limit: first so many examples a task (a share below 1); None for all.
        batch_size: requests in one forward pass.
        device: for a folder, where to load it (None: cuda where there is one, else cpu); None for a loaded model.
        trust_remote_code: for a folder, run the Python code in it where transformers does not know the model itself.

    Returns:
        {"results": {task: {"acc,none": ..., "acc_stderr,none": ...}}, "versions": {task: ...}, "n-shot": {...},
        "n-samples": {...}, "limit": limit, "lm_eval_version": ...}

    Raises:
        ImportError: `lm-eval` is not installed.
        ValueError: no tasks, unknown tasks, a loaded model without a tokenizer or with a device.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks need the library lm-eval ({error}): pip install 'lowbit[tasks]'") from error

    manager = TaskManager()
    unknown = [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]
    if unknown or not tasks:
        raise ValueError(f"tasks = {tasks}, unknown {unknown}: give names that `lm-eval ls tasks` lists, or .yaml files")
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError("a tokenizer with a checkpoint folder: leave it out, the folder's own is used")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        wrapped = HFLM(pretrained=str(model), device=chosen, batch_size=batch_size, trust_remote_code=trust_remote_code)
    else:
        if tokenizer is None:
            raise ValueError("a loaded model without a tokenizer: pass tokenizer=")
        if device is not None:
            raise ValueError(f"device = {device!r} with a loaded model: leave it out, and move the model yourself")
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=tasks, limit=limit, batch_size=batch_size, task_manager=manager, log_samples=False
    )
    keys = ("results", "versions", "n-shot", "n-samples")
    return {key: found[key] for key in keys} | {"limit": limit, "lm_eval_version": lm_eval.__version__}


def _check_model(name: str, model: Any, *, length: int, largest: int) -> None:
    """Raise what would otherwise be a wrong figure or an index error deep inside the model."""
    if getattr(model, "training", False):
        raise ValueError(f"the {name} is in training mode: call .eval() on it")
    if type(model).__name__.endswith("ForMaskedLM"):
        raise ValueError(f"the {name} is a {type(model).__name__}, which sees the token it predicts: give a causal LM")
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(f"id {largest} in the text, but the {name} has vocab_size {vocabulary}: use its own tokenizer")
    longest = positions(model)
    if longest is not None and length > longest:
        raise ValueError(f"window of {length} tokens, but the {name} has {longest} positions: use window <= {longest}")


def _input_device(name: str, model: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return parse_device(device)
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    found = torch.device("cpu") if parameter is None else parameter.device
    if found.type == "meta":
        raise ValueError(f"the {name} has its weights on the meta device: load them, or pass device= where offloaded")
    return found


def _logits(name: str, model: Any, inputs: Tensor, largest: int) -> Tensor:
    """One forward pass: inputs [batch, positions] int64 to logits [batch, positions, vocabulary]."""
    forward = inspect.signature(getattr(model, "forward", model)).parameters
    options = {"use_cache": False} if "use_cache" in forward else {}
    output = model(input_ids=inputs, **options)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"the {name} returns a {type(output).__name__} without logits: load it with a causal LM head")
    if logits.ndim != 3 or logits.shape[:2] != inputs.shape or logits.shape[-1] <= largest:
        raise ValueError(
            f"the {name} returns logits {list(logits.shape)} for ids {list(inputs.shape)} up to {largest}, "
            "which are not over the vocabulary: load it with a causal LM head"
        )
    return logits


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 709.0 else math.inf


evaluate = evaluate_model


class _CallableModule(ModuleType):
    """`lowbit.evaluate` is this module and, by the package's promise, can be called: it calls `evaluate`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.evaluate(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
