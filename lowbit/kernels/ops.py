"""The kernels as operators of torch: on a GPU Triton's, elsewhere the specification; both under torch.compile and CUDA graphs.

Triton is imported when an operator first needs it. Tests set TRITON_INTERPRET=1 and have the kernels interpreted on the CPU.
They are registered without what `torch.library.custom_op` puts around a function, which takes 10 us a call: nothing here has a
gradient, and no output is an input.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import FORMATS, Format
from lowbit.kernels import reference
from lowbit.kernels.packed import Packed, unpack
from lowbit.kernels.reference import Quantized
from lowbit.qtensor import CHANNEL, TENSOR, Spec

_BF16_CORES, _FP8_CORES = (8, 0), (8, 9)  # least compute capabilities
_ROWS_OF_SCALED_MM = 128  # from here on PyTorch's row-wise FP8 product is the faster: 110 us, ours 135, at 256 x 8192 x 28672
_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
PRODUCERS = ("plain", "rms_norm", "layer_norm", "silu_mul", "gelu", "gelu_tanh")


def operator(*mutated: str) -> Callable[[Callable[..., Any]], Any]:
    """Make torch.ops.lowbit.NAME of a function of that name, which changes these of its arguments."""

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutated)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.lowbit, name).default

    return register


def fake(of: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function say what shapes an operator gives."""
    return torch.library.register_fake(of._name, lib=_LIBRARY)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _by_kernel(x: Tensor, fp8: bool = False) -> bool:
    """Whether a Triton kernel computes; refuses a GPU that is too old."""
    if x.is_cuda:
        least = _FP8_CORES if fp8 else _BF16_CORES
        found = _capability(x.device)
        if found < least:
            what = "FP8" if fp8 else "bfloat16"
            raise ValueError(
                f"{torch.cuda.get_device_name(x.device)} has compute capability {found[0]}.{found[1]}, no {what} tensor cores "
                f"({least[0]}.{least[1]}), which this product needs; load the model on a newer GPU, or with dequantized weights"
            )
        return True
    return os.environ.get("TRITON_INTERPRET") == "1"


def _by_triton(x: Tensor) -> bool:
    """Whether a Triton kernel computes what needs no tensor cores, which the specification does on any other device."""
    if not x.is_cuda:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return _capability(x.device) >= _BF16_CORES and find_spec("triton") is not None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _packed(
    words: Tensor, high: Tensor | None, scale: Tensor | None, zero: Tensor | None, outer: Tensor,
    sums: Tensor | None, counters: Tensor, layout: list[int], fmt: str, inner: int,
) -> Packed:  # fmt: skip
    return Packed(words, high, scale, zero, outer, sums, counters, fmt, layout[0], layout[1], (outer.shape[0], inner))


