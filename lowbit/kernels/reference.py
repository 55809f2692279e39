"""What every kernel computes, in plain torch: slow, on any device, and the specification.

Rounding is half to even, as in IEEE 754; int8 codes span -127 .. 127 with one scale a row (ZeroQuant, Yao et al., NeurIPS 2022,
section 4.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, summed in float32 (float64 for float64), in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., width] as int8 codes of that shape and float32 scales [..., 1], x ~ codes * scale; a row of zeros has scale 1."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / INT8_MAX, 1.0)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, float32."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, float32."""
    return F.silu(gate.float()) * up.float()


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, float32."""
    return F.gelu(x.float())


def int8_linear(
    codes: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Product of int8 codes [rows, in] (scale [rows, 1]) and int8 weights [out, in] (scale [out]), summed exactly."""
    total = codes.double() @ weight.double().T
    out = total * x_scale.double() * w_scale.double()
    return (out if bias is None else out + bias.double()).to(dtype)
