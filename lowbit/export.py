"""Writing and reading quantized checkpoints.

Two formats. "compressed-tensors" is what vLLM and transformers read: the layout, the packing and the configuration schema are
those of the compressed-tensors library. "lowbit" holds whatever lowbit can express (docs/format.md); its shards are named
lowbit-*.safetensors, so that no other program takes them for ordinary weights.

`encode` turns one quantized linear into the tensors of a shard. `QuantizedSource` is the way back: a `Source` that shows a
quantized checkpoint under its original tensor names and dequantizes as it reads, with the library's own decompression rather
than the code that wrote it. So everything that runs on a float checkpoint (loading, evaluation, the gate after saving) runs on
a quantized one.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.adapter import merged, read_adapter
from lowbit.arch import Arch, Linear, Site, Tap, addresses
from lowbit.dequantize import decompress, library_scheme, library_shape, quantization_of, without_quantization
from lowbit.formats import FP4_E2M1, FP6_E2M3, FP8_E4M3
from lowbit.kv import CacheSpec, simulate_cache
from lowbit.packing import pack, unpack
from lowbit.qtensor import (
    CHANNEL,
    ENGINE_RULES,
    TENSOR,
    PointScheme,
    QTensor,
    Scheme,
    Spec,
    dequantize,
    largest_of,
    outer_scale,
    spec_from_dict,
)
from lowbit.source import FLOAT_DTYPES, STEM, Source, TensorInfo, open_source, read_json
from lowbit.unit import Input, Quantizer, Static, quantized_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NATIVE = "lowbit"
NATIVE_FILE = "lowbit.json"
_NATIVE_VERSION = 3
_PARTS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
)
_E4M3 = torch.float8_e4m3fn
_NEED_WEIGHTS = ("falcon", "mamba", "mamba2")  # models whose code in transformers reads the weights of some linears itself
# vLLM stacks these linears into one matrix, which has one scheme.
_STACKED_IN_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


# ------------------------------------------------------------------------------------------------------- what engines load


def reason_against(scheme: Scheme, engine: str) -> str | None:
    """Why `engine` cannot load a compressed-tensors checkpoint of this scheme; None if it can.

    "vllm" is vLLM on a GPU. On a CPU it lacks kernels for weight-only 8 bits and for FP8 with one scale a tensor.
    """
    if _library_format(scheme) is None:
        return _reason_for_no_layout(scheme)
    if engine == "transformers":
        return None
    weight, inputs = scheme.weight, scheme.input
    integer = weight.format.kind == "int"
    if _library_format(scheme) == "mxfp6-pack-quantized":
        return "vLLM has no kernel for 6-bit floats"
    if integer and weight.format.bits not in (4, 8):
        return f"vLLM has no kernel for {weight.format.bits}-bit weights, only for 4 and 8 bits"
    if integer and inputs is not None and (inputs.format.bits != 8 or inputs.group not in (CHANNEL, TENSOR)):
        return "vLLM runs integer inputs only with 8 bits and one scale a token or a tensor"
    if integer and weight.format.bits == 8 and inputs is not None and weight.group not in (CHANNEL, TENSOR):
        return "vLLM runs 8-bit weights with 8-bit inputs only with one scale a channel or a tensor"
    if integer and weight.format.bits == 4 and inputs is not None and not (inputs.dynamic and inputs.symmetric):
        return "vLLM runs 4-bit weights with 8-bit inputs only with symmetric scales for each token"
    if weight.format == FP8_E4M3 and weight.scale == "float" and weight.rows == 1 and weight.group not in (CHANNEL, TENSOR):
        return "vLLM runs FP8 weights only with one scale a channel, a tensor, or a block of 128 x 128"
    return None


def _reason_for_no_layout(scheme: Scheme) -> str:
    """What of the scheme compressed-tensors cannot hold."""
    weight, inputs = scheme.weight, scheme.input
    if weight.format.kind == "int" and not weight.symmetric and (inputs is not None or weight.group == TENSOR):
        return "zero points with quantized inputs, or with one scale a tensor, have no layout; use -sym"
    if weight.format.kind == "int" and weight.group == TENSOR:
        return "one integer scale for a whole tensor has no packed layout; use -channel or a group"
    if inputs is not None and inputs.scale == "e8m0" and inputs.rule != ENGINE_RULES.get(inputs.format.name, inputs.rule):
        return f"engines choose the powers of two of these inputs by {ENGINE_RULES[inputs.format.name]}, not by {inputs.rule}"
    return "compressed-tensors has no layout for it"


def _reason_of_transformers(linear: Linear, scheme: Scheme, model_type: str) -> str | None:
    """Why transformers (5.22) would not load this linear, or compute something else from it; measured over tests/tiny.py."""
    weight, layout = scheme.weight, _library_format(scheme)
    if model_type in _NEED_WEIGHTS and layout is not None and "pack" in layout:
        return f"its code for {model_type} reads weights that packed checkpoints do not have; use w8a8 or fp8"
    if linear.index is None or linear.stacked:
        return None
    if scheme.input is not None:
        return "it leaves the inputs of fused experts float; use float inputs (a16)"
    if not weight.symmetric or weight.scale == "e4m3" or layout == "mxfp8-quantized":
        return "it cannot unpack this format into fused experts; use symmetric integers, fp8a16 or mxfp4a16"
    return None


def check_export(format: str, engine: str, linears: Iterable[Linear], schemes: dict[str, Scheme], model_type: str = "") -> None:
    """Refuse, before any work, what the chosen engine would not load.

    Args:
        model_type: as the model's config names it.

    Raises:
        ValueError: with the reason and what to do.
    """
    if format == NATIVE:
        return
    remedy = "write lowbit's own format with --format lowbit"
    for scheme in {scheme.name: scheme for scheme in schemes.values()}.values():
        reason = reason_against(scheme, engine)
        if reason is not None:
            other = "" if engine != "vllm" or reason_against(scheme, "transformers") else ", --engine transformers"
            raise ValueError(f"scheme {scheme.name} cannot be exported for {engine}: {reason}{other}; or {remedy}")
    for linear in linears:
        if linear.name not in schemes:
            continue
        if linear.stacked:
            raise ValueError(
                f"{linear.tensor} holds all experts of a layer, and neither vLLM nor transformers loads quantized experts of "
                f"{model_type or 'this model'} from compressed-tensors; leave them float with --ignore '.*experts.*', or "
                f"{remedy}"
            )
        if linear.transposed:
            raise ValueError(f"{linear.name} is stored as [in, out] (Conv1D), which compressed-tensors does not know; {remedy}")
        reason = _reason_of_transformers(linear, schemes[linear.name], model_type) if engine == "transformers" else None
        if reason is not None:
            raise ValueError(f"{linear.name} cannot be exported for transformers: {reason}; or {remedy}")
    if engine == "vllm":
        _check_stacks(linears, schemes, remedy)


def _check_stacks(linears: Iterable[Linear], schemes: dict[str, Scheme], remedy: str) -> None:
    names = {linear.name for linear in linears}
    for stack in _STACKED_IN_VLLM:
        for name in names:
            path, _, leaf = name.rpartition(".")
            first = f"{path}.{stack[0]}"
            if leaf in stack[1:] and first in names and _kind(schemes.get(name)) != _kind(schemes.get(first)):
                raise ValueError(
                    f"{first} and {name} have different schemes, but vLLM keeps them in one matrix; give them one scheme, "
                    f"--engine transformers, or {remedy}"
                )


def _kind(scheme: Scheme | None) -> tuple[Spec, Spec | None] | None:
    """A scheme without its name."""
    return None if scheme is None else (scheme.weight, scheme.input)


# ---------------------------------------------------------------------------------------------------------------- writing


def encode(name: str, q: QTensor, scheme: Scheme, format: str, inputs: Input | None = None) -> dict[str, Tensor]:
    """The shard's tensors of one quantized linear, by full name; `inputs` where its input is quantized."""
    if format == NATIVE:
        return _encode_native(name, q, inputs)
    from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    layout, fmt = _library_format(scheme), q.spec.format
    scale = q.scale.reshape(1) if q.spec.group == TENSOR else q.scale
    tensors = {f"{name}.weight_scale": scale.view(torch.uint8) if q.spec.scale == "e8m0" else scale}
    if layout == "pack-quantized":
        tensors[f"{name}.weight_packed"] = pack_to_int32(q.codes, fmt.bits)
        tensors[f"{name}.weight_shape"] = torch.tensor(q.codes.shape)
        if q.zero is not None:
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(q.zero, fmt.bits, packed_dim=0).contiguous()
    elif fmt == FP4_E2M1:
        tensors[f"{name}.weight_packed"] = pack_fp4_to_uint8(fmt.decode(q.codes))
        if q.outer is not None:
            tensors[f"{name}.weight_global_scale"] = 1 / q.outer.reshape(1)
    elif fmt == FP6_E2M3:
        tensors[f"{name}.weight_packed"] = pack_fp6_to_uint8(fmt.decode(q.codes))
    else:
        tensors[f"{name}.weight"] = q.codes if fmt.kind == "int" else q.codes.view(torch.float8_e4m3fn)
    if inputs is not None and inputs.largest is not None:
        tensors |= _library_input(name, inputs, q)
    return tensors


