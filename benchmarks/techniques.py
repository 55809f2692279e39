"""How techniques combine: every number format by every sensible chain of steps, on a model and on its twin with outliers.

    python benchmarks/techniques.py [--windows 4 --rows 16 --length 256 --settings w8a8 --chains rtn smooth+rtn]

The twin computes the same, but a hundredth of its channels are 64 times larger (plant_outliers.py), as in large models. Both
are quantized by each chain of each setting, all in lowbit's own format; then all run over the same windows beside their float
model, as in results.py. One call measures everything that is compared. --out gets techniques.json, the table goes into the
section --section of --markdown. The exit status is 1 if a bar is missed. Parts of the table may be measured by processes
side by side, each with its --settings and --out; --merge A/techniques.json B/techniques.json makes one table of theirs.

A chain is `step+step`, a step `method` or `method:option=value,option=value`.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from plant_outliers import plant
from results import Score, checkpoint, code_hash, measure, say, summarize
from sections import RESULTS, ROOT, SHARED, describe, environment, joined, keep
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.recipe import FLOAT, METHODS, Recipe, Rule, Step
from lowbit.report import table

# setting -> chains
SMOOTHED = ["rtn", "smooth+rtn", "smooth:alpha=auto+rtn", "gptq", "smooth+gptq", "smooth:alpha=auto+gptq"]
SEARCHED = ["smooth_search:step=0.1+rtn"]
SCALED = ["rtn", "awq+rtn", "gptq", "awq+gptq"]
DATA_FREE = ["hqq", "rtn:importance=true"]  # or nearly
BEST = ["gptq:asymmetry=0.25", "awq+gptq:asymmetry=0.25", "awq+gptq:asymmetry=0.25+lorc:whiten=true"]
TABLE: dict[str, list[str]] = {
    "w8a8": [*SMOOTHED, *SEARCHED, "rotate+rtn"],
    "w8a8-tensor-astatic": ["rtn", "smooth+rtn", "smooth:alpha=auto+rtn", "rotate+rtn"],
    "w4a16-g128": [*SCALED, *DATA_FREE, *SEARCHED, "awq+rtn:importance=true,shrink_steps=50", "rotate+gptq", *BEST],
    "w3a16-g128": [*SCALED, *DATA_FREE, "rotate+gptq", *BEST, "rtn+lorc", "gptq+lorc", "gptq+lorc:whiten=true"],
    "mxfp4a16": [*SCALED, "rotate:block=32+gptq", "gptq:shrink_steps=3", "awq+gptq:shrink_steps=3,asymmetry=0.25"],
    "w4a4-g128-ag128": [*SMOOTHED, "rotate+rtn", "rotate+gptq", "rotate+gptq:asymmetry=0.25"],
    "mxfp4": [*SMOOTHED, "awq+gptq", "rotate+rtn", "rotate:block=32+gptq", "smooth:alpha=auto+gptq:shrink_steps=3"],
    "nvfp4": ["rtn", "rtn:shrink_steps=9", "gptq", "smooth:alpha=auto+gptq:shrink_steps=9", "awq+gptq:shrink_steps=9"],
    "w4a8-g128": [*SMOOTHED, "awq+gptq", "rotate+gptq"],
    "w2a16-g64-asym": [*SCALED, *BEST, "gptq+lorc:whiten=true"],
    "w4a16-g128-asym": [*SCALED, *DATA_FREE, *SEARCHED, *BEST],
    "w3a16-g128-asym": [*SCALED, *BEST],
    "mxint4": [*SMOOTHED, "awq+gptq", "rotate:block=32+gptq"],
    "mxint8": ["rtn", "smooth+rtn"],
    "mxint6": ["rtn", "smooth+rtn", "gptq"],
    "mxfp8": ["rtn", "gptq"],
    "mxfp6": ["rtn", "gptq"],
    "fp8": ["rtn", "smooth+rtn"],
    "nvfp4a16": ["rtn", "rtn:shrink_steps=9", "gptq:shrink_steps=9", "awq+gptq:shrink_steps=9"],
    "mxfp4a16-even": ["rtn", "gptq"],
    "mxfp4a16-ceil": ["rtn", "gptq"],
    "nf4": ["rtn", "awq+rtn", "gptq"],
    "kmeans3": ["rtn", "rtn:importance=true", "gptq"],
    "bcq3": ["rtn", "gptq", "gptq:asymmetry=0.25"],
    "w4a8-g128-two": ["rtn", "gptq"],
}
# (setting, model) -> the largest ratio of the best chain
MOST = {
    ("w4a16-g128", "plain"): 1.02,
    ("w3a16-g128", "plain"): 1.10,
    ("mxfp4a16", "plain"): 1.05,
    ("w8a8", "outliers"): 1.02,
}
KINDS = ("plain", "outliers")


def parse_chain(text: str) -> tuple[Step, ...]:
    """The steps of a chain; values are written as in TOML, words may go without quotes."""
    steps = []
    for part in text.split("+"):
        method, _, given = part.partition(":")
        options = {}
        for pair in filter(None, given.split(",")):
            name, _, value = pair.partition("=")
            try:
                options[name] = tomllib.loads(f"x = {value}")["x"]
            except tomllib.TOMLDecodeError:
                options[name] = value
        steps.append(Step(method=method, options=options))
    return tuple(steps)


def make_recipe(schemes: dict[str, str], chain: str, data: DataSpec) -> Recipe:
    """The recipe of one row; the schemes by the names of linears that they match. A head, which rotate unties, stays float."""
    head = Rule(match="lm_head|embed_out", scheme=FLOAT, optional=True)
    recipe = Recipe(
        rules=(head, *(Rule(match=match, scheme=scheme) for match, scheme in schemes.items())),
        steps=parse_chain(chain),
        data=data,
        format="lowbit",
    )
    return recipe if recipe.calibrated else replace(recipe, data=None)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the best chain of a setting, and whether it is so."""
    found = []
    for (setting, kind), most in MOST.items():
        mine = [row for row in rows if row["setting"] == setting]
        if mine:
            best = min(mine, key=lambda row: row["scores"][kind]["ratio"])
            ratio = best["scores"][kind]["ratio"]
            found.append(
                {"bar": f"{setting}, {kind}: best ≤ {most:g}", "best": best["chain"], "ratio": ratio, "met": ratio <= most}
            )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    text, data = result["text"], result["data"]
    lines = [
        f"- Model: {result['model']}; its twin has outliers of factor {result['planted']['factor']} in channels "
        f"{', '.join(map(str, result['planted']['channels']))}; the largest difference of their float perplexities is "
        f"{result['float_difference']:.1e}",
        f"- Text: {text['source']}, {text['windows']} windows of {text['window']} tokens without overlap and without bos, "
        f"{text['targets']:,} targets; float32; the float model has perplexity {result['float_perplexity']:.4f}",
        f"- Calibration: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens sha256 "
        f"{data['tokens_sha256'][:16]}",
        *describe(result["environment"]),
        "",
        "Ratios are perplexities over that of the float model, KL is the mean of KL(float || quantized) in nats; the best of a "
        "setting is bold. Seconds, on a GPU only, are of `quantize` on the plain model, with other processes beside.",
        "",
    ]
    rows = []
    timed = not result["environment"]["device"].startswith("CPU")
    for row in result["rows"]:
        cells = [row["setting"], row["chain"], f"{row['bits']:.3f}", *([f"{row['seconds']:.0f}"] if timed else [])]
        for kind in KINDS:
            score = row["scores"][kind]
            best = min(r["scores"][kind]["kl"] for r in result["rows"] if r["setting"] == row["setting"]) == score["kl"]
            mark = "**" if best else ""
            cells += [f"{mark}{score['ratio']:.4f}{mark}", f"{mark}{score['kl']:.2e}{mark}"]
        rows.append(cells)
    head = ["setting", "steps", "bits", *(["seconds"] if timed else []), "ratio", "KL", "ratio, outliers", "KL, outliers"]
    lines.append(table(head, rows))
    lines += ["", *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['best']}, {b['ratio']:.4f})" for b in result["bars"])]
    return "\n".join(lines)


