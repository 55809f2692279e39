"""Float weights out of checkpoints that other programs quantized.

Known are FP8 with scales of blocks, channels or tensors (DeepSeek-V3, Qwen3-FP8, MiniMax-M2, Kimi-K2, FBGEMM), MXFP4 as in
openai/gpt-oss, and the compressed-tensors formats that `checks.library_modules` reads. Every weight is one float32 product of
code and scale, rounded once to the dtype of the model. What is said of quantized inputs and caches is left out, since it
belongs to the format that is given up.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.adapter import FOLDER as ADAPTER
from lowbit.checks import LIBRARY_PARTS, REMEDY, Module, check_headers, library_modules, problems_of_values
from lowbit.source import FLOAT_DTYPES, Source, TensorInfo

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FP8 = ("F8_E4M3", "F8_E5M2")
_FP8_METHODS = ("fp8", "fbgemm_fp8")
_FP8_BLOCK = (128, 128)  # where the configuration names none
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scales of inputs, outputs and caches, under the names that the formats give them.
_RUN_TIME = re.compile(
    r"(\.|_)(activation_scale|input_scale|input_zero_point|input_global_scale|output_scale|output_zero_point|qscale_act)$"
    r"|\.[qkv]_scale$"
)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A float weight that a checkpoint holds as codes and scales.

    Attributes:
        shape: of the float weight.
        parts: names of the stored tensors it is made of, by what they are for `decode`.
        decode: makes the weight from the parts, in float32 or in the dtype that a library gives it.
    """

    shape: tuple[int, ...]
    parts: dict[str, str]
    decode: Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a checkpoint was quantized.

    Attributes:
        words: for people, such as "fp8, blocks of 128 x 128".
        dtype: of the model, in which its weights are shown.
        weights: by their names in the float checkpoint.
        dropped: stored tensors that are neither weights nor parts of them.
    """

    words: str
    dtype: torch.dtype
    weights: dict[str, Packed]
    dropped: frozenset[str]


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a config.json, which models with several parts may keep in text_config, an object unless the
    file is damaged; None: it has none."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if found is not None and found != {}:
            return found
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of quantization."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in kept["text_config"].items() if key != "quantization_config"}
    return kept


class Dequantized(Source):
    """A checkpoint that others quantized, shown as a float one: weights are dequantized as they are read."""

    def __init__(self, plain: Source, packing: Packing) -> None:
        self.__dict__.update(plain.__dict__)
        self.quantization = packing.words
        self._packing = packing
        dtype = next(name for name, each in FLOAT_DTYPES.items() if each == packing.dtype)
        parts = {part for packed in packing.weights.values() for part in packed.parts.values()}
        self.tensors = {name: info for name, info in self.stored.items() if name not in parts | packing.dropped}
        for name, packed in packing.weights.items():
            shard = self.stored[next(iter(packed.parts.values()))].shard
            self.tensors[name] = TensorInfo(shard, packed.shape, dtype)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, dequantized where they are quantized."""
        weights = self._packing.weights
        out = self.read_stored([name for name in names if name not in weights])
        for name in names:
            if name in weights:
                stored = self.read_stored(list(weights[name].parts.values()))
                given = {part: stored[each] for part, each in weights[name].parts.items()}
                out[name] = weights[name].decode(given).to(self._packing.dtype)
        return out


def dequantized(source: Source, where: str) -> Source:
    """A checkpoint, shown as a float one if others quantized it, and as it is if no one did.

    Args:
        where: what the user calls it, for messages.

    Raises:
        ValueError: it is quantized in a way that is not known, or its tensors do not fit what its config.json says.
    """
    packing = _packing_of(source, where)
    if packing is None:
        return source
    if (source.folder / ADAPTER / "adapter_config.json").exists():
        raise ValueError(
            f"{where} is quantized with a low-rank adapter beside it ({ADAPTER}/); quantize the original checkpoint"
        )
    return Dequantized(source, packing)


