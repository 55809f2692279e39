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
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.adapter import merged, read_adapter
from lowbit.arch import Arch, Linear, Site, Tap, addresses, generation_of
from lowbit.arguments import checked, parse_device
from lowbit.checks import (
    LIBRARY_PARTS,
    NATIVE,
    NATIVE_FILE,
    NATIVE_PARTS,
    NATIVE_VERSION,
    POINT_PARTS,
    REMEDY,
    Module,
    StoredPoint,
    check_corrections,
    check_headers,
    check_small_files,
    library_modules,
    positive,
    problems_of_point,
    problems_of_values,
    read_description,
)
from lowbit.dequantize import decompress, quantization_of, without_quantization
from lowbit.files import write_json, write_text
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
    validate,
)
from lowbit.source import FLOAT_DTYPES, STEM, Source, TensorInfo, index_name, open_source, read_json
from lowbit.unit import Input, Quantizer, Static, quantized_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_E4M3 = torch.float8_e4m3fn
_ROWS_IN_VLLM, _COLUMNS_IN_VLLM = 64, 32  # what its kernels want multiples of
_SMALL = 0.02  # of the weights of a block's linears
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


def check_loading(arch: Arch, format: str, engine: str, linears: Iterable[Linear], schemes: dict[str, Scheme]) -> None:
    """Refuse, before any work, what transformers' `from_pretrained` would not load of a compressed-tensors checkpoint.

    Raises:
        ValueError: the model's code, run here without them, reads weights that packed checkpoints do not have; or parameters
            are made of several tensors when the checkpoint is loaded.
    """
    if format == NATIVE or engine != "transformers":
        return
    remedy = "write lowbit's own format with --format lowbit"
    if arch.merged:
        raise ValueError(
            f"transformers makes one parameter of {', '.join(arch.merged[:3])} when it loads a float checkpoint, but not a "
            f"quantized one; use --engine vllm, or {remedy}"
        )
    packed = {
        linear.param.removesuffix(".weight")
        for linear in linears
        if linear.index is None and linear.name in schemes and "pack" in (_library_format(schemes[linear.name]) or "")
    }
    reader = _reader_of_weights(arch, packed)
    if reader is not None:
        raise ValueError(
            f"packed weights of this model cannot be exported for transformers: its code for {reader} reads weights that "
            f"packed checkpoints do not have; use w8a8 or fp8, --engine vllm, or {remedy}"
        )


def _reader_of_weights(arch: Arch, packed: set[str]) -> str | None:
    """The class of a module whose own code reads a weight of the linears `packed`, which a packed checkpoint lacks: when it is
    initialized, or in a forward that is not that of nn.Linear."""
    model: Any = deepcopy(arch.model)
    model = model.to("meta")
    for name in packed:
        if type(model.get_submodule(name)).forward is not nn.Linear.forward:
            return type(model.get_submodule(name)).__name__
        model.get_submodule(name)._parameters.pop("weight", None)
    for name, module in model.named_modules():
        if name in packed:
            continue
        try:
            with torch.random.fork_rng(devices=[]):
                model._init_weights(module)
        except AttributeError as error:
            if "'weight'" in str(error):
                return type(module).__name__
        except (RuntimeError, NotImplementedError, TypeError):  # what initializes from values has none here
            continue
    return None


def _reason_of_transformers(linear: Linear, scheme: Scheme) -> str | None:
    """Why transformers (5.22) would not load this linear, or compute something else from it; measured over tests/tiny.py."""
    weight, layout = scheme.weight, _library_format(scheme)
    if linear.index is None or linear.stacked:
        return None
    if scheme.input is not None:
        return "it leaves the inputs of fused experts float; use float inputs (a16)"
    if not weight.symmetric or weight.scale == "e4m3" or layout == "mxfp8-quantized":
        return "it cannot unpack this format into fused experts; use symmetric integers, fp8a16 or mxfp4a16"
    return None


def too_small(arch: Arch, engine: str) -> dict[str, str]:
    """Linears that an engine has no kernel for and that hardly count, with the reason to leave them float."""
    found: dict[str, str] = {}
    for block in arch.blocks if engine == "vllm" else ():
        total = sum(linear.out_features * linear.in_features for linear in block.linears)
        for linear in block.linears:
            odd = linear.out_features % _ROWS_IN_VLLM or linear.in_features % _COLUMNS_IN_VLLM
            # Of what vLLM stacks, the rows of all together count.
            stacked = any(linear.name.rpartition(".")[2] in stack for stack in _STACKED_IN_VLLM)
            if odd and not stacked and linear.out_features * linear.in_features <= _SMALL * total:
                shape = f"{linear.out_features} x {linear.in_features}"
                found[linear.name] = f"vLLM has no kernel for {shape}, no multiple of {_ROWS_IN_VLLM} x {_COLUMNS_IN_VLLM}"
    return found


