"""The way in to the kernels of a Mamba2 mixer, as operators of torch: on a GPU Triton's, elsewhere the specification.

    scales = scan_of(...)                                    # once a layer
    cache = Cache.empty(scales, batch, kernel, device)       # once a sequence
    codes = convolved(projected[..., a:b], cache, ...)       # then, for the first tokens, or for several more:
    y = prefilled(codes, dt, z, cache, scales)
    y = stepped(projected[:, 0, a:b], dt[:, 0], z[:, 0], cache, ...)   # for every token after them

Everything is in `reference`; what is kept between calls changes in place, as CUDA graphs need it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.ops import _by_kernel, fake, operator
from lowbit.kernels.reference import Scan
from lowbit.ssm import CHUNK
from lowbit.unit import Static

LONGEST = 8  # taps of a convolution: a step reads its inputs of a channel as one word


class Cache(NamedTuple):
    """What a mixer keeps of sequences.

    Attributes:
        past: int8 [batch, width, slots], the last inputs of the convolution; a ring, see `reference.conv`. A step writes a slot
            that it does not need, so every program of its kernel may read what another one replaces.
        state: int8 [batch, channels, n], at the last end of a full run of tokens.
        tokens: int8 [batch, CHUNK, channels + groups * n], x and B of the tokens since. steps: float32 [batch, heads, CHUNK],
            their dt before its bias.
    """

    past: Tensor
    state: Tensor
    tokens: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, of: Scan, batch: int, kernel: int, device: torch.device | str) -> "Cache":
        """Before the first token, for a convolution of `kernel` tokens."""
        (channels, width, _), heads, n = of.sizes, len(of.A), of.state_scale.shape[1]
        slots = 1 << (kernel - 1).bit_length()
        shapes = ((channels + 2 * width, slots), (channels, n), (CHUNK, channels + width))
        past, state, tokens = (torch.zeros(batch, *shape, dtype=torch.int8, device=device) for shape in shapes)
        return cls(past, state, tokens, torch.zeros(batch, heads, CHUNK, device=device))


def scan_of(
    *, A: Tensor, D: Tensor, dt_bias: Tensor, groups: int, x: Static, B: Static, C: Static, state: Static,
    limits: tuple[float, float] = (0.0, float("inf")), z: Static | None = None, dt: Static | None = None,
) -> Scan:  # fmt: skip
    """A scan from its parameters and the scales of its points, on the device of A.

    Raises:
        ValueError: a point is not int8 under one scale a tensor (z, dt), a state group (B, C) or a channel (x).
    """
    for name, point in (("x", x), ("B", B), ("C", C), ("state", state), ("z", z), ("dt", dt)):
        if point is not None and point.spec.format.name != "int8":
            raise ValueError(f"{name} is {point.spec.format.name}; the kernels of scans take int8: quantize it with s8")

    def each(point: Static, name: str, sets: int) -> Tensor:
        """The scale of every feature [features], the same within each of as many sets."""
        scale = point.largest / point.spec.format.max
        wide = scale[point.labels].flatten()
        parts = wide.view(sets, -1)
        if scale.shape[1] != 1 or not torch.equal(parts, parts[:, :1].expand_as(parts)):
            raise ValueError(f"{name} has several scales where the kernels of scans take one: see reference.Scan")
        return wide

    whole = {name: 0.0 if p is None else float(each(p, name, 1)[0]) for name, p in (("z", z), ("dt", dt))}
    x_scale = each(x, "x", len(x.labels))
    scales = torch.cat([x_scale, each(B, "B", groups), each(C, "C", groups)])
    n = len(B.labels) // groups
    device = A.device
    return Scan(
        A=A.float(),
        D=D.float(),
        dt_bias=dt_bias.float(),
        scales=scales.float().to(device),
        state_scale=(state.largest / state.spec.format.max).expand(-1, n).float().contiguous().to(device),
        labels=state.labels.to(device, torch.int32),
        groups=groups,
        limits=limits,
        z_scale=whole["z"],
        dt_scale=whole["dt"],
    )


def convolved(
    x: Tensor, cache: Cache, weight: Tensor, bias: Tensor | None, in_scale: float, of: Scan, *, held: int = 0
) -> Tensor:
    """x, B and C as codes [batch, l, width] of what in_proj made [batch, l, width], before which every sequence has `held`
    tokens; see `reference.conv`."""
    return conv(x, cache.past, weight, bias, in_scale, of.scales, held)


def prefilled(
    codes: Tensor, dt: Tensor, z: Tensor | None, cache: Cache, of: Scan, dtype: torch.dtype, *, held: int = 0
) -> Tensor:
    """y [batch, l, channels] of many tokens, before which every sequence has `held` and after which it has
    `(held + l) % CHUNK`; see `reference.scan`."""
    if held:  # they go before, without C and z, and what comes of them is left out
        codes = torch.cat([F.pad(cache.tokens[:, :held], (0, codes.shape[2] - cache.tokens.shape[2])), codes], 1)
        dt = torch.cat([cache.steps[..., :held].mT, dt.float()], 1)
        z = None if z is None else F.pad(z, (0, 0, held, 0))
    y, state = scan(codes, dt, z, cache.state, *parts(of), dtype)
    after = codes.shape[1] % CHUNK
    cache.state.copy_(state)
    cache.tokens[:, :after] = codes[:, codes.shape[1] - after :, : cache.tokens.shape[2]]
    cache.steps[..., :after] = dt[:, dt.shape[1] - after :].mT
    return y[:, held:]


def stepped(
    x: Tensor, dt: Tensor, z: Tensor | None, cache: Cache, weight: Tensor, bias: Tensor | None, in_scale: float, held: Tensor,
    of: Scan, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [batch, channels] of one more token of every sequence, of which `held` int32 [batch] are held before, and one more
    after, modulo CHUNK, which the caller counts: it is the same in every layer. x: what in_proj made of x, B and C [batch,
    width]. See `reference.step`."""
    return step(x, dt, z, *cache, weight, bias, in_scale, held, *parts(of), dtype)


