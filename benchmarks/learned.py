"""What training buys: perplexity of learned methods beside gptq on text like the calibration text and on other text.

    python benchmarks/learned.py [--windows 4 --rows 16 --length 256 --rows-of "w3a16-g128 gptq" "w3a16-g128 gptq+signround"]

Every row is `setting chain [data=random] [parallel=N]`; a setting is a scheme or a name of `MIXED`, a chain is as in
techniques.py. All rows are quantized in lowbit's own format and run over the same windows of every text beside the float model.
--out gets learned.json, the table goes into the section `learned` of --markdown. The exit status is 1 if a bar is missed. Parts
may be measured by processes side by side, each with its --rows-of and --out; --merge joins them.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from results import code_hash, measure, say, summarize
from sections import RESULTS, ROOT, SHARED, describe, environment, joined, keep
from techniques import make_recipe
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.report import table
from lowbit.run import quantize

TEXTS = ("wikitext2_test.txt", "test.jsonl", "ood_law.jsonl")
# setting -> schemes by the names they match
MIXED = {"w4/8a8": {"mlp": "w4a8-channel-r16", "": "w8a8-r16"}}
ROWS = [
    "w2a16-g64 gptq",
    "w2a16-g64 gptq+end_to_end:steps=800,scale_rate=0.002,rate=0.03",
    "w2a16-g64 gptq+end_to_end:steps=800,scale_rate=0.002,rate=0.01",
    "w2a16-g64 gptq+block_ap:steps=150+end_to_end:steps=400,scale_rate=0.001,rate=0.004",
    "w3a16-g128 gptq",
    "w3a16-g128 gptq+signround:steps=60",
    "w3a16-g128 gptq+end_to_end:steps=700,scale_rate=0.001,rate=0.01",
    "w4a4-g128-ag128 gptq",
    "w4a4-g128-ag128 rotate+gptq:asymmetry=0.25+end_to_end:steps=600,scale_rate=0.001,rate=0.01",
    "w4a16-g128 gptq",
    "w4a16-g128 rtn:importance=true+signround:steps=60",
    "w4a16-g128 rtn:importance=true+end_to_end:steps=700,scale_rate=0.0005,rate=0.004",
    "w4/8a8 rtn",
    "w4/8a8 rtn+lkd:steps=120",
    "w4/8a8 rtn+lkd:steps=120 data=random",
]
# setting -> what the best learned row may have: share of the gap of `BASE` to float, or ratio
GAPS = {"w2a16-g64": 1 / 5, "w3a16-g128": 1 / 2, "w4a4-g128-ag128": 1 / 3}
RATIOS = {"w4a16-g128": 1.015}
LEARNED = ("lkd", "mrem", "omniquant", "signround", "tesseraq", "block_ap", "end_to_end")
BASE = "gptq"


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the best learned row of a setting, on the first text, and whether it is so."""
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        learned = [row for row in mine if any(name in row["chain"] for name in LEARNED)]
        base = next((row for row in mine if row["chain"] == BASE), None)
        if not learned:
            continue
        best = min(learned, key=lambda row: row["scores"][0]["ratio"])
        ratio = best["scores"][0]["ratio"]
        if setting in GAPS and base is not None:
            share = (ratio - 1) / (base["scores"][0]["ratio"] - 1)
            text = f"{setting}: at most {GAPS[setting]:.2f} of the gap of gptq"
            found.append({"bar": text, "met": share <= GAPS[setting], "numbers": f"{best['row']}, {share:.3f}"})
        if setting in RATIOS:
            text = f"{setting}: best ≤ {RATIOS[setting]:g}"
            found.append({"bar": text, "met": ratio <= RATIOS[setting], "numbers": f"{best['row']}, {ratio:.4f}"})
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section `learned`."""
    data = result["data"]
    lines = [
        f"- Model: {result['model']}",
        *(
            f"- {text['source']}: {text['windows']} windows of {text['window']} tokens without overlap and without bos, "
            f"{text['targets']:,} targets; float32; the float model has perplexity {text['float_perplexity']:.4f}"
            for text in result["texts"]
        ),
        f"- Calibration of all rows: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, "
        f"tokens sha256 {data['tokens_sha256'][:16]}; of rows with data=random, as many random tokens",
        *describe(result["environment"]),
        "",
        "Ratios are perplexities over that of the float model, KL is the mean of KL(float || quantized) in nats. Seconds, on a "
        "GPU only, are of `quantize` with other processes beside. Bold: the best of a setting by KL on the first text.",
        "",
    ]
    timed = not result["environment"]["device"].startswith("CPU")
    rows = []
    for row in result["rows"]:
        best = min(other["scores"][0]["kl"] for other in result["rows"] if other["setting"] == row["setting"])
        mark = "**" if best == row["scores"][0]["kl"] else ""
        cells = [row["row"], f"{row['bits']:.3f}", *([f"{row['seconds']:.0f}"] if timed else [])]
        for score in row["scores"]:
            cells += [f"{score['ratio']:.4f}", f"{mark}{score['kl']:.4f}{mark}"]
        rows.append(cells)
    names = [Path(text["source"]).stem for text in result["texts"]]
    head = ["setting, steps", "bits", *(["seconds"] if timed else [])]
    lines.append(table([*head, *(f"{name}, {what}" for name in names for what in ("ratio", "KL"))], rows))
    lines += ["", *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"])]
    return "\n".join(lines)


def main() -> int:
    """Quantize, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[SHARED / "text" / name for name in TEXTS], help="to evaluate on"
    )
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--rows", type=int, default=768, help="calibration sequences (default 768)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-of", nargs="+", default=ROWS, metavar="ROW", help="rows of the table (default: all)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, help="windows of each text to evaluate (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "learned")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="measure nothing, join these results")
    args = parser.parse_args()
    if args.merge:
        return write(joined(args.merge), args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = environment(args.device) | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=args.seed)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)
    work = args.out / "checkpoints"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    models, rows = {}, []
    for number, row in enumerate(args.rows_of):
        setting, chain, *given = row.split()
        flags = dict(pair.split("=") for pair in given)
        data = replace(spec, source="random") if flags.get("data") == "random" else spec
        began = time.monotonic()
        report = quantize(
            str(args.model),
            work / str(number),
            recipe=make_recipe(MIXED.get(setting, {"": setting}), chain, data),
            device=args.device,
            parallel=int(flags.get("parallel", 1)),
        )
        seconds = time.monotonic() - began
        say(f"{row}: {seconds:.0f} s")
        models[row] = load(str(work / str(number)), dtype=torch.float32, device=args.device)
        found = {"row": row, "setting": setting, "chain": " ".join([chain, *given]), "seconds": seconds}
        rows.append(found | {"bits": report["sizes"]["bits_per_quantized_weight"], "scores": []})
    reference = load(str(args.model), dtype=torch.float32, device=args.device)
    texts = []
    for path in args.texts:
        tokens = evaluation_tokens(str(path), tokenizer)
        windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[: args.windows]
        targets = sum(window.scored for window in windows)
        sums = measure(reference, models, tokens, windows)
        for row in rows:
            row["scores"].append(asdict(summarize(sums[row["row"]], targets)))
        text = {"source": path.name, "window": args.window, "windows": len(windows), "targets": targets}
        first = sums[rows[0]["row"]]
        texts.append(text | {"float_perplexity": math.exp(math.fsum(sum_[1] for sum_ in first) / targets)})
    shutil.rmtree(work)
    result = {
        "model": args.model.name,
        "texts": texts,
        "data": calibration.describe(),
        "environment": where,
        "rows": rows,
    }
    return write(result, args)


def write(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Order the rows by setting, judge and write them; 1 if a bar is missed."""
    order = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    result["rows"].sort(key=lambda row: order.index(row["setting"]))
    result["bars"] = bars(result["rows"])
    keep(result, args.out / "learned.json", markdown(result), page=args.markdown, name="learned")
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
