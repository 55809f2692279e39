"""How much accuracy each setting costs: perplexity, KL divergence and top-1 agreement of quantized models on WikiText-2.

    python benchmarks/results.py [--windows 2 --rows 8 --length 256 --settings w4a16-g128 --markdown build/RESULTS.md]

Quantizes the model at every setting by rtn and by gptq, then runs all of them and the float model over the same windows of
the text, in float32, in one pass: for each window one forward of the float model and one of every quantized model. All of them
are in memory at once, so this is for small models (29 million parameters at 20 settings: 2.5 GB).

The quantized checkpoints stay in --out and are used again by the next call, if they were made by the same lowbit, of the same
recipe, data and model, on the same number of threads. --out also gets accuracy.json, with the sums of every window; the
table goes into the section `accuracy` of --markdown. The exit status is 1 if a bar is missed.

Before the long pass two windows tell whether matmul precision "medium" may be used, which is about twice as fast on CPUs
(`choose_precision`); after it, `lowbit.evaluate.evaluate_model` has to give the same figures on the first windows.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import lowbit
from lowbit.data import Calibration, DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import Window, evaluate_model, plan_windows, score_positions
from lowbit.export import load
from lowbit.files import write_json
from lowbit.qtensor import parse_scheme
from lowbit.recipe import METHODS, Recipe, short_recipe
from lowbit.report import read_report, table
from lowbit.run import quantize
from lowbit.source import open_source

SETTINGS = (
    "w4a16-g128",
    "w4a16-g128-asym",
    "w4a16-g64-asym",
    "w3a16-g128",
    "w3a16-g128-asym",
    "w2a16-g64",
    "w2a16-g64-asym",
    "w8a8",
    "w8a16",
    "fp8",
)
COMPARED = ("rtn", "gptq")
# Largest perplexity over that of the float model: for both methods where inputs are quantized too, else for gptq.
MOST = {"w8a8": 1.01, "fp8": 1.01, "w4a16-g128-asym": 1.03, "w4a16-g64-asym": 1.015, "w3a16-g128-asym": 1.15}
BOTH = ("w8a8", "fp8")
CHECK_WINDOWS = 2
PRECISION_TOLERANCE = 1e-4  # of a perplexity, relative
FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on all windows, against the float model; see `lowbit.evaluate.Evaluation`."""

    perplexity: float
    ratio: float
    kl: float
    top1: float


# ------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def measure(
    reference: PreTrainedModel, models: Mapping[str, PreTrainedModel], tokens: Tensor, windows: Sequence[Window]
) -> dict[str, list[list[float]]]:
    """For each model and window the four sums of `score_positions`; the reference runs once a window."""
    sums: dict[str, list[list[float]]] = {name: [] for name in models}
    began = time.monotonic()
    for number, window in enumerate(windows, start=1):
        text = tokens[window.start : window.end].to(reference.device)
        targets = text[-window.scored :]
        part = slice(len(text) - 1 - window.scored, len(text) - 1)  # logits at a position predict the next token
        expected = reference(input_ids=text[None], use_cache=False).logits[0, part]
        for name, model in models.items():
            scores = score_positions(model(input_ids=text[None], use_cache=False).logits[0, part], targets, expected)
            if not all(math.isfinite(score) for score in scores):
                raise ValueError(f"{name}: window {number - 1} gives {scores}, which are not all finite")
            sums[name].append(scores)
        if number % 10 == 0 or number == len(windows):
            say(f"window {number} of {len(windows)}, {time.monotonic() - began:.0f} s")
    return sums


def summarize(sums: list[list[float]], targets: int) -> Score:
    """The figures of one model from its sums over windows."""
    nll, reference, kl, same = (math.fsum(column) / targets for column in zip(*sums, strict=True))
    return Score(perplexity=math.exp(nll), ratio=math.exp(nll - reference), kl=kl, top1=same)


