"""The one way to the kernels: lay a matrix out once, quantize rows of inputs, multiply.

    prepared = prepare([q, k, v], inputs=Input(spec), dtype=torch.bfloat16, device="cuda")
    rows, stream = add_rms_norm(x, residual, weight, eps, prepared.inputs)
    out = linear(rows, prepared)

A `Prepared` matrix takes floats, or rows of codes of 8 bits (`takes_codes`). The functions that make rows leave either, as
their `inputs` say. Everything here runs on any device, and under torch.compile and CUDA graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lowbit.kernels import ops
from lowbit.kernels.packed import Packed, pack_codes, pack_planes, reason_against_codes, reason_against_planes, stacked
from lowbit.kernels.reference import Quantized
from lowbit.qtensor import CHANNEL, TENSOR, QTensor, Scheme, Spec, parse_scheme


class Inputs(Protocol):
    """How the input of a linear is quantized, as `unit.Input` says it."""

    @property
    def spec(self) -> Spec | None:
        """See `qtensor.fake_quantize_input`; not None where a kernel is asked for codes."""

    @property
    def largest(self) -> float | None:
        """The largest magnitude seen in calibration, where the spec is static."""


@dataclass(frozen=True)
class _Inputs:
    spec: Spec
    largest: float | None = None


_W8A8 = parse_scheme("w8a8").input
assert _W8A8 is not None
INT8: Inputs = _Inputs(_W8A8)  # one scale a row


@dataclass(frozen=True)
class Prepared:
    """A matrix [out, in], or several below each other, as a kernel reads it.

    Attributes:
        packed: the matrix.
        inputs: how rows are quantized; None: they are floats of `dtype`.
        dtype: of the product.
        sizes: the outputs of each matrix.
    """

    packed: Packed
    inputs: Inputs | None
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def to(self, device: str | torch.device) -> "Prepared":
        """The same on another device."""
        return replace(self, packed=self.packed.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """out, in."""
        return self.packed.shape

    @property
    def takes_codes(self) -> bool:
        """Whether inputs are `Quantized`; floats are quantized first."""
        return self.inputs is not None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return self.packed.nbytes


def reason_against(scheme: Scheme) -> str | None:
    """Why no kernel multiplies by such weights with such inputs; None if one does.

    Where inputs are what it does not take, the same weights may do with float inputs: `replace(scheme, input=None)`.
    """
    return reason_against_planes(scheme.weight) if scheme.input is None else reason_against_codes(scheme.weight, scheme.input)


def prepare(
    parts: QTensor | Sequence[QTensor],
    *,
    inputs: Inputs | None,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Prepared:
    """Lay out a matrix, or several that have one input, below each other.

    Args:
        inputs: a `unit.Input`, or None for floats.
        dtype: of the product and of float inputs, float16 or bfloat16.

    Raises:
        ValueError: no kernel for it (`reason_against`), another dtype, or matrices of different layouts.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"kernels compute in float16 or bfloat16, not {dtype}")
    parts = [q.to(device) for q in ([parts] if isinstance(parts, QTensor) else parts)]
    spec = None if inputs is None else inputs.spec
    packed = [pack_planes(q, dtype) if spec is None else pack_codes(q, spec, dtype) for q in parts]
    return Prepared(stacked(packed), inputs, dtype, tuple(len(q.codes) for q in parts))


