"""What MREM's parallel training buys: seconds and perplexity with one process and with several, at equal steps.

    python benchmarks/parallel.py [--processes 1 2 --chain rtn+mrem:blocks=4,steps=250,batch=4 --windows 4]
    python benchmarks/parallel.py --device cuda --section parallel-gpu

Quantizes the model with each number of processes, every process with one thread (start it with OMP_NUM_THREADS=1), and runs the
results over the same windows beside the float model. In theory N processes with a module each take an N-th of the time; but
every one reads the model, the last begins `lowbit.parallel.DELAY` of the steps later, and one judges and writes all modules.
On GPUs every process has one to itself where there are as many, else they share them.

--out gets parallel.json; the table goes into the section --section of --markdown. The exit status is 1 if a bar is missed.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from results import measure, say, summarize
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
from techniques import make_recipe
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.report import table
from lowbit.run import quantize

SPEEDUP = 0.8  # of the number of processes, at least
PERPLEXITY = 1.02  # times that of one process, at most


def markdown(result: dict[str, Any]) -> str:
    """The section `parallel`, or one like it."""
    data, text = result["data"], result["text"]
    lines = [
        f"- Model: {result['model']}, {result['scheme']}, {result['chain']}, of which rounding alone has ratio "
        f"{result['rounded']['ratio']:.4f}",
        f"- Calibration: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens sha256 "
        f"{data['tokens_sha256'][:16]}",
        f"- Text: {text['source']}, {text['windows']} windows of {text['window']} tokens without overlap and without bos, "
        f"{text['targets']:,} targets; float32",
        *describe(result["environment"]),
        *([f"- GPUs: {result['gpus']}"] if result["gpus"] else []),
        "",
        "How many times as fast as one process the whole command is, and its training; of GPUs with the seconds. Ratios are "
        "perplexities over that of the float model, KL is the mean of KL(float || quantized) in nats.",
        "",
    ]
    first = result["rows"][0]

    def speed(row: dict[str, Any], key: str) -> str:
        seconds = f" ({row[key]:.0f} s)" if result["gpus"] else ""
        return f"{first[key] / row[key]:.2f}{seconds}"

    rows = [
        [
            str(row["processes"]),
            speed(row, "seconds"),
            speed(row, "training"),
            f"{row['score']['ratio']:.4f}",
            f"{row['score']['kl']:.4f}",
        ]
        for row in result["rows"]
    ]
    lines.append(table(["processes", "whole", "training", "ratio", "KL"], rows))
    lines += ["", *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"])]
    return "\n".join(lines)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and perplexity of every further number of processes beside one."""
    found = []
    for row in rows[1:]:
        n = row["processes"]
        training, whole = (rows[0][key] / row[key] for key in ("training", "seconds"))
        worse = row["score"]["ratio"] / rows[0]["score"]["ratio"]
        numbers = f"{whole:.2f}, in training {training:.2f}; in theory {n}"
        fast = f"{n} processes are {SPEEDUP * n:.1f} times as fast"
        found.append({"bar": fast, "met": whole >= SPEEDUP * n, "numbers": numbers})
        equal = f"the perplexity of {n} is at most {PERPLEXITY:g} times that of one"
        found.append({"bar": equal, "met": worse <= PERPLEXITY, "numbers": f"{worse:.4f}"})
    return found


def main() -> int:
    """Quantize, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--scheme", default="w3a16-g128")
    parser.add_argument("--chain", default="rtn+mrem:blocks=4,steps=250,batch=4", help="ends with mrem")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "parallel")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--section", default="parallel")
    args = parser.parse_args()
    if torch.get_num_threads() != 1 and args.device == "cpu":
        parser.error("start it with OMP_NUM_THREADS=1, so that every process has one thread")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = environment(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    work = args.out / "checkpoints"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows, models = [], {}
    jobs = [("rounded", args.chain.partition("+")[0], 1)] + [(str(n), args.chain, n) for n in args.processes]
    for name, chain, processes in jobs:
        began = time.perf_counter()
        recipe = make_recipe({"": args.scheme}, chain, spec)
        report = quantize(str(args.model), work / name, recipe=recipe, device=args.device, parallel=processes)
        seconds = time.perf_counter() - began
        stages = {stage["stage"]: stage["seconds"] for stage in report["stages"]}
        models[name] = load(str(work / name), dtype=torch.float32, device=args.device)
        say(f"{name}: {seconds:.0f} s, {stages}")
        if name != "rounded":
            training = stages["parallel training" if processes > 1 else "blocks"]
            rows.append({"processes": processes, "seconds": seconds, "training": training, "stages": stages})
    reference = load(str(args.model), dtype=torch.float32, device=args.device)
    tokens = evaluation_tokens(str(args.text), tokenizer)
    windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[: args.windows]
    targets = sum(window.scored for window in windows)
    scores = {name: asdict(summarize(sums, targets)) for name, sums in measure(reference, models, tokens, windows).items()}
    for row in rows:
        row["score"] = scores[str(row["processes"])]
        if not math.isfinite(row["score"]["ratio"]):
            raise ValueError(f"{row['processes']} processes: the perplexity is not finite")
    shutil.rmtree(work)
    result = {
        "model": args.model.name,
        "scheme": args.scheme,
        "chain": args.chain,
        "rounded": scores["rounded"],
        "data": calibration_tokens(spec, tokenizer, vocab_size=vocabulary).describe(),
        "text": {"source": args.text.name, "window": args.window, "windows": len(windows), "targets": targets},
        "environment": where,
        "gpus": torch.cuda.device_count() if args.device == "cuda" else 0,
        "rows": rows,
        "bars": bars(rows),
    }
    keep(result, args.out / "parallel.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
