"""The one way to the kernels: lay a matrix out once, quantize rows of inputs, multiply.

A `Prepared` matrix takes float inputs (`weight_only`), or the int8 codes of rows (per-channel weights of 8 bits).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import reference
from lowbit.qtensor import CHANNEL, QTensor, Scheme, Spec

if TYPE_CHECKING:
    from lowbit.kernels.weight_only import Packed


class Quantized(NamedTuple):
    """Rows as codes: x ~ codes [..., in] int8 * scale [..., 1] float32."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Prepared:
    """A matrix [out, in] as a kernel reads it, or several below each other.

    Attributes:
        shape: out, in.
        dtype: of the product, and of float inputs.
        packed: for float inputs.
        codes, scale: for int8 inputs, int8 [out, in] and float32 [out].
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    packed: "Packed | None" = None
    codes: Tensor | None = None
    scale: Tensor | None = None

    def to(self, device: str | torch.device) -> "Prepared":
        """The same on another device."""
        moved = {
            name: None if (part := getattr(self, name)) is None else part.to(device) for name in ("packed", "codes", "scale")
        }
        return replace(self, **moved)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        part = self.codes if self.packed is None else self.packed.words
        assert part is not None
        return part.device

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(part.nbytes for part in (self.codes, self.scale) if part is not None)


def reason_against(scheme: Scheme) -> str | None:
    """Why no kernel multiplies by such weights with such inputs; None if one does."""
    weight, inputs = scheme.weight, scheme.input
    plain = weight.format.kind == "int" and not weight.format.largest and weight.scale == "float" and weight.rows == 1
    if inputs is None:
        group = weight.group
        if plain and weight.format.bits in (2, 3, 4, 8) and (group == CHANNEL or (group >= 32 and not group & (group - 1))):
            return None
        return "products with float inputs are of integers of 2, 3, 4 or 8 bits, a scale for a row or 32, 64, 128, ... columns"
    of_rows = inputs.dynamic and inputs.symmetric and inputs.group == CHANNEL and inputs.format.name == "int8"
    if plain and weight.format.bits == 8 and weight.symmetric and weight.group == CHANNEL and of_rows:
        return None
    return "products with quantized inputs are of 8-bit integers with one scale for a channel and one for a row of inputs"


def prepare(
    parts: QTensor | Sequence[QTensor], *, inputs: Spec | None, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Prepared:
    """Lay out a matrix, or several that have one input, below each other.

    Raises:
        ValueError: no kernel for it (`reason_against`), or matrices of different layouts.
    """
    parts = [parts] if isinstance(parts, QTensor) else list(parts)
    first = parts[0]
    if any(part.spec != first.spec or part.codes.shape[1] != first.codes.shape[1] for part in parts):
        raise ValueError("matrices of one product have different schemes; multiply by each of them")
    reason = reason_against(Scheme(name="", weight=first.spec, input=inputs))
    if reason is not None:
        raise ValueError(reason)
    codes, scale = (torch.cat([getattr(part, name).to(device) for part in parts]) for name in ("codes", "scale"))
    shape = (codes.shape[0], codes.shape[1])
    if inputs is not None:
        return Prepared(shape, dtype, codes=codes.contiguous(), scale=scale.float().flatten())
    from lowbit.kernels.weight_only import pack

    zeros = [part.zero.to(device) for part in parts if part.zero is not None]
    return Prepared(shape, dtype, packed=pack(QTensor(codes, scale, torch.cat(zeros) if zeros else None, first.spec), dtype))


def linear(x: "Tensor | Quantized", prepared: Prepared, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [..., in] times the matrix, plus bias [out], plus residual [..., out]: [..., out] in `prepared.dtype`."""
    if isinstance(x, Quantized):
        assert prepared.codes is not None and prepared.scale is not None
        flat, scale = x.codes.flatten(0, -2), x.scale.flatten(0, -2)
        if flat.is_cuda:
            rows = F.pad(flat, (0, 0, 0, max(0, 32 - len(flat))))  # _int_mm takes more than 16 rows
            total = torch._int_mm(rows, prepared.codes.T)[: len(flat)].float() * scale * prepared.scale
            out = (total if bias is None else total + bias).to(prepared.dtype)
        else:
            out = reference.int8_linear(flat, scale, prepared.codes, prepared.scale, bias, prepared.dtype)
        out = out.view(*x.codes.shape[:-1], -1)
    else:
        from lowbit.kernels import weight_only

        assert prepared.packed is not None
        out = weight_only.linear(x, prepared.packed, bias)
    return out if residual is None else out + residual


def plain(x: Tensor) -> Quantized:
    """x [..., width] quantized."""
    return Quantized(*reference.quantize_rows(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """RMSNorm of x, quantized."""
    return plain(reference.rms_norm(x, weight, eps))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Quantized:
    """LayerNorm of x, quantized."""
    return plain(reference.layer_norm(x, weight, bias, eps))


def silu_mul(gate: Tensor, up: Tensor) -> Quantized:
    """silu(gate) * up, quantized."""
    return plain(reference.silu_mul(gate, up))


def gelu(x: Tensor) -> Quantized:
    """The exact GELU of x, quantized."""
    return plain(reference.gelu(x))
