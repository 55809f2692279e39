"""The kernels of a Mamba2 mixer on a GPU: checked against the specification, then a decoding step beside transformers.

    python benchmarks/scans.py --part check      # then --part loaded and --part decode: a few minutes each

check: odd and real shapes, the same bits twice; without a GPU on small shapes, by the specification or, with
TRITON_INTERPRET=1, by the interpreted kernels. decode: a step of a stack shaped like Mamba2-2.7B with random weights, without
embedding and head, in a CUDA graph: projections on lowbit's kernels, all between them in int8; the mean over a run of tokens,
at whose end states are written. Beside it, transformers' Mamba2 of that shape in float16 (without mamba_ssm), as it is,
compiled layer by layer, and each of the two in a CUDA graph, where that can be captured. loaded: checkpoints of a few such
layers, made here by the recipes with 8-bit scans (rounded to nearest), loaded as `lowbit.load` does it: their divergence from
the simulation in float32, at once and step by step in a CUDA graph, which must be less than what quantization itself costs; the
time of a step beside the float model's in a graph of the same kind. The exit status is 1 if a check fails or a bar is missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from sections import RESULTS, ROOT, describe, environment, keep
from torch import Tensor

from lowbit import export, runtime
from lowbit.bench import seconds_of
from lowbit.data import DataSpec
from lowbit.decoding import Decoder
from lowbit.kernel_bench import prepared, time_of
from lowbit.kernels import entry, mixer, reference
from lowbit.kernels.entry import Rows, linear
from lowbit.kernels.mixer import Cache, stepped
from lowbit.kernels.reference import Scan
from lowbit.recipe import Step, read_recipe
from lowbit.report import table
from lowbit.run import quantize
from lowbit.ssm import CHUNK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = 4  # tokens of the convolution
# Heads, channels of a head, state groups, state size, batch, tokens of a prefill.
CHECKS = [(80, 64, 1, 128, 2, 2 * CHUNK + 5), (6, 40, 2, 24, 3, CHUNK), (8, 64, 4, 64, 32, 70), (5, 128, 1, 16, 1, 9)]
CHECKS_OF_A_CPU = [(2, 20, 2, 12, 2, CHUNK + 5)]
STACK = {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1}
SCHEMES = ("w4a16-g128", "w4a8-channel")
BATCHES = (1, 32)
BAR = 2.0  # times as fast as the best of transformers
LOADED = {**STACK, "num_hidden_layers": 4}
RECIPES = ("quamba2-w8a8", "quamba2-w4a8")
LENGTH = 2 * CHUNK + 20  # tokens that a loaded model is compared on


def random_scan(heads: int, p: int, groups: int, n: int) -> Scan:
    """Scales as after sort-and-cluster: 16 clusters of channels, one scale a state group."""
    clusters = torch.arange(heads * p, device=DEVICE) * 16 // (heads * p)
    of_x = 0.01 + 0.02 * torch.rand(16, device=DEVICE)[clusters]
    of_b_and_c = (0.01 + 0.02 * torch.rand(2 * groups, device=DEVICE)).repeat_interleave(n)
    return Scan(
        A=-16 * torch.rand(heads, device=DEVICE),
        D=torch.randn(heads, device=DEVICE),
        dt_bias=torch.randn(heads, device=DEVICE) - 3,
        scales=torch.cat([of_x, of_b_and_c]),
        state_scale=0.01 + 0.02 * torch.rand(16, n, device=DEVICE),
        labels=clusters.int(),
        groups=groups,
        z_scale=0.03,
        dt_scale=0.05,
    )


def random_codes(*shape: int) -> Tensor:
    """Int8, all of them."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def close(found: Tensor, wanted: Tensor) -> float:
    """How far off, 1 being the most allowed: codes at most one apart and in 1 %, floats by 2e-3 of their norm."""
    if found.dtype != torch.int8:
        error = float((found - wanted).norm() / wanted.norm()) / 2e-3
        return error if error == error else float("inf")
    apart = (found.int() - wanted.int()).abs()
    return max(float((apart > 0).float().mean()) / 0.01, float(apart.max() > 1) * 2)


