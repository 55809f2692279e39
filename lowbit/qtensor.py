"""A quantized matrix, the choice that describes it, and the arithmetic between floats and codes.

    w[o, i] ~ (value(codes[o, i]) - zero[r, g]) * scale[r, g] * outer        r = o // rows, g = i // G

`Spec` says how one tensor is quantized, `Scheme` what happens to one linear layer (weight and input), `QTensor` is the
result. `find_params` chooses scales, `quantize` makes codes, `dequantize` is the only place that turns codes into floats.

Scales are floats, or numbers of 8 bits: powers of two (E8M0, the microscaling formats of OCP MX v1.0), E4M3 under one scale
for the tensor (NVFP4), or integers under one scale a row (DGQ, QoQ: 4-bit weights that become 8-bit integers by one integer
product). Codebooks (k-means, BCQ) have the values of their codes, or what these are made of, in the place of a scale.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowbit import codebooks
from lowbit.formats import (
    FORMATS,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    NF4,
    Format,
    block_integer,
    codebook,
    integer,
)

CHANNEL = -1  # Spec.group: one scale per output row
TENSOR = 0  # Spec.group: one scale for the whole tensor
ScaleFormat = Literal["float", "e8m0", "e4m3", "int8"]
Rule = Literal["floor", "even", "ceil"]
_SCALE_DTYPES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How one tensor is quantized.

    Attributes:
        format: the element format.
        group: K consecutive input columns share a scale; CHANNEL (-1): one scale per output row (for activations: per
            token); TENSOR (0): one scale in all.
        rows: output rows that share a scale: 128 with a group of 128 for FP8 in square blocks, n with CHANNEL for blocks of
            whole rows (ZeroQuant).
        symmetric: no zero point.
        dynamic: the scale is computed from the data at run time (activations).
        scale: how a scale is stored: "float" in the dtype of the checkpoint; "e8m0" as a power of two; "e4m3" under one
            float for the tensor; "int8" as an integer under one float for the row.
        rule: which power of two, from the largest magnitude a of a block: "floor", 2^floor(log2 a) over that of the format's
            largest value, where the top of a binade saturates (OCP MX v1.0, 6.3); "even", the same of a rounded to the
            element's mantissa; "ceil", the least at which nothing saturates.
    """

    format: Format
    group: int = CHANNEL
    rows: int = 1
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleFormat = "float"
    rule: Rule = "floor"

    def group_size(self, columns: int) -> int:
        """Columns that share one scale in a matrix of `columns` columns."""
        return columns if self.group in (CHANNEL, TENSOR) else self.group

    def scale_shape(self, out: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of a matrix [out, columns]; a last group, or block of rows, may be smaller."""
        if self.group == TENSOR:
            return (1, 1)
        shape = (-(-out // self.rows), -(-columns // self.group_size(columns)))
        own = {"kmeans": 2**self.format.bits, "bcq": self.format.bits + 1}.get(self.format.kind)
        return shape if own is None else (*shape, own)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `spec_from_dict`."""
        return {name: getattr(self, name) for name in _FIELDS} | {"format": self.format.name}


_FIELDS = ("format", "group", "rows", "symmetric", "dynamic", "scale", "rule")


def spec_from_dict(fields: Any) -> Spec:
    """Rebuild a Spec from `Spec.to_dict`.

    Raises:
        ValueError: a field is missing, of another type, or not among what is allowed, or the fields contradict each other.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r} is no object with {', '.join(_FIELDS)}")
    for key in _FIELDS:
        kind = {"group": int, "rows": int, "symmetric": bool, "dynamic": bool}.get(key, str)
        if key not in fields:
            raise ValueError(f"{key!r} is missing; there must be {', '.join(_FIELDS)}")
        if type(fields[key]) is not kind:
            raise ValueError(f"{key!r} is {fields[key]!r}, not of type {kind.__name__}")
    name = fields["format"]
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}; known are {', '.join(sorted(FORMATS))}")
    for key, allowed in (("scale", get_args(ScaleFormat)), ("rule", get_args(Rule))):
        if fields[key] not in allowed:
            raise ValueError(f"{key!r} is {fields[key]!r}; known are {', '.join(allowed)}")
    if fields["group"] < CHANNEL or fields["rows"] < 1:
        raise ValueError(f"group {fields['group']} and rows {fields['rows']}: give -1, 0 or more columns, and 1 or more rows")
    spec = Spec(**{key: fields[key] for key in _FIELDS} | {"format": FORMATS[name]})
    _check_spec(spec)
    return spec


def check_input(spec: Spec) -> None:
    """Raise ValueError for what `fake_quantize_input` cannot do."""
    if spec.format.codebook or spec.format.kind == "table" or spec.scale == "int8" or spec.rows != 1:
        raise ValueError(f"inputs cannot be quantized to {spec.format.name} with {spec.scale} scales and rows {spec.rows}")
    if spec.scale == "e4m3" and spec.format != FP4_E2M1:
        raise ValueError(f"inputs with e4m3 scales are fp4_e2m1, not {spec.format.name}")
    if spec.dynamic and spec.group == TENSOR:
        raise ValueError("inputs have dynamic scales for a token or a group of it, not for a tensor")
    if not spec.dynamic and (spec.group != TENSOR or not spec.symmetric or spec.scale != "float"):
        raise ValueError("static scales of inputs are one float for a tensor, without a zero point")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What quantization does to one linear layer: its weight, and its input (None: left in the model's dtype)."""

    name: str
    weight: Spec
    input: Spec | None = None


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix of shape [out, in].

    Attributes:
        codes: [out, in], int8 (integer formats, two's complement) or uint8 (bit patterns of float formats).
        scale: [out / rows, in / G], [out / rows, 1] or [1, 1]; the dtype in which the checkpoint stores it. For codebooks
            with a third axis: the 2^b values of k-means, the b factors and the offset of BCQ.
        zero: int8, the shape of `scale`; None when symmetric.
        spec: how the above is to be read.
        outer: float32, the second factor of every scale: [1, 1], a power of two, for "e4m3"; [out, 1] for "int8"; else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: Spec = field(compare=False)
    outer: Tensor | None = None

    def to(self, device: str | torch.device) -> "QTensor":
        """The same on another device."""
        zero, outer = (None if part is None else part.to(device) for part in (self.zero, self.outer))
        return QTensor(self.codes.to(device), self.scale.to(device), zero, self.spec, outer)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and zero points."""
        stored = self.codes.numel() * self.spec.format.bits + self.scale.numel() * self.scale.element_size() * 8
        if self.zero is not None:
            stored += self.zero.numel() * self.spec.format.bits
        if self.outer is not None:
            stored += self.outer.numel() * 32
        return stored / self.codes.numel()


@dataclass(frozen=True, kw_only=True)
class PointScheme:
    """How a point of a state space mixer is quantized: statically, symmetric.

    Attributes:
        name: what the user wrote.
        spec: one scale for the tensor.
        scales: what has a scale of its own: the tensor, each state group, or each cluster of channels that `reorder` found.
        quantile: the share of magnitudes within the range; 1: all of them.
    """

    name: str
    spec: Spec
    scales: Literal["tensor", "groups", "clusters"] = "tensor"
    quantile: float = 1.0


_POINT = re.compile(r"s(?P<bits>[3-8])(?:-(?P<scales>groups|clusters))?(?:-p(?P<quantile>\d+))?")


def parse_point(text: str) -> PointScheme | None:
    """Read `sB`, B = 3..8: integers under one scale from calibration; then `-groups` (a scale for each state group) or
    `-clusters` (for each cluster of channels), and `-pD`: the range holds a share 0.D of the magnitudes. None: something else.
    """
    match = _POINT.fullmatch(text.strip().lower())
    if match is None:
        return None
    scales: Any = match["scales"] or "tensor"
    return PointScheme(
        name=text.strip().lower(),
        spec=Spec(format=integer(int(match["bits"])), group=TENSOR),
        scales=scales,
        quantile=float(f"0.{match['quantile']}") if match["quantile"] else 1.0,
    )


# --------------------------------------------------------------------------------------------------------------- schemes

_EXAMPLES = (
    "w4a16, w4a16-g64-asym, w8a8, w8a16-channel, w3a16-g128, w4a4-g128-ag128, fp8, fp8-block, mxfp4, mxfp4a16-even, nvfp4, "
    "kmeans3, bcq3-g64"
)
_SCHEME = re.compile(
    r"(?:w(?P<w>[1-9]\d*)a(?P<a>[1-9]\d*)|(?P<float>fp8|fp4|nf4|nvfp4|mxfp[468]|mxint[1-9]|kmeans[2-4]|bcq[1-4])(?:a(?P<fa>[1-9]\d*))?)"
    r"(?P<options>(?:-[a-z0-9]+)*)"
)
GROUP_DEFAULT = 128  # columns a group, for elements of 4 bits and fewer where the scheme names none
_MX_ELEMENTS = {"mxfp4": FP4_E2M1, "mxfp6": FP6_E2M3, "mxfp8": FP8_E4M3}
# How engines choose the powers of two of inputs, which they compute themselves: MXFP8 as vLLM, the others as vLLM and
# compressed-tensors. A checkpoint for them whose accuracy was measured by another rule would not be what was measured.
ENGINE_RULES: dict[str, Rule] = {"fp8_e4m3": "ceil", "fp4_e2m1": "even", "fp6_e2m3": "even"}
_VARIANTS = {("mxfp6", "e3m2"): FP6_E3M2, ("mxfp8", "e5m2"): FP8_E5M2, ("fp8", "e5m2"): FP8_E5M2}


def parse_scheme(text: str) -> Scheme:
    """Read a scheme name.

    `wBaA`: integers of B = 2..8 bits; A = 16: float inputs, 3..8: integer inputs with a scale for each token, dynamic. Without
    a group, weights of up to 4 bits get groups of 128, others one scale a channel.
    `fp8`: E4M3 weights per channel and inputs per token. `fp4`: E2M1 weights in groups of 128, E4M3 inputs per token.
    `nf4`: NF4 weights in groups of 64, float inputs.
    `mxfp4`, `mxfp6`, `mxfp8`, `mxint2` .. `mxint8`: weights and inputs in blocks of 32 with a power of two as scale.
    `nvfp4`: E2M1 in blocks of 16 with an E4M3 scale under one for the tensor, weights and inputs.
    `kmeans2` .. `kmeans4`: 4 to 16 values a channel; `bcq1` .. `bcq4`: sums of so many binary planes in groups of 128; float
    inputs.
    After a name that is no `wBaA`, `a16` leaves inputs float, and `a8`, `a6`, `a4` gives them that width of the same family.

    Then any of: `-gK` (a scale for every K input columns), `-rN` (for every N output rows), `-block` (128 x 128, inputs in
    groups of 128), `-channel`, `-tensor`; `-sym`, `-asym`; `-floor`, `-even`, `-ceil` (see `Spec.rule`; without one, weights
    have floor and inputs the rule of the engines, `ENGINE_RULES`); `-e5m2`, `-e3m2`;
    `-pow2` (power-of-two scales), `-two` (integer scales under one a row); for inputs `-agK`, `-aasym`, `-astatic` (one
    scale for the tensor, from calibration).

    Raises:
        ValueError: not in the grammar, with what was wrong and examples of what is allowed.
    """
    name = text.strip().lower()
    match = _SCHEME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown scheme {text!r}; examples of schemes: {_EXAMPLES}")
    taken: dict[str, str] = {}
    for option in (o for o in match["options"].split("-") if o):
        kind = next((kind for kind, pattern in _OPTIONS.items() if re.fullmatch(pattern, option)), None)
        if kind is None or kind in taken:
            raise ValueError(f"scheme {text!r}: {option!r} is unknown or said twice; examples of schemes: {_EXAMPLES}")
        taken[kind] = option
    try:
        weight, inputs = _named(match, taken.get("variant"))
        weight = _weight_options(weight, taken)
        inputs = _input_options(inputs, taken)
        _check_spec(weight)
        if inputs is not None:
            _check_spec(inputs)
    except ValueError as error:
        raise ValueError(f"scheme {text!r}: {error}") from error
    return Scheme(name=name, weight=weight, input=inputs)


_OPTIONS = {
    "group": r"g[1-9]\d*|channel|tensor|block",
    "rows": r"r[1-9]\d*",
    "symmetric": "sym|asym",
    "rule": "floor|even|ceil",
    "variant": "e5m2|e3m2",
    "scale": "pow2|two",
    "input_group": r"ag[1-9]\d*",
    "input_symmetric": "aasym",
    "input_static": "astatic",
}


def _named(match: re.Match[str], variant: str | None) -> tuple[Spec, Spec | None]:
    """Weight and input of the first word of a scheme."""
    family = match["float"]
    if family is None:
        weight, bits = integer(int(match["w"])), int(match["a"])
        if bits != 16 and not 3 <= bits <= 8:
            raise ValueError(f"activations have 3 to 8 bits, or 16 (left float), not {bits}")
        group = GROUP_DEFAULT if weight.bits <= 4 else CHANNEL
        return Spec(format=weight, group=group), None if bits == 16 else Spec(format=integer(bits), dynamic=True)
    if variant is not None and (family, variant) not in _VARIANTS:
        raise ValueError(f"{family} has no variant {variant}; there are {', '.join('-'.join(pair) for pair in _VARIANTS)}")
    if family.startswith("mx"):
        own = int(family[-1])
        bits = int(match["fa"] or own)
        formats = [_block_format(family[:-1], width, variant if width == own else None) for width in (own, bits) if width != 16]
        specs = [Spec(format=element, group=32, scale="e8m0") for element in formats]
        return specs[0], replace(specs[1], dynamic=True, rule=ENGINE_RULES.get(formats[1].name, "floor")) if len(
            specs
        ) == 2 else None
    if family.startswith(("kmeans", "bcq")):
        if match["fa"] not in (None, "16"):
            raise ValueError(f"inputs of {family} stay float (a16)")
        kind: Literal["kmeans", "bcq"] = "bcq" if family.startswith("bcq") else "kmeans"
        return Spec(format=codebook(kind, int(family[-1])), group=GROUP_DEFAULT if kind == "bcq" else CHANNEL), None
    single = {
        "fp8": Spec(format=_VARIANTS.get((family, variant or ""), FP8_E4M3)),
        "fp4": Spec(format=FP4_E2M1, group=GROUP_DEFAULT),
        "nf4": Spec(format=NF4, group=64),
        "nvfp4": Spec(format=FP4_E2M1, group=16, scale="e4m3"),
    }[family]
    allowed = {"fp8": ("8", "16"), "fp4": ("8", "16"), "nf4": ("16",), "nvfp4": ("4", "16")}[family]
    bits_given = match["fa"] or allowed[0]
    if bits_given not in allowed:
        raise ValueError(f"activations of {family} have {' or '.join(allowed)} bits, not {bits_given}")
    if bits_given == "16":
        return single, None
    if family == "nvfp4":
        return single, Spec(format=FP4_E2M1, group=16, scale="e4m3", dynamic=True)
    return single, Spec(format=single.format if family == "fp8" else FP8_E4M3, dynamic=True)


def _block_format(family: str, bits: int, variant: str | None) -> Format:
    if family == "mxint":
        if not 2 <= bits <= 8:
            raise ValueError(f"mxint has 2 to 8 bits, not {bits}")
        return block_integer(bits)
    name = f"{family}{bits}"
    if name not in _MX_ELEMENTS:
        raise ValueError(f"mxfp has 4, 6 or 8 bits, not {bits}")
    return _VARIANTS[(name, variant)] if variant else _MX_ELEMENTS[name]


def _weight_options(weight: Spec, taken: dict[str, str]) -> Spec:
    changes: dict[str, Any] = {}
    if group := taken.get("group"):
        named = {"channel": CHANNEL, "tensor": TENSOR, "block": 128}
        changes["group"] = named[group] if group in named else int(group[1:])
        if group == "block":
            changes["rows"] = 128
    if rows := taken.get("rows"):
        changes["rows"] = int(rows[1:])
    if symmetric := taken.get("symmetric"):
        changes["symmetric"] = symmetric == "sym"
    if scale := taken.get("scale"):
        if weight.scale != "float":
            raise ValueError(f"the scales of this format are {weight.scale}, which -{scale} cannot change")
        changes |= {"scale": "e8m0", "rule": "ceil"} if scale == "pow2" else {"scale": "int8"}
    if rule := taken.get("rule"):
        if "e8m0" not in (weight.scale, changes.get("scale")):
            raise ValueError(f"-{rule} is for power-of-two scales only (mx formats, -pow2)")
        changes["rule"] = rule
    return replace(weight, **changes)


def _input_options(inputs: Spec | None, taken: dict[str, str]) -> Spec | None:
    given = [taken[key] for key in ("input_group", "input_symmetric", "input_static") if key in taken]
    if inputs is None:
        if given:
            raise ValueError(f"-{given[0]} is for quantized inputs, and these stay float")
        return None
    changes: dict[str, Any] = {}
    if inputs.scale != "float":
        if given and inputs.scale != "e8m0" or given and given != [taken.get("input_group")]:
            raise ValueError(f"-{given[0]} does not go with inputs whose scales are {inputs.scale}")
        if inputs.scale == "e8m0":
            if group := taken.get("group"):
                changes["group"] = int(group[1:]) if group[0] == "g" else 32
            if "rule" in taken:
                changes["rule"] = taken["rule"]
    elif taken.get("group") == "block":
        changes["group"] = 128
    if group := taken.get("input_group"):
        changes["group"] = int(group[2:])
    if "input_symmetric" in taken:
        changes["symmetric"] = False
    if "input_static" in taken:
        if "input_group" in taken or "input_symmetric" in taken:
            raise ValueError("-astatic is one symmetric scale for the tensor; remove -agK and -aasym")
        changes |= {"group": TENSOR, "dynamic": False}
    return replace(inputs, **changes)


def _check_spec(spec: Spec) -> None:
    """Refuse combinations that mean nothing."""
    if spec.format.codebook and (spec.scale != "float" or spec.rows != 1 or spec.group == TENSOR or not spec.symmetric):
        raise ValueError("a codebook belongs to a channel or a group of it; it goes with -gK and -channel only")
    if spec.format.kind != "int" and not spec.symmetric:
        raise ValueError("float formats have no zero point; remove -asym")
    if spec.format.name.startswith("mxint") and not spec.symmetric:
        raise ValueError("mxint has no zero point; remove -asym")
    if spec.scale == "e8m0" and not spec.symmetric:
        raise ValueError("power-of-two scales have no zero point; remove -asym")
    if spec.scale in ("e4m3", "int8") and (spec.group in (CHANNEL, TENSOR) or spec.rows != 1):
        raise ValueError(f"{spec.scale} scales need groups (-gK), one row each")
    if spec.scale == "int8" and (spec.format.kind != "int" or spec.format.bits > 4):
        raise ValueError("-two is for integers of up to 4 bits")
    if spec.rows != 1 and spec.group == TENSOR:
        raise ValueError("-tensor is one scale in all; remove -rN")


def check_shape(name: str, out_features: int, in_features: int, scheme: Scheme) -> None:
    """Raise ValueError when a [out, in] weight or its input cannot be cut into the groups of `scheme`."""
    leave = f"or leave it out with --ignore '{re.escape(name)}'"
    for spec, option in ((scheme.weight, "-gK"), (scheme.input, "-agK")):
        group = spec.group_size(in_features) if spec is not None else 1
        if in_features % group:
            divisors = [g for g in (16, 32, 64, 128, 256) if in_features % g == 0]
            raise ValueError(
                f"{name}: groups of {group} do not divide its {in_features} input columns; use a group of "
                f"{', '.join(map(str, divisors)) or 'a divisor'} ({option} in the scheme), -channel, {leave}"
            )
    if out_features % scheme.weight.rows:
        raise ValueError(
            f"{name}: blocks of {scheme.weight.rows} rows do not divide its {out_features} output rows; use another -rN, "
            f"{leave}"
        )


# ------------------------------------------------------------------------------------------------------------ arithmetic


class Grid(NamedTuple):
    """Where the values of a quantized matrix may lie; shapes and dtypes as in `QTensor`."""

    scale: Tensor
    zero: Tensor | None
    outer: Tensor | None

    @property
    def steps(self) -> Tensor:
        """Scales as float32, with their second factor."""
        return _whole(self.scale, self.outer)

    def step(self, spec: Spec, rows: int) -> Tensor:
        """The distance between codes 0 and 1, float32 [rows, groups], for a matrix of `rows` rows."""
        step = self.steps
        return step.expand(rows, -1) if spec.group == TENSOR else step.repeat_interleave(spec.rows, 0)


def _whole(scale: Tensor, outer: Tensor | None) -> Tensor:
    """Scales as float32, with their second factor."""
    return scale.float() if outer is None else scale.float() * outer


def values_of(scale: Tensor, spec: Spec) -> Tensor:
    """The values float32 [rows, groups, 2^b] of the codes of each group, for codebooks."""
    return codebooks.levels(scale.float()) if spec.format.kind == "bcq" else scale.float()


def grouped(w: Tensor, spec: Spec) -> Tensor:
    """w [out, in] as [scale rows, scale columns, elements that share one scale]."""
    if spec.group == TENSOR:
        return w.reshape(1, 1, -1)
    groups = w.unflatten(1, (-1, spec.group_size(w.shape[1])))
    if spec.rows == 1:
        return groups
    return groups.unflatten(0, (-1, spec.rows)).transpose(1, 2).flatten(2)


def ungrouped(groups: Tensor, shape: torch.Size, spec: Spec) -> Tensor:
    """The inverse of `grouped`, for a matrix of the given shape."""
    if spec.rows != 1 and spec.group != TENSOR:
        groups = groups.unflatten(2, (spec.rows, -1)).transpose(1, 2)
    return groups.reshape(shape)


def find_params(
    w: Tensor,
    spec: Spec,
    *,
    scale_dtype: torch.dtype,
    shrink_steps: int = 0,
    importance: Tensor | None = None,
    largest: float | None = None,
) -> Grid:
    """Choose scale and zero point of every group.

    Min-max by default. With `shrink_steps` > 1, several ranges are tried and each group keeps the one with the least error:
    sum |w - Q(w)|^2.4, as GPTQ's reference code has it (80 steps), or sum importance (w - Q(w))^2 where the importance of
    columns is known. The ranges are, for float scales, the whole one times 1 - i/100, i < shrink_steps; for powers of two,
    half, whole and double; for E4M3 scales, nine from 3/4 to 3/2, among them the one whose largest element becomes 4 instead
    of 6 (Cook et al., Four Over Six, 2025). For codebooks it is the number of rounds of alternation, by the sum of importance
    (w - Q(w))^2: with 0, k-means has evenly spaced values and BCQ its greedy solution.

    Args:
        w: [out, in] float32.
        scale_dtype: the dtype in which the checkpoint keeps float scales; codes must be computed with the rounded scale.
        importance: [in] float32, such as the mean square of each input.
        largest: the largest magnitude, where it is not that of w alone: matrices that an engine stacks have one outer scale.
    """
    if spec.format.codebook:
        return Grid(_fit_codebook(w, spec, importance, shrink_steps).to(scale_dtype), None, None)
    groups = grouped(w, spec)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    outer = _outer(low, high, spec, largest)
    scale, zero = _params_from_range(low, high, spec, scale_dtype, outer)
    if shrink_steps > 1:
        weights = None if importance is None else grouped(importance.expand_as(w), spec)
        best_error = torch.full_like(low, torch.inf)
        for factor in _factors(spec, shrink_steps):
            s, z = _params_from_range(low * factor, high * factor, spec, scale_dtype, outer)
            delta = _fake(groups, s, z, outer, spec).sub_(groups)
            error = (delta.abs_().pow_(2.4) if weights is None else delta.square_().mul_(weights)).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            scale = torch.where(better, s, scale)
            zero = None if zero is None or z is None else torch.where(better, z, zero)
    return Grid(scale.to(_SCALE_DTYPES.get(spec.scale, scale_dtype)), zero, outer)


def _fit_codebook(w: Tensor, spec: Spec, importance: Tensor | None, rounds: int) -> Tensor:
    """The values, or what they are made of, float32 [out, groups, K], some rows at a time."""
    fit = codebooks.bcq if spec.format.kind == "bcq" else codebooks.kmeans
    weights = None if importance is None else importance.unflatten(0, (-1, spec.group_size(w.shape[1]))).float()
    found = []
    for rows in w.split(max(1, _FITTED // w.shape[1])):
        groups = grouped(rows, spec)
        each = None if weights is None else weights.expand_as(groups).flatten(0, 1)
        found.append(fit(groups.flatten(0, 1), spec.format.bits, importance=each, rounds=rounds).unflatten(0, groups.shape[:2]))
    return torch.cat(found)


_FITTED = 2**22  # weights whose codebooks are fitted at once


def search_steps(spec: Spec, few: int, many: int) -> int:
    """How much `find_params` should search where the user does not say: `few` from 4 bits on, `many` below; codebooks are
    always fitted."""
    return codebooks.ROUNDS if spec.format.codebook else many if spec.format.bits < 4 else few


def _factors(spec: Spec, shrink_steps: int) -> list[float]:
    if spec.scale == "e8m0":
        return [1.0, 0.5, 2.0]
    if spec.scale == "e4m3":
        return [1.0, 1.5, 1.375, 1.25, 1.125, 0.9375, 0.875, 0.8125, 0.75]
    return [1 - step / 100 for step in range(shrink_steps)]


_HEADROOM = 1.5  # of an E4M3 scale, for the factors above 1


def _outer(low: Tensor, high: Tensor, spec: Spec, largest: float | None) -> Tensor | None:
    """The second factor of every scale.

    For E4M3, a power of two, so that scale times outer is exact: the least at which the largest scale and its headroom fit.
    For integers, such that the group with the widest range of a row gets the largest integer.
    """
    if spec.scale == "e4m3":
        reach = torch.maximum(-low, high).max() if largest is None else torch.tensor(largest, device=low.device)
        return _power_of_two(reach * _HEADROOM / spec.format.max, FP8_E4M3.max, FP8_E4M3, "ceil").reshape(1, 1)
    if spec.scale == "int8":
        step = steps_of_range(low, high, spec).amax(1, keepdim=True)
        return torch.where(step > 0, step / _integer_limit(spec), 1.0)
    return None


def outer_scale(largest: float, spec: Spec) -> Tensor:
    """The second factor, float32 [1, 1], of E4M3 scales of values up to `largest`."""
    reach = torch.tensor([[largest]])
    outer = _outer(-reach, reach, spec, largest)
    assert outer is not None
    return outer


def largest_of(outer: float, spec: Spec) -> float:
    """A largest magnitude whose `outer_scale` is `outer`."""
    return outer * FP8_E4M3.max * spec.format.max / _HEADROOM


def _integer_limit(spec: Spec) -> int:
    """The largest integer scale: integer times code less zero point stays within an int8."""
    widest = spec.format.max - spec.format.min if not spec.symmetric else max(spec.format.max, -spec.format.min)
    return int(127 // widest)


def steps_of_range(low: Tensor, high: Tensor, spec: Spec) -> Tensor:
    """Unrounded scales of ranges low .. high."""
    fmt = spec.format
    if not spec.symmetric:
        return (high - low) / (fmt.max - fmt.min)
    reach = torch.maximum(-low, high)
    if signed(spec):
        return torch.where(high > -low, -reach, reach) / -fmt.min
    # Integers have one negative code more than positive ones: half of the whole range is (2^b - 1) / 2 steps.
    return reach / ((fmt.max - fmt.min) / 2)


def signed(spec: Spec) -> bool:
    """Whether scales have a sign: integers of few bits, where the code -2^(b-1), which has no positive counterpart, is worth
    having. The largest magnitude of a group gets it: a negative scale makes it positive (as llama.cpp's and AutoRound's
    formats have it). Engines multiply by a scale, whatever its sign."""
    few = spec.format.kind == "int" and spec.format.bits < 8 and not spec.format.largest
    return few and spec.symmetric and spec.scale == "float"


def usable_steps(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: none is 0, also not rounded to `dtype`, and groups of zeros have 1."""
    least = torch.finfo(dtype).tiny
    return torch.where(step == 0, 1.0, torch.where(step.abs() < least, step.sign() * least, step))


def _power_of_two(largest: Tensor, reach: float, fmt: Format, rule: Rule) -> Tensor:
    """The power of two that brings magnitudes of up to `largest` into those of up to `reach`, the format's maximum; NaN where
    `largest` is not finite, so that all of its block is NaN."""
    if rule == "ceil":
        mantissa, exponent = torch.frexp(largest / reach)
        exponent = exponent - (mantissa == 0.5).int()
    else:
        mantissa, exponent = torch.frexp(largest)
        if rule == "even":
            kept = fmt.bits - 2 if fmt.kind == "int" else fmt.mantissa
            exponent = exponent + (mantissa >= 1 - 2.0 ** -(kept + 2)).int()
        exponent = exponent - 1 - fmt.top_exponent
    power = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 127)), 1.0)
    return torch.where(largest.isfinite(), power, torch.nan)


