"""How much memory quantization takes on a model that is larger than that: peak resident memory above the bare imports.

    python benchmarks/streaming_memory.py [--layers 2 --hidden 256 --ffn 512 --heads 4 --vocab 1000 --length 64]

Writes a Llama of random weights in bfloat16 (by default 28 layers of width 2048, 3.1 GB) shard by shard into a temporary
folder, then runs each of these in a fresh process: the imports alone, w4a16 by rtn, w4a16 by gptq on random tokens. A child
reads its own peak, VmHWM of /proc/self/status, at its end (Linux only); ru_maxrss would not do, since a child begins with that
of its parent. Needs about 1.5 times the model's size on disk; the folder is deleted at the end unless --keep is given.

--out gets streaming.json; the table goes into the section `streaming` of --markdown. The exit status is 1 if a bar is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sections import RESULTS, ROOT, describe, environment, keep, peak_memory

from lowbit.files import write_json
from lowbit.report import table

MOST_BYTES = 1.5e9  # above the imports
SCALE = 0.02  # standard deviation of every random weight
LAYERS_PER_SHARD = 4


# -------------------------------------------------------------------------------------------------------------- the child


def child(job: dict[str, Any] | None) -> dict[str, Any]:
    """What a fresh process does: import, then quantize if there is a job; returns seconds and peaks.

    job: model, out, scheme, method and data (keyword arguments of DataSpec), as `lowbit.quantize` takes them.
    """
    import accelerate  # noqa: F401
    import compressed_tensors  # noqa: F401
    import torch
    from transformers.utils import logging

    import lowbit.run
    from lowbit.data import DataSpec

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "peak_after_imports": peak_memory()}
    if job is not None:
        data = DataSpec(**job["data"])
        began = time.perf_counter()
        report = lowbit.run.quantize(job["model"], job["out"], scheme=job["scheme"], method=job["method"], data=data)
        result["seconds"] = time.perf_counter() - began
        result["stages"] = report["stages"]
        result["data"] = report["data"]
        result["output_bytes"] = report["sizes"]["output_bytes"]
    result["peak"] = peak_memory()
    return result


def in_child(job: dict[str, Any] | None, threads: int | None) -> dict[str, Any]:
    """Run `child(job)` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    done = subprocess.run(command, env=child_environment(threads), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the process for {job and (job['scheme'], job['method'])} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child_environment(threads: int | None) -> dict[str, str]:
    """Variables of a child: no network, and a number of threads where one is given."""
    given = {} if threads is None else {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | given


# -------------------------------------------------------------------------------------------------------------- the model


def write_model(folder: Path, *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> int:
    """Write a random Llama in several shards, at most LAYERS_PER_SHARD layers of it in memory; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    head = hidden // heads
    linears = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for first in range(0, layers, LAYERS_PER_SHARD):
        numbers = range(first, min(first + LAYERS_PER_SHARD, layers))
        shards.append({f"model.layers.{i}.{name}": shape for i in numbers for name, shape in block.items()})
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})

    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                tensor.normal_(0.0, SCALE, generator=generator)
            tensors[name] = tensor
            total += tensor.nbytes
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)
    return total


# ------------------------------------------------------------------------------------------------------------- the result


def markdown(result: dict[str, Any]) -> str:
    """The section `streaming`."""
    model, data = result["model"], result["data"]
    imports = result["imports"]["peak"]
    lines = [
        f"- Model: random Llama, {model['layers']} layers, width {model['hidden']}, MLP {model['ffn']}, {model['heads']} heads "
        f"({model['kv_heads']} for keys and values), vocabulary {model['vocab']}, untied; {model['bytes'] / 1e9:.2f} GB in "
        f"bfloat16, {model['shards']} shards",
        f"- Data of gptq: {data['rows']} rows x {data['length']} random tokens, seed {data['seed']}",
        *describe(result["environment"]),
        "",
        f"Peak resident memory (VmHWM) of a fresh process each. The imports alone (torch, transformers, accelerate, "
        f"compressed-tensors, lowbit) take {imports / 1e9:.2f} GB, which is subtracted.",
        "",
    ]
    rows = [
        [
            f"{run['scheme']} {run['method']}",
            f"{run['seconds']:.0f}",
            f"{run['peak'] / 1e9:.2f} GB",
            f"{run['above_imports'] / 1e9:.2f} GB",
            f"< {MOST_BYTES / 1e9:g} GB: {'yes' if run['met'] else '**no**'}",
        ]
        for run in result["runs"]
    ]
    return "\n".join([*lines, table(["run", "seconds", "peak", "above imports", "bars"], rows)])


def main() -> int:
    """Write the model, run the children, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=8, help="random calibration sequences of gptq (default 8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--threads", type=int, help="of the children; default: torch's")
    parser.add_argument("--work", type=Path, help="where to make the temporary folder (default: the system's place)")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "streaming", help="for streaming.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS, help="whose section to replace")
    parser.add_argument("--child", type=json.loads, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if hasattr(args, "child"):
        print(json.dumps(child(args.child)))
        return 0
    kv_heads = args.kv_heads or args.heads
    if args.hidden % args.heads or args.heads % kv_heads:
        parser.error("--heads must divide --hidden, and --kv-heads must divide --heads")
    shape = {"layers": args.layers, "hidden": args.hidden, "ffn": args.ffn, "heads": args.heads, "kv_heads": kv_heads}
    shape["vocab"] = args.vocab

    where = environment()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="streaming-", dir=args.work))
    try:
        model = work / "model"
        model.mkdir()
        began = time.monotonic()
        size = write_model(model, **shape)
        print(f"{size / 1e9:.2f} GB written in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        data = {"source": "random", "rows": args.rows, "length": args.length, "seed": 0}
        imports = in_child(None, args.threads)
        runs = []
        for method in ("rtn", "gptq"):
            out = work / method
            job = {"model": str(model), "out": str(out), "scheme": args.scheme, "method": method, "data": data}
            run = {"scheme": args.scheme, "method": method} | in_child(job, args.threads)
            run["above_imports"] = run["peak"] - imports["peak"]
            run["met"] = run["above_imports"] < MOST_BYTES
            runs.append(run)
            print(f"{method}: {run['seconds']:.0f} s, {run['above_imports'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
            if not args.keep:
                shutil.rmtree(out)
        shards = len(list(model.glob("*.safetensors")))
    finally:
        if args.keep:
            print(f"kept: {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    result = {
        "model": shape | {"bytes": size, "shards": shards},
        "data": data,
        "environment": where | {"threads": imports["threads"]},
        "imports": imports,
        "runs": runs,
    }
    keep(result, args.out / "streaming.json", markdown(result), page=args.markdown, name="streaming")
    return 0 if all(run["met"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
