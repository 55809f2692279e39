"""Quamba2 on a Mamba2 model and on its twin with outliers: the recipes, and what each of their steps is worth.

    python benchmarks/ssm.py [--windows 24 --rows 16 --chains NAME ...]

The twin has the filters of a few channels of each scan `--factor` times larger, and the gated norm's gains that much smaller,
so x has outliers there. SiLU lies between, so it is another function, and its ratios are to its own float perplexity.
The bars are those of the recipes on the plain model, the size of those with 4 bits, and that no step of the ablation makes KL
worse by more than a twentieth.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from results import checkpoint, code_hash, measure, say, summarize
from safetensors.torch import load_file, save_file
from sections import RESULTS, ROOT, SHARED, describe, environment, keep
from transformers import AutoTokenizer

from lowbit import runtime
from lowbit.data import DataSpec, calibration_tokens, evaluation_tokens
from lowbit.evaluate import plan_windows
from lowbit.export import load
from lowbit.recipe import Recipe, Rule, Step, read_recipe
from lowbit.report import table

BARS = {"quamba2-w8a8": 1.02, "quamba2-w4a16": 1.04, "quamba2-w4a8": 1.06}  # the largest ratio
WEIGHTS = "w4a8-g128-astatic"
PLAIN = Rule(match="", scheme="s8")
GROUPS = Rule(match=r"\.(B|C)$", scheme="s8-groups")
CLUSTERS = Rule(match=r"\.(x|state)$", scheme="s8-clusters")
ABLATION: dict[str, tuple[tuple[Rule, ...], tuple[str, ...]]] = {
    "one scale a tensor": ((PLAIN,), ("rtn",)),
    "+ hadamard": ((PLAIN,), ("hadamard", "rtn")),
    "+ gptq": ((PLAIN,), ("hadamard", "gptq")),
    "+ scales of state groups": ((GROUPS, PLAIN), ("hadamard", "gptq")),
    "+ reorder, scales of clusters": ((CLUSTERS, GROUPS, PLAIN), ("reorder", "hadamard", "gptq")),
}
SLACK = 1.05
SMALLER = 3.5


def plant(model: Path, out: Path, factor: int, count: int, seed: int = 0) -> list[int]:
    """Copy the checkpoint `model` to `out` with outliers in `count` channels of every x; returns the channels."""
    shutil.copytree(model, out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    channels: list[int] = []
    for name, gain in list(tensors.items()):
        if name.endswith("mixer.norm.weight"):
            prefix = name.removesuffix("norm.weight")
            order = torch.randperm(len(gain), generator=torch.Generator().manual_seed(seed))
            channels = order[:count].sort().values.tolist()
            gain[channels] /= factor
            for part in ("conv1d.weight", "conv1d.bias"):
                tensors[prefix + part][channels] *= factor
    if not channels:
        raise ValueError(f"{model} has no gated norms named like a Mamba2's; nothing was planted")
    save_file(tensors, path, metadata={"format": "pt"})
    return channels


def recipes(spec: DataSpec) -> dict[str, Recipe]:
    """Every row of the table."""
    found = {name: replace(read_recipe(ROOT / "recipes" / f"{name}.toml"), data=spec) for name in BARS}
    for name, (rules, steps) in ABLATION.items():
        found[name] = Recipe(
            rules=(*rules, Rule(match="", scheme=WEIGHTS)),
            steps=tuple(Step(method=method) for method in steps),
            data=spec,
            format="lowbit",
        )
    return found


def block_bytes(folder: Path) -> int:
    """Bytes of all tensors of the blocks of a checkpoint, quantized or not."""
    tensors = [load_file(path) for path in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for shard in tensors for name, tensor in shard.items() if ".layers." in name)


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Bytes that a model keeps of one sequence."""
    cache = model(torch.zeros(1, 8, dtype=torch.int64), use_cache=True).cache_params
    parts = [part for layer in cache.layers for part in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return sum(part.nbytes for part in parts if part is not None)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked, and whether it is so."""
    plain = {row["name"]: row for row in rows if row["model"] == "plain"}
    found = []
    for name, most in BARS.items():
        if name in plain:
            ratio = plain[name]["score"]["ratio"]
            found.append({"bar": f"{name} within {most} of the float perplexity", "met": ratio <= most, "is": f"{ratio:.4f}"})
            if "-w4" in name:
                size = plain[name]["smaller"]
                found.append({"bar": f"{name} at least {SMALLER} times smaller", "met": size >= SMALLER, "is": f"{size:.2f}"})
    for model in ("plain", "outliers"):
        chain = [row for row in rows if row["model"] == model and row["name"] in ABLATION]
        for before, after in zip(chain, chain[1:], strict=False):
            met = after["score"]["kl"] <= SLACK * before["score"]["kl"]
            change = f"KL {before['score']['kl']:.4f} to {after['score']['kl']:.4f}"
            found.append({"bar": f"{model}: {after['name']} is no worse", "met": met, "is": change})
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    text, data = result["text"], result["data"]
    lines = [
        f"- Model: {result['model']}; its twin has outliers of factor {result['factor']} in channels {result['channels']}; "
        f"float perplexities {result['float']['plain']:.3f} and {result['float']['outliers']:.3f}",
        f"- Text: {text['source']}, {text['windows']} windows of {text['window']} tokens; float32; calibration: "
        f"{data['source']}, {data['rows']} rows x {data['length']} tokens, seed {data['seed']}",
        "- Kept of a sequence (lowbit: the int8 state and the tokens since it was rounded): "
        + ", ".join(f"{name} {size / 1000:.0f} KB" for name, size in result["cache"].items()),
        *describe(result["environment"]),
        "",
    ]
    rows = [
        [
            r["model"],
            r["name"],
            f"{r['smaller']:.2f}",
            f"{r['blocks']:.2f}",
            f"{r['score']['ratio']:.4f}",
            f"{r['score']['kl']:.2e}",
        ]
        for r in result["rows"]
    ]
    lines.append(table(["model", "recipe, or step of the ablation (w4a8)", "times smaller", "its blocks", "ratio", "KL"], rows))
    lines += ["", *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['is']})" for b in result["bars"])]
    return "\n".join(lines)


def main() -> int:
    """Plant, quantize, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mamba2-6m")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "valid.jsonl")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.jsonl")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="windows to evaluate (default: all)")
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--chains", nargs="+", choices=[*BARS, *ABLATION], default=[*BARS, *ABLATION])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ssm")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    where = environment() | {"code_sha256": code_hash()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = evaluation_tokens(str(args.text), tokenizer)
    windows = plan_windows(len(tokens), window=args.window, stride=args.window, bos="none")[: args.windows]
    targets = sum(window.scored for window in windows)
    spec = DataSpec(source=str(args.calibration.resolve()), rows=args.rows, length=args.length)
    vocabulary = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = calibration_tokens(spec, tokenizer, vocab_size=vocabulary)
    twin = args.out / "twin"
    shutil.rmtree(twin, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    channels = plant(args.model, twin, args.factor, args.channels)
    chosen = {name: recipe for name, recipe in recipes(spec).items() if name in args.chains}
    rows, floats = [], {}
    for kind, folder in (("plain", args.model), ("outliers", twin)):
        models, reports = {}, {}
        for number, (name, recipe) in enumerate(chosen.items()):
            out = args.out / "checkpoints" / kind / f"{number}"
            reports[name] = checkpoint(folder, out, recipe, calibration, where, "cpu")
            models[name] = load(str(out), dtype=torch.float32)
            say(f"{kind} {name}")
        sums = measure(load(str(folder), dtype=torch.float32), models, tokens, windows)
        for name in chosen:
            score, sizes = summarize(sums[name], targets), reports[name]["sizes"]
            smaller = sizes["source_bytes"] / sizes["output_bytes"]
            blocks = block_bytes(folder) / block_bytes(args.out / "checkpoints" / kind / f"{list(chosen).index(name)}")
            rows.append({"model": kind, "name": name, "smaller": smaller, "blocks": blocks, "score": asdict(score)})
            floats[kind] = score.perplexity / score.ratio
    kept = {"transformers": cache_bytes(load(str(args.model)))}
    if "quamba2-w8a8" in chosen:
        out = args.out / "checkpoints" / "plain" / f"{list(chosen).index('quamba2-w8a8')}"
        kept["lowbit"] = cache_bytes(runtime.load(str(out), kernels=True))
    result = {
        "cache": kept,
        "model": args.model.name,
        "factor": args.factor,
        "channels": channels,
        "float": floats,
        "text": {"source": args.text.name, "window": args.window, "windows": len(windows)},
        "data": calibration.describe(),
        "environment": where,
        "rows": rows,
        "bars": bars(rows),
    }
    keep(result, args.out / "ssm.json", markdown(result), page=args.markdown, name="ssm")
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