def _library_input(name: str, inputs: Input, q: QTensor) -> dict[str, Tensor]:
    """What a compressed-tensors checkpoint keeps of a calibrated input."""
    assert inputs.largest is not None
    assert inputs.spec is not None
    if inputs.spec.scale == "e4m3":
        return {f"{name}.input_global_scale": 1 / outer_scale(inputs.largest, inputs.spec).reshape(1)}
    return {f"{name}.input_scale": torch.tensor([inputs.largest / inputs.spec.format.max], dtype=q.scale.dtype)}


def _library_format(scheme: Scheme) -> str | None:
    """The compressed-tensors layout of a scheme, None if there is none."""
    weight, inputs = scheme.weight, scheme.input
    if inputs is not None and _kind_of_input(inputs) is None:
        return None
    fmt = weight.format
    if weight.scale == "e8m0":
        known = {FP4_E2M1: "mxfp4-pack-quantized", FP6_E2M3: "mxfp6-pack-quantized", FP8_E4M3: "mxfp8-quantized"}
        return known.get(fmt) if weight.group == 32 and weight.rows == 1 else None
    if weight.scale == "e4m3":
        return "nvfp4-pack-quantized" if weight.group == 16 else None
    if weight.scale != "float" or (weight.rows, weight.group) not in ((1, weight.group), (128, 128)):
        return None
    if fmt.kind == "float":
        return "float-quantized" if fmt == FP8_E4M3 else None
    if fmt.kind != "int" or weight.rows != 1:
        return None
    if inputs is None or fmt.bits < 8:
        if weight.group == TENSOR or (inputs is not None and not weight.symmetric):
            return None
        return "pack-quantized"
    return "int-quantized" if weight.symmetric else None


