"""Mixed precision: planned mixes beside uniform, random and reversed ones of the same size.

    python benchmarks/mixed.py [--bits 3 --signals kl --rows 8 --length 256 --windows 4]
    python benchmarks/mixed.py --merge a.json b.json

For every number of bits there is a uniform scheme, and its bytes are the budget of all mixes: the linears of a model are given
schemes by each signal of `lowbit plan`, by no signal (every weight counts the same), by random sensitivities, and by the
measured ones in reverse order. All are quantized by one chain and run over the same windows beside the float model; an
encoder (--encoder) is judged by the cosine of its sentence embeddings to the float model's. What a mix scores moves with the
calibration rows, so all is done for several seeds of them; the mixes without a signal of use (equal, reversed, random) for the
first only, and compared there. --out gets mixed.json, the table goes into the section `mixed` of --markdown; --merge makes one
result of several that differ in their seeds or bits. The exit status is 1 if a bar is missed.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from results import code_hash, measure, say, summarize
from sections import RESULTS, ROOT, SHARED, describe, environment, joined, keep
from techniques import parse_chain
from transformers import AutoTokenizer
from transformers.utils import logging

from lowbit.allocate import allocate
from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens, read_documents
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.planner import Plan, plan
from lowbit.qtensor import parse_scheme
from lowbit.recipe import Recipe, Rule
from lowbit.report import table
from lowbit.run import quantize
from lowbit.sensitivity import SIGNALS, Signal

CANDIDATES = ["w2a16-g64", "w2a16-g32", "w3a16-channel", "w3a16-g128", "w3a16-g64", "w4a16-g128", "w8a16-g128"]
UNIFORM = {3.0: "w3a16-channel", 2.5: "w2a16-g32"}  # the scheme of about so many bits, where scales have 16; the budget
EMBEDDINGS = "embed"  # left float: bits are those of the linears
RANDOM = 5  # random mixes
SENTENCES = 256  # of an encoder


def stored(planned: Plan, scheme: str) -> float:
    """Bits of each weight where all linears have one scheme."""
    weights = sum(row["weights"] for row in planned.measured["decisions"].values())
    return 8 * sum(size[scheme] for size in planned.sizes.values()) / weights


def rivals(planned: Plan, bits: float) -> dict[str, list[str]]:
    """Mixes of at most so many bits that measured nothing, or read it the wrong way round: schemes by decision."""
    rows = list(planned.measured["decisions"].values())
    weights = [row["weights"] for row in rows]
    given = {"equal": [1.0] * len(rows)}
    for seed in range(RANDOM):
        chance = random.Random(seed)
        given[f"random {seed}"] = [math.exp(chance.uniform(-3, 3)) for _ in rows]
    # the squared error of rounding falls by 4 with every bit
    costs = {
        name: [
            [s * w * 4.0 ** -parse_scheme(c).weight.format.bits * (1 + 1e-3 * i) for i, c in enumerate(CANDIDATES)]
            for s, w in zip(sensitivity, weights, strict=True)
        ]
        for name, sensitivity in given.items()
    }
    # the most sensitive decision is taken for the least sensitive, and so on, a weight's costs being those of its mirror
    order = sorted(range(len(rows)), key=lambda i: rows[i]["cost"]["w3a16-g128"] / weights[i])
    mirror = dict(zip(order, reversed(order), strict=True))
    costs["reversed"] = [
        [rows[mirror[i]]["cost"][c] * weights[i] / weights[mirror[i]] for c in CANDIDATES] for i in range(len(rows))
    ]
    sizes = [[size[name] for name in CANDIDATES] for size in planned.sizes.values()]
    budget = int(bits * sum(weights) / 8)
    return {name: [CANDIDATES[j] for j in allocate(each, sizes, budget)] for name, each in costs.items()}


def recipes(model: Path, bits: float, args: argparse.Namespace, data: DataSpec) -> dict[str, Recipe]:
    """The recipes of one number of bits and one seed, by name; none has more bytes than the uniform one."""

    def planned(signal: Signal, most: float) -> Plan:
        return plan(
            str(model),
            bits=most,
            schemes=CANDIDATES,
            signal=signal,
            data=data,
            rows=args.plan_rows,
            length=args.plan_length,
            ignore=[EMBEDDINGS],
            format="lowbit",
            sensitivities=args.out / f"{model.name}-{signal}-{data.seed}.json",  # what was measured serves all bits
            device=args.device,
        )

    began = time.monotonic()
    base = planned(args.signals[0], 16)
    budget = stored(base, UNIFORM[bits])
    plain = replace(base.recipe, steps=parse_chain(args.chain), data=data)
    found = {"uniform": replace(plain, rules=(Rule(match="", scheme=UNIFORM[bits]),))}
    for signal in args.signals:
        if not re.search(args.mixes, f"planned by {signal}"):
            continue
        made = planned(signal, budget)
        found[f"planned by {signal}"] = replace(plain, rules=made.recipe.rules)
        say(f"{bits:g} bits, seed {data.seed}, {signal}: {time.monotonic() - began:.0f} s, solved in {made.seconds:.2f} s")
    if data.seed == args.seeds[0]:
        for name, schemes in rivals(base, budget).items():
            rules = (replace(rule, scheme=scheme) for rule, scheme in zip(plain.rules, schemes, strict=True))
            found[name] = replace(plain, rules=tuple(rules))
    return {name: recipe for name, recipe in found.items() if re.search(args.mixes, name)}


# What is asked of plans, by the name of a number of a row; less is better.
JUDGED = {"ratio": "perplexity", "kl": "KL", "cosine": "cosine"}


def losses(rows: list[dict[str, Any]], bits: float, how: str, what: str) -> dict[int, float]:
    """What the mixes of one name lose on the first text, by seed; random ones averaged. 1 - cosine of an encoder."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["bits_asked"] == bits and row["how"].startswith(how):
            value = row["scores"][0][what]
            found.setdefault(row["seed"], []).append(1 - value if what == "cosine" else value)
    return {seed: mean(values) for seed, values in found.items()}