@operator()
def linear_floats(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor | None, zero: Tensor | None, outer: Tensor,
    sums: Tensor | None, counters: Tensor, layout: list[int], fmt: str, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [..., in] times a `Packed`, plus bias [out], plus residual [..., out]: [..., out] in the dtype of x."""
    packed = _packed(words, high, scale, zero, outer, sums, counters, layout, fmt, x.shape[-1])
    if not _by_kernel(x):
        return reference.linear(x, unpack(packed), bias, residual)
    from lowbit.kernels import binary, weight_only

    flat, added = _flat(x).contiguous(), None if residual is None else _flat(residual).contiguous()
    kernel = binary if binary.takes(len(flat), packed) else weight_only
    with torch.cuda.device_of(x):
        out = kernel.linear(flat, packed, bias, added)
    return out.view(*x.shape[:-1], -1)


@fake(linear_floats)
def _(x, words, high, scale, zero, outer, sums, counters, layout, fmt, bias, residual):
    return x.new_empty(*x.shape[:-1], outer.shape[0])


@operator()
def linear_codes(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, words: Tensor, high: Tensor | None, scale: Tensor | None,
    zero: Tensor | None, outer: Tensor, sums: Tensor | None, counters: Tensor, layout: list[int], fmt: str, bias: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same for rows of codes, in `dtype`."""
    packed = _packed(words, high, scale, zero, outer, sums, counters, layout, fmt, codes.shape[-1])
    x = Quantized(codes, x_scale, x_zero)
    if not _by_kernel(codes, fp8=codes.dtype == torch.float8_e4m3fn):
        out = reference.linear(reference.dequantize_rows(x), unpack(packed), bias, residual)
        return out.to(dtype)
    flat = Quantized(*(None if part is None else _flat(part).contiguous() for part in x))  # type: ignore[arg-type]
    added = None if residual is None else _flat(residual).contiguous()
    if _scaled_mm_takes(flat, packed, dtype):
        scales = flat.scale, packed.outer[None]
        out = torch._scaled_mm(flat.codes, words.T, *scales, bias, out_dtype=dtype, use_fast_accum=True)
        out = out if added is None else out + added
    else:
        from lowbit.kernels import codes as kernel

        with torch.cuda.device_of(codes):
            out = kernel.linear(flat, packed, bias, added, dtype)
    return out.view(*codes.shape[:-1], -1)


def _scaled_mm_takes(x: Quantized, packed: Packed, dtype: torch.dtype) -> bool:
    """Many rows of E4M3, one scale each, as PyTorch's product has them."""
    fits = x.codes.is_cuda and x.codes.dtype == torch.float8_e4m3fn and packed.step == 0 and dtype == torch.bfloat16
    return fits and len(x.codes) >= _ROWS_OF_SCALED_MM and packed.shape[0] % 16 == packed.shape[1] % 16 == 0


@fake(linear_codes)
def _(codes, x_scale, x_zero, words, high, scale, zero, outer, sums, counters, layout, fmt, bias, residual, dtype):
    return codes.new_empty(*codes.shape[:-1], outer.shape[0], dtype=dtype)


@operator()
def rows(
    producer: str, x: Tensor, second: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, one_plus: bool,
    fmt: str, group: int, symmetric: bool, largest: float | None, kept: bool = False, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a producer makes of x [..., width], as codes of a format (fmt "": floats): codes, scale, zero, x + second.

    second: `up` of "silu_mul", the residual of norms. group: columns a scale, -1: all; largest: given, a static scale. kept:
    of a norm the floats that become codes, in the place of the sum. dtype: of floats, by default that of x. What there is none
    of is empty.
    """
    assert producer in PRODUCERS, producer
    out = _empty_rows(producer, x, second, fmt, group, symmetric, kept, dtype)
    added = second is not None and producer != "silu_mul"
    if _by_kernel(x, fp8=fmt == "fp8_e4m3"):
        from lowbit.kernels import rows as kernel

        first, other = (None if part is None else _rows_contiguous(part) for part in (x, second))
        assert first is not None
        given = None if largest is None else largest / FORMATS[fmt].max
        with torch.cuda.device_of(x):
            kernel.rows(
                *(producer, first, other, weight, bias, out),
                added=added,
                kept=kept,
                eps=eps,
                one_plus=one_plus,
                fmt=FORMATS[fmt] if fmt else None,
                group=max(group, 0),
                given=given,
                symmetric=symmetric,
            )
        return out
    if added:
        assert second is not None
        x = (x.float() + second.float()).to(x.dtype)
    values = _produced(producer, x, second, weight, bias, eps, one_plus)
    if kept:
        values = out[3].copy_(values).float()
    elif added:
        out[3].copy_(x)
    if not fmt:
        out[0].copy_(values)
        return out
    spec = _spec(FORMATS[fmt], group, symmetric, largest)
    found = reference.quantize_rows(values, spec, largest)
    out[0].copy_(found.codes)
    out[1].copy_(found.scale)
    if found.zero is not None:
        out[2].copy_(found.zero)
    return out


def _rows_contiguous(x: Tensor) -> Tensor:
    """x as [rows, width], rows any equal distance apart; a copy where they are not."""
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _spec(fmt: Format, group: int, symmetric: bool, largest: float | None) -> Spec:
    dynamic = largest is None
    return Spec(format=fmt, group=group if dynamic else TENSOR, symmetric=symmetric, dynamic=dynamic)


def _produced(
    producer: str, x: Tensor, second: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, one_plus: bool
) -> Tensor:
    scaled = None if weight is None else weight.float() + one_plus
    if producer == "silu_mul":
        assert second is not None
        return reference.silu_mul(x, second)
    if producer in ("gelu", "gelu_tanh"):
        return reference.gelu(x, tanh=producer == "gelu_tanh")
    if producer == "plain":
        return x.float()
    assert scaled is not None
    return reference.rms_norm(x, scaled, eps) if producer == "rms_norm" else reference.layer_norm(x, scaled, bias, eps)


def _empty_rows(
    producer: str,
    x: Tensor,
    second: Tensor | None,
    fmt: str,
    group: int,
    symmetric: bool,
    kept: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, before = x.shape[-1], x.shape[:-1]
    groups = (1 if group == CHANNEL else width // group) if fmt else 0
    kind = (dtype or x.dtype) if not fmt else torch.int8 if FORMATS[fmt].kind == "int" else torch.float8_e4m3fn
    scale = x.new_empty(*before, groups, dtype=torch.float32)
    zero = x.new_empty(*before, groups if not symmetric else 0, dtype=torch.float32)
    stream = x.new_empty(*before, width if kept or (second is not None and producer != "silu_mul") else 0)
    return x.new_empty(*before, width, dtype=kind), scale, zero, stream


@fake(rows)
def _(producer, x, second, weight, bias, eps, one_plus, fmt, group, symmetric, largest, kept=False, dtype=None):
    return _empty_rows(producer, x, second, fmt, group, symmetric, kept, dtype)


@operator()
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [rows, heads, tokens, width], the last axis contiguous, turned; cos and sin [rows or 1, tokens, width]."""
    out = torch.empty_like(q), torch.empty_like(k)
    if not _by_triton(q):
        for x, turned in zip((q, k), out, strict=True):
            turned.copy_(reference.rope(x, cos, sin))
        return out
    from lowbit.kernels import rope as kernel

    with torch.cuda.device_of(q):
        kernel.rope(q, k, cos.contiguous(), sin.contiguous(), *out)
    return out


@fake(rope)
def _(q, k, cos, sin):
    return torch.empty_like(q), torch.empty_like(k)


@operator()
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """Attention, see `reference.attend`; the last axis of all is contiguous. [rows, heads, tokens, width]."""
    out = _between(q)
    if not _by_triton(q):
        return out.copy_(reference.attend(q, k, v, mask, factor))
    from lowbit.kernels import attention

    with torch.cuda.device_of(q):
        attention.attend(q, k, v, mask, factor, out)
    return out


def _between(q: Tensor) -> Tensor:
    rows, heads, tokens, width = q.shape
    return q.new_empty(rows, tokens, heads, width).transpose(1, 2)


@fake(attend)
def _(q, k, v, mask, factor):
    return _between(q)


@operator("keys", "values")
def put(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor) -> None:
    """k and v [rows, heads, tokens, width] into a contiguous cache [rows, heads, length, width], at [tokens]."""
    if not _by_triton(k):
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        return
    from lowbit.kernels import attention

    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with torch.cuda.device_of(k):
        attention.put(keys, values, k, v, at)