def _kind_of_input(spec: Spec) -> str | None:
    """How the compressed-tensors schema names this way to quantize inputs, None if it does not."""
    if spec.scale == "e4m3":
        return "nvfp4" if spec.group == 16 else None
    if spec.scale == "e8m0":
        known = (FP4_E2M1, FP6_E2M3, FP8_E4M3)
        return "mx" if spec.group == 32 and spec.format in known and spec.rule == ENGINE_RULES[spec.format.name] else None
    if spec.format.kind == "float" and spec.format != FP8_E4M3:
        return None
    return "plain"


def _encode_native(name: str, q: QTensor, inputs: Input | None) -> dict[str, Tensor]:
    bits = q.spec.format.bits
    offset = 2 ** (bits - 1) if q.spec.format.kind == "int" else 0
    tensors = {f"{name}.codes": pack(q.codes.to(torch.int16) + offset, bits)}
    tensors[f"{name}.scale"] = q.scale.view(torch.uint8) if q.spec.scale in ("e8m0", "e4m3") else q.scale
    if q.zero is not None:
        tensors[f"{name}.zero"] = q.zero
    if q.outer is not None:
        tensors[f"{name}.outer"] = q.outer
    if inputs is not None and inputs.largest is not None:
        tensors[f"{name}.input_largest"] = torch.tensor([inputs.largest], dtype=torch.float32)
    return tensors


def encode_static(name: str, static: Static) -> dict[str, Tensor]:
    """The shard's tensors of a quantized point."""
    tensors = {f"{name}.largest": static.largest}
    if len(static.largest) > 1:
        tensors[f"{name}.labels"] = static.labels.to(torch.int32)
    return tensors


