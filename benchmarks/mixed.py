"""Mixed precision: planned mixes beside uniform, random and reversed ones of the same size.

    python benchmarks/mixed.py [--bits 3 --signals kl --rows 8 --length 256 --windows 4]

For every number of bits, the linears of a model are given schemes by each signal of `lowbit plan`, by no signal (one scheme for
all, and a mix where every weight counts the same), by random sensitivities, and by the measured ones turned upside down; no mix
is larger than the bits allow, but for the uniform scheme, which may be. All are quantized by one chain and run over the same
windows beside the float model; an encoder (--encoder) is judged by the cosine of its sentence embeddings to the float model's.
--out gets mixed.json, the table goes into the section `mixed` of --markdown. The exit status is 1 if a bar is missed.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from results import code_hash, measure, say, summarize
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
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

CANDIDATES = ["w2a16-g64", "w2a16-g32", "w3a16-channel", "w3a16-g128", "w3a16-g64", "w4a16-g128", "w8a16-g128"]
UNIFORM = {3.0: "w3a16-channel", 2.5: "w2a16-g32"}  # the scheme with about so many bits, where scales have 16
EMBEDDINGS = "embed"  # left float: bits are those of the linears
SEEDS = 5
SENTENCES = 256  # of an encoder


def rivals(planned: Plan, bits: float) -> dict[str, list[str]]:
    """Mixes of at most so many bits that measured nothing, or read it the wrong way round: schemes by decision."""
    rows = list(planned.measured["decisions"].values())
    weights = sum(row["weights"] for row in rows)
    measured = [row["cost"]["w3a16-g128"] / row["weights"] for row in rows]
    middle = sorted(measured)[len(measured) // 2]
    given = {"equal": [1.0] * len(rows), "reversed": [middle / cost for cost in measured]}
    for seed in range(SEEDS):
        chance = random.Random(seed)
        given[f"random {seed}"] = [math.exp(chance.uniform(-3, 3)) for _ in rows]
    sizes = [[size[name] for name in CANDIDATES] for size in planned.sizes.values()]
    found = {}
    for name, sensitivity in given.items():
        # the squared error of rounding falls by 4 with every bit
        costs = [
            [s * row["weights"] * 4.0 ** -parse_scheme(c).weight.format.bits * (1 + 1e-3 * i) for i, c in enumerate(CANDIDATES)]
            for s, row in zip(sensitivity, rows, strict=True)
        ]
        found[name] = [CANDIDATES[j] for j in allocate(costs, sizes, int(bits * weights / 8))]
    return found


def recipes(model: Path, bits: float, args: argparse.Namespace, data: DataSpec) -> dict[str, Recipe]:
    """The recipes of one number of bits, by name; all but the uniform one within it."""
    plans: dict[str, Plan] = {}
    for signal in args.signals:
        began = time.monotonic()
        plans[signal] = plan(
            str(model),
            bits=bits,
            schemes=CANDIDATES,
            signal=signal,
            data=data,
            rows=args.plan_rows,
            length=args.plan_length,
            ignore=[EMBEDDINGS],
            format="lowbit",
            sensitivities=args.out / f"{model.name}-{signal}.json",
            device=args.device,
            overwrite=bits == args.bits[0],  # what was measured serves all
        )
        seconds = time.monotonic() - began
        say(f"{model.name} {bits:g} bits, {signal}: {seconds:.0f} s, solved in {plans[signal].seconds:.2f} s")
    base = plans[args.signals[0]]
    plain = replace(base.recipe, steps=parse_chain(args.chain), data=data)
    found = {f"planned by {signal}": replace(plain, rules=made.recipe.rules) for signal, made in plans.items()}
    for name, schemes in rivals(base, bits).items():
        rules = (replace(rule, scheme=scheme) for rule, scheme in zip(plain.rules, schemes, strict=True))
        found[name] = replace(plain, rules=tuple(rules))
    return found | {"uniform": replace(plain, rules=(Rule(match="", scheme=UNIFORM[bits]),))}


def bars(rows: list[dict[str, Any]], bits: float) -> list[dict[str, Any]]:
    """What is asked of the mixes of one number of bits; loss is a ratio of perplexities, or 1 - cosine."""
    loss = {row["how"]: row["loss"] for row in rows if row["bits_asked"] == bits}
    best = min((name for name in loss if name.startswith("planned")), key=lambda name: loss[name])
    chance = [value for name, value in loss.items() if name.startswith("random")]
    wanted = [
        (f"{bits:g} bits: planned beats uniform", loss[best] < loss["uniform"], f"{loss[best]:.4f}, {loss['uniform']:.4f}"),
        (f"{bits:g} bits: planned beats random", loss[best] < min(chance), f"{loss[best]:.4f}, mean {mean(chance):.4f}"),
        (
            f"{bits:g} bits: reversed is worse than uniform",
            loss["reversed"] > loss["uniform"],
            f"{loss['reversed']:.4f}, {loss['uniform']:.4f}",
        ),
    ]
    return [{"bar": bar, "met": met, "numbers": f"{best}, {numbers}"} for bar, met, numbers in wanted]


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


def markdown(result: dict[str, Any]) -> str:
    """The section `mixed`."""
    data, text = result["data"], result["text"]
    lines = [
        f"- Model: {result['model']}, every mix quantized by {result['chain']}; candidates {', '.join(CANDIDATES)}",
        f"- Measured on {result['plan_rows']} rows x {result['plan_length']} tokens of, and calibrated on: "
        f"{data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}, tokens sha256 "
        f"{data['tokens_sha256'][:16]}",
        f"- Judged on: {text}",
        *describe(result["environment"]),
        "",
        "Bits are stored bits for each weight of the linears. Random sensitivities: 5 seeds.",
        "",
    ]
    cosine = "cosine" in result["rows"][0]
    head = ["bits", "mix", "bits of it", *(["cosine"] if cosine else ["ratio", "KL"])]
    cells = [
        [f"{r['bits_asked']:g}", r["how"], f"{r['bits']:.3f}"]
        + ([f"{r['cosine']:.4f}"] if cosine else [f"{r['loss']:.4f}", f"{r['kl']:.4f}"])
        for r in result["rows"]
    ]
    lines += [table(head, cells), ""]
    lines += [f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"]]
    return "\n".join(lines)


def main() -> int:
    """Plan, quantize, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-29m", help="folder of a float checkpoint")
    parser.add_argument("--encoder", action="store_true", help="the model embeds sentences, one a document of --text")
    parser.add_argument("--round", action="store_true", help="round the model to bfloat16 first, so that scales have 16 bits")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "wikitext2_test.txt", help="what to judge on")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--bits", type=float, nargs="+", choices=list(UNIFORM), default=list(UNIFORM))
    parser.add_argument("--signals", nargs="+", default=["kl", "trace", "eigenvalue", "fisher"])
    parser.add_argument("--chain", default="gptq", help="what all are quantized by (default gptq)")
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences (default 64)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--plan-rows", type=int, default=16, help="sequences to measure on (default 16)")
    parser.add_argument("--plan-length", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48, help="windows to judge on (default 48)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mixed")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--section", default="mixed", help="of --markdown")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = environment(args.device) | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(data, tokenizer, vocab_size=vocabulary)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.round:
        args.model = rounded(args.model, args.out / args.model.name)
    work = args.out / "checkpoints"
    rows: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    for bits in args.bits:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        models, mine = {}, []
        for how, recipe in recipes(args.model, bits, args, data).items():
            folder = work / how.replace(" ", "-")
            report = quantize(str(args.model), folder, recipe=recipe, device=args.device)
            models[how] = load(str(folder), dtype=torch.float32, device=args.device)
            mine.append({"bits_asked": bits, "how": how, "bits": report["sizes"]["bits_per_quantized_weight"]})
            say(f"{bits:g} bits, {how}: {mine[-1]['bits']:.3f}")
        reference = load(str(args.model), dtype=torch.float32, device=args.device)
        if args.encoder:
            sentences = first_words(args.text)
            text = f"{args.text.name}, the first 60 words of {len(sentences)} documents"
            for row, cosine in zip(mine, cosines(models, reference, sentences, tokenizer).values(), strict=True):
                row |= {"cosine": cosine, "loss": 1 - cosine}
        else:
            tokens = evaluation_tokens(str(args.text), tokenizer)
            windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[: args.windows]
            targets = sum(window.scored for window in windows)
            text = f"{args.text.name}, {len(windows)} windows of {args.window} tokens without overlap and without bos"
            text += f", {targets:,} targets, float32"
            sums = measure(reference, models, tokens, windows)
            for row in mine:
                score = asdict(summarize(sums[row["how"]], targets))
                row |= {"loss": score["ratio"], "kl": score["kl"]}
        rows += mine
        judged += bars(mine, bits)
    shutil.rmtree(work)
    result = {
        "model": args.model.name + (", rounded to bfloat16" if args.round else ""),
        "chain": args.chain,
        "data": calibration.describe(),
        "plan_rows": args.plan_rows,
        "plan_length": args.plan_length,
        "text": text,
        "environment": where,
        "rows": rows,
        "bars": judged,
    }
    keep(result, args.out / f"{args.section}.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
