"""Models on the kernels end to end, with random weights: decoding and prefill of a Llama-7B-shaped model, BERT-large.

    python benchmarks/end_to_end.py --part decode      # then --part prefill, --part encoder: each a few minutes

Every part builds its float checkpoint and quantizes it once into --out, where a later call finds them; results of the parts are
kept there and the section `end-to-end` of RESULTS.md is written from all that there are. "Eager" is transformers as it is,
"graph" the same captured in a CUDA graph, "unmasked" too, with no mask (in a graph transformers writes one out for an encoder,
needed or not), "compiled" by torch.compile. --tiny runs small shapes, on a CPU as well, where
nothing is captured.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from sections import RESULTS, ROOT, describe, environment, keep
from transformers import StaticCache

from lowbit import runtime
from lowbit.bench import bench_model, seconds_of
from lowbit.recipe import short_recipe
from lowbit.report import table
from lowbit.run import quantize

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}
BERT = {"vocab_size": 30522, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
# part -> model type, scheme
PARTS = {"decode": ("llama", "w4a16"), "prefill": ("llama", "w8a8"), "encoder": ("bert", "w8a8")}
UNMASKED = "sdpa_unmasked"
transformers.AttentionInterface.register(UNMASKED, transformers.AttentionInterface()["sdpa"])
transformers.AttentionMaskInterface.register(UNMASKED, lambda **how: None)
KINDS = ("eager", "graph", "unmasked", "compiled")
# part, batch, what we are compared with, at least this many times as fast
BARS = (
    ("decode", 1, "graph", 2.5), ("decode", 1, "eager", 10.0), ("decode", 16, "graph", 2.0),
    ("prefill", 1, "best", 1.4), ("encoder", 16, "graph", 1.8), ("encoder", None, "eager", 5.19),
)  # fmt: skip


def checkpoints(part: str, out: Path, device: str, tiny: bool) -> tuple[Path, Path]:
    """Folders of the float model and of the quantized one, made where they are missing."""
    kind, scheme = PARTS[part]
    original = out / f"{kind}{'-tiny' if tiny else ''}"
    if not original.exists():
        shape = TINY if tiny else {"llama": LLAMA, "bert": BERT}[kind]
        config = transformers.AutoConfig.for_model(kind, **shape, max_position_embeddings=4096 if kind == "llama" else 512)
        auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
        with torch.device(device):
            model = auto.from_config(config, dtype=torch.float16)
        model.save_pretrained(original)
    folder = out / f"{original.name}-{scheme}"
    if not folder.exists():
        scheme = f"{scheme}-g32" if tiny and scheme == "w4a16" else scheme
        recipe = short_recipe(
            scheme=scheme, method="rtn", options={}, ignore=None, data=None, format="compressed-tensors", engine="vllm",
            kv_cache=None,
        )  # fmt: skip
        quantize(str(original), str(folder), recipe=recipe, device=device)
    return original, folder


def captured(action: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The action as a CUDA graph; itself on a CPU."""
    if device.type != "cuda":
        return action
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