def check_export(format: str, engine: str, linears: Iterable[Linear], schemes: dict[str, Scheme], model_type: str = "") -> None:
    """Refuse, before any work, what the chosen engine would not load.

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
        if linear.router and engine == "vllm":
            raise ValueError(f"{linear.name} chooses experts, and vLLM keeps such linears float; leave it float, or {remedy}")
        reason = _reason_of_transformers(linear, schemes[linear.name]) if engine == "transformers" else None
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
                "transposed": linear.stored_transposed,
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
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
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
        write_json(
            folder / NATIVE_FILE,
            {"format": NATIVE, "version": NATIVE_VERSION, "dtype": dtype, "linears": table, "points": of_points},
        )
        return ["config.json", NATIVE_FILE]
    config = original | {"quantization_config": library_config(arch, schemes, kv_cache=kv_cache)}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
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
        names += [linear.name for linear, _ in block.aside]
        names += [linear.name for linear in block.linears if linear.name not in schemes and not linear.stacked]
    # Further layers and heads for several tokens, which other programs may build.
    names += [name.removesuffix(".weight") for name in sorted(arch.unused) if len(arch.source.tensors[name].shape) >= 2]
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------------------------- reading


class QuantizedSource(Source):
    """A quantized checkpoint, shown as the float checkpoint it came from.

    `tensors` has the original names and shapes; `read` dequantizes, rounding once to the dtype of the scales.

    Attributes:
        modules: the quantized linears by name. by_tensor: the same by the source's tensors.
        corrections: their low-rank corrections, which `read` has added.
        parameters: names of quantized parameters among the points, by the source's tensors.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.native = (folder / NATIVE_FILE).exists()
        super().__init__(folder, NATIVE if self.native else STEM, trust_remote_code=trust_remote_code)
        self._points: dict[str, StoredPoint] = {}
        if self.native:
            described = read_description(folder)
            self.modules, self._points, rest = described.modules, described.points, described.dtype
        else:
            given = quantization_of(self.config)
            self.modules = library_modules(folder, given, self.stored, lambda name: self.read_stored([name])[name])
            rest = ""
        check_headers(folder, self.stored, self.modules, self._points, rest)
        self.corrections = read_adapter(folder)
        check_corrections(folder, self.corrections, self.modules)
        self.by_tensor: dict[str, list[Module]] = {}
        for module in self.modules.values():
            self.by_tensor.setdefault(module.tensor, []).append(module)
        parts = {part for module in self.modules.values() for part in self._parts(module)}
        parts |= {f"{name}.{part}" for name in self._points for part in POINT_PARTS}
        self.tensors = {name: info for name, info in self.stored.items() if name not in parts}
        floats = [info.dtype for info in self.tensors.values() if info.dtype in FLOAT_DTYPES]
        # Scales of 8 bits do not tell the dtype of the source.
        rest = rest or max(floats, key=floats.count, default="BF16")
        for tensor, modules in self.by_tensor.items():
            scale = self.stored[modules[0].name + (".scale" if self.native else ".weight_scale")]
            dtype = scale.dtype if scale.dtype in FLOAT_DTYPES and not self.native else rest
            out, inner = modules[0].shape
            shape: tuple[int, ...] = (inner, out) if modules[0].transposed else (out, inner)
            shape = shape if modules[0].index is None else (len(modules), *shape)
            self.tensors[tensor] = TensorInfo(scale.shard, shape, dtype)
        self.parameters = {point.tensor: name for name, point in self._points.items() if point.tensor is not None}
        for tensor, name in self.parameters.items():
            self.tensors[tensor] = TensorInfo(self.stored[f"{name}.codes"].shard, self._points[name].shape, "F32")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named original tensors, dequantized where they are quantized."""
        out = self.read_stored([name for name in names if name not in self.by_tensor and name not in self.parameters])
        for name in names:
            if name in self.parameters:
                out[name] = self._parameter(self.parameters[name])
            if name in self.by_tensor:
                modules = sorted(self.by_tensor[name], key=lambda module: module.index or 0)
                matrices = [self._dequantized(module) for module in modules]
                matrices = [m.T if module.transposed else m for m, module in zip(matrices, modules, strict=True)]
                out[name] = matrices[0] if modules[0].index is None else torch.stack(matrices)
        return out

    def quantized(self, name: str, device: str | torch.device = "cpu") -> QTensor:
        """The codes and scales of a quantized linear, unpacked on `device`, without its low-rank correction.

        Raises:
            ValueError: they are unreadable or not what they may be.
        """
        module = self.modules[name]
        tensors = {part: tensor.to(device) for part, tensor in self._checked(module).items()}
        if self.native:
            q = _decode_native(name, tensors, module.scheme.weight, module.shape[1])
        else:
            q = _decode_library(name, tensors, module.scheme.weight, module.shape)
        try:
            validate(q, name)
        except ValueError as error:
            raise ValueError(f"{self._shard_of(module)}: {error}; {REMEDY}") from error
        return q

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear."""
        return {name: module.scheme for name, module in self.modules.items()}

    def points(self) -> dict[str, Static]:
        """How each quantized activation among the points of scans is quantized."""
        found = {}
        for name, point in self._points.items():
            if point.tensor is None:
                read = self._checked_point(name)
                labels = read.get("labels", torch.zeros(point.shape[0])).long()
                found[name] = Static(spec=point.spec, largest=read["largest"], labels=labels)
        return found

    def _parameter(self, name: str) -> Tensor:
        """A quantized parameter among the points, dequantized, in the shape that the source has."""
        point = self._points[name]
        read = {f"{name}.{part}": tensor for part, tensor in self._checked_point(name).items()}
        columns = torch.Size(point.shape[1:] if len(point.shape) > 1 else point.shape).numel()
        return dequantize(_decode_native(name, read, point.spec, columns)).view(point.shape)

    def _checked_point(self, name: str) -> dict[str, Tensor]:
        """What is stored of a point, by the last words of the names."""
        read = self.read_stored([f"{name}.{part}" for part in POINT_PARTS if f"{name}.{part}" in self.stored])
        tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in read.items()}
        for problem in problems_of_point(name, tensors):
            raise ValueError(f"{self.folder}: {problem}; {REMEDY}")
        return tensors

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
            if module.calibrated:
                read = self._checked(module, ("input_largest", "input_scale", "input_global_scale"))
                part, value = next((name.rpartition(".")[2], float(tensor)) for name, tensor in read.items())
                if part == "input_largest":
                    largest = value
                elif part == "input_scale":
                    largest = value * spec.format.max
                else:  # the largest magnitude for which `outer_scale` gives this scale
                    largest = largest_of(1 / value, spec)
            found[name] = Input(spec, largest, turned=module.turned)
        return found

    def cache_scales(self) -> dict[str, tuple[float, float]]:
        """Scales of keys and values of an FP8 key-value cache, by attention module."""
        modules = [name.removesuffix(".k_scale") for name in self.stored if name.endswith(".k_scale")]
        read = self.read_stored([f"{module}.{part}" for module in modules for part in ("k_scale", "v_scale")])
        for name, tensor in read.items():
            if not positive(tensor):
                where = self.folder / self.stored[name].shard
                raise ValueError(f"{where}: {name} is {float(tensor)}, not a finite number above 0; {REMEDY}")
        return {module: (float(read[f"{module}.k_scale"]), float(read[f"{module}.v_scale"])) for module in modules}

    def bits_per_weight(self, name: str) -> float:
        """Stored bits for each weight of a quantized linear."""
        module = self.modules[name]
        stored = sum(self.stored[part].nbytes for part in self._parts(module))
        stored += sum(part.nbytes for part in self.corrections.get(name, ()))
        return stored * 8 / (module.shape[0] * module.shape[1])

    def _parts(self, module: Module) -> list[str]:
        candidates = [f"{module.name}.{part}" for part in (NATIVE_PARTS if self.native else LIBRARY_PARTS)]
        return [name for name in candidates if name in self.stored]

    def _shard_of(self, module: Module) -> Path:
        return self.folder / self.stored[self._parts(module)[0]].shard

    def _checked(self, module: Module, parts: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The stored tensors of a linear (of them only `parts`), by name, their numbers looked at."""
        names = [name for name in self._parts(module) if parts is None or name.rpartition(".")[2] in parts]
        read = self.read_stored(names)
        local = {name.removeprefix(f"{module.name}."): tensor for name, tensor in read.items()}
        for problem in problems_of_values(module, local):
            raise ValueError(f"{self._shard_of(module)}: {problem}; {REMEDY}")
        return read

    def _dequantized(self, module: Module) -> Tensor:
        w = self._uncorrected(module)
        return merged(w, self.corrections[module.name]) if module.name in self.corrections else w

    def _uncorrected(self, module: Module) -> Tensor:
        dtype = FLOAT_DTYPES[self.tensors[module.tensor].dtype]
        if self.native:
            return dequantize(self.quantized(module.name), dtype)
        tensors = self._checked(module)
        local = {name.removeprefix(module.name + "."): tensor for name, tensor in tensors.items()}
        return decompress(local, module.library).to(dtype)


def open_checkpoint(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Open a float checkpoint (folder or hub id) or a quantized one: as a `QuantizedSource` in both formats that lowbit
    writes, see `checks`; dequantized as it is read in those of others, see `source.open_source`.

    Raises:
        ValueError: incomplete or damaged, another file than report.json says, or in a format that lowbit does not read.
    """
    folder = Path(model).expanduser()
    if not ((folder / NATIVE_FILE).exists() or _of_library(folder)):
        found = open_source(model, revision, trust_remote_code=trust_remote_code)
        if not _of_library(found.folder):
            return found
        folder = found.folder
    source = QuantizedSource(folder, trust_remote_code=trust_remote_code)
    check_small_files(folder, index_name(NATIVE if source.native else STEM))
    return source


def _of_library(folder: Path) -> bool:
    """Whether a folder is a compressed-tensors checkpoint."""
    if not (folder / "config.json").exists():
        return False
    found = quantization_of(read_json(folder / "config.json", "the model's configuration"))
    return isinstance(found, dict) and found.get("quant_method") == "compressed-tensors"


def quantized_sites(arch: Arch, source: QuantizedSource) -> dict[Site, Quantizer]:
    """Where the model quantizes inputs and points, and how."""
    modules = source.modules
    found: dict[Site, Quantizer] = {
        arch.site(modules[name].tensor, modules[name].index): given for name, given in source.inputs().items()
    }
    points = source.points()
    sites = {point.name: point.site for block in arch.blocks for point in block.points}
    return found | {sites[name]: static for name, static in points.items()}


@checked
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a checkpoint, quantized or not, as a transformers model with float weights.

    Quantized weights are dequantized; where the scheme quantizes inputs, every forward does so too, exactly as the report's
    figures were measured, and where there are scales of a key-value cache, attention goes through one. This is the reference
    for accuracy, not for speed or memory: engines load the folder itself.

    Args:
        model: a folder written by `quantize` (compressed-tensors or lowbit format), another compressed-tensors folder, a
            float checkpoint or a hub id.
        dtype: of the parameters; the checkpoint's own by default.
        trust_remote_code: run the Python code in the folder or repository, with the rights of this process, where
            transformers does not know the model itself; only for sources you trust.

    Raises:
        ValueError: the folder is incomplete or in a format lowbit does not read.
    """
    where = parse_device(device)
    source = open_checkpoint(str(model), revision, trust_remote_code=trust_remote_code)
    arch = Arch(source, dtype or source.dtype())
    if isinstance(source, QuantizedSource):
        check_model(arch, source)
    loaded: Any = arch.fill()
    loaded.to(where)
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


def check_model(arch: Arch, source: QuantizedSource) -> None:
    """Compare what a checkpoint says is quantized with the model that its config.json describes.

    Raises:
        ValueError: the model has no such tensor, no such attention module, or no such point.
    """
    described = source.folder / (NATIVE_FILE if source.native else "config.json")
    for tensor in (*source.by_tensor, *source.parameters):
        if tensor in arch.unused:
            raise ValueError(f"{described}: {tensor} is quantized, but the model has no place for it; {REMEDY}")
    modules = dict(arch.model.named_modules())
    for name in source.cache_scales():
        if name not in modules:
            raise ValueError(f"{source.folder}: there are scales for the cache of {name}, which the model lacks; {REMEDY}")
    known = {point.name: point for block in arch.blocks for point in block.points}
    for name, given in source.points().items():
        if name not in known or len(given.labels) != known[name].sets or given.largest.shape[1] not in (1, known[name].inner):
            raise ValueError(f"{described}: point {name} is not one of the model, or has another shape; {REMEDY}")


def restore_generation(model: Any, folder: Path) -> None:
    """Give a model the generation settings of its checkpoint, where it has any."""
    settings = generation_of(folder)
    if settings is not None:
        model.generation_config = settings


def quantize_inputs(model: Any, inputs: dict[Site, Quantizer]) -> None:
    """Make every forward of the model quantize the inputs at the given sites."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with Tap(quantized_inputs(addresses(model), inputs)):
            return original(*args, **kwargs)

    model.forward = forward
