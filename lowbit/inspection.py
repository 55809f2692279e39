"""What a checkpoint contains, whoever wrote it: its linears, their formats and bits, its size.

`summary_of` reads headers and configurations, no weights: lowbit's own format, compressed-tensors, GPTQ and AWQ as AutoGPTQ,
GPTQModel and AutoAWQ lay them out, and GGUF through the gguf package. `problems_of` reads everything and says what is wrong.
"""

import itertools
import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowbit.arch import Arch
from lowbit.checks import REMEDY, Damaged, changed_files
from lowbit.export import QuantizedSource, check_model, open_checkpoint
from lowbit.qtensor import CHANNEL, TENSOR, Scheme, parse_scheme
from lowbit.report import hashes_of, problem_of_report, read_report
from lowbit.source import Source, read_json

_PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of GPTQ and AWQ
_FLOATS = ("fp8", "fp4", "nvfp4", "mxfp4", "mxfp6", "mxfp8")  # families of schemes that compressed-tensors holds
_GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


def summary_of(model: str) -> dict[str, Any]:
    """A summary of a folder or a .gguf file, JSON types only.

    Returns:
        "folder", "model_type", "architectures", "format", "shards", "bytes" of all tensors, and "linears": by name "scheme",
        "shape" [out, in] and stored "bits" a weight; of lowbit's own checkpoints also "gate" and "evaluations".

    Raises:
        ValueError: not a checkpoint, damaged, or quantized in a way that is not known.
        ImportError: a GGUF file, and the gguf package is not installed.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path)
    if (path / "config.json").is_file():
        config = read_json(path / "config.json", "the model's configuration").get("quantization_config")
        method = config.get("quant_method") if isinstance(config, dict) else None
        if config is not None and method in ("gptq", "awq"):
            return _packed(path, method, config)
    source = open_checkpoint(model)
    if not isinstance(source, QuantizedSource):
        return _about(source, source.quantization or "float", {})
    linears = {
        name: {
            "scheme": scheme.name if source.native else scheme_name(scheme),
            "shape": list(source.modules[name].shape),
            "bits": round(source.bits_per_weight(name), 3),
        }
        for name, scheme in source.schemes().items()
    }
    summary = _about(source, "lowbit" if source.native else "compressed-tensors", linears)
    report = read_report(source.folder)
    if report is not None:
        summary["gate"], summary["evaluations"] = report["gate"], report["evaluations"]
    return summary


def problems_of(model: str, progress: Callable[[str, int, int], None] | None = None) -> tuple[list[str], bool]:
    """Everything that can be told to be wrong with a quantized folder, lowbit's own format or compressed-tensors: hashes of all
    files, every header, every number that decides how others are read, and whether the model of config.json has such tensors.

    Returns:
        a line for each problem; whether there were hashes (report.json of lowbit) to compare with.

    Raises:
        ValueError: no such folder, or one that is not quantized in a way that lowbit reads.
    """
    folder = Path(model).expanduser()
    say = progress or (lambda stage, done, total: None)
    if not folder.is_dir():
        raise ValueError(f"{model} is no folder; only those can be checked")
    hashes = bool(hashes_of(folder))
    say("comparing hashes", 0, 1)
    damaged_report = problem_of_report(folder)
    found = [*([] if damaged_report is None else [damaged_report]), *changed_files(folder)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is among the hashes
            source = open_checkpoint(model)
    except Damaged as damaged:
        return [*dict.fromkeys([*found, *damaged.problems])], hashes
    except ValueError as error:
        return [*dict.fromkeys([*found, str(error)])], hashes
    if not isinstance(source, QuantizedSource):
        what = f"quantized otherwise ({source.quantization})" if source.quantization else "not quantized"
        raise ValueError(f"{model} is {what}; only folders in lowbit's own format or compressed-tensors can be checked")
    try:
        check_model(Arch(source), source)
    except ValueError as error:
        found.append(str(error))
    names = [*source.modules, *source.tensors]
    for i, name in enumerate(names):
        say("checking", i, len(names))
        try:
            if name in source.modules:
                source.quantized(name)
            elif name not in source.by_tensor:
                values = source.read([name])[name]
                if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                    found.append(f"{folder / source.tensors[name].shard}: tensor {name} has NaN or infinite values; {REMEDY}")
        except ValueError as error:
            found.append(str(error))
    try:
        source.points()
        source.cache_scales()
    except ValueError as error:
        found.append(str(error))
    say("checking", len(names), len(names))
    return [*dict.fromkeys(found)], hashes


@cache
def scheme_name(scheme: Scheme) -> str:
    """The name that `parse_scheme` reads as this scheme, if it has one of the usual form; else its own."""
    weight, inputs = scheme.weight, scheme.input
    group = "block" if weight.rows > 1 else {CHANNEL: "channel", TENSOR: "tensor"}.get(weight.group, f"g{weight.group}")
    integers = f"w{weight.format.bits}a{inputs.format.bits if inputs else 16}-{group}"
    families = [family + suffix for family in _FLOATS for suffix in ("", "a16", "a8")]
    firsts = [integers, *families, *(f"{family}-{group}" for family in families)]
    for first, *options in itertools.product(firsts, ("", "-asym"), ("", "-astatic")):
        name = first + "".join(options)
        try:
            meant = parse_scheme(name)
        except ValueError:
            continue
        if (meant.weight, meant.input) == (weight, inputs):
            return name
    return scheme.name


def _about(source: Source, form: str, linears: dict[str, Any]) -> dict[str, Any]:
    return {
        "folder": str(source.folder),
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures"),
        "format": form,
        "shards": len(source.shards),
        "bytes": source.stored_bytes(),
        "linears": linears,
    }


def _packed(folder: Path, method: str, config: dict[str, Any]) -> dict[str, Any]:
    """GPTQ packs along the inputs of a matrix stored [in, out], AWQ along its outputs, 32 bits a word."""
    source = Source(folder)
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size", -1))
    if not isinstance(bits, int) or not isinstance(group, int):
        raise ValueError(f"{folder / 'config.json'}: quantization_config of {method} names no bits or no group_size")
    symmetric = config.get("sym", False) if method == "gptq" else not config.get("zero_point", True)
    words = "g" + str(group) if group > 0 else "channel"
    scheme = f"w{bits}a16-{words}{'' if symmetric else '-asym'}"
    linears = {}
    for tensor, info in source.tensors.items():
        name, _, part = tensor.rpartition(".")
        if part != "qweight":
            continue
        rows, columns = info.shape
        shape = [columns, rows * 32 // bits] if method == "gptq" else [columns * 32 // bits, rows]
        stored = sum(source.tensors[f"{name}.{p}"].nbytes for p in _PARTS if f"{name}.{p}" in source.tensors)
        linears[name] = {"scheme": scheme, "shape": shape, "bits": round(8 * stored / prod(shape), 3)}
    if not linears:
        raise ValueError(f"{folder} says it is quantized by {method}, but holds no qweight; fetch it again")
    return _about(source, method, linears)


def _gguf(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"GGUF files need the package gguf ({error}): pip install 'lowbit[gguf]'") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a GGUF file that the package gguf reads ({error}); fetch it again") from error
    linears, total = {}, 0
    for tensor in reader.tensors:
        total += int(tensor.n_bytes)
        shape = [int(size) for size in reversed(tensor.shape.tolist())]
        kind = tensor.tensor_type.name
        if len(shape) >= 2 and kind not in _GGUF_FLOATS:
            bits = 8 * int(tensor.n_bytes) / prod(shape)
            linears[tensor.name.removesuffix(".weight")] = {"scheme": kind, "shape": shape, "bits": round(bits, 3)}
    architecture = reader.get_field("general.architecture")
    return {
        "folder": str(path),
        "model_type": architecture.contents() if architecture is not None else None,
        "architectures": None,
        "format": "gguf",
        "shards": 1,
        "bytes": total,
        "linears": linears,
    }
