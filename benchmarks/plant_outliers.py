"""Make a small model as hard to quantize as a large one: outlier channels planted into its activations.

    python benchmarks/plant_outliers.py MODEL OUT [--factor 64 --share 0.01 --seed 0]

In every block the gains of both norms are multiplied by a power of two on a few channels, the same in all blocks as in large
models, and the columns of the linears that read them are divided by it. Powers of two are exact in every float dtype, so the
model computes what it did, but the inputs of its linears have channels that are `factor` times larger than the others.

For models with the tensor names of Llama: input_layernorm before q, k, v, post_attention_layernorm before gate and up.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(model: Path, out: Path, *, factor: int = 64, share: float = 0.01, seed: int = 0) -> list[int]:
    """Copy the checkpoint `model` to `out` with outliers planted; returns the channels.

    Args:
        factor: a power of two.
        share: of all channels, at least one.

    Raises:
        ValueError: factor is no power of two, or the model has other tensor names.
    """
    if factor < 2 or math.log2(factor) % 1:
        raise ValueError(f"factor {factor} is not a power of two above 1, so the model would change; use 16, 32, 64 ...")
    width = json.loads((model / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    channels = order[: max(1, round(share * width))].sort().values
    shutil.copytree(model, out)
    planted = 0
    for shard in sorted(out.glob("*.safetensors")):
        tensors = load_file(shard)
        planted += sum(_plant(name, tensor, channels, factor) for name, tensor in tensors.items())
        save_file(tensors, shard, metadata={"format": "pt"})
    if not planted:
        raise ValueError(f"{model} has no tensors named like a Llama's; nothing was planted")
    return channels.tolist()


def _plant(name: str, tensor: Tensor, channels: Tensor, factor: int) -> bool:
    """Scale a norm's gains up, or a reader's columns down, in place; whether the tensor is one of these."""
    for norm, readers in READERS.items():
        if name.endswith(f".{norm}.weight"):
            tensor[channels] *= factor
            return True
        if any(name.endswith(f".{reader}.weight") for reader in readers):
            tensor[:, channels] /= factor
            return True
    return False


def main() -> int:
    """Read the command line and plant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("channels", *plant(args.model, args.out, factor=args.factor, share=args.share, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
