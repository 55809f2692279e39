"""Selective state space models: the mixers of Mamba and Mamba2 in plain torch, with everything they compute as named points.

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t        y_t = C_t h_t + D x_t

per channel and state dimension (Mamba, Gu and Dao, 2312.00752; Mamba2, Dao and Gu, 2405.21060: one A and dt a head, B and C
shared by the heads of a state group). `chunk_mamba` and `chunk_mamba2` compute a run of tokens from the state before it; `scan`
walks over runs of `CHUNK` tokens. Any float dtype, sums in at least float32.

A quantized state is rounded at the end of every run only, and a cache holds the state of the last such boundary beside the
tokens since: decoding step by step then computes exactly what a prefill does, whatever the lengths, and a state that decays by
less than half a step is not held up by being rounded again for every token. Quamba2 rounds at every token.

`Mixer` is the forward of a transformers mixer module, of whatever model, recognised by the parameters it has (in_proj, conv1d,
A_log, D, out_proj, and x_proj and dt_proj, or dt_bias and a gated norm). What it computes is compared with the model's own
forward when the model is probed, so variants that it does not know are found, and left as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

CHUNK = 64  # tokens of a run

ACTIVATIONS = ("z", "conv_in", "x", "B", "C", "dt", "state")
Chunk = Callable[..., tuple[Tensor, Tensor]]  # (x, dt, B, C, state) -> y, state


def point(x: Tensor, name: str) -> Tensor:
    """x, as it is; a torch function mode (`arch.Tap`) sees it under its name and may put something in its place."""
    if has_torch_function((x,)):
        return handle_torch_function(point, (x,), x, name)
    return x


# ------------------------------------------------------------------------------------------------------------ the scan


def chunk_mamba2(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """A run of a Mamba2 scan, all tokens at once (the quadratic form of 2405.21060, section 6).

    Args:
        x: [batch, l, heads, p]. dt: [batch, l, heads], positive. B, C: [batch, l, groups, n].
        state: [batch, heads, p, n] before the run. A: [heads], negative.

    Returns:
        y without D x, like x; the state after the run.
    """
    each = x.shape[2] // B.shape[2]
    decay = (dt * A).cumsum(1).transpose(1, 2)  # [batch, heads, l]
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    future = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    scores = torch.einsum("blgn,bsgn->bgls", C, B).repeat_interleave(each, 1)
    weights = scores * between.masked_fill(future, -torch.inf).exp()
    dx = x * dt.unsqueeze(-1)
    heads_b, heads_c = B.repeat_interleave(each, 2), C.repeat_interleave(each, 2)
    y = torch.einsum("bhls,bshp->blhp", weights, dx)
    y = y + torch.einsum("blhn,bhpn->blhp", heads_c * decay.exp().transpose(1, 2).unsqueeze(-1), state)
    rest = (decay[..., -1:] - decay).exp().transpose(1, 2).unsqueeze(-1)
    grown = torch.einsum("bshp,bshn->bhpn", dx * rest, heads_b)
    return y, state * decay[..., -1].exp()[..., None, None] + grown


def chunk_mamba(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """A run of a Mamba scan by doubling: log2(l) steps over all tokens.

    Args:
        x, dt: [batch, l, channels]. B, C: [batch, l, n]. state: [batch, channels, n]. A: [channels, n], negative.
    """
    decay = (dt.unsqueeze(-1) * A).exp()
    h = (dt * x).unsqueeze(-1) * B.unsqueeze(2)
    h = torch.cat([h[:, :1] + decay[:, :1] * state.unsqueeze(1), h[:, 1:]], 1)
    step = 1
    while step < h.shape[1]:
        h = torch.cat([h[:, :step], h[:, step:] + decay[:, step:] * h[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return torch.einsum("blcn,bln->blc", h, C), h[:, -1]


def scan(
    chunk: Chunk, tokens: tuple[Tensor, ...], state: Tensor, held: int, rounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, int]:
    """Run over tokens (x, dt, B, C), each [batch, l, ...], of which the first `held` came before and start a run.

    Args:
        state: at the start of that run.
        rounded: what becomes of a state at the end of a full run; it sees the state at the end of all tokens too.

    Returns:
        y of the tokens that are new, the state at the start of the last run that is not full, how many tokens that run has.
    """
    found = []
    length = tokens[0].shape[1]
    for start in range(0, length, CHUNK):
        y, end = chunk(*(part[:, start : start + CHUNK] for part in tokens), state)
        found.append(y)
        end = rounded(end)
        if length - start >= CHUNK:
            state = end
    return torch.cat(found, 1)[:, held:], state, length % CHUNK


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [batch, l, channels], each channel with its own filter weight [channels, 1, kernel], zeros before the first token."""
    kernel = weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
    return F.conv1d(padded, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), groups=len(weight)).transpose(1, 2)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm of y silu(z) [..., channels], in as many groups of channels."""
    gated = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(y.dtype)


# ----------------------------------------------------------------------------------------------------------- the mixer


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """Entries along an axis of a mixer's parameter that follow its channels, or its heads.

    Attributes:
        param: name within the mixer. axis: 0 or 1. start: the first such entry.
        heads: one for each head instead of each channel.
    """

    param: str
    axis: int
    start: int = 0
    heads: bool = False


def is_mixer(module: nn.Module) -> bool:
    """Whether a module has the parameters of a Mamba or Mamba2 mixer."""
    names = {name for name, _ in module.named_parameters()}
    common = {"in_proj.weight", "conv1d.weight", "A_log", "D", "out_proj.weight"} <= names
    return common and ({"x_proj.weight", "dt_proj.weight"} <= names or {"dt_bias", "norm.weight"} <= names)


class Mixer:
    """The forward of a mixer module, with its tensors as points.

    Attributes:
        second: Mamba2 rather than Mamba.
        channels, heads, groups, state: of the scan; a Mamba scan has one head and one group.
        parameters: parameters, other than those of linears, that may be quantized.
    """

    def __init__(self, module: Any, path: str) -> None:
        self.module, self.path = module, path
        self.second = module.A_log.dim() == 1
        self.channels = module.out_proj.in_features
        self.heads = len(module.A_log) if self.second else 1
        self.groups = int(module.n_groups) if self.second else 1
        width = module.conv1d.weight.shape[0] - self.channels
        self.state = width // (2 * self.groups) if self.second else module.A_log.shape[1]
        names = ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "dt_bias")
        own = dict(module.named_parameters())
        self.parameters = tuple(name for name in names if name in own)

    def activations(self) -> tuple[str, ...]:
        """The names of its points."""
        return ACTIVATIONS if self.second else (*ACTIVATIONS, "dt_low")

    def features(self, name: str) -> tuple[int, int]:
        """How many sets of features a point has along its last axis, and how many features are in a set."""
        if name == "state":
            return self.channels, self.state
        if name in ("B", "C"):
            return self.groups * self.state, 1
        width = {"conv_in": self.module.conv1d.weight.shape[0], "dt": self.heads if self.second else self.channels}
        if name == "dt_low":
            return self.module.dt_proj.in_features, 1
        return width.get(name, self.channels), 1

    def group_of(self, name: str) -> Tensor | None:
        """The state group of each set of features of a point [sets]; None where it has none. A Mamba scan is one group."""
        if name not in ("x", "state", "B", "C"):
            return None
        sets = self.features(name)[0]
        return torch.arange(sets) // (sets // self.groups)

    def indexed(self) -> tuple[Indexed, ...]:
        """Everything that is indexed by channel or head."""
        c = self.channels
        found = [Indexed(param="conv1d.weight", axis=0), Indexed(param="out_proj.weight", axis=1)]
        for start in (0, c):  # z and x, or x and z
            found.append(Indexed(param="in_proj.weight", axis=0, start=start))
            if self.module.in_proj.bias is not None:
                found.append(Indexed(param="in_proj.bias", axis=0, start=start))
        if self.module.conv1d.bias is not None:
            found.append(Indexed(param="conv1d.bias", axis=0))
        if self.second:
            last = 2 * c + 2 * self.groups * self.state
            found.append(Indexed(param="in_proj.weight", axis=0, start=last, heads=True))
            if self.module.in_proj.bias is not None:
                found.append(Indexed(param="in_proj.bias", axis=0, start=last, heads=True))
            found += [Indexed(param=name, axis=0, heads=True) for name in ("A_log", "D", "dt_bias")]
            found.append(Indexed(param="norm.weight", axis=0))
        else:
            found += [Indexed(param="x_proj.weight", axis=1), Indexed(param="dt_proj.weight", axis=0)]
            found += [Indexed(param=name, axis=0) for name in ("A_log", "D", "dt_proj.bias") if name in self.parameters]
        return tuple(found)

    def norm_groups(self) -> int:
        """Groups of channels that the gated norm takes the mean over."""
        size = getattr(self.module.norm, "group_size", None)
        return self.channels // size if size else 1

    def __call__(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states [batch, l, width]; the other arguments as transformers' mixers have them."""
        m, length = self.module, hidden_states.shape[1]
        layer = None if cache_params is None else cache_params.layers[m.layer_idx]
        fresh = layer is None or not layer.has_previous_state[0]
        projected = m.in_proj(_masked(hidden_states, attention_mask))
        wide = torch.promote_types(projected.dtype, torch.float32)
        if self.second:
            z, conv_in, dt = projected.split([self.channels, m.conv1d.weight.shape[0], self.heads], -1)
            dt = self._point(dt.to(wide), "dt")
        else:
            conv_in, z = projected.chunk(2, -1)
        z, conv_in = self._point(z.to(wide), "z"), self._point(conv_in.to(wide), "conv_in")
        seen = conv_in
        if layer is not None:
            kernel = m.conv1d.weight.shape[-1]
            seen = layer.update_conv_state(conv_in.transpose(1, 2), conv_kernel_size=kernel).transpose(1, 2)
        conv = m.act(causal_conv(seen, m.conv1d.weight, m.conv1d.bias))[:, -length:]
        conv = _masked(conv, attention_mask)
        if self.second:
            x, b, c = conv.split([self.channels, self.groups * self.state, self.groups * self.state], -1)
        else:
            x = self._point(conv, "x")
            low, b, c = m.x_proj(x.to(hidden_states.dtype)).to(wide).split([m.dt_proj.in_features, self.state, self.state], -1)
            low, b, c = (self._normed(part, name) for part, name in ((low, "dt"), (b, "b"), (c, "c")))
            low = self._point(low, "dt_low")
            dt = self._point((low.to(m.dt_proj.weight.dtype) @ m.dt_proj.weight.T).to(wide), "dt")
        x = self._point(x, "x") if self.second else x
        b, c = self._point(b, "B"), self._point(c, "C")
        y = self._scanned((x, dt, b, c), layer, fresh)
        skip = m.D.to(wide)
        y = y + x * (skip.repeat_interleave(self.channels // self.heads) if self.second else skip)
        return m.out_proj(self._gated(y, z).to(hidden_states.dtype))

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        if not self.second:
            return y * self.module.act(z)
        norm = self.module.norm
        return gated_norm(y, z, norm.weight, norm.variance_epsilon, self.norm_groups())

    def _point(self, x: Tensor, name: str) -> Tensor:
        return point(x, f"{self.path}.{name}")

    def _normed(self, x: Tensor, name: str) -> Tensor:
        norm = getattr(self.module, f"{name}_layernorm", None)
        return x if norm is None else norm(x)

    def _scanned(self, new: tuple[Tensor, ...], layer: Any, fresh: bool) -> Tensor:
        """y [batch, l, channels] of new tokens (x, dt, B, C), after what the cache's layer holds."""
        x, wide = new[0], new[0].dtype
        batch = len(x)
        held = 0 if fresh or layer is None else layer.lowbit_held
        if held or not fresh:
            new = tuple(torch.cat([layer.recurrent_states[i][:, :held], part], 1) for i, part in enumerate(new, 1))
        state = x.new_zeros(batch, self.channels * self.state) if fresh else layer.recurrent_states[0]
        A = -self.module.A_log.to(wide).exp()
        p = self.channels // self.heads

        def chunk(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            dt = self._time_step(dt)
            if not self.second:
                y, end = chunk_mamba(x, dt, b, c, state.unflatten(-1, (-1, self.state)), A)
                return y, end.flatten(1)
            b, c = (part.unflatten(-1, (-1, self.state)) for part in (b, c))
            y, end = chunk_mamba2(x.unflatten(-1, (-1, p)), dt, b, c, state.view(batch, self.heads, p, self.state), A)
            return y.flatten(2), end.flatten(1)

        y, state, kept = scan(chunk, new, state, held, lambda end: self._point(end, "state"))
        if layer is not None:
            self._keep(layer, state, tuple(part[:, part.shape[1] - kept :] for part in new), fresh)
        return y

    def _time_step(self, dt: Tensor) -> Tensor:
        bias = self.module.dt_bias if self.second else self.module.dt_proj.bias
        dt = F.softplus(dt if bias is None else dt + bias.to(dt.dtype))
        low, high = getattr(self.module, "time_step_limit", (0.0, float("inf"))) if self.second else (0.0, float("inf"))
        return dt.clamp(low, high)

    def _keep(self, layer: Any, state: Tensor, tokens: tuple[Tensor, ...], fresh: bool) -> None:
        """Put the state, and the tokens of the run that is not full, into a layer of transformers' cache, which may select
        and reorder rows of all of them."""
        parts = (state, *tokens)
        if fresh:
            layer.number_of_states = len(parts)
            for i, part in enumerate(parts):
                shape = part.shape if i == 0 else (len(part), CHUNK, part.shape[-1])
                layer.recurrent_states[i] = part.new_zeros(shape)
                layer.is_recurrent_states_initialized[i] = True
                layer.is_conv_states_initialized.setdefault(i, False)
                layer.has_previous_state.setdefault(i, False)
        layer.recurrent_states[0] = state
        for i, part in enumerate(tokens, 1):
            layer.recurrent_states[i][:, : part.shape[1]] = part
        layer.lowbit_held = tokens[0].shape[1]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [batch, l, ...] with padded tokens at 0."""
    return x if mask is None else (x * mask[:, -x.shape[1] :, None]).to(x.dtype)
