"""Quantize a model with AutoRound, for comparison, and record what it took.

    python peer_autoround.py MODEL TOKENS.safetensors OUT_DIR --bits 4 --group-size 128 [--asym] --iters 0|50|200

For an environment that has AutoRound and not lowbit: imports nothing of lowbit. TOKENS.safetensors holds `tokens`, int64
[rows, length], the calibration samples. --iters 0 is AutoRound's rounding to nearest, 200 its default, 50 its light setting;
the other choices are its defaults, but the number and the length of samples, which are those of the file.

OUT_DIR gets a float checkpoint with the quantized weights (format "fake"), which every program reads, and peer.json.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def any_tokenizer() -> PreTrainedTokenizerFast:
    """AutoRound wants one, even for samples that are tokens already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?", pad_token="?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model in memory")
    parser.add_argument("--only-measure", action="store_true", help="write no checkpoint; the model needs no tokenizer")
    args = parser.parse_args()
    tokens = load_file(args.tokens)["tokens"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    imports = peak_memory()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = any_tokenizer() if args.only_measure else AutoTokenizer.from_pretrained(args.model)
    start = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        iters=args.iters,
        nsamples=len(samples),
        seqlen=tokens.shape[1],
        dataset=DataLoader(samples, batch_size=1),
        device_map=args.device,
    )
    rounder.quantize()
    seconds = time.perf_counter() - start
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if not args.only_measure:
        rounder.save_quantized(str(args.out_dir), format="fake")
    record = {
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
        "method": f"iters={args.iters}",
        "seconds": {"oneshot": seconds},
        "threads": torch.get_num_threads(),
        "imports": imports,
        "peak": peak_memory(),
        "gpu_peak": None if args.device == "cpu" else torch.cuda.max_memory_allocated(),
    }
    (args.out_dir / "peer.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