# ------------------------------------------------------------------------------------------------------- the operators


def parts(of: Scan) -> tuple[list[Tensor], int, list[float]]:
    """A scan as operators take it."""
    tensors = [of.A, of.D, of.dt_bias, of.scales, of.state_scale, of.labels]
    return tensors, of.groups, [*of.limits, of.z_scale, of.dt_scale]


def _scan(tensors: list[Tensor], groups: int, numbers: list[float]) -> Scan:
    names = ("A", "D", "dt_bias", "scales", "state_scale", "labels")
    low, high, z_scale, dt_scale = numbers
    named = dict(zip(names, tensors, strict=True))
    return Scan(**named, groups=groups, limits=(low, high), z_scale=z_scale, dt_scale=dt_scale)


@operator("past")
def conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, in_scale: float, scales: Tensor, held: int) -> Tensor:
    """The codes of `reference.conv`; the last inputs come into `past`."""
    if not _by_kernel(x):
        out, after = reference.conv(x, past, weight, bias, in_scale, scales, held)
        past.copy_(after)
        return out.contiguous()
    from lowbit.kernels import scan as kernel

    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    with torch.cuda.device_of(x):
        kernel.conv(x if x.stride(-1) == 1 else x.contiguous(), past, weight, bias, in_scale, scales, held, out)
    return out


@fake(conv)
def _(x, past, weight, bias, in_scale, scales, held):
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@operator()
def scan(
    codes: Tensor, dt: Tensor, z: Tensor | None, state: Tensor, tensors: list[Tensor], groups: int, numbers: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.scan`, y in `dtype`."""
    of = _scan(tensors, groups, numbers)
    if not _by_kernel(codes):
        y, after = reference.scan(codes, dt, z, state, of)
        return y.to(dtype).contiguous(), after
    from lowbit.kernels import scan as kernel

    out, end = _empty_scan(codes, state, dtype)
    end.copy_(state)
    with torch.cuda.device_of(codes):
        kernel.scan(codes, dt, z, end, of, out)
    return out, end


def _empty_scan(codes: Tensor, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return codes.new_empty(*codes.shape[:2], state.shape[1], dtype=dtype), torch.empty_like(state)


@fake(scan)
def _(codes, dt, z, state, tensors, groups, numbers, dtype):
    return _empty_scan(codes, state, dtype)


@operator("past", "state", "tokens", "steps")
def step(
    x: Tensor, dt: Tensor, z: Tensor | None, past: Tensor, state: Tensor, tokens: Tensor, steps: Tensor, weight: Tensor,
    bias: Tensor | None, in_scale: float, held: Tensor, tensors: list[Tensor], groups: int, numbers: list[float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The y of `reference.step`, in `dtype`; the cache becomes that with this token."""
    of = _scan(tensors, groups, numbers)
    cache = (past, state, tokens, steps)
    if not _by_kernel(x):
        y, after = reference.step(x, dt, z, cache, weight, bias, in_scale, held, of)
        for part, value in zip(cache, after, strict=True):
            part.copy_(value)
        return y.to(dtype)
    from lowbit.kernels import scan as kernel

    out = x.new_empty(len(x), state.shape[1], dtype=dtype)
    with torch.cuda.device_of(x):
        kernel.step(x, dt, z, cache, weight, bias, in_scale, held, of, out)
    return out


@fake(step)
def _(x, dt, z, past, state, tokens, steps, weight, bias, in_scale, held, tensors, groups, numbers, dtype):
    return x.new_empty(len(x), state.shape[1], dtype=dtype)