def _packing_of(source: Source, where: str) -> Packing | None:
    given, stored = quantization_of(source.config), source.stored
    if given is None:
        _check_float(where, stored)
        return None
    if not isinstance(given, dict):
        raise ValueError(
            f"{where} is quantized already, but 'quantization_config' is {given!r:.80}, not an object; quantize the original "
            "checkpoint instead"
        )
    method = given.get("quant_method", "unknown")
    if method in _FP8_METHODS:
        words, weights = _fp8(where, given, stored)
    elif method == "mxfp4":
        words, weights = _mxfp4(where, stored)
    elif method == "compressed-tensors":
        words, weights = _library(where, source, given)
    else:
        raise ValueError(
            f"{where} is quantized already ({method}), which lowbit cannot dequantize; quantize the original checkpoint "
            "instead, or a dequantized copy of this one. Dequantized as they are read are fp8, fbgemm_fp8, mxfp4 and "
            "compressed-tensors"
        )
    if not weights and given.get("config_groups", True):  # compressed-tensors may describe a cache alone
        raise ValueError(f"{where}: config.json says it is quantized ({method}), but no tensor is; fetch both again")
    used = {name for packed in weights.values() for name in packed.parts.values()}
    dropped = frozenset(name for name in stored if name not in used and _RUN_TIME.search(name))
    return Packing(words=words, dtype=_model_dtype(source.config), weights=weights, dropped=dropped)