def bars(rows: list[dict[str, Any]], signal: str) -> list[dict[str, Any]]:
    """What is asked of the plan by one signal, compared on the seeds that both have; by each number that judges."""
    found = []
    for bits in sorted({row["bits_asked"] for row in rows}, reverse=True):
        for what in [name for name in JUDGED if name in rows[0]["scores"][0]]:
            for one, other in (
                (f"planned by {signal}", "uniform"),
                (f"planned by {signal}", "random"),
                ("uniform", "reversed"),
            ):
                a, b = losses(rows, bits, one, what), losses(rows, bits, other, what)
                seeds = sorted(a.keys() & b.keys())
                if not seeds:
                    continue
                less, more = mean(a[seed] for seed in seeds), mean(b[seed] for seed in seeds)
                won = sum(a[seed] < b[seed] for seed in seeds)
                found.append(
                    {
                        "bar": f"{bits:g} bits: {one} beats {other} by {JUDGED[what]}",
                        "met": less < more,
                        "numbers": f"{less:.4f}, {more:.4f}; on {won} of {len(seeds)} seeds",
                    }
                )
    return found


def cosines(models: dict[str, Any], reference: Any, sentences: list[str], tokenizer: Any) -> dict[str, float]:
    """Mean cosine of the sentence embeddings (mean of the last hidden states) to the float model's, by model."""

    @torch.no_grad()
    def embed(model: Any, text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=128)["input_ids"]])
        return model(input_ids=ids.to(next(model.parameters()).device)).last_hidden_state[0].mean(0)

    wanted = [embed(reference, text) for text in sentences]
    return {
        name: mean(float(torch.cosine_similarity(embed(model, text), w, 0)) for text, w in zip(sentences, wanted, strict=True))
        for name, model in models.items()
    }


def first_words(text: Path) -> list[str]:
    """What an encoder is judged on: the first 60 words of the documents of a text."""
    documents = read_documents(DataSpec(source=str(text.resolve()), rows=1, length=2))
    return [" ".join(document.split()[:60]) for document, _ in zip(documents, range(SENTENCES), strict=False)]


