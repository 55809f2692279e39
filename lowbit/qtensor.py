"""A quantized matrix, the choice that describes it, and the arithmetic between floats and codes.

    w[o, i] ~ scale[o, i // G] * (value(codes[o, i]) - zero[o, i // G])

`Spec` says how one tensor is quantized, `Scheme` what happens to one linear layer (weight and input), `QTensor` is the
result. `find_params` chooses scales, `quantize` makes codes, `dequantize` is the only place that turns codes into floats.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import FP8_E4M3, Format, integer

CHANNEL = -1  # Spec.group: one scale per output row
TENSOR = 0  # Spec.group: one scale for the whole tensor


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How one tensor is quantized.

    Attributes:
        format: the element format.
        group: K consecutive input columns share a scale; CHANNEL (-1): one scale per output row (for activations: per
            token); TENSOR (0): one scale in all.
        symmetric: no zero point.
        dynamic: the scale is computed from the data at run time (activations).
    """

    format: Format
    group: int = CHANNEL
    symmetric: bool = True
    dynamic: bool = False

    def group_size(self, columns: int) -> int:
        """Columns that share one scale in a matrix of `columns` columns."""
        return columns if self.group in (CHANNEL, TENSOR) else self.group

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `spec_from_dict`."""
        return {
            "format": self.format.name,
            "group": self.group,
            "symmetric": self.symmetric,
            "dynamic": self.dynamic,
        }


def spec_from_dict(fields: dict[str, Any]) -> Spec:
    """Rebuild a Spec from `Spec.to_dict`."""
    name = fields["format"]
    known = {FP8_E4M3.name: FP8_E4M3} | {integer(b).name: integer(b) for b in range(2, 9)}
    if name not in known:
        raise ValueError(f"unknown number format {name!r}; known are {', '.join(sorted(known))}")
    return Spec(format=known[name], group=fields["group"], symmetric=fields["symmetric"], dynamic=fields["dynamic"])


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
        scale: [out, in / G], [out, 1] or [1, 1]; the dtype in which the checkpoint stores it.
        zero: int8, the shape of `scale`; None when symmetric.
        spec: how the above is to be read.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: Spec = field(compare=False)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and zero points."""
        stored = self.codes.numel() * self.spec.format.bits + self.scale.numel() * self.scale.element_size() * 8
        if self.zero is not None:
            stored += self.zero.numel() * self.spec.format.bits
        return stored / self.codes.numel()


# --------------------------------------------------------------------------------------------------------------- schemes

_GRAMMAR = "w4a16, w4a16-g64-asym, w8a8, w8a16-channel, w3a16-g128, fp8, fp8a16, w8a8-tensor"
_SCHEME = re.compile(r"(?:w(?P<w>\d+)a(?P<a>\d+)|fp8(?P<fp8>a16)?)(?P<options>(?:-[a-z0-9]+)*)")
GROUP_DEFAULT = 128  # columns a group, for integers of 4 bits and fewer where the scheme names none


def parse_scheme(text: str) -> Scheme:
    """Read a scheme name.

    Grammar: `wBaA` (B = 2..8 weight bits; A = 16: float input, 8: int8 input per token, dynamic) or `fp8` (E4M3 weights
    per channel and inputs per token) or `fp8a16` (weights alone), then any of `-gK` (a scale for every K input columns),
    `-channel`, `-tensor`, `-sym`, `-asym`. Without a group, weights of up to 4 bits get groups of 128, others one scale a
    channel.

    Raises:
        ValueError: not in the grammar, with what was wrong and examples of what is allowed.
    """
    match = _SCHEME.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"unknown scheme {text!r}; examples of schemes: {_GRAMMAR}")
    options = [o for o in match["options"].split("-") if o]
    if match["w"]:
        weight_format = integer(int(match["w"]))
        if match["a"] not in ("8", "16"):
            raise ValueError(f"scheme {text!r}: activations have 8 or 16 bits, not {match['a']}")
        inputs = Spec(format=integer(8), dynamic=True) if match["a"] == "8" else None
    else:
        weight_format = FP8_E4M3
        inputs = None if match["fp8"] else Spec(format=FP8_E4M3, dynamic=True)
    group: int | None = None
    symmetric: bool | None = None
    for option in options:
        if option in ("sym", "asym") and symmetric is None:
            symmetric = option == "sym"
        elif re.fullmatch(r"g[1-9]\d*|channel|tensor", option) and group is None:
            group = {"channel": CHANNEL, "tensor": TENSOR}.get(option) if option[0] != "g" else int(option[1:])
        else:
            raise ValueError(f"scheme {text!r}: {option!r} is unknown or said twice; examples of schemes: {_GRAMMAR}")
    if group is None:
        group = GROUP_DEFAULT if weight_format.bits <= 4 else CHANNEL
    if weight_format.kind == "float" and symmetric is False:
        raise ValueError(f"scheme {text!r}: float formats have no zero point; remove -asym")
    weight = Spec(format=weight_format, group=group, symmetric=symmetric is not False)
    return Scheme(name=text.strip().lower(), weight=weight, input=inputs)