def linear(x: Tensor | Quantized, prepared: Prepared, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [..., in] times the matrix, plus bias [out], plus residual [..., out]: [..., out] in `prepared.dtype`.

    Raises:
        ValueError: floats of another dtype or width, or codes where floats are taken.
    """
    packed, width = prepared.packed, prepared.shape[1]
    if isinstance(x, Quantized) != prepared.takes_codes:
        if isinstance(x, Quantized):
            raise ValueError("codes were given to a matrix whose inputs are floats")
        assert prepared.inputs is not None
        x = plain(x, prepared.inputs)
    found = x.codes if isinstance(x, Quantized) else x
    if found.shape[-1] != width or (not isinstance(x, Quantized) and found.dtype != prepared.dtype):
        raise ValueError(f"packed for {prepared.dtype} of width {width}, but x is {found.dtype} [..., {found.shape[-1]}]")
    tensors = (packed.words, packed.high, packed.scale, packed.zero, packed.outer, packed.sums, packed.counters)
    layout = [packed.group, packed.step]
    if isinstance(x, Quantized):
        out: Tensor = ops.linear_codes(*x, *tensors, layout, packed.format, bias, residual, prepared.dtype)
    else:
        out = ops.linear_floats(x, *tensors, layout, packed.format, bias, residual)
    return out


# ------------------------------------------------------------------------------------------------------------------- rows

# What a product takes. Each of these functions is one kernel; with `inputs` None it leaves floats of the dtype of x.
Rows = Tensor | Quantized


def plain(x: Tensor, inputs: Inputs = INT8) -> Rows:
    """x [..., width] quantized."""
    return _rows("plain", x, inputs)[0]


def silu_mul(gate: Tensor, up: Tensor, inputs: Inputs | None = INT8) -> Rows:
    """silu(gate) * up, quantized."""
    return _rows("silu_mul", gate, inputs, second=up)[0]


def gelu(x: Tensor, inputs: Inputs | None = INT8, *, tanh: bool = False) -> Rows:
    """GELU, exact or by its approximation with tanh, quantized."""
    return _rows("gelu_tanh" if tanh else "gelu", x, inputs)[0]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    inputs: Inputs | None = INT8,
    *,
    one_plus: bool = False,
    dtype: torch.dtype | None = None,
) -> Rows:
    """RMSNorm of x, times weight or (`one_plus`) 1 + weight, quantized; floats in `dtype`, if given."""
    return _rows("rms_norm", x, inputs, weight=weight, eps=eps, one_plus=one_plus, dtype=dtype)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, inputs: Inputs | None = INT8) -> Rows:
    """LayerNorm of x, quantized."""
    return _rows("layer_norm", x, inputs, weight=weight, bias=bias, eps=eps)[0]


def kept_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, inputs: Inputs | None = INT8
) -> tuple[Rows, Tensor]:
    """`layer_norm` and its floats, rounded to the dtype of x before: for models whose residuals are what a norm gives."""
    return _rows("layer_norm", x, inputs, weight=weight, bias=bias, eps=eps, kept=True)


def kept_rms_norm(
    x: Tensor, weight: Tensor, eps: float, inputs: Inputs | None = INT8, *, one_plus: bool = False
) -> tuple[Rows, Tensor]:
    """The same of `rms_norm`."""
    return _rows("rms_norm", x, inputs, weight=weight, eps=eps, one_plus=one_plus, kept=True)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, inputs: Inputs | None = INT8, *, one_plus: bool = False
) -> tuple[Rows, Tensor]:
    """`rms_norm` of x + residual, and that sum, rounded to the dtype of x before."""
    return _rows("rms_norm", x, inputs, second=residual, weight=weight, eps=eps, one_plus=one_plus)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, inputs: Inputs | None = INT8
) -> tuple[Rows, Tensor]:
    """`layer_norm` of x + residual, and that sum, rounded to the dtype of x before."""
    return _rows("layer_norm", x, inputs, second=residual, weight=weight, bias=bias, eps=eps)


def _rows(
    producer: str,
    x: Tensor,
    inputs: Inputs | None,
    *,
    second: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
    kept: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Rows, Tensor]:
    if inputs is None:
        floats, _, _, stream = ops.rows(producer, x, second, weight, bias, eps, one_plus, "", CHANNEL, True, None, kept, dtype)
        return floats, stream
    spec = inputs.spec
    assert spec is not None
    group = CHANNEL if spec.group in (CHANNEL, TENSOR, x.shape[-1]) else spec.group
    largest = None if spec.dynamic else inputs.largest
    codes, scale, zero, stream = ops.rows(
        producer, x, second, weight, bias, eps, one_plus, spec.format.name, group, spec.symmetric, largest, kept
    )
    return Quantized(codes, scale, None if spec.symmetric else zero), stream


# --------------------------------------------------------------------------------------------------- between two products


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [rows, heads, tokens, width] with rotary embedding by cos and sin [rows or 1, tokens, width], in one kernel.

    Raises:
        ValueError: shapes that do not belong together.
    """
    rows, _, tokens, width = q.shape
    fits = k.shape[::2] == q.shape[::2] and k.shape[3] == width and width % 2 == 0
    if not fits or cos.shape != sin.shape or cos.shape[1:] != (tokens, width) or len(cos) not in (1, rows):
        raise ValueError(f"q, k, cos and sin of shapes {_shapes(q, k, cos, sin)} do not belong together")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return ops.rope(q, k, cos, sin)


def put(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor) -> None:
    """Put k and v [rows, heads, tokens, width] into a contiguous cache [rows, heads, length, width], at [tokens]: one kernel.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    for cache, new in ((keys, k), (values, v)):
        same = cache.dtype == new.dtype and cache.shape[::3] == new.shape[::3] and cache.shape[1] == new.shape[1]
        if not same or at.shape != new.shape[2:3] or not cache.is_contiguous():
            raise ValueError(f"{new.dtype} {list(new.shape)} does not go into a cache {cache.dtype} {list(cache.shape)}")
    ops.put(keys, values, k, v, at)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float | None = None) -> Tensor:
    """Attention to all keys that the mask shows: softmax(factor q k^T) v, each token to the same keys of its row.

    Args:
        q: [rows, heads, tokens, width]. k, v: [rows, heads, keys, width], or of a part of the heads, each for several of q.
        mask: bool [rows or 1, 1, 1, keys], or None.
        factor: by default width^-0.5.

    Returns:
        [rows, heads, tokens, width]; in memory, heads lie between tokens and width.

    Raises:
        ValueError: shapes that do not belong together.
    """
    rows, heads, _, width = q.shape
    keys = k.shape[2]
    hidden = mask is not None and (mask.shape[1:] != (1, 1, keys) or len(mask) not in (1, rows))
    if not k.shape == v.shape == (rows, k.shape[1], keys, width) or heads % k.shape[1] or hidden:
        raise ValueError(f"q, k, v and mask of shapes {_shapes(q, k, v, mask)} do not belong together")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    seen = None if mask is None else mask[:, 0, 0].contiguous()
    return ops.attend(q, k, v, seen, width**-0.5 if factor is None else factor)


def _shapes(*tensors: Tensor | None) -> str:
    return ", ".join(str(list(part.shape)) for part in tensors if part is not None)