def decode_scaled(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Codes [..., out, in] of any float dtype times scales [..., ceil(out / rows), ceil(in / columns)] of blocks of (rows,
    columns), the last of which may be smaller; float32. Scales in uint8 are exponents of 2, biased by 127."""
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() > 1:
        for axis in (-2, -1):
            size = codes.shape[axis]
            factor = factor.repeat_interleave(min(block[axis], size), axis).narrow(axis, 0, size)
    return codes.float() * factor


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 as in gpt-oss: blocks [experts, out, groups, 16] of two codes a byte, the lower half first, and scales [experts,
    out, groups], exponents of 2 biased by 127, both uint8; float32 [experts, groups * 32, out]."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    out = torch.empty(blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1])
    for expert in range(len(blocks)):
        codes = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], -1).flatten(-2)
        weight = torch.ldexp(values[codes.int()], scales[expert].int().unsqueeze(-1) - 127)
        out[expert] = weight.flatten(-2).T
    return out


def decompress(parts: dict[str, Tensor], scheme: Any) -> Tensor:
    """The weight of a compressed module from its tensors by local name, as the library computes it."""
    from compressed_tensors.compressors import BaseCompressor

    weight: Tensor = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(parts, scheme)["weight"]
    return weight


def _check_float(where: str, stored: Mapping[str, TensorInfo]) -> None:
    for name, info in stored.items():
        if info.dtype.startswith(("F8_", "F6_", "F4")):
            raise ValueError(
                f"{where}: tensor {name} is stored as {info.dtype}, but config.json has no quantization_config that says how "
                "it is scaled; take the config.json that belongs to these weights, or the original checkpoint"
            )


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return next((_FLOATS[name] for name in named if name in _FLOATS), torch.bfloat16)


def _fp8(where: str, given: dict[str, Any], stored: Mapping[str, TensorInfo]) -> tuple[str, dict[str, Packed]]:
    declared = given.get("weight_block_size") or list(_FP8_BLOCK)
    if not isinstance(declared, list) or len(declared) != 2 or not all(type(size) is int and size > 0 for size in declared):
        raise ValueError(
            f"{where}: weight_block_size in config.json is {declared!r:.80}; allowed are two whole numbers above 0"
        )
    block = (declared[0], declared[1])
    weights, kinds = {}, set()
    for name, info in stored.items():
        stem = name.removesuffix(".weight")
        scales = [f"{name}_scale_inv", f"{name}_scale"]
        scales += [f"{stem}.scale", f"{stem}.qscale_weight"] if stem != name else []
        scale = next((each for each in scales if each in stored), None)
        if info.dtype not in _FP8:
            if scale is not None and info.dtype not in ("BF16", "F16", "F32"):
                raise ValueError(
                    f"{where}: tensor {name} is stored as {info.dtype} with scales, which lowbit cannot dequantize"
                )
            continue
        if scale is None:
            raise ValueError(
                f"{where}: tensor {name} is stored as {info.dtype}, but has no scale ({scales[0]}); fetch it again"
            )
        weights[name], kind = _scaled(where, name, info.shape, scale, stored[scale].shape, block)
        kinds.add(kind)
    return f"{given['quant_method']}, {' and '.join(sorted(kinds))}", weights


def _scaled(
    where: str, name: str, shape: tuple[int, ...], scale: str, scales: tuple[int, ...], block: tuple[int, int]
) -> tuple[Packed, str]:
    """An FP8 weight [..., out, in] with scales in one of the shapes they come in, and in words which."""
    *stack, rows, columns = (*(1,) * (2 - len(shape)), *shape)
    count = torch.Size(scales).numel()
    if count in (1, torch.Size(stack).numel()):
        grid, kind, block = (1, 1), "a scale for each tensor", (rows, columns)
    elif count == torch.Size(stack).numel() * rows:
        grid, kind, block = (rows, 1), "a scale for each channel", (1, columns)
    else:
        grid = (scales[-2], scales[-1]) if len(scales) >= 2 else (0, 0)
        expected = (-(-rows // block[0]), -(-columns // block[1]))
        if grid != expected and 0 not in grid and rows % grid[0] == 0 and columns % grid[1] == 0:
            block, expected = (rows // grid[0], columns // grid[1]), grid
        if grid != expected or list(scales[:-2]) != stack:
            raise ValueError(
                f"{where}: {scale} of shape {list(scales)} does not fit {name} of shape {list(shape)} in blocks of {block[0]} "
                f"x {block[1]} (weight_block_size in config.json)"
            )
        kind = f"blocks of {block[0]} x {block[1]}"
    whole = (1, 1) if count == 1 else (*stack, *grid)

    def decode(parts: dict[str, Tensor]) -> Tensor:
        return decode_scaled(parts["weight"], parts["scale"].reshape(whole), block).reshape(shape)

    return Packed(shape=shape, parts={"weight": name, "scale": scale}, decode=decode), kind


def _mxfp4(where: str, stored: Mapping[str, TensorInfo]) -> tuple[str, dict[str, Packed]]:
    weights = {}
    for blocks, info in stored.items():
        if not blocks.endswith("_blocks"):
            continue
        name = blocks.removesuffix("_blocks")
        scales = stored.get(f"{name}_scales")
        if len(info.shape) != 4 or info.shape[3] != 16 or scales is None or scales.shape != info.shape[:3]:
            raise ValueError(
                f"{where}: {blocks} of shape {list(info.shape)} and {name}_scales are not MXFP4 experts as in gpt-oss, "
                "[experts, out, groups, 16] and [experts, out, groups]; fetch them again"
            )
        experts, out, groups, _ = info.shape
        weights[name] = Packed(
            shape=(experts, groups * 32, out),
            parts={"blocks": blocks, "scales": f"{name}_scales"},
            decode=lambda parts: decode_mxfp4(parts["blocks"], parts["scales"]),
        )
    return "mxfp4", weights


def _library(where: str, source: Source, given: dict[str, Any]) -> tuple[str, dict[str, Packed]]:
    """Weights by the description that `checks` reads, as for `export.QuantizedSource`, but without inputs and outputs."""
    stored = {name: info for name, info in source.stored.items() if not _RUN_TIME.search(name)}
    if given.get("config_groups") == {} and not any(name.endswith(".weight_scale") for name in stored):
        return "compressed-tensors, a cache alone", {}
    groups = given.get("config_groups")
    if isinstance(groups, dict):
        floats = {"input_activations": None, "output_activations": None}
        given = given | {"config_groups": {key: _updated(group, floats) for key, group in groups.items()}}
    modules = library_modules(source.folder, given, stored, lambda name: source.read_stored([name])[name])
    check_headers(source.folder, stored, modules, {}, "")
    weights = {
        module.tensor: Packed(
            shape=module.shape,
            parts={part: f"{name}.{part}" for part in LIBRARY_PARTS if f"{name}.{part}" in stored},
            decode=partial(_decompressed, where=where, module=module),
        )
        for name, module in modules.items()
    }
    formats = {str(getattr(module.library.format, "value", module.library.format)) for module in modules.values()}
    return f"compressed-tensors, {' and '.join(sorted(formats))}", weights


def _updated(group: Any, values: dict[str, Any]) -> Any:
    return group | values if isinstance(group, dict) else group


def _decompressed(parts: dict[str, Tensor], where: str, module: Module) -> Tensor:
    for problem in problems_of_values(module, parts):
        raise ValueError(f"{where}: {problem}; {REMEDY}")
    return decompress(parts, module.library)
