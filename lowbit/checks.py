"""What a stored checkpoint must satisfy before a number of it is used.

Such a folder may come from anyone and over any network, so nothing of it is believed. `read_description` and
`library_modules` read how its matrices are stored. `check_headers` compares that with the dtypes and shapes in the headers of
the shards, which costs nothing. `problems_of_values` looks at the numbers that are read: scales, zero points, codes.
`check_small_files` compares the files that say how all others are read with the hashes in report.json, and `changed_files` does
so for all files.

Every error is a ValueError that names the file, the tensor or key, what is expected there, and what to do.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.adapter import FOLDER as ADAPTER
from lowbit.adapter import WEIGHTS, LowRank
from lowbit.files import sha256_of
from lowbit.packing import packed_width, padding_is_zero
from lowbit.patterns import Matcher
from lowbit.qtensor import (
    CHANNEL,
    ENGINE_RULES,
    TENSOR,
    Scheme,
    Spec,
    check_input,
    problems_of_codes,
    problems_of_scales,
    problems_of_zeros,
    spec_from_dict,
)
from lowbit.report import JSON_NAME, hashes_of, read_report
from lowbit.source import FLOAT_DTYPES, TensorInfo, read_json

NATIVE = "lowbit"
NATIVE_FILE = "lowbit.json"
NATIVE_VERSION = 3
REMEDY = "fetch this folder again, or quantize the model again"
NATIVE_PARTS = ("codes", "scale", "zero", "outer", "input_largest")
POINT_PARTS = ("codes", "scale", "largest", "labels")
LIBRARY_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
)
# What compressed-tensors may store besides, and lowbit does not compute with: it must not be passed over.
_FOREIGN_PARTS = ("weight_g_idx", "input_zero_point", "output_scale", "output_zero_point", "bitmask", "compressed")
_WHOLE = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # dtypes that no float weight has


@dataclass(frozen=True, kw_only=True)
class Module:
    """How one quantized linear of a checkpoint is stored.

    Attributes:
        tensor, index: the tensor of the source that it is, or which slice of it.
        transposed: whether the source holds it as [in, out]. shape: [out, in] all the same.
        library: the scheme in the library's words, of a compressed-tensors checkpoint.
        turned: whether its input is multiplied by a Hadamard matrix.
    """

    name: str
    tensor: str
    index: int | None
    transposed: bool
    shape: tuple[int, int]
    scheme: Scheme
    library: Any = None
    turned: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether something is stored of its input."""
        inputs = self.scheme.input
        return inputs is not None and (not inputs.dynamic or inputs.scale == "e4m3")


@dataclass(frozen=True, kw_only=True)
class StoredPoint:
    """How a point of a scan is stored: a parameter, `tensor` of the source, or what is computed, where that is None."""

    tensor: str | None
    shape: tuple[int, ...]
    spec: Spec


@dataclass(frozen=True)
class Description:
    """What lowbit.json says. `dtype`: of dequantized matrices and float scales, as safetensors spells it."""

    dtype: str
    modules: dict[str, Module]
    points: dict[str, StoredPoint]


