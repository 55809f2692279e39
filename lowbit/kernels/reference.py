"""What every kernel computes, in plain torch: slow, on any device, and the specification.

Rounding is half to even, as in IEEE 754. Rows are quantized as `qtensor.fake_quantize_input` has it: one scale a row or a
group of it (ZeroQuant, Yao et al., NeurIPS 2022, section 4.1), or one for all from calibration.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.qtensor import Spec
from lowbit.ssm import causal_conv, chunk_mamba2
from lowbit.ssm import scan as scan_runs


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
    """x [..., width] as codes, by integers of up to 8 bits or E4M3 with float scales; dynamic scales of what holds an infinity
    or a NaN are NaN.

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
    if spec.dynamic:
        scale = torch.where(groups.isfinite().all(-1, keepdim=True), scale, torch.nan)
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


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, tokens, width], channel i of each head turned with channel i + width / 2, float32.

    cos and sin are [rows or 1, tokens, width].
    """
    a, b = x.float().chunk(2, -1)
    return x.float() * cos.float()[:, None] + torch.cat([-b, a], -1) * sin.float()[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """softmax(factor q k^T) v over the keys where mask [rows or 1, keys] is true, float32 [rows, heads, tokens, width].

    q is [rows, heads, tokens, width], k and v are [rows, heads, keys, width], or of a part of the heads, each for several of q.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.float() @ k.float().mT * factor
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1) @ v.float()


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A Mamba2 scan whose x, B, C and state are int8 under scales from calibration (Quamba2, Chiang et al., 2503.22879).

    Attributes:
        A, D, dt_bias: float32 [heads], A negative.
        scales: float32 [channels + 2 * groups * n], of each feature of x, B and C; one for all of B of a state group, and of C.
        state_scale: float32 [clusters, n]. labels: int32 [channels], which of its rows the state of a channel has.
        groups: state groups, which share B and C.
        limits: least and largest time step.
        z_scale, dt_scale: of z and of dt before its bias, which then count as int8 too; 0 where these are floats.
    """

    A: Tensor
    D: Tensor
    dt_bias: Tensor
    scales: Tensor
    state_scale: Tensor
    labels: Tensor
    groups: int
    limits: tuple[float, float] = (0.0, float("inf"))
    z_scale: float = 0.0
    dt_scale: float = 0.0

    def to(self, device: str | torch.device) -> "Scan":
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Features of x, of B and of C."""
        width = self.groups * self.state_scale.shape[1]
        return len(self.labels), width, width


def conv(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, in_scale: float, scales: Tensor, held: int
) -> tuple[Tensor, Tensor]:
    """SiLU of a causal convolution of each channel, between int8 codes.

    Args:
        x: [batch, l, width], int8 codes or floats, which are quantized.
        past: int8 [batch, width, slots], the inputs before, that of token t in slot t % slots: a ring of at least as many as
            the kernel has, a power of two and at most CHUNK.
        weight: float32 [width, kernel]. bias: float32 [width]. in_scale: of x. scales: float32 [width], of what comes out.
        held: the first token of x is number `held`, modulo CHUNK.

    Returns:
        codes [batch, l, width]; past with the last inputs.
    """
    slots, length = past.shape[2], x.shape[1]
    new = x if x.dtype == torch.int8 else _codes(x.float(), in_scale)
    seen = torch.cat([past.roll(-held, -1).mT, new], 1)
    made = F.silu(causal_conv(seen.float() * in_scale, weight.unsqueeze(1), bias))[:, slots:]
    return _codes(made, scales), seen[:, length:].mT.roll(held + length, -1)


def scan(codes: Tensor, dt: Tensor, z: Tensor | None, state: Tensor, of: Scan) -> tuple[Tensor, Tensor]:
    """Run over tokens that start where the state was rounded last; see `ssm`.

    Args:
        codes: int8 [batch, l, channels + 2 * groups * n], x, B and C. dt: [batch, l, heads], before its bias and softplus.
        z: [batch, l, channels], whose SiLU multiplies y, or None. state: int8 [batch, channels, n].

    Returns:
        y float32 [batch, l, channels], with D x; the state at the end of the last full run.
    """
    x, b, c = (codes.float() * of.scales).split(of.sizes, -1)
    heads, n = len(of.A), state.shape[-1]
    dt = F.softplus(_known(dt, of.dt_scale) + of.dt_bias).clamp(*of.limits)
    tokens = (x.unflatten(-1, (heads, -1)), dt, *(part.unflatten(-1, (of.groups, n)) for part in (b, c)))
    scale = of.state_scale[of.labels]
    start = (state.float() * scale).unflatten(1, (heads, -1))

    def rounded(end: Tensor) -> Tensor:
        return (_codes(end.flatten(1, 2), scale).float() * scale).view_as(end)

    y, end, _ = scan_runs(partial(chunk_mamba2, A=of.A), tokens, start, 0, rounded)
    y = (y + tokens[0] * of.D[:, None]).flatten(2)
    return y if z is None else y * F.silu(_known(z, of.z_scale)), _codes(end.flatten(1, 2), scale)


def step(
    conv_in: Tensor, dt: Tensor, z: Tensor | None, cache: tuple[Tensor, Tensor, Tensor, Tensor], weight: Tensor,
    bias: Tensor | None, in_scale: float, held: Tensor, of: Scan,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """The convolution and the scan of one more token of every sequence.

    Args:
        conv_in, weight, bias, in_scale: as for `conv`; dt, z: as for `scan`; without the axis of tokens.
        cache: past, as for `conv`; the state; int8 [batch, CHUNK, channels + groups * n], x and B of the tokens since it was
            rounded; float32 [batch, heads, CHUNK], their dt.
        held: int32 [batch], how many these are, less than CHUNK.

    Returns:
        y float32 [batch, channels], the cache with this token.
    """
    past, state, tokens, steps = (part.clone() for part in cache)
    found = []
    for row, count in enumerate(held.tolist()):
        one = slice(row, row + 1)
        codes, past[one] = conv(conv_in[one, None], past[one], weight, bias, in_scale, of.scales, count)
        tokens[row, count], steps[row, :, count] = codes[0, 0, : tokens.shape[-1]], dt[row].float()
        seen = F.pad(tokens[one, : count + 1], (0, codes.shape[-1] - tokens.shape[-1]))
        seen[:, -1] = codes[0]
        y, state[one] = scan(seen, steps[one, :, : count + 1].mT, None, state[one], of)
        found.append(y[0, -1])
    y = torch.stack(found)
    return y if z is None else y * F.silu(_known(z, of.z_scale)), (past, state, tokens, steps)


def _codes(values: Tensor, scale: Tensor | float) -> Tensor:
    return FORMATS["int8"].round(values / scale).to(torch.int8)


def _known(x: Tensor, scale: float) -> Tensor:
    """x as float32, rounded to int8 under its scale, if it has one."""
    return x.float() if scale == 0 else _codes(x.float(), scale).float() * scale