def rounded(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint in bfloat16."""
    shutil.rmtree(folder, ignore_errors=True)
    loaded = load(str(model), dtype=torch.bfloat16)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.4f}" + (f" \u00b1 {stdev(values):.4f}" if len(values) > 1 else "")


def markdown(result: dict[str, Any]) -> str:
    """The section `mixed`."""
    data, rows = result["data"], result["rows"]
    hashes = {row["seed"]: row["tokens_sha256"][:16] for row in rows}
    lines = [
        f"- Model: {result['model']}, every mix quantized by {result['chain']}; candidates {', '.join(CANDIDATES)}",
        f"- Measured on {result['plan_rows']} rows x {result['plan_length']} tokens of, and calibrated on: "
        f"{data['source']}, {data['rows']} rows x {data['length']} tokens; seeds (tokens sha256) "
        + ", ".join(f"{seed} ({digest})" for seed, digest in hashes.items()),
        *(f"- Judged on: {text}" for text in result["texts"]),
        *describe(result["environment"]),
        "",
        "Bits are stored bits for each weight of the linears; no mix has more bytes than the uniform one. Means over seeds of "
        "the calibration rows (random: over mixes, of one seed) and standard deviations.",
        "",
    ]
    first = rows[0]["scores"][0]
    head = ["bits", "mix", "bits of it", "times"]
    for text in result["texts"]:
        name = text.partition(",")[0]
        head += [f"cosine, {name}"] if "cosine" in first else [f"ratio, {name}", "KL"]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["bits_asked"], row["how"].rstrip("0123456789 ")), []).append(row)
    cells = []
    for (bits, how), mine in sorted(groups.items(), key=lambda item: -item[0][0]):
        cells.append([f"{bits:g}", how, f"{mean(row['bits'] for row in mine):.3f}", str(len(mine))])
        for number in range(len(result["texts"])):
            for what in (name for name in JUDGED if name in first):
                cells[-1].append(spread([row["scores"][number][what] for row in mine]))
    lines += [table(head, cells), ""]
    lines += [f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"]]
    return "\n".join(lines)


def judged_by(
    models: dict[str, Any], reference: Any, tokenizer: Any, args: argparse.Namespace
) -> tuple[list[str], dict[str, list[dict[str, float]]]]:
    """What the texts are, and by model the scores on each."""
    texts: list[str] = []
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for path, limit in zip(args.text, args.windows, strict=True):
        if args.encoder:
            sentences = first_words(path)
            texts.append(f"{path.name}, the first 60 words of {len(sentences)} documents")
            for name, cosine in cosines(models, reference, sentences, tokenizer).items():
                scores[name].append({"cosine": cosine})
            continue
        tokens = evaluation_tokens(str(path), tokenizer)
        windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[:limit]
        targets = sum(window.scored for window in windows)
        texts.append(
            f"{path.name}, {len(windows)} windows of {args.window} tokens without overlap and without bos, "
            f"{targets:,} targets, float32"
        )
        for name, sums in measure(reference, models, tokens, windows).items():
            score = summarize(sums, targets)
            scores[name].append({"ratio": score.ratio, "kl": score.kl})
    return texts, scores


def write(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Judge and keep a result."""
    result |= {"bars": bars(result["rows"], args.signals[0])}
    keep(result, args.out / f"{args.section}.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


def main() -> int:
    """Plan, quantize, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--encoder", action="store_true", help="the model embeds sentences, one a document of --text")
    parser.add_argument("--round", action="store_true", help="round the model to bfloat16 first, so that scales have 16 bits")
    judge = [SHARED / "text" / name for name in ("wikitext2_test.txt", "test.jsonl")]
    parser.add_argument("--text", type=Path, nargs="+", default=judge, help="what to judge on, bars by the first")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--bits", type=float, nargs="+", choices=list(UNIFORM), default=list(UNIFORM))
    parser.add_argument(
        "--signals", nargs="+", choices=SIGNALS, default=["kl", "fisher", "trace"], help="bars are of the first"
    )
    parser.add_argument("--chain", default="gptq", help="what all are quantized by (default gptq)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration rows (default 0 1 2)")
    parser.add_argument("--mixes", default="", metavar="REGEX", help="names of those that are made, or merged (default all)")
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences (default 64)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--plan-rows", type=int, default=16, help="sequences to measure on (default 16)")
    parser.add_argument("--plan-length", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 24], help="windows of each text (default 64 24)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mixed")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--section", default="mixed", help="of --markdown")
    parser.add_argument("--merge", type=Path, nargs="+", help="results to make one of, instead of measuring")
    args = parser.parse_args()
    if args.merge:
        merged = joined(args.merge)
        return write(merged | {"rows": [row for row in merged["rows"] if re.search(args.mixes, row["how"])]}, args)
    if args.encoder:
        args.windows = [0] * len(args.text)  # of documents there are no windows
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = environment(args.device) | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.round:
        args.model = rounded(args.model, args.out / args.model.name)
    reference = load(str(args.model), dtype=torch.float32, device=args.device)
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    described: dict[str, Any] = {}
    for seed in args.seeds:
        data = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length, seed=seed)
        described = calibration_tokens(data, tokenizer, vocab_size=vocabulary).describe()
        own = {"seed": seed, "tokens_sha256": described.pop("tokens_sha256")}
        for bits in args.bits:
            models, mine = {}, []
            with tempfile.TemporaryDirectory(dir=args.out) as work:
                for how, recipe in recipes(args.model, bits, args, data).items():
                    folder = Path(work) / how.replace(" ", "-")
                    report = quantize(str(args.model), folder, recipe=recipe, device=args.device)
                    models[how] = load(str(folder), dtype=torch.float32, device=args.device)
                    found = report["sizes"]["bits_per_quantized_weight"]
                    mine.append(own | {"bits_asked": bits, "how": how, "bits": found})
                    say(f"{bits:g} bits, seed {seed}, {how}: {found:.3f}")
                texts, scores = judged_by(models, reference, tokenizer, args)
            for row in mine:
                row["scores"] = scores[row["how"]]
                say(f"{bits:g} bits, seed {seed}, {row['how']}: {row['scores']}")
            rows += mine
    described = {key: value for key, value in described.items() if key not in ("seed", "documents")}  # of the last seed only
    result = {
        "model": args.model.name + (", rounded to bfloat16" if args.round else ""),
        "chain": args.chain,
        "data": described,
        "plan_rows": args.plan_rows,
        "plan_length": args.plan_length,
        "texts": texts,
        "environment": where,
        "rows": rows,
    }
    return write(result, args)


if __name__ == "__main__":
    sys.exit(main())
