"""What every kernel computes, in plain torch: slow, on any device, and the specification.

Rounding is half to even, as in IEEE 754. Rows are quantized as `qtensor.fake_quantize_input` has it: one scale a row or a
group of it (ZeroQuant, Yao et al., NeurIPS 2022, section 4.1), or one for all from calibration.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.qtensor import Spec


class Quantized(NamedTuple):
    """Rows as codes: x ~ (codes - zero) * scale.

    Attributes:
        codes: [..., width], int8 or float8_e4m3fn.
        scale: float32 [..., groups].
        zero: the same, whole numbers; None where symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out], plus residual [..., out], in the dtype of x; computed in
    float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)


def quantize_rows(x: Tensor, spec: Spec, largest: float | None = None) -> Quantized:
    """x [..., width] as codes, by integers of up to 8 bits or E4M3 with float scales.

    Args:
        largest: the largest magnitude seen in calibration, where the spec is static.
    """
    fmt = spec.format
    kind = torch.int8 if fmt.kind == "int" else torch.float8_e4m3fn
    groups = x.float().unflatten(-1, (-1, spec.group_size(x.shape[-1])))
    zero = None
    if not spec.dynamic:
        assert largest is not None
        scale = torch.full_like(groups[..., :1], largest / fmt.max)
    elif spec.symmetric:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / fmt.max
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-12) / (fmt.max - fmt.min)
        zero = (fmt.min - low / scale).round()
    values = groups / scale if zero is None else groups / scale + zero
    codes = fmt.round(values).to(kind).flatten(-2)
    return Quantized(codes, scale.squeeze(-1), None if zero is None else zero.squeeze(-1))


def dequantize_rows(x: Quantized) -> Tensor:
    """The float32 rows that codes stand for."""
    groups = x.codes.float().unflatten(-1, (x.scale.shape[-1], -1))
    if x.zero is not None:
        groups = groups - x.zero[..., None]
    return (groups * x.scale[..., None]).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis, float32."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, float32."""
    return F.silu(gate.float()) * up.float()


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """GELU, exact or by its approximation with tanh, float32."""
    return F.gelu(x.float(), approximate="tanh" if tanh else "none")