def check_shape(name: str, out_features: int, in_features: int, scheme: Scheme) -> None:
    """Raise ValueError when a [out, in] weight cannot be cut into the groups of `scheme`."""
    group = scheme.weight.group_size(in_features)
    if in_features % group:
        divisors = [g for g in (16, 32, 64, 128, 256) if in_features % g == 0]
        raise ValueError(
            f"{name}: groups of {group} do not divide its {in_features} input columns; use a group of "
            f"{', '.join(map(str, divisors)) or 'a divisor'} (-gK in the scheme), -channel, or leave it out with "
            f"--ignore '{re.escape(name)}'"
        )


# ------------------------------------------------------------------------------------------------------------ arithmetic


def grouped(w: Tensor, spec: Spec) -> Tensor:
    """View w [out, in] as [scale rows, scale columns, elements that share one scale]."""
    if spec.group == TENSOR:
        return w.reshape(1, 1, -1)
    return w.unflatten(1, (-1, spec.group_size(w.shape[1])))


def find_params(
    w: Tensor,
    spec: Spec,
    *,
    scale_dtype: torch.dtype,
    shrink_steps: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every group.

    Min-max by default. With `shrink_steps` > 1, the range is shrunk by factors 1 - i/100 for i < shrink_steps, and each
    group keeps the factor with the least error: sum |w - Q(w)|^2.4, as GPTQ's reference code has it (80 steps), or
    sum importance (w - Q(w))^2 where the importance of columns is known.

    Args:
        w: [out, in] float32.
        scale_dtype: the dtype in which the checkpoint keeps scales; codes must be computed with the rounded scale.
        importance: [in] float32, such as the mean square of each input.

    Returns:
        scale [out, groups] of `scale_dtype` ([1, 1] for one scale a tensor) and zero int8 of that shape, or None.
    """
    groups = grouped(w, spec)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    best = _params_from_range(low, high, spec, scale_dtype)
    if shrink_steps <= 1:
        return best
    weights = None if importance is None else grouped(importance.expand_as(w), spec)
    best_error = torch.full_like(low, torch.inf)
    scale, zero = best
    for step in range(shrink_steps):
        factor = 1 - step / 100
        s, z = _params_from_range(low * factor, high * factor, spec, scale_dtype)
        delta = _fake(groups, s, z, spec).sub_(groups)
        error = (delta.abs_().pow_(2.4) if weights is None else delta.square_().mul_(weights)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, s, scale)
        zero = None if zero is None or z is None else torch.where(better, z, zero)
    return scale, zero


def _params_from_range(low: Tensor, high: Tensor, spec: Spec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    fmt = spec.format
    if spec.symmetric:
        # Integers have one negative code more than positive ones: half of the whole range is (2^b - 1) / 2 steps.
        reach = (fmt.max - fmt.min) / 2
        scale = torch.maximum(-low, high) / reach
    else:
        scale = (high - low) / (fmt.max - fmt.min)
    scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(dtype).tiny), 1.0).to(dtype)
    if spec.symmetric:
        return scale, None
    return scale, (fmt.min - low / scale.float()).round_().clamp_(fmt.min, fmt.max).to(torch.int8)


def _fake(groups: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """Quantize and dequantize `grouped` values in float32."""
    s = scale.float().unsqueeze(-1)
    z = 0.0 if zero is None else zero.float().unsqueeze(-1)
    return (spec.format.round(groups / s + z) - z) * s


def quantize(w: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> QTensor:
    """Round w [out, in] float32 to the nearest codes of the given scales and zero points."""
    z = 0.0 if zero is None else zero.float().unsqueeze(-1)
    codes = spec.format.encode(grouped(w, spec) / scale.float().unsqueeze(-1) + z)
    return QTensor(codes.reshape(w.shape), scale, zero, spec)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in] weights: the product in float32, rounded once to `dtype`. Engines compute the same bits."""
    values = grouped(q.spec.format.decode(q.codes), q.spec)
    if q.zero is not None:
        values = values - q.zero.float().unsqueeze(-1)
    return (values * q.scale.float().unsqueeze(-1)).reshape(q.codes.shape).to(dtype)


def fake_quantize_input(x: Tensor, spec: Spec) -> Tensor:
    """Dynamic quantization of activations: one symmetric scale per token, absmax / format.max, as vLLM computes it.

    Args:
        x: [..., features], any float dtype; the result has the same shape and dtype.
    """
    assert spec.dynamic and spec.symmetric and spec.group == CHANNEL, spec
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True).clamp_(min=1e-12) / spec.format.max
    return spec.format.round(values / scale).mul_(scale).to(x.dtype)


def validate(q: QTensor, name: str) -> None:
    """Raise ValueError when q could not be loaded or would decode to nonsense."""
    if not bool(torch.isfinite(q.scale).all()) or not bool((q.scale > 0).all()):
        raise ValueError(f"{name}: a scale is zero, negative or not finite")
    if q.codes.dtype != q.spec.format.code_dtype:
        raise ValueError(f"{name}: codes are {q.codes.dtype}, {q.spec.format.name} needs {q.spec.format.code_dtype}")