def _decode_native(name: str, tensors: dict[str, Tensor], spec: Spec, columns: int) -> QTensor:
    bits = spec.format.bits
    codes = unpack(tensors[f"{name}.codes"], bits, columns)
    if spec.format.kind == "int":
        codes = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    scale = tensors[f"{name}.scale"]
    if spec.scale in ("e8m0", "e4m3"):
        scale = scale.view(torch.float8_e8m0fnu if spec.scale == "e8m0" else torch.float8_e4m3fn)
    return QTensor(codes, scale, tensors.get(f"{name}.zero"), spec, tensors.get(f"{name}.outer"))


def _decode_library(name: str, tensors: dict[str, Tensor], spec: Spec, shape: tuple[int, int]) -> QTensor:
    """The inverse of `encode` for compressed-tensors; also of what the library itself writes."""
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed, plain, scale = (tensors.get(f"{name}.{part}") for part in ("weight_packed", "weight", "weight_scale"))
    zero, divisor = (tensors.get(f"{name}.{part}") for part in ("weight_zero_point", "weight_global_scale"))
    fmt = spec.format
    assert scale is not None
    if plain is not None:
        codes = plain if fmt.kind == "int" else plain.view(torch.uint8)
    elif fmt.kind == "int":
        assert packed is not None
        codes = unpack_from_int32(packed, fmt.bits, torch.Size(shape))
        if zero is not None:
            zero = unpack_from_int32(zero, fmt.bits, torch.Size((shape[0], scale.shape[-1])), packed_dim=0).contiguous()
    else:
        assert packed is not None
        values = (unpack_fp4_from_uint8 if fmt == FP4_E2M1 else unpack_fp6_from_uint8)(packed, *shape, dtype=torch.float32)
        codes = fmt.encode(values)
    scale = scale.view(torch.float8_e8m0fnu) if spec.scale == "e8m0" else scale
    scale = scale.reshape(-1, 1) if spec.rows == 1 and spec.group in (CHANNEL, TENSOR) else scale
    zero = zero.reshape(scale.shape) if zero is not None and not spec.symmetric else None
    return QTensor(codes, scale, zero, spec, None if divisor is None else 1 / divisor.reshape(1, 1))


