"""What a block of a large model costs to solve and to train: seconds and peak memory, for models of different depth.

    python benchmarks/blocks.py --device cuda --peer [--layers 4 --hidden 4096 --ffn 14336 --heads 32 --kv-heads 8]
    python benchmarks/blocks.py --section depth --layers 4 16 --hidden 512 --ffn 1408 --heads 8 --kv-heads 8 --rows 16

Writes a Llama of random weights in bfloat16 (by default of Llama-3-8B's blocks, with a small vocabulary) for each number of
layers and quantizes it with each chain on random tokens, in a fresh process each. Seconds are of all blocks over their number.
Peaks are of resident memory above the bare imports (Linux only), and of what PyTorch holds on the GPU. --steps is for the
chains that train. --peer also runs AutoRound (peer_autoround.py, with as many steps) on the same model and tokens, in the
environment of --peer-python.

--out gets blocks.json; the table goes into the section --section of --markdown. The exit status is 1 if, for a chain, memory
grows with depth.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sections import RESULTS, ROOT, describe, environment, keep, peak_memory
from streaming_memory import child_environment, write_model

from lowbit.report import table

CHAINS = (
    "gptq",
    "rtn+omniquant:steps={steps}",
    "rtn+signround:steps={steps}",
    "rtn+tesseraq:steps={steps}",
    "rtn+block_ap:steps={steps}",
    "rtn+block_ap:steps={steps},state_bits=8",
    "rtn+mrem:blocks=2,steps={steps}",
)
GROWTH = 0.2  # of a block in float32: most by which a peak may grow for every further block
PEER = "AutoRound"


def child(job: dict[str, Any] | None) -> dict[str, Any]:
    """What a fresh process does: import, then quantize if there is a job; returns seconds and peaks."""
    import torch
    from techniques import make_recipe
    from transformers.utils import logging

    import lowbit.run
    from lowbit.data import DataSpec

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Any] = {"imports": peak_memory()}
    if job is not None:
        recipe = make_recipe({"": job["scheme"]}, job["chain"], DataSpec(**job["data"]))
        report = lowbit.run.quantize(job["model"], job["out"], recipe=recipe, device=job["device"])
        found["seconds"] = {stage["stage"]: stage["seconds"] for stage in report["stages"]}
        found["data"] = report["data"]
        if job["device"] != "cpu":
            found["gpu_peak"] = torch.cuda.max_memory_allocated()
    return found | {"peak": peak_memory()}


def in_child(job: dict[str, Any] | None) -> dict[str, Any]:
    """Run `child(job)` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    done = subprocess.run(command, env=child_environment(None), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer(model: Path, out: Path, data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The same by AutoRound."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(data["seed"])
    tokens = torch.randint(args.vocab, (data["rows"], data["length"]), generator=generator)
    save_file({"tokens": tokens}, out.with_suffix(".tokens"))
    script = Path(__file__).with_name("peer_autoround.py")
    command = [*args.peer_python.split(), str(script), str(model), str(out.with_suffix(".tokens")), str(out)]
    command += ["--bits", args.scheme[1], "--group-size", args.scheme.rpartition("-g")[2], "--iters", str(args.steps)]
    command += ["--device", args.device, "--dtype", "bfloat16", "--only-measure"]
    subprocess.run(command, env=child_environment(None), check=True)
    record = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    return {
        "seconds": {"blocks": record["seconds"]["oneshot"]},
        "gpu_peak": record.get("gpu_peak"),
        "peak": record["peak"],
        "imports": record["imports"],
        "versions": record["versions"],
    }


def markdown(result: dict[str, Any]) -> str:
    """The section."""
    shape, data = result["shape"], result["data"]
    lines = [
        f"- Model: random Llama of width {shape['hidden']}, MLP {shape['ffn']}, {shape['heads']} heads ({shape['kv_heads']} "
        f"for keys and values), {result['block_bytes'] / 1e6:.0f} MB a block in bfloat16; {result['scheme']}",
        f"- Data: {data['rows']} rows x {data['length']} random tokens, seed {data['seed']}",
        *describe(result["environment"]),
    ]
    peers = [run for run in result["runs"] if "versions" in run]
    if peers:
        lines.append("- AutoRound: " + ", ".join(f"{name} {number}" for name, number in peers[0]["versions"].items()))
    timed = result["environment"]["device"].startswith("NVIDIA")
    lines += ["", "Seconds are of all blocks, divided by their number; peaks of memory are above the imports alone.", ""]
    head = ["steps", "blocks", *(["seconds a block", "peak on the GPU"] if timed else []), "peak"]
    rows = []
    for run in result["runs"]:
        cells = [run["chain"], str(run["layers"])]
        if timed:
            cells += [f"{run['seconds']['blocks'] / run['layers']:.1f}", f"{run['gpu_peak'] / 1e9:.2f} GB"]
        rows.append([*cells, f"{(run['peak'] - run['imports']) / 1e9:.3f} GB"])
    lines.append(table(head, rows))
    lines += ["", *(f"- {b['bar']}: {'yes' if b['met'] else '**no**'} ({b['numbers']})" for b in result["bars"])]
    return "\n".join(lines)


def bars(runs: list[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """Whether the memory of a chain grows with depth by less than what would be a copy of every block, in any dtype."""
    found = []
    for chain in dict.fromkeys(run["chain"] for run in runs if "versions" not in run):
        mine = sorted((run["layers"], run["peak"]) for run in runs if run["chain"] == chain)
        if len(mine) > 1:
            growth = (mine[-1][1] - mine[0][1]) / (2 * block * (mine[-1][0] - mine[0][0]))
            text = f"{chain}: a further block takes at most {GROWTH:g} times what it has in float32"
            found.append({"bar": text, "met": growth <= GROWTH, "numbers": f"{growth:.2f}"})
    return found


def main() -> int:
    """Write the models, run the children, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--chains", nargs="+", default=CHAINS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--work", type=Path, help="where to make the temporary folder (default: the system's place)")
    parser.add_argument("--section", default="blocks", choices=("blocks", "depth"))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "blocks")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    parser.add_argument("--child", type=json.loads, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if hasattr(args, "child"):
        print(json.dumps(child(args.child)))
        return 0
    shape = {name: getattr(args, name) for name in ("hidden", "ffn", "heads", "kv_heads", "vocab")}
    data: dict[str, Any] = {"source": "random", "rows": args.rows, "length": args.length, "seed": 0}
    where = environment(args.device)
    runs, sizes = [], []
    with tempfile.TemporaryDirectory(prefix="blocks-", dir=args.work) as name:
        work = Path(name)
        in_child(None)  # so that no run reads modules from disk for the first time
        for layers in args.layers:
            model = work / f"model-{layers}"
            model.mkdir()
            sizes.append(write_model(model, layers=layers, **shape))
            for chain in [chain.format(steps=args.steps) for chain in args.chains] + [PEER] * args.peer:
                out = work / "out"
                if chain == PEER:
                    run = peer(model, out, data, args)
                else:
                    job = {"model": str(model), "out": str(out), "scheme": args.scheme, "chain": chain, "data": data}
                    run = in_child(job | {"device": args.device})
                shutil.rmtree(out)
                runs.append({"chain": chain, "layers": layers} | run)
                say = f"{chain}, {layers} blocks: {run['seconds']['blocks']:.1f} s, {run['peak'] / 1e9:.2f} GB"
                print(say, file=sys.stderr, flush=True)
    outside = 2 * 2 * args.vocab * args.hidden  # embedding and head in bfloat16
    result = {
        "shape": shape,
        "scheme": args.scheme,
        "block_bytes": (sizes[0] - outside) // args.layers[0],
        "data": data,
        "environment": where,
        "runs": runs,
    }
    result["bars"] = bars(runs, result["block_bytes"])
    keep(result, args.out / "blocks.json", markdown(result), page=args.markdown, name=args.section)
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