def checked(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """What to run at a shape, its name, and what must come out, with what is kept."""
    heads, p, groups, n, batch, length = shape
    of = random_scan(heads, p, groups, n)
    channels, width = heads * p, len(of.scales)
    weight, bias = torch.randn(width, KERNEL, device=DEVICE), torch.randn(width, device=DEVICE)
    made = torch.randn(batch, length, channels + width + heads, device=DEVICE, dtype=torch.float16)
    z, x, dt = made.split([channels, width, heads], -1)
    past, state, codes = (random_codes(batch, *size) for size in ((width, KERNEL), (channels, n), (length, width)))
    tokens, steps = random_codes(batch, CHUNK, channels + groups * n), torch.randn(batch, heads, CHUNK, device=DEVICE)
    first, how = (x[:, 0], dt[:, 0], z[:, 0]), (weight, bias, 0.02)

    def convolution(x: Tensor) -> tuple[Tensor, ...]:
        kept = past.clone()
        return mixer.conv(x, kept, *how, of.scales, 5), kept

    def one_more(held: Tensor) -> tuple[Tensor, ...]:
        cache = Cache(*(part.clone() for part in (past, state, tokens, steps)))
        return stepped(*first, cache, *how, held, of, torch.float32), *cache

    for part in (x, x[:, :1]):
        wanted = reference.conv(part, past, *how, of.scales, 5)
        yield f"conv of {part.shape[1]}", partial(convolution, part), wanted
    run = partial(mixer.scan, codes, dt, z, state, *mixer.parts(of), torch.float32)
    yield f"scan of {length}", run, reference.scan(codes, dt, z, state, of)
    for name, last in (("step at an end", CHUNK - 1), ("step", 17)):
        held = (last - torch.arange(batch, device=DEVICE, dtype=torch.int32)).remainder(CHUNK)
        y, cache = reference.step(*first, (past, state, tokens, steps), *how, held, of)
        yield name, partial(one_more, held), (y, *cache)


def check() -> Iterator[dict[str, Any]]:
    """How far each kernel is from the specification, at each shape; wrong above 1, or where two calls differ."""
    for shape in CHECKS if DEVICE == "cuda" else CHECKS_OF_A_CPU:
        for name, run, wanted in checked(shape):
            found = run()
            same = all(torch.equal(*pair) for pair in zip(found, run(), strict=True))
            error = max(close(*pair) for pair in zip(found, wanted, strict=True))
            yield {"kernel": name, "shape": shape, "error": error, "right": same and error <= 1}


class Layer:
    """A mixer with random weights and its norm, decoding."""

    def __init__(self, scheme: str, shape: dict[str, int], batch: int) -> None:
        self.heads, p, n, groups = (shape[name] for name in ("num_heads", "head_dim", "state_size", "n_groups"))
        self.channels, width = self.heads * p, shape["hidden_size"]
        self.scan = random_scan(self.heads, p, groups, n)
        self.sizes = [self.channels, len(self.scan.scales), self.heads]
        self.in_proj = prepared(scheme, -(-sum(self.sizes) // 16) * 16, width, device=DEVICE)
        self.out_proj = prepared(scheme, width, self.channels, device=DEVICE)
        self.weight = torch.randn(len(self.scan.scales), KERNEL, device=DEVICE)
        self.norms = [torch.rand(size, device=DEVICE, dtype=torch.float16) for size in (width, self.channels)]
        self.cache = Cache.empty(self.scan, batch, KERNEL, DEVICE)

    def copy(self) -> "Layer":
        """The same, in memory of its own."""
        other = object.__new__(Layer)
        other.__dict__.update(self.__dict__)
        other.in_proj, other.out_proj = (matrix.to("cpu").to(DEVICE) for matrix in (self.in_proj, self.out_proj))
        other.weight = self.weight.clone()
        other.cache = Cache(*(part.clone() for part in self.cache))
        return other

    def __call__(self, hidden: Tensor, held: Tensor) -> Tensor:
        """hidden [batch, width], after one more token."""
        made = linear(self._normed(hidden, 0), self.in_proj)
        z, conv_in, dt = made[:, : sum(self.sizes)].split(self.sizes, -1)
        y = stepped(conv_in, dt, z, self.cache, self.weight, None, 0.03, held, self.scan, torch.float32)
        return linear(self._normed(y, 1), self.out_proj, residual=hidden)

    def _normed(self, x: Tensor, which: int) -> Rows:
        return entry.rms_norm(x, self.norms[which], 1e-5, self.in_proj.inputs, dtype=torch.float16)


def ours(scheme: str, shape: dict[str, int], batch: int) -> dict[str, float]:
    """Microseconds of a step in a CUDA graph, bytes of packed weights and of the cache."""
    first = Layer(scheme, shape, batch)
    layers = [first, *(first.copy() for _ in range(shape["num_hidden_layers"] - 1))]
    held = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(batch, shape["hidden_size"], dtype=torch.float16, device=DEVICE)

    def step() -> None:
        x = hidden
        for layer in layers:
            x = layer(x, held)
        held.add_(1).remainder_(CHUNK)

    taken = time_of([step] * CHUNK, replays=5)
    weights = sum(layer.in_proj.nbytes + layer.out_proj.nbytes for layer in layers)
    return {"lowbit": taken, "weights": weights, "cache": sum(part.nbytes for layer in layers for part in layer.cache)}


@torch.no_grad()
def theirs(shape: dict[str, int], batch: int) -> dict[str, float]:
    """Microseconds of a step of transformers by the way it runs; what cannot run or be captured is said and left out."""
    config = transformers.AutoConfig.for_model("mamba2", **shape, vocab_size=256, expand=2, use_cache=True, chunk_size=16)
    with torch.device(DEVICE):
        model = transformers.AutoModel.from_config(config, dtype=torch.float16).eval()
    prompt = torch.randn(batch, 8, shape["hidden_size"], dtype=torch.float16, device=DEVICE)
    cache = model(inputs_embeds=prompt, use_cache=True).cache_params
    found: dict[str, float] = {}

    def way(name: str, forward: Callable[..., Any]) -> None:
        def step() -> Any:
            return forward(inputs_embeds=prompt[:, :1], cache_params=cache, use_cache=True)

        for how, timed in (
            ("", lambda: seconds_of(step, torch.device(DEVICE)) * 1e6),
            (" in a graph", lambda: time_of([step] * 4)),
        ):
            try:
                found[name + how] = timed()
            except (RuntimeError, TypeError, ValueError) as error:
                print(f"transformers {name}{how}: {str(error).splitlines()[0][:100]}", file=sys.stderr)

    way("eager", model)
    for layer in model.layers:
        layer.compile(dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=8 + len(model.layers)):  # a layer is compiled anew for its index
        way("compiled", model)
    return found


def decode() -> Iterator[dict[str, Any]]:
    """Every batch and scheme."""
    for batch in BATCHES:
        peers = theirs(STACK, batch)
        for scheme in SCHEMES:
            yield {"scheme": scheme, "batch": batch, **ours(scheme, STACK, batch), "peers": peers}


@torch.no_grad()
def loaded() -> Iterator[dict[str, Any]]:
    """Every recipe: divergences, and microseconds of a step of one sequence by the model that runs."""
    tokens = torch.randint(256, (2, LENGTH), device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.AutoConfig.for_model("mamba2", **LOADED, vocab_size=256, expand=2, use_cache=True)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(f"{folder}/float")
        model = export.load(f"{folder}/float", device=DEVICE)
        taken = {"float": steps_of(model, tokens)[1]}
        floats = model.float()(tokens).logits
        for name in RECIPES:
            recipe = read_recipe(ROOT / "recipes" / f"{name}.toml")
            steps = tuple(Step(method="rtn") if s.method == "gptq" else s for s in recipe.steps if s.method != "embed")
            recipe = replace(recipe, steps=steps, data=DataSpec(source="random", rows=8, length=256))
            quantize(f"{folder}/float", f"{folder}/{name}", recipe=recipe, device=DEVICE)
            wanted = export.load(f"{folder}/{name}", dtype=torch.float32, device=DEVICE)(tokens).logits
            model = runtime.load(f"{folder}/{name}", dtype=torch.float16, device=DEVICE, kernels=True)
            stepped, taken["lowbit"] = steps_of(model, tokens)
            yield {
                "recipe": name,
                "runs": sorted({row.runs for row in model.lowbit}),
                "quantization": divergence(floats, wanted),
                "prefill": divergence(wanted, model(tokens).logits),
                "steps": divergence(wanted[:1, 8:], stepped),
                **taken,
            }


def steps_of(model: Any, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits [1, l - 8, vocabulary] of the first of the sequences, from token 9 on step by step, in a graph on a GPU; and
    microseconds of a step, over a run."""
    decoder = Decoder(model, 1, 2 * LENGTH)
    found = [decoder.prefill(tokens[:1, :9]).clone()]
    if DEVICE == "cuda":
        decoder.capture()
    for token in tokens[0, 9:]:
        decoder.token.copy_(token)
        found.append(decoder.step().clone())
    run = seconds_of(lambda: [decoder.step() for _ in range(CHUNK)], torch.device(DEVICE))
    return torch.stack(found, 1), run / CHUNK * 1e6


def divergence(wanted: Tensor, found: Tensor) -> float:
    """KL in nats a token."""
    p, q = (logits.float().log_softmax(-1) for logits in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def same(row: dict[str, Any]) -> bool:
    """Whether a loaded model has its scans in int8 and is nearer to the simulation than that is to the float model."""
    return "int8" in row["runs"] and max(row["prefill"], row["steps"]) <= row["quantization"]


def met(row: dict[str, Any]) -> bool:
    """Whether a row of `decode` is as fast as asked for."""
    return row["lowbit"] * BAR <= min(row["peers"].values())


def markdown(parts: dict[str, dict[str, Any]]) -> str:
    """The section `scans`."""
    lines = [*describe(next(iter(parts.values()))["environment"])]
    for part, result in parts.items():
        rows = result["rows"]
        lines += ["", f"### {part}", ""]
        if part == "check":
            wrong = [f"{row['kernel']} {row['shape']} {row['error']:.1e}" for row in rows if not row["right"]]
            lines.append(f"{len(rows)} kernels and shapes checked; wrong: {', '.join(wrong) or 'none'}")
            continue
        if part == "loaded":
            head = ["recipe", "KL of quantization", "of kernels, at once", "step by step", "us a step", "float", ""]
            cells = [
                [row["recipe"], *(f"{row[kind]:.1e}" for kind in ("quantization", "prefill", "steps"))]
                + [f"{row['lowbit']:.0f}", f"{row['float']:.0f}", "same" if same(row) else "**wrong**"]
                for row in rows
            ]
            lines += [f"{LOADED['num_hidden_layers']} layers, random weights, one sequence.", "", table(head, cells)]
            continue
        ways = list(dict.fromkeys(name for row in rows for name in row["peers"]))
        cells = [
            [row["scheme"], str(row["batch"]), f"{row['lowbit']:.0f}"]
            + [f"{row['peers'][name]:.0f}" if name in row["peers"] else "" for name in ways]
            + [f"{row['weights'] / 1e9:.2f}", f"{row['cache'] / 1e6:.0f}", "met" if met(row) else "missed"]
            for row in rows
        ]
        head = ["scheme", "batch", "lowbit", *(f"transformers {name}" for name in ways), "weights GB", "cache MB", f"bar {BAR}"]
        lines += ["Microseconds of a step.", "", table(head, cells)]
    return "\n".join(lines)


PARTS = {"check": check, "loaded": loaded, "decode": decode}
RIGHT: dict[str, Callable[[dict[str, Any]], bool]] = {"check": lambda row: row["right"], "loaded": same, "decode": met}


def measure(part: str) -> dict[str, Any]:
    """One part: environment and rows."""
    torch.manual_seed(0)
    rows = []
    for row in PARTS[part]():
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return {"environment": environment(DEVICE), "rows": rows}


def main() -> int:
    """Check or time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default="check")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "scans")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.part == "decode" and DEVICE != "cuda":
        parser.error("decode is timed in CUDA graphs, and no GPU is here; --part check runs on a CPU")
    result = measure(args.part)
    there = {name: args.out / f"{name}.json" for name in PARTS}
    parts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in there.items() if path.exists()}
    parts[args.part] = result
    keep(result, there[args.part], markdown(parts), page=args.markdown, name="scans")
    return 0 if all(map(RIGHT[args.part], result["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