def choose_precision(
    reference: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    smooth: set[str],
    tokens: Tensor,
    windows: Sequence[Window],
) -> dict[str, Any]:
    """Set matmul precision "medium" if it changes no perplexity by more than PRECISION_TOLERANCE, else leave "highest".

    It is not accurate everywhere: on CPUs with bfloat16 matrix units it uses them, on others it selects oneDNN kernels that
    compute in float32. The float model and those in `smooth` decide. A model that rounds its inputs is no judge: the last bit
    of a sum decides some roundings, and these decide others, so it differs by as much as between any two ways to add.
    """
    windows = windows[:CHECK_WINDOWS]
    targets = sum(window.scored for window in windows)
    scores = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        found = measure(reference, {FLOAT: reference, **models}, tokens, windows)
        scores[precision] = {name: summarize(sums, targets) for name, sums in found.items()}
    change = {
        name: abs(scores["medium"][name].perplexity / scores["highest"][name].perplexity - 1) for name in scores["medium"]
    }
    decisive = max(change[name] for name in {FLOAT, *smooth})
    chosen = "medium" if decisive <= PRECISION_TOLERANCE else "highest"
    torch.set_float32_matmul_precision(chosen)
    kl = [abs(scores["medium"][name].kl - scores["highest"][name].kl) for name in {FLOAT, *smooth}]
    return {
        "chosen": chosen,
        "windows": len(windows),
        "perplexity_change": decisive,
        "kl_change": max(kl),
        "perplexity_change_with_rounded_inputs": max((change[name] for name in models if name not in smooth), default=None),
    }


def check_against_evaluate_model(
    reference: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokens: Tensor,
    sums: Mapping[str, list[list[float]]],
    window: int,
) -> int:
    """Compare `measure` with `evaluate_model` on the first windows, for every model; returns how many windows.

    Raises:
        RuntimeError: they differ by more than the order of a sum does.
    """
    for name, model in models.items():
        windows = min(CHECK_WINDOWS, len(sums[name]))
        theirs = evaluate_model(model, tokens, window=window, reference=reference, max_windows=windows, device=reference.device)
        mine = summarize(sums[name][:windows], theirs.tokens)
        assert theirs.reference_perplexity is not None and theirs.kl is not None and theirs.top1_agreement is not None
        pairs = {
            "perplexity": (mine.perplexity, theirs.perplexity),
            "float perplexity": (mine.perplexity / mine.ratio, theirs.reference_perplexity),
            "KL": (mine.kl, theirs.kl),
            "top-1": (mine.top1, theirs.top1_agreement),
        }
        for what, (a, b) in pairs.items():
            if not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12):
                raise RuntimeError(f"{name}: {what} is {a!r} here and {b!r} by evaluate_model")
    return windows


# ----------------------------------------------------------------------------------------------------------- quantization


def make_recipe(setting: str, method: str, data: DataSpec) -> Recipe:
    """The recipe of one cell of the table: engines' format where an engine has kernels for it, lowbit's own elsewhere."""
    weight = parse_scheme(setting).weight.format
    format = "compressed-tensors" if weight.kind == "float" or weight.bits in (4, 8) else "lowbit"
    given = data if METHODS[method].calibrated({}) else None
    return short_recipe(scheme=setting, method=method, data=given, format=format)


def checkpoint(
    model: Path, folder: Path, recipe: Recipe, calibration: Calibration, where: dict[str, Any], device: str
) -> dict[str, Any]:
    """Make the checkpoint `folder`, or use the one that is there if it is what would be made; returns its report.

    where: `environment()` and `code_sha256` when this process began.
    """
    made = {
        "recipe_sha256": recipe.hash(),
        "tokens_sha256": calibration.sha256 if recipe.data is not None else None,
        "fingerprint": open_source(str(model)).fingerprint(),
        "code_sha256": where["code_sha256"],
        "versions": where["versions"],
        "threads": where["threads"],
        "device": device,
    }
    note = folder.with_name(folder.name + ".json")
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    report = read_report(folder) if folder.is_dir() else None
    if known == made and report is not None and _agrees(report, made):
        say(f"{folder.name}: made before")
        return report
    partial = folder.with_name(folder.name + ".partial")
    for old in (folder, *([] if known == made else [partial])):
        if old.exists():
            shutil.rmtree(old)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, made)
    began = time.monotonic()
    report = quantize(str(model), folder, recipe=recipe, device=device)
    if not _agrees(report, made):
        raise RuntimeError(f"{folder.name}: the report names another recipe, model, data or version than was asked for")
    say(f"{folder.name}: {time.monotonic() - began:.0f} s")
    return report


