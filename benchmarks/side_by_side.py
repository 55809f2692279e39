"""lowbit beside llm-compressor: time, memory and accuracy of GPTQ on the same model, tokens, scheme and number of threads.

    python benchmarks/side_by_side.py --peer-python PYTHON [--rows 2 --length 64 --windows 2 --markdown build/RESULTS.md]

PYTHON is that of an environment with llm-compressor; peer_llmcompressor.py runs in it. For each scheme the two take turns,
--repeats times, each in a fresh process:

    llm-compressor   seconds of `oneshot` and of saving; loading the model is not counted
    lowbit           seconds of `lowbit.quantize`, which contains loading, saving, reading the output back and comparing

Imports count for neither. Memory is the peak resident memory of the process (VmHWM of /proc/self/status, Linux only) at its
end, less that after its imports. Of several turns the median counts. Both are calibrated on the same rows: those that lowbit
draws, handed to the peer as a file, checked by their hash.

Then both checkpoints are read by `lowbit.load` and evaluated in float32 over the same windows. --out gets peer.json; the table
goes into the section `peer` of --markdown. The exit status is 1 if a bar is missed.
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import measure, summarize
from safetensors.torch import load_file, save_file
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
from streaming_memory import child_environment, in_child
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.data import Calibration, DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.report import table

# lowbit's name of a scheme and the peer's options for the same
SCHEMES = {"w4a16-g128": ["--scheme", "W4A16"], "w4a16-g64-asym": ["--scheme", "W4A16_ASYM", "--group-size", "64"]}
PEER = "llm-compressor"
MOST_TIME = 1 / 5  # of the peer's
MOST_MEMORY = 1 / 2


def run_peer(python: Path, model: Path, tokens: Path, out: Path, options: list[str], threads: int) -> dict[str, Any]:
    """One turn of llm-compressor: seconds, memory, and its own record."""
    script = Path(__file__).with_name("peer_llmcompressor.py").resolve()
    command = [str(python), str(script), str(model), str(tokens), str(out), *options, "--method", "gptq"]
    given = child_environment(threads)
    given.pop("PYTHONPATH", None)
    # in a folder of its own: the libraries leave logs where they run
    done = subprocess.run(command, cwd=out.parent, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    record = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    memory = record["memory"]
    return {
        "seconds": record["seconds"]["oneshot"] + record["seconds"]["save"],
        "memory": memory["end"]["vm_hwm"] - memory["after_import"]["vm_hwm"],
        "threads": record["threads"],
        "record": record,
    }


def run_lowbit(model: Path, data: dict[str, Any], out: Path, scheme: str, threads: int) -> dict[str, Any]:
    """One turn of lowbit: seconds, memory, and its own record."""
    job = {"model": str(model), "out": str(out), "scheme": scheme, "method": "gptq", "data": data}
    record = in_child(job, threads)
    return {
        "seconds": record["seconds"],
        "memory": record["peak"] - record["peak_after_imports"],
        "threads": record["threads"],
        "tokens_sha256": record["data"]["tokens_sha256"],
        "record": record,
    }


def take_turns(args: argparse.Namespace, calibration: Calibration, work: Path, threads: int) -> dict[str, dict[str, Any]]:
    """For each scheme {"lowbit": turns, PEER: turns, "folders": {who: the last checkpoint}}."""
    tokens = work / "tokens.safetensors"
    save_file({"tokens": calibration.tokens}, tokens)
    handed = hashlib.sha256(load_file(tokens)["tokens"].numpy().astype("<i8").tobytes()).hexdigest()
    if handed != calibration.sha256:
        raise RuntimeError("the rows handed to the peer are not those that were drawn")
    spec = calibration.spec
    data = {"source": spec.source, "rows": spec.rows, "length": spec.length, "seed": spec.seed}
    found: dict[str, dict[str, Any]] = {}
    for scheme, options in SCHEMES.items():
        turns: dict[str, Any] = {PEER: [], "lowbit": [], "folders": {}}
        for turn in range(args.repeats):
            for who in (PEER, "lowbit"):
                out = work / f"{scheme}-{who}-{turn}" / "out"
                out.parent.mkdir()
                if who == PEER:
                    done = run_peer(args.peer_python, args.model, tokens, out, options, threads)
                else:
                    done = run_lowbit(args.model, data, out, scheme, threads)
                    if done["tokens_sha256"] != calibration.sha256:
                        raise RuntimeError(f"lowbit was calibrated on rows {done['tokens_sha256']}, not {calibration.sha256}")
                if done["threads"] != threads:
                    raise RuntimeError(f"{who} ran with {done['threads']} threads, not {threads}")
                turns[who].append(done)
                turns["folders"][who] = out
                print(f"{scheme} {who}: {done['seconds']:.1f} s, {done['memory'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        found[scheme] = turns
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section `peer`."""
    text, data, peer = result["text"], result["data"], result["peer_versions"]
    lines = [
        f"- Model: {result['model']}; GPTQ, damping 0.01, head left float, activation order with static groups",
        f"- Calibration of both: {data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens "
        f"sha256 {data['tokens_sha256'][:16]}",
        f"- Text: {text['source']}, {text['windows']} windows of {text['window']} tokens without overlap and without bos, "
        f"{text['targets']:,} targets; float32; the float model has perplexity {text['float_perplexity']:.4f}",
        *describe(result["environment"]),
        f"- The peer's versions: {', '.join(f'{name} {number}' for name, number in peer.items())}",
        "",
        f"Ratios are to the peer, the last to the float model. Seconds without imports: of the peer `oneshot` and saving, of "
        f"lowbit all of `quantize`, with loading, saving and reading back. Memory is the peak above the imports. Median of "
        f"{result['repeats']}.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        for who in (PEER, "lowbit"):
            own, theirs = row[who], row[PEER]
            met = "; ".join(f"{bar['bar']}: {'yes' if bar['met'] else '**no**'}" for bar in row["bars"])
            rows.append(
                [
                    row["scheme"],
                    who,
                    f"{own['seconds']:.1f}",
                    f"{own['seconds'] / theirs['seconds']:.3f}",
                    f"{own['memory'] / 1e6:.0f} MB",
                    f"{own['memory'] / theirs['memory']:.3f}",
                    f"{own['perplexity']:.4f}",
                    f"{own['ratio']:.4f}",
                    f"{own['kl']:.4f}",
                    met if who == "lowbit" else "",
                ]
            )
    head = ["scheme", "who", "seconds", "ratio", "peak memory", "ratio", "ppl", "ppl ratio to float", "KL to float", "bars"]
    return "\n".join([*lines, table(head, rows)])


def main() -> int:
    """Take turns, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="python of an environment with llm-compressor")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt", help="what to evaluate on")
    parser.add_argument("--rows", type=int, default=128, help="calibration sequences (default 128)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="which calibration sequences (default 0)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default 1024)")
    parser.add_argument("--windows", type=int, default=64, help="windows to evaluate (default 64)")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each on each scheme (default 1)")
    parser.add_argument("--threads", type=int, help="of both; default: torch's")
    parser.add_argument("--work", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peer", help="for peer.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS, help="whose section to replace")
    args = parser.parse_args()
    for name in ("windows", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    args.model = args.model.resolve()
    args.peer_python = args.peer_python.absolute()  # not resolved: a link into another installation is what makes it a venv
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    where = environment()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=args.seed)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)
    text = evaluation_tokens(str(args.text), tokenizer)
    windows = plan_windows(len(text), window=args.window, stride=args.window, bos="none")[: args.windows]
    targets = sum(window.scored for window in windows)

    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="side-by-side-", dir=args.work)).resolve()
    try:
        turns = take_turns(args, calibration, work, where["threads"])
        models = {
            f"{scheme} {who}": load(str(folder), dtype=torch.float32)
            for scheme, found in turns.items()
            for who, folder in found["folders"].items()
        }
    finally:
        shutil.rmtree(work)
    sums = measure(load(str(args.model), dtype=torch.float32), models, text, windows)

    rows = []
    for scheme, found in turns.items():
        row: dict[str, Any] = {"scheme": scheme}
        for who in (PEER, "lowbit"):
            score = summarize(sums[f"{scheme} {who}"], targets)
            row[who] = {key: median(turn[key] for turn in found[who]) for key in ("seconds", "memory")}
            row[who] |= {"perplexity": score.perplexity, "ratio": score.ratio, "kl": score.kl, "top1": score.top1}
            row[who]["turns"] = [turn["record"] for turn in found[who]]
        mine, theirs = row["lowbit"], row[PEER]
        row["bars"] = [
            {"bar": "ppl no worse", "met": mine["perplexity"] <= theirs["perplexity"]},
            {"bar": "time ≤ 1/5", "met": mine["seconds"] <= MOST_TIME * theirs["seconds"]},
            {"bar": "memory ≤ 1/2", "met": mine["memory"] <= MOST_MEMORY * theirs["memory"]},
        ]
        rows.append(row)
    first = sums[f"{next(iter(SCHEMES))} lowbit"]
    result = {
        "model": args.model.name,
        "data": calibration.describe(),
        "text": {
            "source": args.text.name,
            "window": args.window,
            "windows": len(windows),
            "targets": targets,
            "float_perplexity": math.exp(math.fsum(column[1] for column in first) / targets),
        },
        "environment": where,
        "peer_versions": turns[next(iter(SCHEMES))][PEER][0]["record"]["versions"],
        "repeats": args.repeats,
        "rows": rows,
    }
    keep(result, args.out / "peer.json", markdown(result), page=args.markdown, name="peer")
    return 0 if all(bar["met"] for row in rows for bar in row["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