@dataclass(frozen=True)
class Part:
    """What a tensor must be: one of these dtypes, as safetensors spells them, and one of these shapes (None: any)."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None
    optional: bool = False

    def __str__(self) -> str:
        shapes = "of any shape" if self.shapes is None else " or ".join(str(list(shape)) for shape in self.shapes)
        return f"{' or '.join(self.dtypes)} {shapes}"


class Damaged(ValueError):
    """A checkpoint whose headers are not what its description calls for. `problems`: all of them, of which the message has the
    first."""

    def __init__(self, problems: list[str]) -> None:
        more = f" ({len(problems)} such problems; lowbit inspect --check lists them)" if problems[1:] else ""
        super().__init__(problems[0] + more)
        self.problems = problems


# ------------------------------------------------------------------------------------------------------------ lowbit.json


def read_description(folder: Path) -> Description:
    """What lowbit.json says, every entry checked against docs/format.md.

    Raises:
        ValueError: another version, or an entry is missing, of another type, or contradicts another.
    """
    path = folder / NATIVE_FILE
    given = read_json(path, "the description of a checkpoint in lowbit's own format")
    if given.get("format") != NATIVE:
        raise ValueError(f"{path}: 'format' is {given.get('format')!r:.80}, not {NATIVE!r}; {REMEDY}")
    if type(given.get("version")) is not int or given["version"] != NATIVE_VERSION:
        raise ValueError(
            f"{path} has version {given.get('version')!r:.80}; this lowbit reads version {NATIVE_VERSION}: use the lowbit that "
            "wrote it, or quantize the model again"
        )
    dtypes = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}
    dtype = _field(given, "dtype", str, f"{path}")
    if dtype not in dtypes:
        raise ValueError(f"{path}: 'dtype' is {dtype!r}, not one of {', '.join(dtypes)}; {REMEDY}")
    modules, points = {}, {}
    for name, entry in _field(given, "linears", dict, f"{path}").items():
        modules[name] = _module(name, entry, f"{path}: linears[{name!r}]")
    for name, entry in _field(given, "points", dict, f"{path}").items():
        points[name] = _point(entry, f"{path}: points[{name!r}]")
    if not modules and not points:
        raise ValueError(f"{path} names no linears and no points; {REMEDY}")
    _check_slices(path, modules, points)
    return Description(dtypes[dtype], modules, points)


def _field(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.80}, not an object; {REMEDY}")
    if key not in entry:
        raise ValueError(f"{where} has no {key!r} ({names}); {REMEDY}")
    if type(entry[key]) not in kinds:
        raise ValueError(f"{where}: {key!r} is {entry[key]!r:.80}, not of type {names}; {REMEDY}")
    return entry[key]


def _sizes(entry: Any, where: str) -> tuple[int, ...]:
    shape = _field(entry, "shape", list, where)
    if not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{where}: 'shape' is {shape!r:.80}, not a list of sizes from 1 on; {REMEDY}")
    return tuple(shape)


def _spec(entry: Any, key: str, where: str) -> Spec:
    try:
        return spec_from_dict(_field(entry, key, dict, where))
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {key!r}: {error}; {REMEDY}") from error


def _module(name: str, entry: Any, where: str) -> Module:
    shape = _sizes(entry, where)
    if len(shape) != 2:
        raise ValueError(f"{where}: 'shape' is {list(shape)}, not [out, in]; {REMEDY}")
    inputs = _field(entry, "input", (dict, type(None)), where)
    scheme = Scheme(
        name=_field(entry, "scheme", str, where),
        weight=_spec(entry, "weight", where),
        input=None if inputs is None else _spec(entry, "input", where),
    )
    check_scheme(where, shape, scheme)
    index = _field(entry, "index", (int, type(None)), where)
    return Module(
        name=name,
        tensor=_field(entry, "tensor", str, where),
        index=index,
        transposed=_field(entry, "transposed", bool, where),
        shape=(shape[0], shape[1]),
        scheme=scheme,
        turned=_field(entry, "turned", bool, where),
    )


def _point(entry: Any, where: str) -> StoredPoint:
    tensor, spec = _field(entry, "tensor", (str, type(None)), where), _spec(entry, "spec", where)
    shape = _sizes(entry, where)
    if spec.format.kind != "int" or spec.group != TENSOR or not spec.symmetric or spec.dynamic or spec.scale != "float":
        raise ValueError(f"{where}: 'spec' is not of integers with static, symmetric scales of a tensor; {REMEDY}")
    if tensor is None and len(shape) != 2:
        raise ValueError(f"{where}: 'shape' is {list(shape)}, not [sets, inner]; {REMEDY}")
    return StoredPoint(tensor=tensor, shape=shape, spec=spec)


def check_scheme(where: str, shape: tuple[int, ...], scheme: Scheme, *, partial: bool = False) -> None:
    """Raise ValueError where a matrix [out, in], or its input, cannot be quantized in this way; partial: the last block of
    rows and columns may be smaller."""
    out, columns = shape
    if scheme.weight.dynamic:
        raise ValueError(f"{where}: scales of weights are not dynamic; {REMEDY}")
    if scheme.input is not None:
        try:
            check_input(scheme.input)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; lowbit computes no such inputs") from error
    for what, spec in (("weight", scheme.weight), ("input", scheme.input)):
        if spec is not None and columns % spec.group_size(columns) and not (partial and what == "weight"):
            raise ValueError(f"{where}: groups of {spec.group} do not divide the {columns} columns ({what}); {REMEDY}")
    if out % scheme.weight.rows and not partial:
        raise ValueError(f"{where}: blocks of {scheme.weight.rows} rows do not divide the {out} rows; {REMEDY}")


def _check_slices(path: Path, modules: dict[str, Module], points: dict[str, StoredPoint]) -> None:
    """A tensor of the source is one linear, or all slices of it are; or one point."""
    by_tensor: dict[str, list[Module]] = {}
    for module in modules.values():
        by_tensor.setdefault(module.tensor, []).append(module)
    for tensor, members in by_tensor.items():
        first, names = members[0], ", ".join(module.name for module in members[:3])
        if len(members) > 1 and any(module.index is None for module in members):
            raise ValueError(f"{path}: {names} all claim to be tensor {tensor!r}; {REMEDY}")
        if first.index is not None and sorted(module.index or 0 for module in members) != [*range(len(members))]:
            raise ValueError(f"{path}: the indices of {names} are not 0 .. {len(members) - 1} of tensor {tensor!r}; {REMEDY}")
        if any((module.shape, module.transposed) != (first.shape, first.transposed) for module in members):
            raise ValueError(f"{path}: slices of tensor {tensor!r} differ in shape or transposed; {REMEDY}")
    named = Counter(point.tensor for point in points.values() if point.tensor is not None)
    for tensor, count in named.items():
        if count > 1 or tensor in by_tensor:
            raise ValueError(f"{path}: tensor {tensor!r} is named twice; {REMEDY}")


# ----------------------------------------------------------------------------------------------------- compressed-tensors


def library_modules(
    folder: Path, given: Any, stored: dict[str, TensorInfo], read: Callable[[str], Tensor]
) -> dict[str, Module]:
    """The quantized linears of a compressed-tensors checkpoint, by what its headers have and its configuration says of them.

    Args:
        given: quantization_config of config.json. read: a stored tensor by its name.

    Raises:
        ValueError: another method, a configuration that the library does not read, or what lowbit does not compute.
    """
    path = folder / "config.json"
    if not isinstance(given, dict):
        raise ValueError(f"{path}: 'quantization_config' is {given!r:.80}, not an object; {REMEDY}")
    if given.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{folder}: quantization method {given.get('quant_method')!r:.80} is not read by lowbit, only "
            "compressed-tensors and lowbit's own format"
        )
    sparsity = given.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    if given.get("transform_config") or (sparsity and not dense):
        raise ValueError(f"{path}: quantization_config has transforms or sparsity, which lowbit does not compute")
    config = _library_config(path, given)
    groups = _Groups(path, config)
    modules = {}
    for scale in stored:
        name = scale.removesuffix(".weight_scale")
        if name == scale:
            continue
        library = groups.of(name)
        where = f"{path}: quantization_config, {name}"
        scheme = _library_scheme(library, where)
        shape = _library_shape(folder, name, stored, read, scheme.weight)
        modules[name] = Module(
            name=name,
            tensor=f"{name}.weight",
            index=None,
            transposed=False,
            shape=shape,
            scheme=scheme,
            library=library,
        )
        _layout(modules[name], where)
        check_scheme(where, shape, scheme, partial=scheme.weight.rows > 1)
    if not modules:
        raise ValueError(f"{folder} says that it is quantized, but no tensor is called NAME.weight_scale; {REMEDY}")
    return modules


def _library_config(path: Path, given: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(given)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError) as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: compressed-tensors does not read quantization_config ({first}); {REMEDY}") from error


class _Groups:
    """Which group of a quantization_config a module belongs to: the first with a target that names it."""

    def __init__(self, path: Path, config: Any) -> None:
        self.path, self.config = path, config
        matcher = Matcher(f"{path}: quantization_config")
        self._match = matcher.match
        self._ignored = _Targets(config.ignore or ())
        self._targets = [(group, _Targets(group.targets)) for group in config.config_groups.values()]

    def of(self, name: str) -> Any:
        """The library's scheme of a module."""
        if self._ignored.hold(name, self._match):
            raise ValueError(f"{self.path}: quantization_config ignores {name}, but it is stored quantized; {REMEDY}")
        for group, targets in self._targets:
            if "Linear" in targets.names or targets.hold(name, self._match):
                return group if group.format else group.model_copy(update={"format": self.config.format})
        raise ValueError(f"{self.path}: quantization_config has no group for {name}, which is stored quantized; {REMEDY}")