def _agrees(report: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a report is of this recipe, model, calibration data and lowbit."""
    return (
        report["recipe_sha256"] == made["recipe_sha256"]
        and report["model"]["fingerprint"] == made["fingerprint"]
        and report["lowbit"] == made["versions"]["lowbit"]
        and made["tokens_sha256"] in (None, report["data"]["tokens_sha256"])
    )


def code_hash() -> str:
    """Of lowbit's source text: between releases the version does not tell what made a checkpoint."""
    digest = hashlib.sha256()
    package = Path(lowbit.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- the result


def bars(setting: str, scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """What is asked of a setting and whether it is so; `scores` by method."""
    found = []
    if parse_scheme(setting).weight.format.bits < 8 and len(scores) == len(COMPARED):
        found.append({"bar": "gptq < rtn", "met": scores["gptq"].perplexity < scores["rtn"].perplexity})
    methods = [method for method in scores if method == "gptq" or setting in BOTH]
    if setting in MOST and methods:
        met = all(scores[method].ratio <= MOST[setting] for method in methods)
        found.append({"bar": f"{' and '.join(methods)} ≤ {MOST[setting]:g}", "met": met})
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section `accuracy`."""
    model, text, data, check = (result[key] for key in ("model", "text", "data", "check"))
    lines = [
        f"- Model: {model['name']}, {model['class']}, {model['parameters'] / 1e6:.1f} million parameters, stored as "
        f"{model['dtype']}, evaluated in float32",
        f"- Text: {text['source']}, windows of {text['window']} tokens without overlap and without bos; {text['windows']} "
        f"windows of {text['windows_in_all']}, {text['targets']:,} targets; tokens sha256 {text['tokens_sha256'][:16]}",
        f"- Calibration of gptq: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens "
        f"sha256 {data['tokens_sha256'][:16]}; rtn uses none",
        *describe(result["environment"]),
        "",
        f"The float model has perplexity {result['float_perplexity']:.4f}; ratios are to it. KL is the mean of "
        "KL(float || quantized) in nats, top-1 the share of positions where both rank the same token first.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        scores = row["scores"]
        cells = [f"{s['perplexity']:.4f} ({s['ratio']:.4f})" for s in scores.values()]
        bits = " / ".join(dict.fromkeys(f"{value:.3f}" for value in row["bits"].values()))
        kl, top1 = ([score[key] for score in scores.values()] for key in ("kl", "top1"))
        checked = "; ".join(f"{bar['bar']}: {'yes' if bar['met'] else '**no**'}" for bar in row["bars"])
        cells += [" / ".join(f"{v:.2e}" for v in kl), " / ".join(f"{v:.2%}" for v in top1)]
        rows.append([row["setting"], bits, *cells, checked])
    methods = result["methods"]
    both = ", ".join(methods) if len(methods) == 1 else " / ".join(methods)
    head = ["setting", "bits per weight", *(f"{m} ppl (ratio)" for m in methods), f"KL, {both}", f"top-1, {both}", "bars"]
    lines += [table(head, rows), ""]
    change = check["perplexity_change_with_rounded_inputs"]
    others = "" if change is None else f" (of those with quantized inputs, whose roundings hang on last bits, {change:.1e})"
    lines.append(
        f"Matmul precision {check['chosen']}: on {check['windows']} windows, medium instead of highest changes perplexities of "
        f"the float model and of weight-only settings by at most {check['perplexity_change']:.1e} of their value{others} and "
        f"KL by at most {check['kl_change']:.1e} nats; {PRECISION_TOLERANCE:g} of a perplexity is allowed. `evaluate_model` "
        f"gives the same figures on the first {result['equal_windows']} windows of every model. Checkpoints are read back from "
        "disk: 2 and 3 bits in lowbit's own format, the others in compressed-tensors."
    )
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Quantize, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt", help="what to evaluate on")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl", help="for gptq")
    parser.add_argument("--rows", type=int, default=128, help="calibration sequences (default 128)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="which calibration sequences (default 0)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="SCHEME", help="default: all of the table")
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED), help="default: both")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default 1024)")
    parser.add_argument("--windows", type=int, help="windows to evaluate (default: all)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="cpu", help="where to quantize and evaluate (default cpu)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "accuracy", help="for checkpoints and accuracy.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS, help="whose section to replace")
    args = parser.parse_args()
    for name in ("windows", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    where = environment(args.device) | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = evaluation_tokens(str(args.text), tokenizer)
    planned = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")
    windows = planned[: args.windows]
    targets = sum(window.scored for window in windows)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=args.seed)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)

    reports, models = {}, {}
    pairs = [(setting, method) for setting in args.settings for method in args.methods]
    for setting, method in pairs:
        folder = args.out / "checkpoints" / f"{args.model.name}-{setting}-{method}"
        reports[setting, method] = checkpoint(
            args.model, folder, make_recipe(setting, method, spec), calibration, where, args.device
        )
        models[f"{setting} {method}"] = load(str(folder), dtype=torch.float32, device=args.device)
    reference = load(str(args.model), dtype=torch.float32, device=args.device)

    smooth = {f"{setting} {method}" for setting, method in pairs if parse_scheme(setting).input is None}
    check = choose_precision(reference, models, smooth, tokens, windows)
    say(f"matmul precision {check['chosen']}: medium changes perplexities by at most {check['perplexity_change']:.1e}")
    began = time.monotonic()
    sums = measure(reference, models, tokens, windows)
    seconds = time.monotonic() - began
    equal = check_against_evaluate_model(reference, models, tokens, sums, args.window)

    rows = []
    for setting in args.settings:
        scores = {method: summarize(sums[f"{setting} {method}"], targets) for method in args.methods}
        sizes = {method: reports[setting, method]["sizes"] for method in args.methods}
        rows.append(
            {
                "setting": setting,
                "bits": {method: size["bits_per_quantized_weight"] for method, size in sizes.items()},
                "scores": {method: asdict(score) for method, score in scores.items()},
                "bars": bars(setting, scores),
                "seconds": {m: sum(s["seconds"] for s in reports[setting, m]["stages"]) for m in args.methods},
                "format": reports[setting, args.methods[0]]["recipe"]["format"],
            }
        )
    first = reports[pairs[0]]
    result = {
        "model": {key: first["model"][key] for key in ("name", "class", "dtype", "fingerprint")}
        | {"parameters": first["sizes"]["parameters"]},
        "text": {
            "source": args.text.name,
            "tokens_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
            "window": args.window,
            "windows": len(windows),
            "windows_in_all": len(planned),
            "targets": targets,
        },
        "data": calibration.describe(),
        "environment": where,
        "methods": args.methods,
        "float_perplexity": math.exp(math.fsum(row[1] for row in sums[f"{pairs[0][0]} {pairs[0][1]}"]) / targets),
        "rows": rows,
        "check": check,
        "equal_windows": equal,
        "evaluation_seconds": seconds,
        "window_sums": {"columns": ["nll", "float nll", "KL", "same top token"], "models": sums},
    }
    keep(result, args.out / "accuracy.json", markdown(result), page=args.markdown, name="accuracy")
    return 0 if all(bar["met"] for row in rows for bar in row["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