def _params_from_range(
    low: Tensor, high: Tensor, spec: Spec, dtype: torch.dtype, outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales as float32 with the value they will have when stored, but float scales in `dtype`; zero points."""
    if spec.scale == "e8m0":
        return _power_of_two(torch.maximum(-low, high), spec.format.max, spec.format, spec.rule), None
    step = steps_of_range(low, high, spec)
    if spec.scale == "float":
        scale = usable_steps(step, dtype).to(dtype)
    elif spec.scale == "e4m3":
        assert outer is not None
        scale = FP8_E4M3.round(torch.where(step > 0, step / outer, 1.0)).clamp_(min=2.0**-9)
    else:
        assert outer is not None
        scale = (step / outer).round_().clamp_(1, _integer_limit(spec))
    if spec.symmetric:
        return scale, None
    zero = (spec.format.min - low / _whole(scale, outer)).round_().clamp_(spec.format.min, spec.format.max)
    return scale, zero.to(torch.int8)


def _fake(groups: Tensor, scale: Tensor, zero: Tensor | None, outer: Tensor | None, spec: Spec) -> Tensor:
    """Quantize and dequantize `grouped` values in float32."""
    s = _whole(scale, outer).unsqueeze(-1)
    z = 0.0 if zero is None else zero.float().unsqueeze(-1)
    return (spec.format.round(groups / s + z) - z) * s


def quantize(w: Tensor, grid: Grid, spec: Spec) -> QTensor:
    """Round w [out, in] float32 to the nearest codes of the given scales and zero points."""
    if spec.format.codebook:
        found = [codebooks.nearest(grouped(rows, spec), values) for rows, values in _by_rows(w, values_of(grid.scale, spec))]
        return QTensor(torch.cat(found).to(torch.uint8).view(w.shape), grid.scale, None, spec)
    step = _whole(grid.scale, grid.outer)
    z = 0.0 if grid.zero is None else grid.zero.float().unsqueeze(-1)
    codes = spec.format.encode(grouped(w, spec) / step.unsqueeze(-1) + z)
    return QTensor(ungrouped(codes, w.shape, spec), grid.scale, grid.zero, spec, grid.outer)


def _by_rows(w: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of a matrix at a time, with their codebooks."""
    count = max(1, _FITTED // w.shape[1])
    return zip(w.split(count), values.split(count), strict=True)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in] weights: the product in float32, rounded once to `dtype`. Engines compute the same bits."""
    if q.spec.format.codebook:
        parts = _by_rows(q.codes, values_of(q.scale, q.spec))
        picked = [codebooks.pick(values, grouped(rows, q.spec).long()).to(dtype) for rows, values in parts]
        return torch.cat(picked).view(q.codes.shape)
    values = grouped(q.spec.format.decode(q.codes), q.spec)
    if q.zero is not None:
        values = values - q.zero.float().unsqueeze(-1)
    values = values * q.scale.float().unsqueeze(-1)
    if q.outer is not None:
        values = values * q.outer.unsqueeze(-1)
    return ungrouped(values, q.codes.shape, q.spec).to(dtype)


def to_bcq(q: QTensor) -> QTensor:
    """The same matrix in binary coding, exact: integers of up to 4 bits with float scales (LUT-GEMM, section 3.2).

    The factors are float32, so that offsets are exact too. Scales of one for the tensor become one a row.
    """
    fmt = q.spec.format
    if fmt.kind != "int" or fmt.bits > 4 or q.spec.scale != "float" or q.spec.rows != 1 or fmt.largest:
        raise ValueError(f"{fmt.name} with {q.spec.scale} scales is no uniform code of up to 4 bits with float scales")
    scale = q.scale.float().expand(len(q.codes), -1)
    zero = torch.zeros(()) if q.zero is None else q.zero.float()
    alphas = codebooks.uniform((fmt.min - zero) * scale, scale, fmt.bits)
    group = CHANNEL if q.spec.group == TENSOR else q.spec.group
    spec = Spec(format=codebook("bcq", fmt.bits), group=group)
    return QTensor((q.codes.to(torch.int16) - int(fmt.min)).to(torch.uint8), alphas, None, spec)


def fake_quantize_input(x: Tensor, spec: Spec, largest: float | None = None) -> Tensor:
    """Quantize and dequantize activations as engines do at run time, in float32.

    Scales are largest magnitude / format.max (integers: symmetric, or with a zero point over the range that contains 0) of
    each token, each group of a token, or (static) of the whole calibration data; powers of two by the rule of the spec; E4M3
    under a power of two from `largest`. What shares a scale with an infinity or a NaN becomes NaN, so that an overflow is seen.

    Args:
        x: [..., features], any float dtype; the result has the same shape and dtype.
        largest: the largest magnitude seen in calibration; needed by static scales and by "e4m3".
    """
    values = x.float().reshape(-1, x.shape[-1])
    fmt = spec.format
    if not spec.dynamic:
        assert largest is not None and spec.group == TENSOR and spec.symmetric, spec
        scale = torch.tensor(largest / fmt.max, device=x.device)
        return fmt.round(values / scale).mul_(scale).view(x.shape).to(x.dtype)
    assert spec.rows == 1 and spec.group != TENSOR, spec
    groups = grouped(values, spec)
    reach = groups.abs().amax(-1, keepdim=True)
    if spec.scale == "e8m0":
        scale = _power_of_two(reach, fmt.max, fmt, spec.rule)
    elif spec.scale == "e4m3":
        assert largest is not None
        outer = _outer(reach, reach, spec, largest)
        assert outer is not None
        scale = FP8_E4M3.round(reach / fmt.max / outer).clamp_(min=2.0**-9) * outer
        scale = torch.where(reach.isfinite(), scale, torch.nan)  # as E4M3, which has no infinity, has it
    elif spec.symmetric:
        scale = reach.clamp_(min=1e-12) / fmt.max
    else:
        low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low).clamp_(min=1e-12) / (fmt.max - fmt.min)
        zero = (fmt.min - low / scale).round_()
        return ((fmt.round(groups / scale + zero) - zero) * scale).reshape(x.shape).to(x.dtype)
    return fmt.round(groups / scale).mul_(scale).reshape(x.shape).to(x.dtype)


def validate(q: QTensor, name: str) -> None:
    """Raise ValueError when q could not be loaded or would decode to nonsense."""
    for problem in problems_of_scales(q.scale, q.outer, q.spec):
        raise ValueError(f"{name}: {problem}")
    if q.codes.dtype != q.spec.format.code_dtype:
        raise ValueError(f"{name}: codes are {q.codes.dtype}, {q.spec.format.name} needs {q.spec.format.code_dtype}")
    for problem in (*problems_of_codes(q.codes, q.spec), *problems_of_zeros(q.zero, q.spec)):
        raise ValueError(f"{name}: {problem}")


def problems_of_scales(scale: Tensor, outer: Tensor | None, spec: Spec) -> list[str]:
    """What is wrong with the values of scales, shapes and dtypes as in `QTensor`."""
    if outer is not None and not bool((torch.isfinite(outer) & (outer > 0)).all()):
        return ["the second factor of the scales is zero, negative or not finite"]
    whole = _whole(scale, outer)
    usable = whole != 0 if signed(spec) else whole > 0
    if not bool(torch.isfinite(whole).all()) or not (spec.format.codebook or bool(usable.all())):
        return ["a scale is zero, not finite, or negative where it must not be"]
    return []


def problems_of_codes(codes: Tensor, spec: Spec) -> list[str]:
    """What is wrong with the values of codes, of `Format.code_dtype`."""
    fmt = spec.format
    if fmt.kind == "int" and bool(((codes < fmt.min) | (codes > fmt.max)).any()):
        return [f"a code lies outside {fmt.min:g} .. {fmt.max:g}, the range of {fmt.name}"]
    if fmt.kind == "float" and not bool(fmt.is_number(codes).all()):
        return [f"a code of {fmt.name} is no number"]
    return []


def problems_of_zeros(zero: Tensor | None, spec: Spec) -> list[str]:
    """What is wrong with the values of zero points."""
    fmt = spec.format
    if zero is not None and bool(((zero < fmt.min) | (zero > fmt.max)).any()):
        return [f"a zero point lies outside {fmt.min:g} .. {fmt.max:g}, the range of {fmt.name}"]
    return []