def main() -> int:
    """Plant, quantize, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt", help="what to evaluate on")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--rows", type=int, default=128, help="calibration sequences (default 128)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(TABLE), default=list(TABLE), metavar="SCHEME")
    parser.add_argument("--chains", nargs="+", metavar="CHAIN", help="only these (default: those of the table)")
    parser.add_argument("--factor", type=int, default=64, help="of the outliers (default 64)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, help="windows to evaluate (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "techniques")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--section", default="techniques", help="of --markdown")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="measure nothing, join these results")
    args = parser.parse_args()
    if args.merge:
        return write(joined(args.merge), args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    where = environment(args.device) | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = evaluation_tokens(str(args.text), tokenizer)
    windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[: args.windows]
    targets = sum(window.scored for window in windows)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=args.seed)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)

    twin = args.out / "twin"
    shutil.rmtree(twin, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    channels = plant(args.model, twin, factor=args.factor)
    pairs = [(s, c) for s in args.settings for c in (TABLE[s] if args.chains is None else args.chains)]
    known = [pair for pair in pairs if all(step.partition(":")[0] in METHODS for step in pair[1].split("+"))]
    for setting, chain in sorted(set(pairs) - set(known)):
        say(f"{setting} {chain}: left out, no such method")

    sums: dict[str, dict[str, list[list[float]]]] = {}
    reports = {}
    for kind, model in zip(KINDS, (args.model, twin), strict=True):
        models = {}
        for setting, chain in known:
            name = re.sub(r"[:=,]", "-", f"{setting}-{chain}")
            folder = args.out / "checkpoints" / kind / name
            began = time.monotonic()
            recipe = make_recipe({"": setting}, chain, spec)
            reports[kind, setting, chain] = checkpoint(model, folder, recipe, calibration, where, args.device)
            say(f"{kind} {setting} {chain}: {time.monotonic() - began:.0f} s")
            models[f"{setting} {chain}"] = load(str(folder), dtype=torch.float32, device=args.device)
        reference = load(str(model), dtype=torch.float32, device=args.device)
        sums[kind] = measure(reference, models, tokens, windows)
        del models, reference

    rows = []
    for setting, chain in known:
        report = reports["plain", setting, chain]
        scores: dict[str, Score] = {kind: summarize(sums[kind][f"{setting} {chain}"], targets) for kind in KINDS}
        rows.append(
            {
                "setting": setting,
                "chain": chain,
                "bits": report["sizes"]["bits_per_quantized_weight"],
                "seconds": sum(stage["seconds"] for stage in report["stages"]),
                "scores": {kind: asdict(score) for kind, score in scores.items()},
            }
        )
    first = f"{known[0][0]} {known[0][1]}"
    plain, outliers = (math.exp(math.fsum(row[1] for row in sums[kind][first]) / targets) for kind in KINDS)
    result = {
        "model": args.model.name,
        "planted": {"factor": args.factor, "channels": channels},
        "float_perplexity": plain,
        "float_difference": abs(plain - outliers),
        "text": {"source": args.text.name, "window": args.window, "windows": len(windows), "targets": targets},
        "data": calibration.describe(),
        "environment": where,
        "rows": rows,
    }
    return write(result, args)


def write(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Order the rows by setting, judge and write them; 1 if a bar is missed."""
    order = list(TABLE)
    result["rows"].sort(key=lambda row: order.index(row["setting"]))
    result["bars"] = bars(result["rows"])
    keep(result, args.out / "techniques.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
