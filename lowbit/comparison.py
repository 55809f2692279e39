"""Compare recipes on one model: each is run once, judged on the same text, and set in one table.

OUT holds what was done, named by its content (recipe, model, calibration data, version), so that a comparison that is run
again, interrupted, or extended by another recipe does nothing twice:

    KEY.toml          a recipe
    KEY/              its checkpoint, written by a process of its own, so that its peak memory is its own; KEY.partial/ is one
                      that is not finished, which the next comparison goes on with
    KEY-JUDGED.json   what was measured on it, JUDGED naming the texts and windows
    comparison.json   all of it; comparison.html shows it (see `page`)
    lock              held by the comparison at work here and by the process it started, which may outlive it
"""

import fcntl
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import __version__
from lowbit.allocate import useful
from lowbit.arguments import checked, parse_device
from lowbit.data import DataSpec, evaluation_tokens, tokenizer_of
from lowbit.evaluate import Evaluation, OutputDivergence, evaluate_model, evaluate_outputs, sentence_pooling
from lowbit.export import load
from lowbit.files import check_name, remove_unfinished, write_json, write_text
from lowbit.journal import WORK
from lowbit.outputs import input_ids, predicts_next_token
from lowbit.page import comparison_page
from lowbit.planner import candidates
from lowbit.processes import tied
from lowbit.recipe import Recipe, short_recipe
from lowbit.report import read_report
from lowbit.run import Progress
from lowbit.sensitivity import check_measured
from lowbit.source import Source, open_source

# What `search` walks: every chain with every candidate that the engine loads, from the quickest chain on.
SEARCHED = ("rtn", "gptq", "awq+gptq")
_OWN_FILES = r"comparison\.(json|html)|(float-)?[0-9a-f]{16}(-[0-9a-f]{16})?\.(json|toml)"  # beside the checkpoints
PROMPT, CONTINUED = 24, 40  # tokens of a sample of text, and generated after it
DECODED = 32  # tokens of the measurement of speed