def write_config(
    folder: Path,
    arch: Arch,
    linears: Iterable[Linear],
    schemes: dict[str, Scheme],
    format: str,
    *,
    kv_cache: bool = False,
    points: dict[str, PointScheme] | None = None,
    turned: Iterable[str] = (),
) -> list[str]:
    """Write config.json (and lowbit.json) of a quantized checkpoint into `folder`; returns the names written.

    kv_cache: the checkpoint holds scales of an FP8 key-value cache.
    points: schemes of points, by name. turned: names of linears whose inputs are multiplied by a Hadamard matrix.
    """
    described = read_json(arch.source.folder / "config.json", "the model's configuration")
    original = without_quantization(described) | arch.source.overrides
    if format == NATIVE:
        dtype = str(arch.source.dtype()).removeprefix("torch.")
        table = {
            linear.name: {
                "tensor": linear.tensor,
                "index": linear.index if linear.stacked else None,
                "transposed": linear.transposed,
                "shape": [linear.out_features, linear.in_features],
                "scheme": schemes[linear.name].name,
                "weight": schemes[linear.name].weight.to_dict(),
                "input": spec.to_dict() if (spec := schemes[linear.name].input) else None,
                "turned": linear.name in turned,
            }
            for linear in linears
            if linear.name in schemes
        }
        config = original | {"quantization_config": {"quant_method": NATIVE}}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        of_points = {
            point.name: {
                "tensor": point.tensor,
                "shape": list(arch.source.tensors[point.tensor].shape) if point.tensor else [point.sets, point.inner],
                "scheme": scheme.name,
                "spec": scheme.spec.to_dict(),
            }
            for block in arch.blocks
            for point in block.points
            if (scheme := (points or {}).get(point.name)) is not None
        }
        (folder / NATIVE_FILE).write_text(
            json.dumps(
                {"format": NATIVE, "version": _NATIVE_VERSION, "dtype": dtype, "linears": table, "points": of_points}, indent=1
            )
            + "\n"
        )
        return ["config.json", NATIVE_FILE]
    config = original | {"quantization_config": library_config(arch, schemes, kv_cache=kv_cache)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ["config.json"]


def library_config(arch: Arch, schemes: dict[str, Scheme], *, kv_cache: bool = False) -> dict[str, Any]:
    """The quantization_config of a compressed-tensors checkpoint."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    distinct = {scheme.name: scheme for scheme in schemes.values()}
    # For vLLM a head is no Linear and wants its name; other programs know it by either.
    heads = [linear.name for linear in (arch.head.linears if arch.head is not None else ()) if linear.name in schemes]
    groups = {}
    for i, scheme in enumerate(distinct.values()):
        names = [name for name in schemes if schemes[name] == scheme]
        groups[f"group_{i}"] = QuantizationScheme(
            targets=["Linear", *heads] if len(distinct) == 1 else _patterns(names, schemes),
            weights=_library_args(scheme.weight),
            input_activations=_library_args(scheme.input) if scheme.input is not None else None,
            format=_library_format(scheme),
        )
    formats = {_library_format(scheme) for scheme in distinct.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=_float_linears(arch, schemes),
        kv_cache_scheme=_library_args(Spec(format=FP8_E4M3, group=TENSOR)) if kv_cache else None,
    )
    return json.loads(json.dumps(config.model_dump(mode="json", exclude_none=True)))


def _library_args(spec: Spec) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    chosen: dict[str, Any] = {"strategy": "group", "group_size": spec.group}
    if spec.scale == "e4m3":
        chosen = {"strategy": "tensor_group", "group_size": spec.group, "scale_dtype": _E4M3, "zp_dtype": _E4M3}
        chosen["dynamic"] = "local" if spec.dynamic else False
    elif spec.scale == "e8m0":
        chosen |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    elif spec.rows > 1:
        chosen = {"strategy": "block", "block_structure": [spec.rows, spec.group]}
    elif spec.group == TENSOR:
        chosen = {"strategy": "tensor"}
    elif spec.group == CHANNEL:
        chosen = {"strategy": "token" if spec.dynamic else "channel"}
    given = {
        "num_bits": spec.format.bits,
        "type": spec.format.kind,
        "symmetric": spec.symmetric,
        "dynamic": spec.dynamic,
        "observer": None,
    }
    return QuantizationArgs(**given | chosen)


def _patterns(names: list[str], schemes: dict[str, Scheme]) -> list[str]:
    """Targets for exactly these names: one expression where a whole family (all layers) has the scheme, names elsewhere."""
    scheme = schemes[names[0]]
    mixed = {_family(name) for name in schemes if schemes[name] != scheme}
    targets = [name if _family(name) in mixed else f"re:{_family(name)}$" for name in names]
    return list(dict.fromkeys(targets))


def _family(name: str) -> str:
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))


def _float_linears(arch: Arch, schemes: dict[str, Scheme]) -> list[str]:
    """Every linear module that stays float, under the checkpoint's name and, where it differs, the model's."""
    quantized = {arch.site(f"{name}.weight")[0] for name in schemes if f"{name}.weight" in arch.source.tensors}
    names = []
    for name, module in arch.model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" not in quantized:
            names.append(name)
    for block in arch.blocks:
        names += [name for name, _ in block.skipped if f"{name}.weight" in arch.source.tensors]
        names += [linear.name for linear in block.linears if linear.name not in schemes and not linear.stacked]
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class _Module:
    """How one quantized linear of a checkpoint is read back."""

    name: str
    tensor: str
    index: int | None
    transposed: bool
    shape: tuple[int, int]
    scheme: Scheme
    library: Any = None  # the library's scheme
    turned: bool = False


class QuantizedSource(Source):
    """A quantized checkpoint, shown as the float checkpoint it came from.

    `tensors` has the original names and shapes; `read` dequantizes, rounding once to the dtype of the scales.

    Attributes:
        modules: the quantized linears by name.
        corrections: their low-rank corrections, which `read` has added.
        parameters: names of quantized parameters among the points, by the source's tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.native = (folder / NATIVE_FILE).exists()
        super().__init__(folder, NATIVE if self.native else STEM)
        self.corrections = read_adapter(folder)
        self.modules = self._native_modules() if self.native else self._library_modules()
        self._by_tensor: dict[str, list[_Module]] = {}
        for module in self.modules.values():
            self._by_tensor.setdefault(module.tensor, []).append(module)
        parts = {part for module in self.modules.values() for part in self._parts(module)}
        self._points = self._described()["points"] if self.native else {}
        parts |= {f"{name}.{part}" for name in self._points for part in ("codes", "scale", "largest", "labels")}
        self.tensors = {name: info for name, info in self.stored.items() if name not in parts}
        floats = [info.dtype for info in self.tensors.values() if info.dtype in FLOAT_DTYPES]
        # Scales of 8 bits do not tell the dtype of the source.
        rest = self._native_dtype() if self.native else max(floats, key=floats.count, default="BF16")
        for tensor, modules in self._by_tensor.items():
            scale = self.stored[modules[0].name + (".scale" if self.native else ".weight_scale")]
            dtype = scale.dtype if scale.dtype in FLOAT_DTYPES and not self.native else rest
            out, inner = modules[0].shape
            shape: tuple[int, ...] = (inner, out) if modules[0].transposed else (out, inner)
            shape = shape if modules[0].index is None else (len(modules), *shape)
            self.tensors[tensor] = TensorInfo(scale.shard, shape, dtype)
        self.parameters = {entry["tensor"]: name for name, entry in self._points.items() if entry["tensor"]}
        for tensor, name in self.parameters.items():
            shape = tuple(self._points[name]["shape"])
            self.tensors[tensor] = TensorInfo(self.stored[f"{name}.codes"].shard, shape, "F32")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named original tensors, dequantized where they are quantized."""
        out = self.read_stored([name for name in names if name not in self._by_tensor and name not in self.parameters])
        for name in names:
            if name in self.parameters:
                out[name] = self._parameter(self.parameters[name])
            if name in self._by_tensor:
                modules = sorted(self._by_tensor[name], key=lambda module: module.index or 0)
                matrices = [self._dequantized(module) for module in modules]
                matrices = [m.T if module.transposed else m for m, module in zip(matrices, modules, strict=True)]
                out[name] = matrices[0] if modules[0].index is None else torch.stack(matrices)
        return out

    def quantized(self, name: str, device: str | torch.device = "cpu") -> QTensor:
        """The codes and scales of a quantized linear, unpacked on `device`, without its low-rank correction."""
        module = self.modules[name]
        tensors = {part: tensor.to(device) for part, tensor in self.read_stored(self._parts(module)).items()}
        if self.native:
            return _decode_native(name, tensors, module.scheme.weight, module.shape[1])
        return _decode_library(name, tensors, module.scheme.weight, module.shape)

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear."""
        return {name: module.scheme for name, module in self.modules.items()}

    def points(self) -> dict[str, Static]:
        """How each quantized activation among the points of scans is quantized."""
        found = {}
        for name, entry in self._points.items():
            if entry["tensor"] is None:
                parts = [f"{name}.{part}" for part in ("largest", "labels") if f"{name}.{part}" in self.stored]
                read = self.read_stored(parts)
                labels = read.get(f"{name}.labels", torch.zeros(entry["shape"][0])).long()
                found[name] = Static(spec=spec_from_dict(entry["spec"]), largest=read[f"{name}.largest"], labels=labels)
        return found

    def _parameter(self, name: str) -> Tensor:
        """A quantized parameter among the points, dequantized, in the shape that the source has."""
        entry = self._points[name]
        shape = entry["shape"]
        read = self.read_stored([f"{name}.codes", f"{name}.scale"])
        columns = torch.Size(shape[1:] if len(shape) > 1 else shape).numel()
        return dequantize(_decode_native(name, read, spec_from_dict(entry["spec"]), columns)).view(shape)

    def inputs(self) -> dict[str, Input]:
        """How the input of each quantized linear is quantized, or turned; absent where it stays as it is."""
        found = {}
        for name, module in self.modules.items():
            spec = module.scheme.input
            if spec is None:
                if module.turned:
                    found[name] = Input(None, turned=True)
                continue
            largest = None
            if self.native and f"{name}.input_largest" in self.stored:
                largest = float(self.read_stored([f"{name}.input_largest"])[f"{name}.input_largest"])
            elif f"{name}.input_scale" in self.stored:
                largest = float(self.read_stored([f"{name}.input_scale"])[f"{name}.input_scale"]) * spec.format.max
            elif f"{name}.input_global_scale" in self.stored:
                # the largest magnitude for which `outer_scale` gives this scale
                given = float(self.read_stored([f"{name}.input_global_scale"])[f"{name}.input_global_scale"])
                largest = largest_of(1 / given, spec)
            found[name] = Input(spec, largest, turned=module.turned)
        return found

    def cache_scales(self) -> dict[str, tuple[float, float]]:
        """Scales of keys and values of an FP8 key-value cache, by attention module."""
        modules = [name.removesuffix(".k_scale") for name in self.stored if name.endswith(".k_scale")]
        read = self.read_stored([f"{module}.{part}" for module in modules for part in ("k_scale", "v_scale")])
        return {module: (float(read[f"{module}.k_scale"]), float(read[f"{module}.v_scale"])) for module in modules}

    def bits_per_weight(self, name: str) -> float:
        """Stored bits for each weight of a quantized linear."""
        module = self.modules[name]
        stored = sum(self.stored[part].nbytes for part in self._parts(module))
        stored += sum(part.nbytes for part in self.corrections.get(name, ()))
        return stored * 8 / (module.shape[0] * module.shape[1])

    def _parts(self, module: _Module) -> list[str]:
        if self.native:
            candidates = [f"{module.name}.{part}" for part in ("codes", "scale", "zero", "outer", "input_largest")]
        else:
            candidates = [f"{module.name}.{part}" for part in ("weight", *_PARTS)]
        return [name for name in candidates if name in self.stored]

    def _dequantized(self, module: _Module) -> Tensor:
        w = self._uncorrected(module)
        return merged(w, self.corrections[module.name]) if module.name in self.corrections else w

    def _uncorrected(self, module: _Module) -> Tensor:
        dtype = FLOAT_DTYPES[self.tensors[module.tensor].dtype]
        if self.native:
            return dequantize(self.quantized(module.name), dtype)
        tensors = self.read_stored(self._parts(module))
        local = {name.removeprefix(module.name + "."): tensor for name, tensor in tensors.items()}
        return decompress(local, module.library).to(dtype)

    def _described(self) -> dict[str, Any]:
        return read_json(self.folder / NATIVE_FILE, "the description of a checkpoint in lowbit's own format")

    def _native_dtype(self) -> str:
        """The dtype of the dequantized matrices, as safetensors spells it."""
        name = self._described()["dtype"]
        return next(key for key, dtype in FLOAT_DTYPES.items() if str(dtype) == f"torch.{name}")

    def _native_modules(self) -> dict[str, _Module]:
        described = self._described()
        if described.get("version") != _NATIVE_VERSION:
            raise ValueError(
                f"{self.folder / NATIVE_FILE} has version {described.get('version')}; this lowbit reads version "
                f"{_NATIVE_VERSION}"
            )
        return {
            name: _Module(
                name=name,
                tensor=entry["tensor"],
                index=entry["index"],
                transposed=entry["transposed"],
                shape=(entry["shape"][0], entry["shape"][1]),
                scheme=Scheme(
                    name=entry["scheme"],
                    weight=spec_from_dict(entry["weight"]),
                    input=spec_from_dict(entry["input"]) if entry["input"] else None,
                ),
                turned=entry["turned"],
            )
            for name, entry in described["linears"].items()
        }

    def _library_modules(self) -> dict[str, _Module]:
        from compressed_tensors.quantization import QuantizationConfig

        given = quantization_of(self.config) or {}
        if given.get("quant_method") != "compressed-tensors":
            raise ValueError(
                f"{self.folder}: quantization method {given.get('quant_method')!r} is not read by lowbit, only "
                "compressed-tensors and lowbit's own format"
            )
        config = QuantizationConfig.model_validate(given)
        modules = {}
        for scale in self.stored:
            if not scale.endswith(".weight_scale"):
                continue
            name = scale.removesuffix(".weight_scale")
            library = library_scheme(name, config)
            shape = library_shape(name, library, self.stored, self.read_stored)
            modules[name] = _Module(
                name=name,
                tensor=f"{name}.weight",
                index=None,
                transposed=False,
                shape=shape,
                scheme=_scheme_of(library),
                library=library,
            )
        return modules


def _scheme_of(library: Any) -> Scheme:
    """Our scheme of the library's; the name only tells the bits."""
    weight = _spec_of(library.weights)
    inputs = _spec_of(library.input_activations) if library.input_activations is not None else None
    bits = (weight.format.name, inputs.format.name if inputs else "float")
    return Scheme(name="/".join(bits), weight=weight, input=inputs)


def _spec_of(args: Any) -> Spec:
    strategy, floats = str(args.strategy), {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
    rows, group = 1, {"tensor": TENSOR, "channel": CHANNEL, "token": CHANNEL}.get(strategy, args.group_size)
    if strategy == "block":
        rows, group = args.block_structure
    scale = "e4m3" if strategy == "tensor_group" else "e8m0" if args.scale_dtype == torch.uint8 else "float"
    name = f"int{args.num_bits}" if args.type == "int" else floats[args.num_bits]
    return spec_from_dict(
        {
            "format": name,
            "group": group,
            "rows": rows,
            "symmetric": args.symmetric,
            "dynamic": bool(args.dynamic),
            "scale": scale,
            "rule": ENGINE_RULES[name] if scale == "e8m0" and args.dynamic else "floor",
        }
    )


def open_checkpoint(model: str, revision: str | None = None) -> Source:
    """Open a float checkpoint (folder or hub id) or a quantized one: as a `QuantizedSource` in both formats that lowbit
    writes, dequantized as it is read (see `source.open_source`) in those of others."""
    folder = Path(model).expanduser()
    if (folder / NATIVE_FILE).exists() or _of_library(folder):
        return QuantizedSource(folder)
    source = open_source(model, revision)
    return QuantizedSource(source.folder) if _of_library(source.folder) else source


def _of_library(folder: Path) -> bool:
    """Whether a folder is a compressed-tensors checkpoint."""
    if not (folder / "config.json").exists():
        return False
    found = quantization_of(read_json(folder / "config.json", "the model's configuration"))
    return found is not None and found.get("quant_method") == "compressed-tensors"


def quantized_sites(arch: Arch, source: QuantizedSource) -> dict[Site, Quantizer]:
    """Where the model quantizes inputs and points, and how."""
    modules = source.modules
    found: dict[Site, Quantizer] = {
        arch.site(modules[name].tensor, modules[name].index): given for name, given in source.inputs().items()
    }
    points = source.points()
    sites = {point.name: point.site for block in arch.blocks for point in block.points}
    return found | {sites[name]: static for name, static in points.items()}


def load(
    model: str, *, revision: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> "PreTrainedModel":
    """Load a checkpoint, quantized or not, as a transformers model with float weights.

    Quantized weights are dequantized; where the scheme quantizes inputs, every forward does so too, exactly as the report's
    figures were measured, and where there are scales of a key-value cache, attention goes through one. This is the reference
    for accuracy, not for speed or memory: engines load the folder itself.

    Args:
        model: a folder written by `quantize` (compressed-tensors or lowbit format), another compressed-tensors folder, a
            float checkpoint or a hub id.
        dtype: of the parameters; the checkpoint's own by default.

    Raises:
        ValueError: the folder is incomplete or in a format lowbit does not read.
    """
    source = open_checkpoint(model, revision)
    arch = Arch(source, dtype or source.dtype())
    loaded: Any = arch.fill()
    loaded.to(device)
    restore_generation(loaded, source.folder)
    if isinstance(source, QuantizedSource):
        inputs = quantized_sites(arch, source)
        if source.points():
            arch.use_points()
        if inputs:
            quantize_inputs(loaded, inputs)
        for module, scales in source.cache_scales().items():
            simulate_cache(loaded.get_submodule(module), CacheSpec(name="fp8", format=FP8_E4M3), scales)
    return loaded


def restore_generation(model: Any, folder: Path) -> None:
    """Give a model the generation settings of its checkpoint, where it has any."""
    if (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)


def quantize_inputs(model: Any, inputs: dict[Site, Quantizer]) -> None:
    """Make every forward of the model quantize the inputs at the given sites."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with Tap(quantized_inputs(addresses(model), inputs)):
            return original(*args, **kwargs)

    model.forward = forward