@torch.no_grad()
def decode(model: Any, batch: int, prompt: int, steps: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds of a step after `prompt` tokens; "eager", and of the float model "graph", are transformers' own caches."""
    found = {}
    for kind in kinds:
        own = kind == "graph" and not hasattr(model, "lowbit")
        if kind == "eager" or own:
            model.set_attn_implementation("sdpa")  # which a `Decoder` changes
            cache = StaticCache(config=model.config, max_cache_len=prompt + 64) if own else None
            text = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
            cache = model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            position = torch.full((batch, 1), prompt, device=model.device)
            step = partial(model, input_ids=text[:, :1], position_ids=position, past_key_values=cache)
            found[kind] = 1e3 * seconds_of(captured(step, model.device) if own else step, model.device)
        else:
            row = bench_model(model, rows=batch, prompt=prompt, tokens=steps, compiled=kind == "compiled")
            found[kind] = 1e3 * row["step_seconds"]
    return found


@torch.no_grad()
def forward(model: Any, batch: int, length: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds of one pass over random tokens."""
    text = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
    options = {"use_cache": False, "logits_to_keep": 1} if model.can_generate() else {}
    found = {}
    for kind in kinds:
        if kind == "unmasked":
            model.set_attn_implementation(UNMASKED)
        run = torch.compile(model.forward) if kind == "compiled" else model.forward

        def once(run: Any = run) -> Any:
            return run(input_ids=text, **options)

        found[kind] = 1e3 * seconds_of(once if kind == "eager" else captured(once, model.device), model.device)
        if kind == "unmasked":
            model.set_attn_implementation("sdpa")
    return found


def measure(part: str, out: Path, device: str, tiny: bool, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The rows of one part: milliseconds of the float model ("fp16") and of ours ("lowbit"), by kind."""
    original, quantized = checkpoints(part, out, device, tiny)
    batches = (1, 2) if tiny else {"decode": (1, 16), "prefill": (1,), "encoder": (1, 4, 16)}[part]
    length = 16 if tiny else {"decode": 512, "prefill": 2048, "encoder": 128}[part]
    if device == "cpu":
        kinds = ("eager", "graph") if part == "decode" else ("eager",)
    plain = tuple(kind for kind in kinds if kind != "unmasked")  # of what makes no mask anyway, or needs one
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    rows: list[dict[str, Any]] = [{"batch": batch, "length": length} for batch in batches]
    for name, folder in (("fp16", original), ("lowbit", quantized)):
        model = runtime.load(str(folder), device=device, dtype=dtype, kernels=name == "lowbit")
        here = kinds if (part, name) == ("encoder", "fp16") else plain
        for row in rows:
            if part == "decode":
                row[name] = decode(model, row["batch"], length, 4 if tiny else 64, here)
            else:
                row[name] = forward(model, row["batch"], length, here)
            print(json.dumps({"part": part, **row}), file=sys.stderr, flush=True)
        del model
    return {"environment": environment(device), "rows": rows}


def bars(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar of the measured parts, with the ratio found: our best kind over theirs."""
    found = []
    for part, batch, rival, least in BARS:
        ratios = {}
        for row in parts.get(part, {}).get("rows", []):
            theirs = row["fp16"]
            if batch in (None, row["batch"]) and (rival == "best" or rival in theirs):
                fast = {kind: value for kind, value in theirs.items() if kind != "eager"} or theirs
                ratios[row["batch"]] = (min(fast.values()) if rival == "best" else theirs[rival]) / min(row["lowbit"].values())
        if ratios:
            at = max(ratios, key=lambda each: ratios[each])
            found.append({"bar": f"{part}, batch {at}, over fp16 {rival}", "least": least, "ratio": ratios[at]})
    return found


def markdown(parts: dict[str, Any]) -> str:
    """The section `end-to-end`."""
    lines = describe(next(iter(parts.values()))["environment"])
    lines += [
        "",
        "Milliseconds of a step (decode) or a pass to its last token, medians. graph: a CUDA graph, in which transformers "
        "writes out a mask for an encoder; unmasked: where it makes none.",
        "",
    ]
    cells = []
    for part, result in parts.items():
        for row in result["rows"]:
            both = [", ".join(f"{kind} {value:.2f}" for kind, value in row[name].items()) for name in ("fp16", "lowbit")]
            cells.append([f"{part}, {PARTS[part][1]}", str(row["batch"]), str(row["length"]), *both])
    lines += [table(["what", "batch", "tokens", "fp16", "lowbit"], cells), ""]
    lines += [
        f"- {bar['bar']}: {bar['ratio']:.2f}, at least {bar['least']:g}: {'yes' if bar['ratio'] >= bar['least'] else '**no**'}"
        for bar in bars(parts)
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure one part, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="compiling a float model takes about a minute")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "end-to-end")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = args.out / "end_to_end.json"
    parts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts[args.part] = measure(args.part, args.out, args.device, args.tiny, tuple(args.kinds))
    keep(parts, path, markdown(parts), page=args.markdown, name="end-to-end")
    return 0 if all(bar["ratio"] >= bar["least"] for bar in bars(parts)) else 1


if __name__ == "__main__":
    sys.exit(main())