class _Targets:
    """Names, and expressions after `re:`, as compressed-tensors matches them."""

    def __init__(self, targets: Iterable[str]) -> None:
        targets = list(targets)
        self.names = frozenset(targets)
        self.patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]

    def hold(self, name: str, match: Callable[[str, str], bool]) -> bool:
        return name in self.names or any(match(pattern, name) for pattern in self.patterns)


def _library_scheme(library: Any, where: str) -> Scheme:
    """Our scheme of the library's; the name only tells the bits."""
    if library.weights is None or library.output_activations is not None:
        raise ValueError(f"{where}: lowbit reads quantized weights, with quantized inputs or without, and no quantized outputs")
    try:
        weight = _spec_of(library.weights)
        inputs = _spec_of(library.input_activations) if library.input_activations is not None else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {REMEDY}") from error
    bits = (weight.format.name, inputs.format.name if inputs else "float")
    return Scheme(name="/".join(bits), weight=weight, input=inputs)


def _spec_of(args: Any) -> Spec:
    strategy, floats = str(args.strategy), {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
    rows, group = 1, {"tensor": TENSOR, "channel": CHANNEL, "token": CHANNEL}.get(strategy, args.group_size)
    if strategy == "block":
        rows, group = args.block_structure
    scale = "e4m3" if strategy == "tensor_group" else "e8m0" if args.scale_dtype == torch.uint8 else "float"
    name = f"int{args.num_bits}" if args.type == "int" else floats.get(args.num_bits, f"{args.num_bits}-bit floats")
    return spec_from_dict(
        {
            "format": name,
            "group": group,
            "rows": rows,
            "symmetric": args.symmetric,
            "dynamic": bool(args.dynamic),
            "scale": scale,
            "rule": ENGINE_RULES.get(name, "floor") if scale == "e8m0" and args.dynamic else "floor",
        }
    )


def _library_shape(
    folder: Path, name: str, stored: dict[str, TensorInfo], read: Callable[[str], Tensor], spec: Spec
) -> tuple[int, int]:
    plain, packed = stored.get(f"{name}.weight"), stored.get(f"{name}.weight_packed")
    info = packed if plain is None else plain
    if info is None or (plain is not None and packed is not None):
        raise ValueError(f"{folder}: {name} must have either weight or weight_packed beside weight_scale; {REMEDY}")
    if len(info.shape) != 2:
        raise ValueError(f"{folder / info.shard}: the weight of {name} has shape {list(info.shape)}, not [out, in]; {REMEDY}")
    rows, columns = info.shape
    if plain is not None:
        return rows, columns
    if info.dtype == "U8":
        return rows, columns * 8 // spec.format.bits
    key = f"{name}.weight_shape"
    where = stored.get(key)
    if where is None or where.dtype not in ("I64", "I32") or where.shape != (2,):
        raise ValueError(f"{folder / info.shard}: {key} must be I64 [2]; {REMEDY}")
    shape = read(key).tolist()
    if min(shape) < 1 or (shape[0], -(-shape[1] * spec.format.bits // 32)) != info.shape:
        raise ValueError(f"{folder / where.shard}: {key} is {shape}, but weight_packed has shape {list(info.shape)}; {REMEDY}")
    return shape[0], shape[1]


def _layout(module: Module, where: str) -> str:
    """How the codes are stored: "words" of 32 bits, "plain" elements, or packed "floats" of 4 or 6 bits."""
    spec, form = module.scheme.weight, str(getattr(module.library.format, "value", module.library.format))
    kind = (spec.format.name if spec.format.kind != "int" else "int", spec.scale)
    layouts = {
        "pack-quantized": ("words", [("int", "float")]),
        "int-quantized": ("plain", [("int", "float")]),
        "naive-quantized": ("plain", [("int", "float"), ("fp8_e4m3", "float")]),
        "float-quantized": ("plain", [("fp8_e4m3", "float")]),
        "mxfp8-quantized": ("plain", [("fp8_e4m3", "e8m0")]),
        "mxfp4-pack-quantized": ("floats", [("fp4_e2m1", "e8m0")]),
        "mxfp6-pack-quantized": ("floats", [("fp6_e2m3", "e8m0")]),
        "nvfp4-pack-quantized": ("floats", [("fp4_e2m1", "e4m3")]),
    }
    layout, kinds = layouts.get(form, ("", []))
    if kind not in kinds:
        known = f"known formats are {', '.join(layouts)}" if not kinds else f"{form} holds {' or '.join(map(str, kinds))}"
        raise ValueError(f"{where}: format {form!r} with {kind[0]} weights and {kind[1]} scales cannot be read; {known}")
    return layout


# ---------------------------------------------------------------------------------------------------------------- headers


def parts_of(module: Module, dtype: str) -> dict[str, Part]:
    """What must be stored of a linear, by the last words of the names. dtype: of float scales of lowbit's own format."""
    return _native_parts(module, dtype) if module.library is None else _library_parts(module)


def _native_parts(module: Module, dtype: str) -> dict[str, Part]:
    spec, (out, columns) = module.scheme.weight, module.shape
    scales = spec.scale_shape(out, columns)
    kinds = {"float": dtype, "e8m0": "U8", "e4m3": "U8", "int8": "I8"}
    parts = {
        "codes": Part(("U8",), ((out, packed_width(columns, spec.format.bits)),)),
        "scale": Part((kinds[spec.scale],), (scales,)),
    }
    if not spec.symmetric:
        parts["zero"] = Part(("I8",), (scales,))
    if spec.scale in ("e4m3", "int8"):
        parts["outer"] = Part(("F32",), ((1, 1) if spec.scale == "e4m3" else (out, 1),))
    if module.calibrated:
        parts["input_largest"] = Part(("F32",), ((1,),))
    return parts


def _library_parts(module: Module) -> dict[str, Part]:
    spec, (out, columns) = module.scheme.weight, module.shape
    bits, layout, one = spec.format.bits, _layout(module, module.name), ((1,), ())
    floats = tuple(FLOAT_DTYPES)
    shape = spec.scale_shape(out, columns)
    scales = (*one, (1, 1)) if spec.group == TENSOR else (shape, shape[:1]) if shape[1:] == (1,) else (shape,)
    parts = {"weight_scale": Part({"e8m0": ("U8",), "e4m3": ("F8_E4M3",)}.get(spec.scale, floats), scales)}
    if layout == "words":
        parts["weight_packed"] = Part(("I32",), ((out, -(-columns * bits // 32)),))
        parts["weight_shape"] = Part(("I64", "I32"), ((2,),))
    elif layout == "plain":
        parts["weight"] = Part(("I8",) if spec.format.kind == "int" else ("F8_E4M3",), ((out, columns),))
    else:
        parts["weight_packed"] = Part(("U8",), ((out, columns * bits // 8),))
    if spec.symmetric:  # the library has written zeros there
        parts["weight_zero_point"] = Part(("I8", "I32", "F8_E4M3", "U8", *floats), None, optional=True)
    elif layout == "words":
        parts["weight_zero_point"] = Part(("I32",), ((-(-out * bits // 32), *shape[1:]),))
    else:
        parts["weight_zero_point"] = Part(("I8",), scales)
    if spec.scale == "e4m3":
        parts["weight_global_scale"] = Part(("F32",), one)
    if module.calibrated:
        assert module.scheme.input is not None
        static = module.scheme.input.scale == "float"
        parts["input_scale" if static else "input_global_scale"] = Part(floats if static else ("F32",), one)
    return parts


def _point_parts(point: StoredPoint) -> dict[str, Part]:
    if point.tensor is None:
        return {"largest": Part(("F32",), None), "labels": Part(("I32",), ((point.shape[0],),), optional=True)}
    rows, columns = (1, *point.shape) if len(point.shape) == 1 else (point.shape[0], math.prod(point.shape[1:]))
    return {
        "codes": Part(("U8",), ((rows, packed_width(columns, point.spec.format.bits)),)),
        "scale": Part(("F32",), ((1, 1),)),
    }


def check_headers(
    folder: Path, stored: dict[str, TensorInfo], modules: dict[str, Module], points: dict[str, StoredPoint], dtype: str
) -> None:
    """Raise `Damaged` where the shards' headers are not what the description of the checkpoint calls for."""
    problems = [*_problems_of_headers(folder, stored, modules, points, dtype)]
    if problems:
        raise Damaged(problems)


def _problems_of_headers(
    folder: Path, stored: dict[str, TensorInfo], modules: dict[str, Module], points: dict[str, StoredPoint], dtype: str
) -> Iterator[str]:
    native = (folder / NATIVE_FILE).exists()
    described = folder / (NATIVE_FILE if native else "config.json")
    known = (*NATIVE_PARTS, *POINT_PARTS) if native else (*LIBRARY_PARTS, *_FOREIGN_PARTS)
    wanted = {name: parts_of(module, dtype) for name, module in modules.items()}
    wanted |= {name: _point_parts(point) for name, point in points.items()}
    for name, parts in wanted.items():
        for part, must in parts.items():
            info = stored.get(f"{name}.{part}")
            if info is None:
                if not must.optional:
                    yield f"{folder}: {name}.{part} is missing, which {described.name} calls for as {must}; {REMEDY}"
            elif info.dtype not in must.dtypes or (must.shapes is not None and info.shape not in must.shapes):
                yield (
                    f"{folder / info.shard}: {name}.{part} is {info.dtype} {list(info.shape)}, but {described.name} calls for "
                    f"{must}; {REMEDY}"
                )
        for part in known:
            info = stored.get(f"{name}.{part}")
            if info is not None and part not in parts:
                yield f"{folder / info.shard}: {name}.{part} is there, but {described.name} does not call for it; {REMEDY}"
    for name, point in points.items():
        yield from _problems_of_point(folder, name, point, stored)
    replaced = {module.tensor for module in modules.values()} | {point.tensor for point in points.values() if point.tensor}
    stray = ("codes",) if native else (*LIBRARY_PARTS[1:], *_FOREIGN_PARTS)
    for tensor, info in stored.items():
        name, _, part = tensor.rpartition(".")
        if name in wanted and part in known:
            continue
        if tensor in replaced:
            yield f"{folder / info.shard}: {tensor} is there, but {described.name} says that it is quantized; {REMEDY}"
        elif part in stray:
            yield f"{folder / info.shard}: {tensor} is there, but {described.name} does not name {name}; {REMEDY}"
        elif part == "weight" and info.dtype in _WHOLE:
            yield f"{folder / info.shard}: {tensor} is {info.dtype}, but {described.name} does not say how; {REMEDY}"
        elif part in ("k_scale", "v_scale"):
            if info.dtype not in FLOAT_DTYPES or info.shape not in ((1,), ()):
                yield f"{folder / info.shard}: {tensor} is {info.dtype} {list(info.shape)}, not one float; {REMEDY}"
            if f"{name}.{'v_scale' if part == 'k_scale' else 'k_scale'}" not in stored:
                yield f"{folder / info.shard}: {tensor} is there without its twin of the other of keys and values; {REMEDY}"


def _problems_of_point(folder: Path, name: str, point: StoredPoint, stored: dict[str, TensorInfo]) -> Iterator[str]:
    info = stored.get(f"{name}.largest")
    if point.tensor is not None or info is None:
        return
    inner = point.shape[1]
    if len(info.shape) != 2 or info.shape[0] < 1 or info.shape[1] not in (1, inner):
        yield f"{folder / info.shard}: {name}.largest has shape {list(info.shape)}, not [scales, {inner} or 1]; {REMEDY}"
    elif info.shape[0] > 1 and f"{name}.labels" not in stored:
        yield f"{folder}: {name}.labels is missing, which says which of {info.shape[0]} scales a set has; {REMEDY}"


def check_corrections(folder: Path, corrections: dict[str, LowRank], modules: dict[str, Module]) -> None:
    """Raise ValueError where a low-rank correction does not fit a linear, or is not finite."""
    path = folder / ADAPTER / WEIGHTS
    for name, low in corrections.items():
        if name not in modules:
            raise ValueError(f"{path} corrects {name}, which is no quantized linear of this checkpoint; {REMEDY}")
        out, columns = modules[name].shape
        if low.a.dim() != 2 or low.a.shape[1] != columns or low.b.shape != (out, len(low.a)):
            shapes = f"{list(low.b.shape)} times {list(low.a.shape)}"
            raise ValueError(
                f"{path}: the correction of {name} is {shapes}, not [{out}, rank] times [rank, {columns}]; {REMEDY}"
            )
        if low.a.dtype != low.b.dtype or not all(part.is_floating_point() and bool(torch.isfinite(part).all()) for part in low):
            raise ValueError(f"{path}: the correction of {name} is not of finite floats of one dtype; {REMEDY}")


# ----------------------------------------------------------------------------------------------------------------- values


def problems_of_values(module: Module, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with the numbers of a linear, whose headers are right: tensors by the last words of their names. Codes of
    fewer than 8 bits are looked at when they are unpacked (`qtensor.validate`)."""
    spec, columns = module.scheme.weight, module.shape[1]
    scale = tensors.get("scale", tensors.get("weight_scale"))
    outer, zero, divisor = tensors.get("outer"), tensors.get("zero"), tensors.get("weight_global_scale")
    if divisor is not None:
        outer = 1 / divisor.reshape(1, 1)
    if scale is not None:
        if spec.scale in ("e8m0", "e4m3"):
            scale = scale.view(torch.float8_e8m0fnu if spec.scale == "e8m0" else torch.float8_e4m3fn)
        yield from (f"{module.name}: {problem}" for problem in problems_of_scales(scale, outer, spec))
    packed = tensors.get("codes", tensors.get("weight_packed"))
    if packed is not None and not padding_is_zero(packed, spec.format.bits, columns):
        yield f"{module.name}: bits behind the last column are not zero"
    plain = tensors.get("weight")
    if plain is not None:
        codes = plain if spec.format.kind == "int" else plain.view(torch.uint8)
        yield from (f"{module.name}: {problem}" for problem in problems_of_codes(codes, spec))
    given = tensors.get("weight_zero_point")
    if given is not None and spec.symmetric and bool(given.float().any()):
        yield f"{module.name}: there are zero points, but quantization_config says that it is symmetric"
    if given is not None and not spec.symmetric:
        if plain is not None:
            zero = given
        elif not padding_is_zero(given.T, spec.format.bits, module.shape[0]):
            yield f"{module.name}: bits behind the zero point of the last row are not zero"
    yield from (f"{module.name}: {problem}" for problem in problems_of_zeros(zero, spec))
    for part in ("input_largest", "input_scale", "input_global_scale"):
        if part in tensors and not positive(tensors[part]):
            yield f"{module.name}.{part} is {tensors[part].flatten().tolist()}, not a finite number above 0"


def problems_of_point(name: str, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with the numbers of a point that is computed, or with the scale of a parameter."""
    for part in ("largest", "scale"):
        if part in tensors and not positive(tensors[part]):
            yield f"{name}.{part} has numbers that are not finite or not above 0"
    labels = tensors.get("labels")
    if labels is not None and (int(labels.min()) < 0 or int(labels.max()) >= len(tensors["largest"])):
        yield f"{name}.labels has numbers outside 0 .. {len(tensors['largest']) - 1}"


def positive(x: Tensor) -> bool:
    """Whether all are finite and above 0, and so are their reciprocals."""
    x = x.float()
    return bool((torch.isfinite(x) & (x > 0) & torch.isfinite(1 / x)).all())


# ----------------------------------------------------------------------------------------------------------------- hashes


def check_small_files(folder: Path, index: str) -> None:
    """Compare the files that say how all others are read with the hashes of report.json, if there are any.

    config.json may have been edited on purpose (longer contexts, other special tokens), so that a warning is enough.

    Raises:
        ValueError: lowbit.json or the index is another file than was written, or the adapter is missing.
    """
    report, files = read_report(folder) or {}, hashes_of(folder)
    promised = report.get("adapter") is not None or f"{ADAPTER}/{WEIGHTS}" in files
    if promised and not (folder / ADAPTER / WEIGHTS).is_file():
        path = folder / ADAPTER / WEIGHTS
        raise ValueError(f"{path} is missing: {JSON_NAME} says that low-rank corrections belong to this checkpoint; {REMEDY}")
    for name in (NATIVE_FILE, index):
        problem = _changed(folder, name, files)
        if problem is not None:
            raise ValueError(problem)
    problem = _changed(folder, "config.json", files)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def changed_files(folder: Path) -> Iterator[str]:
    """Every file of report.json that is missing or another by now, and weights that it does not know."""
    files = hashes_of(folder)
    for name in files:
        problem = _changed(folder, name, files)
        if problem is not None:
            yield problem
    for path in sorted(folder.glob("*.safetensors")) if files else ():
        if path.name not in files:
            yield f"{path} is not among the files of {JSON_NAME}, but programs that read every *.safetensors read it; remove it"


def _changed(folder: Path, name: str, files: dict[str, str]) -> str | None:
    path = folder / name
    if name not in files:
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        return f"{path} is missing, or no regular file of this folder; {REMEDY}"
    if sha256_of(path) == files[name]:
        return None
    return (
        f"{path} is not the file that was written (its SHA-256 is not the one in {JSON_NAME}); fetch it again, or, if you "
        f'changed it on purpose, remove its line from "files" there'
    )