@checked
def compare(
    model: str | Path,
    recipes: dict[str, Recipe],
    out: str | Path,
    *,
    texts: Sequence[str],
    window: int = 1024,
    windows: int | None = None,
    sensitivities: dict[str, Any] | None = None,
    searched: dict[str, Recipe] | None = None,
    limit_seconds: float | None = None,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run or reuse every recipe, judge all, and write comparison.json and comparison.html into `out`.

    While another comparison, or a recipe that one left running, is at work in `out`, this one waits.

    Args:
        model: a folder or hub id; causal language models are judged on the text, others by what they give out for it.
        recipes: by the name they have in the table.
        texts: files to judge on, not those of calibration.
        window, windows: see `evaluate.evaluate_model`; windows without overlap, without bos.
        sensitivities: what `planner.plan` measured, for the page.
        searched: more recipes, such as those of `search_space`, that are run in their order for `limit_seconds` after the
            others; what is not done by then is named in the result, and gone on with by the next call.
        trust_remote_code: run the Python code in the model's folder or repository, see `run.quantize`.

    Returns:
        what comparison.json holds: "float" and "rows", one for each recipe; a row whose recipe failed has "failed".

    Raises:
        ValueError: nothing to compare, or bad input.
    """
    model, device = str(model), str(parse_device(device))
    if sensitivities is not None:
        check_measured(sensitivities, "sensitivities")
    searched = searched or {}
    if not recipes and not searched:
        raise ValueError("nothing to compare: give recipes")
    if not texts:
        raise ValueError("nothing to judge by: give texts")
    out = Path(out)
    check_name(out)
    out.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda stage, done, total: None)
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    source.track()
    tokenizer = tokenizer_of(source)
    tokens = {text: evaluation_tokens(text, tokenizer) for text in texts}
    judge = _Judge(source, tokens, tokenizer, window, windows, device)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    with _alone(out, say) as lock:
        end = None
        for number, (name, recipe) in enumerate([*recipes.items(), *searched.items()]):
            say("comparing", number, len(recipes) + len(searched))
            if number == len(recipes) and limit_seconds is not None:
                end = time.monotonic() + limit_seconds
            try:
                rows.append({"name": name} | _row(out, _key(source, recipe), source, recipe, judge, device, end, lock))
            except subprocess.TimeoutExpired:
                left.append(name)
        say("comparing", len(recipes) + len(searched), len(recipes) + len(searched))
        return _written(out, model, source, judge, rows, left, sensitivities)


@contextmanager
def _alone(out: Path, say: Progress) -> Iterator[int]:
    """The descriptor of a lock of this folder, for this process and those that inherit it."""
    with (out / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another process in the folder", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_unfinished(out, _OWN_FILES)
        yield lock.fileno()


def _written(
    out: Path,
    model: str,
    source: Source,
    judge: "_Judge",
    rows: list[dict[str, Any]],
    left: list[str],
    sensitivities: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write what was measured, with the float model beside it, as JSON and as a page."""
    reference = out / f"float-{judge.key}.json"
    if not reference.exists():
        write_json(reference, judge.measured(None))
    good = [row for row in rows if "failed" not in row]
    result = {
        "lowbit": __version__,
        "model": Path(model).name if Path(model).is_dir() else model,
        "fingerprint": source.fingerprint(),
        "texts": judge.describe(),
        "device": judge.device,
        "threads": torch.get_num_threads(),
        "float": json.loads(reference.read_text(encoding="utf-8")) | {"bytes": source.stored_bytes()},
        "rows": rows,
        "front": front({row["name"]: (row["bytes"], row["loss"]) for row in good}),
        "left_out": left,
        "sensitivities": sensitivities,
    }
    write_json(out / "comparison.json", result)
    write_text(out / "comparison.html", comparison_page(result))
    return result


def search_space(data: DataSpec, format: str, engine: str) -> dict[str, Recipe]:
    """The recipes that a search walks: `SEARCHED` by the candidates of a plan."""
    schemes = candidates(None, format, engine)
    return {
        f"{scheme} {method}": short_recipe(scheme=scheme, method=method, data=data, format=format, engine=engine)
        for method in SEARCHED
        for scheme in schemes
    }


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Of named (bytes, loss), those that no other beats in one and equals in the other, by bytes."""
    names = list(points)
    return [names[j] for j in useful([points[name][1] for name in names], [points[name][0] for name in names])]


# --------------------------------------------------------------------------------------------------------- one recipe


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _content(path: str) -> str:
    """A file by what is in it, anything else by its name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else path


def _key(source: Source, recipe: Recipe) -> str:
    """Names a checkpoint by all that decides what is in it."""
    plain = recipe.to_dict()
    if recipe.data is not None:
        plain["data"]["source"] = _content(recipe.data.source)
    return _digest([plain, source.fingerprint(), __version__])


def _row(
    out: Path, key: str, source: Source, recipe: Recipe, judge: "_Judge", device: str, end: float | None, lock: int
) -> dict[str, Any]:
    """What was measured on a recipe's checkpoint, which is made where it is missing, until `end`."""
    folder, judged = out / key, out / f"{key}-{judge.key}.json"
    if not folder.is_dir() or (folder / WORK).exists():  # killed just before its journal was removed
        failure = _quantized(out, key, source, recipe, device, end, lock)
        if failure is not None:
            return {"key": key, "recipe": recipe.to_dict(), "failed": failure}
    if not judged.exists():
        write_json(judged, judge.measured(folder))
    report = read_report(folder)
    assert report is not None
    if report["model"]["fingerprint"] != source.fingerprint():
        raise ValueError(
            f"{source.folder} has changed during the comparison, so {folder} is of another model; delete that folder, put the "
            "model back, or compare again"
        )
    measured = json.loads(judged.read_text(encoding="utf-8"))
    first = measured["evaluations"][0]
    return measured | {
        "key": key,
        "loss": first["relative_error"] if first["kl"] is None else first["kl"],
        "recipe": report["recipe"],
        "bytes": report["sizes"]["output_bytes"],
        "bits": report["sizes"]["bits_per_quantized_weight"],
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
        "peak_rss": max(stage["peak_rss"] for stage in report["stages"]),
        "linears": report["linears"],
        "notes": [note | {"block": block["block"]} for block in report["blocks"] for note in block["transforms"]],
        "adapter": report["adapter"],
        "histograms": report["histograms"],
        "gate": report["gate"],
    }


def _quantized(out: Path, key: str, source: Source, recipe: Recipe, device: str, end: float | None, lock: int) -> str | None:
    """Run a recipe in a process of its own, which holds the lock too; what it complained about, if it failed.

    Raises:
        subprocess.TimeoutExpired: it was not finished by `end`.
    """
    written = recipe
    if recipe.data is not None and Path(recipe.data.source).is_file():
        written = replace(recipe, data=replace(recipe.data, source=str(Path(recipe.data.source).resolve())))
    path = out / f"{key}.toml"
    write_text(path, written.to_toml())
    arguments = ["quantize", str(source.folder), "--recipe", str(path), "--out", str(out / key), "--device", device]
    arguments += ["--trust-remote-code"] if source.trust_remote_code else []
    command = tied("import sys; from lowbit.cli import main; sys.exit(main())", *arguments)
    seconds = None if end is None else end - time.monotonic()
    if seconds is not None and seconds <= 0:
        raise subprocess.TimeoutExpired(command, seconds)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, pass_fds=(lock,))
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("lowbit: ") if lines else f"ended with status {done.returncode}"


