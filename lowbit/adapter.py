"""Low-rank corrections of quantized matrices, kept beside the checkpoint as a LoRA adapter in PEFT's format.

An engine computes W x + B (A x); lowbit itself works with the sum W + B A, rounded once to the checkpoint's dtype, which
differs from that by this rounding and, where inputs are quantized, by PEFT's A reading the input before that.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.files import replacing, write_json

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES = "lowbit"  # the only key of the metadata, whose order would not be fixed: the checkpoint's name of every module


class LowRank(NamedTuple):
    """A correction b @ a of a matrix [out, in].

    Attributes:
        a: [rank, in], in the dtype in which it is stored.
        b: [out, rank].
    """

    a: Tensor
    b: Tensor


def merged(w: Tensor, low: LowRank) -> Tensor:
    """w + b a [out, in] on the CPU, in the dtype of w; summed in float64, so that it is the same everywhere."""
    return (w.cpu().double() + low.b.cpu().double() @ low.a.cpu().double()).to(w.dtype)


def write_adapter(folder: Path, corrections: dict[str, LowRank], modules: dict[str, str], *, causal: bool) -> None:
    """Write the adapter of a checkpoint in `folder`.

    Args:
        corrections: by the checkpoint's name of the linear.
        modules: the transformers module of each.
        causal: the model is a causal language model.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    rank = len(next(iter(corrections.values())).a)
    tensors = {}
    for name, low in corrections.items():
        for part, value in (("lora_A", low.a), ("lora_B", low.b)):
            tensors[f"{_PREFIX}{modules[name]}.{part}.weight"] = value.contiguous()
    names = json.dumps({modules[name]: name for name in corrections})
    with replacing(target / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={_NAMES: names})
    write_json(
        target / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted(modules[name] for name in corrections),
        },
    )


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The corrections of a checkpoint by the checkpoint's names; empty if it has none.

    Raises:
        ValueError: the file is damaged, or does not say which linear each correction belongs to.
    """
    path = folder / FOLDER / WEIGHTS
    if not path.exists():
        return {}
    remedy = "fetch this file again, or quantize the model again"
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {}).get(_NAMES, "null"))
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); {remedy}") from error
    except (json.JSONDecodeError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path}: its metadata {_NAMES!r} is no object of modules and names of linears; {remedy}")
    expected = [f"{_PREFIX}{module}.{part}.weight" for module in names for part in ("lora_A", "lora_B")]
    if sorted(expected) != sorted(tensors) or len(set(names.values())) != len(names):
        odd = sorted({*expected} ^ {*tensors})[:3]
        raise ValueError(f"{path}: its tensors are not those of its metadata {_NAMES!r} ({', '.join(odd)} ...); {remedy}")
    return {
        name: LowRank(*(tensors[f"{_PREFIX}{module}.{part}.weight"] for part in ("lora_A", "lora_B")))
        for module, name in names.items()
    }


def low_rank(error: Tensor, rank: int, gram: Tensor | None = None, *, damping: float = 0.01) -> LowRank:
    """The best correction of an error, float32.

    Without `gram` it minimises |error - b a|^2 (Eckart and Young): the first `rank` terms of the singular value decomposition.
    With it trace((error - b a) G (error - b a)^T): those of error L, G = L L^T, with a multiplied by L^-1.

    Args:
        error: [out, in] float32.
        gram: [in, in] float32, the Gram matrix of the inputs, of which damping x mean diagonal is added to the diagonal.
    """
    if gram is not None:
        damped = gram.double()
        damped.diagonal().add_(damping * damped.diagonal().mean().clamp(min=1e-30))
        factor = torch.linalg.cholesky(damped)
        error = (error.double() @ factor).float()
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    a = root.unsqueeze(1) * v[:rank]
    if gram is not None:
        a = torch.linalg.solve_triangular(factor, a.double(), upper=False, left=False).float()
    return LowRank(a, u[:, :rank] * root)
