"""Our best beside the best of llm-compressor and AutoRound, scheme by scheme: the same model, tokens, windows and run.

    python benchmarks/peers.py --peer-python PYTHON [--settings w4a16-g128 --rows 8 --length 128 --windows 4]
    python benchmarks/peers.py --peer-python PYTHON --section autoround --table autoround

PYTHON is that of an environment with llm-compressor and AutoRound; peer_llmcompressor.py and peer_autoround.py run in it. Each
setting of `TABLE` names their ways and ours. All results are read by `lowbit.load` and evaluated in float32 over the same
windows. --out gets peers.json, the table goes into the section --section of --markdown. The exit status is 1 where the best of
ours is worse than the best of theirs; in the table `autoround`, its light and default numbers of steps beside as many of ours,
where what takes no more time than theirs is worse in perplexity or divergence.

Seconds contain no imports: of the peers no loading either, of lowbit all of `quantize`.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plant_outliers import plant
from results import checkpoint, code_hash, measure, say, summarize
from safetensors.torch import save_file
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
from techniques import make_recipe
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.report import table

A = "gptq:asymmetry=0.25,refine=2"
SIGN = ["gptq+signround:steps=50", "rtn:importance=true+signround:steps=50"]
LORC = "lorc:whiten=true"
# setting -> (on the twin with outliers, llm-compressor's options and methods, AutoRound's options and iterations, our chains)
TABLE: dict[str, tuple[bool, list[str], list[str], list[str], list[int], list[str]]] = {
    "w4a16-g128": (
        *(False, ["--scheme", "W4A16"], ["rtn", "gptq", "awq"], ["--bits", "4", "--group-size", "128"], [0, 50]),
        ["rtn", "gptq", f"awq+{A}", *SIGN, f"awq+{A}+{LORC}", f"{SIGN[1]}+{LORC}"],
    ),
    "w4a16-g128-asym": (
        *(False, ["--scheme", "W4A16_ASYM"], ["rtn", "gptq", "awq"], ["--bits", "4", "--group-size", "128", "--asym"], [0, 50]),
        ["rtn", "gptq", f"awq+{A}", *SIGN],
    ),
    "w3a16-g128": (
        *(False, ["--scheme", "W3A16"], ["rtn", "gptq"], ["--bits", "3", "--group-size", "128"], [0, 50]),
        ["rtn", "gptq", f"awq+{A}", *SIGN, f"awq+{A}+{LORC}"],
    ),
    "w8a8": (
        True,
        ["--scheme", "W8A8"],
        ["rtn", "gptq", "smooth", "smooth+gptq"],
        [],
        [],
        ["rtn", "smooth+rtn", "smooth+gptq"],
    ),
    "fp8": (False, ["--scheme", "FP8_DYNAMIC"], ["rtn"], [], [], ["rtn", "gptq"]),
    "mxfp4a16": (False, ["--scheme", "MXFP4A16"], ["rtn", "gptq"], [], [], ["rtn", "gptq", f"gptq+{LORC}"]),
    "nvfp4a16": (
        *(False, ["--scheme", "NVFP4A16"], ["rtn", "gptq"], [], []),
        ["rtn:shrink_steps=9", "gptq:shrink_steps=9", "awq+gptq:shrink_steps=9"],
    ),
}
ROUNDED = [f"rtn:importance=true+signround:{how}" for how in ("steps=40", "steps=80,batch=4", "steps=160", "steps=320,batch=4")]
TABLES = {
    "peers": TABLE,
    "autoround": {
        "w4a16-g128": (False, [], [], ["--bits", "4", "--group-size", "128"], [50, 200], ROUNDED),
        "w3a16-g128": (
            *(False, [], [], ["--bits", "3", "--group-size", "128"], [50, 200]),
            [*ROUNDED, "gptq+tesseraq:steps=40,rate=0.1", "gptq+tesseraq:steps=160,rate=0.03"],
        ),
    },
}


def in_time(rows: list[dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """For every training of AutoRound, whether one of ours that took no longer is no worse."""
    found = []
    for theirs in (row for row in rows if row["who"] == "AutoRound"):
        for what in ("ratio", "kl"):
            quick = [row for row in rows if row["who"] == "lowbit" and row["seconds"] <= theirs["seconds"]]
            best = min(quick, key=lambda row: row[what], default=None)
            numbers = "none was as quick" if best is None else f"{best['how']} {best[what]:.4f}, {theirs[what]:.4f}"
            text = f"{setting}, AutoRound {theirs['how']}: no worse in no more time, by {what}"
            found.append({"bar": text, "met": best is not None and best[what] <= theirs[what], "numbers": numbers})
    return found


def run_peer(python: Path, script: str, model: Path, tokens: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """One result of a peer: its record."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = Path(__file__).with_name(script).resolve()
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -P: else `kernels`, which their transformers looks for, would be the script of that name beside this one
    command = [str(python), "-P", str(path), str(model.resolve()), str(tokens.resolve()), str(out), *options]
    done = subprocess.run(command, cwd=out.parent, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(options)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads((out / "peer.json").read_text(encoding="utf-8"))


def markdown(result: dict[str, Any]) -> str:
    """The section `peers`."""
    text, data = result["text"], result["data"]
    lines = [
        f'- Model: {result["model"]}; rows marked "outliers" are of its twin with planted outliers (plant_outliers.py)',
        f"- Calibration of all: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens "
        f"sha256 {data['tokens_sha256'][:16]}",
        f"- Text: {text['source']}, {text['windows']} windows of {text['window']} tokens without overlap and without bos, "
        f"{text['targets']:,} targets; float32; the float model has perplexity {text['float_perplexity']:.4f}",
        *describe(result["environment"]),
        f"- The peers' versions: {', '.join(f'{name} {number}' for name, number in result['peer_versions'].items())}",
        "",
        "Ratios are perplexities over that of the float model, KL is KL(float || quantized) in nats. Times are parts of that "
        "of the peers' slowest in the setting, without imports and, of the peers, loading and saving. Bold: the best by KL.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        alike = [other for other in result["rows"] if other["setting"] == row["setting"]]
        mark = "**" if row["kl"] == min(other["kl"] for other in alike) else ""
        slowest = max(other["seconds"] for other in alike if other["who"] != "lowbit")
        setting = row["setting"] + (", outliers" if row["outliers"] else "")
        cells = [
            setting,
            row["who"],
            row["how"],
            f"{row['seconds'] / slowest:.2f}",
            f"{row['ratio']:.4f}",
            f"{mark}{row['kl']:.4f}{mark}",
        ]
        rows.append(cells)
    lines += [table(["setting", "who", "how", "time", "ratio", "KL"], rows), ""]
    lines += [f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"]]
    return "\n".join(lines)


def main() -> int:
    """Quantize by all, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt", help="what to evaluate on")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--table", choices=list(TABLES), default="peers")
    parser.add_argument("--section", default="peers", help="of --markdown")
    parser.add_argument("--settings", nargs="+", help="of the table (default: all)", metavar="SCHEME")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    rivals = TABLES[args.table]
    if unknown := set(args.settings or []) - rivals.keys():
        parser.error(f"--settings {' '.join(sorted(unknown))}: the table {args.table} has {', '.join(rivals)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python = args.peer_python.absolute()
    where = environment("cpu") | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = evaluation_tokens(str(args.text), tokenizer)
    windows = plan_windows(len(text), window=args.window, stride=args.window, bos="none")[: args.windows]
    targets = sum(window.scored for window in windows)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=args.seed)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)
    work = args.out.resolve() / "checkpoints"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokens = work / "tokens.safetensors"
    save_file({"tokens": calibration.tokens}, tokens)
    twin = work / "twin"
    plant(args.model, twin, factor=64)

    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    bars = []
    perplexity = 0.0
    for setting in args.settings or rivals:
        outliers, options, methods, round_options, iterations, chains = rivals[setting]
        model = twin if outliers else args.model
        ways = [("llm-compressor", method, [*options, "--method", method]) for method in methods]
        ways += [("AutoRound", f"iters={n}", [*round_options, "--iters", str(n)]) for n in iterations]
        models: dict[str, Any] = {}
        mine: list[dict[str, Any]] = []
        for who, how, given in ways:
            script = "peer_llmcompressor.py" if who == "llm-compressor" else "peer_autoround.py"
            folder = work / setting / who / how
            record = run_peer(python, script, model, tokens, folder, given)
            versions |= record["versions"]
            mine.append({"who": who, "how": how, "seconds": record["seconds"]["oneshot"]})
            models[f"{who} {how}"] = load(str(folder), dtype=torch.float32)
            say(f"{setting} {who} {how}: {record['seconds']['oneshot']:.0f} s")
        for chain in chains:
            folder = work / setting / "lowbit" / chain.replace(":", "-").replace("=", "-")
            began = time.monotonic()
            checkpoint(model, folder, make_recipe({"": setting}, chain, spec), calibration, where, "cpu")
            mine.append({"who": "lowbit", "how": chain, "seconds": time.monotonic() - began})
            models[f"lowbit {chain}"] = load(str(folder), dtype=torch.float32)
            say(f"{setting} lowbit {chain}: {mine[-1]['seconds']:.0f} s")
        sums = measure(load(str(model), dtype=torch.float32), models, text, windows)
        for row in mine:
            columns = sums[f"{row['who']} {row['how']}"]
            score = summarize(columns, targets)
            row |= {"setting": setting, "outliers": outliers, "ratio": score.ratio, "kl": score.kl}
            perplexity = math.exp(math.fsum(column[1] for column in columns) / targets)
        own, theirs = (min(row["kl"] for row in mine if (row["who"] == "lowbit") == which) for which in (True, False))
        if args.table == "autoround":
            bars += in_time(mine, setting)
        else:
            asked = f"{setting}: ours at or below theirs"
            bars.append({"bar": asked, "met": own <= theirs, "numbers": f"{own:.4f}, {theirs:.4f}"})
        rows += mine
        del models
        shutil.rmtree(work / setting)
    result = {
        "model": args.model.name,
        "data": calibration.describe(),
        "text": {
            "source": args.text.name,
            "window": args.window,
            "windows": len(windows),
            "targets": targets,
            "float_perplexity": perplexity,
        },
        "environment": where,
        "peer_versions": versions,
        "rows": rows,
        "bars": bars,
    }
    shutil.rmtree(work)
    keep(result, args.out / "peers.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