class _Judge:
    """What all checkpoints are measured by.

    Attributes:
        key: names texts and windows.
    """

    def __init__(
        self, source: Source, tokens: dict[str, Tensor], tokenizer: Any, window: int, windows: int | None, device: str
    ) -> None:
        self.source, self.tokens, self.tokenizer = source, tokens, tokenizer
        self.window, self.windows, self.device = window, windows, device
        digests = {text: hashlib.sha256(found.numpy().tobytes()).hexdigest() for text, found in tokens.items()}
        self.key = _digest([list(digests.values()), window, windows, device, __version__])
        self._reference: tuple[Any, float] | None = None

    def describe(self) -> list[dict[str, Any]]:
        """The texts, as the report names them."""
        return [
            {"source": Path(text).name, "tokens": len(found), "window": self.window, "windows": self.windows}
            for text, found in self.tokens.items()
        ]

    def reference(self) -> tuple[Any, float]:
        """The float model, loaded when first asked for, and how many seconds that took."""
        if self._reference is None:
            self._reference = self._loaded(self.source.folder)
        return self._reference

    def _loaded(self, folder: Path) -> tuple[Any, float]:
        began = time.monotonic()
        model = load(str(folder), dtype=torch.float32, device=self.device, trust_remote_code=self.source.trust_remote_code)
        return model, time.monotonic() - began

    def measured(self, folder: Path | None) -> dict[str, Any]:
        """Everything measured on the checkpoint in `folder`, or on the float model."""
        model, seconds = self._loaded(folder) if folder is not None else self.reference()
        first = next(iter(self.tokens.values()))
        causal = predicts_next_token(type(model))
        given: dict[str, Any] = {"window": self.window, "max_windows": self.windows}
        evaluations: list[Evaluation | OutputDivergence] = []
        for text, tokens in self.tokens.items():
            name = Path(text).name
            if causal:
                reference = self.reference()[0] if folder is not None else None
                evaluations.append(evaluate_model(model, tokens, reference=reference, source=name, **given))
            else:
                pooling = sentence_pooling(self.source.folder)
                reference = self.reference()[0]
                evaluations.append(evaluate_outputs(model, tokens, reference=reference, source=name, pooling=pooling, **given))
        return {
            "evaluations": [evaluation.to_dict() for evaluation in evaluations],
            "load_seconds": seconds,
            "decode_tokens_per_second": _decode_speed(model, first) if causal else None,
            "samples": self._samples(model) if causal else [],
            "outliers": _outliers(model, first[: min(self.window, evaluations[0].window)]),
        }

    def _samples(self, model: Any) -> list[dict[str, str]]:
        """A continuation of the beginning of every text."""
        samples = []
        for tokens in self.tokens.values():
            prompt = tokens[None, :PROMPT].to(self.device)
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0
            )[0]
            pair = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt[0], output[prompt.shape[1] :]))
            samples.append(dict(zip(("prompt", "text"), pair, strict=True)))
        return samples


def _decode_speed(model: Any, tokens: Tensor) -> float:
    """Tokens a second when transformers decodes one sequence greedily with the dequantized weights."""
    prompt = tokens[None, :PROMPT].to(next(model.parameters()).device)
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=4, min_new_tokens=4, **given)
    began = time.monotonic()
    model.generate(prompt, max_new_tokens=DECODED, min_new_tokens=DECODED, **given)
    return DECODED / (time.monotonic() - began)


@torch.no_grad()
def _outliers(model: Any, tokens: Tensor) -> dict[str, float]:
    """By linear module: the largest of its input channels over the median one, by their largest magnitudes on one window."""
    found: dict[str, float] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes = args[0].detach().abs().float().flatten(0, -2).amax(0)
            found[name] = float(sizes.max() / sizes.median().clamp(min=1e-12))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            handles.append(module.register_forward_pre_hook(watch(name)))
    try:
        model(input_ids=input_ids(model, tokens[None].to(next(model.parameters()).device)))
    finally:
        for handle in handles:
            handle.remove()
    return found
