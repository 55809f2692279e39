"""What training buys an encoder of sentences: the cosine of its embeddings to the float model's, by scheme and chain.

    python benchmarks/encoder.py --model MINILM [--schemes w4a8-g128 --rows 16]

MINILM is a folder with a BERT that embeds sentences by the mean of its last hidden states, such as all-MiniLM-L6-v2. --out gets
encoder.json, the table goes into the section `encoder` of --markdown. The exit status is 1 if a bar is missed. Parts may be
measured by processes side by side, each with its --schemes, --chains and --out; --merge joins them.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from mixed import cosines, first_words
from results import say
from sections import RESULTS, ROOT, SHARED, describe, environment, joined, keep
from techniques import make_recipe
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import DataSpec, calibration_tokens
from lowbit.export import load
from lowbit.report import table
from lowbit.run import quantize

SCHEMES = ("w4a8-g128", "w2a8-g64")
CHAINS = ("rtn", "gptq", "rtn+lkd:steps={steps}", "gptq+lkd:steps={steps}", "rtn+mrem:steps={steps}", "gptq+mrem:steps={steps}")
BEST = "mrem"


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the best of every scheme is a chain with mrem."""
    found = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        best = max((row for row in rows if row["scheme"] == scheme), key=lambda row: row["cosine"])
        numbers = f"{best['chain']}, {best['cosine']:.4f}"
        found.append({"bar": f"{scheme}: best by {BEST}", "met": BEST in best["chain"], "numbers": numbers})
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section `encoder`."""
    data = result["data"]
    lines = [
        f"- Model: {result['model']}",
        f"- Judged on: {result['text']}",
        f"- Calibration: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens sha256 "
        f"{data['tokens_sha256'][:16]}",
        *describe(result["environment"]),
        "",
        table(
            ["scheme", "steps", "bits", "cosine"],
            [[row["scheme"], row["chain"], f"{row['bits']:.3f}", f"{row['cosine']:.4f}"] for row in result["rows"]],
        ),
        "",
        *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"]),
    ]
    return "\n".join(lines)


def main() -> int:
    """Quantize, embed, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a float checkpoint")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "test.jsonl", help="what to judge on")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--chains", nargs="+", default=CHAINS, help="with {steps} for --steps")
    parser.add_argument("--steps", type=int, default=200, help="of chains that train")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "encoder")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="measure nothing, join these results")
    args = parser.parse_args()
    if args.merge:
        return write(joined(args.merge), args)
    if args.model is None:
        parser.error("--model is missing")
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
    for scheme in args.schemes:
        for chain in (chain.format(steps=args.steps) for chain in args.chains):
            folder = work / str(len(rows))
            report = quantize(str(args.model), folder, recipe=make_recipe({"": scheme}, chain, spec), device=args.device)
            models[str(len(rows))] = load(str(folder), dtype=torch.float32, device=args.device)
            rows.append({"scheme": scheme, "chain": chain, "bits": report["sizes"]["bits_per_quantized_weight"]})
            say(f"{scheme} {chain}: {sum(stage['seconds'] for stage in report['stages']):.0f} s")
    sentences = first_words(args.text)
    reference = load(str(args.model), dtype=torch.float32, device=args.device)
    for row, cosine in zip(rows, cosines(models, reference, sentences, tokenizer).values(), strict=True):
        row["cosine"] = cosine
    shutil.rmtree(work)
    result = {
        "model": args.model.name,
        "text": f"{args.text.name}, the first 60 words of {len(sentences)} documents",
        "data": calibration_tokens(spec, tokenizer, vocab_size=vocabulary).describe(),
        "environment": where,
        "rows": rows,
    }
    return write(result, args)


def write(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Judge and write the rows, ordered by scheme; 1 if a bar is missed."""
    order = list(dict.fromkeys(row["scheme"] for row in result["rows"]))
    result["rows"].sort(key=lambda row: order.index(row["scheme"]))
    result["bars"] = bars(result["rows"])
    keep(result, args.out / "encoder.json", markdown(result), page=args.markdown, name="encoder")
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
