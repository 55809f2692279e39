"""Quantized scans of a checkpoint in a model on the kernels: Mamba2 mixers in int8, all others simulated.

A `ScanMixer` takes the place of a mixer module: its projections, which may be packed, with the convolution, SiLU and scan
between them on the kernels of `kernels.mixer`. What it keeps of a sequence is int8 and lies at fixed addresses in
transformers' cache, so that a decoding step can be a CUDA graph. A mixer that the kernels do not know (Mamba, or points they
need left float) runs as `ssm.Mixer`, its points rounded in floats.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.arch import Arch, Site
from lowbit.export import QuantizedSource
from lowbit.kernels.mixer import LONGEST, Cache, convolved, prefilled, scan_of, stepped
from lowbit.kernels.reference import Scan
from lowbit.ssm import CHUNK, Mixer
from lowbit.unit import Static

_NEEDED = ("conv_in", "x", "B", "C", "state")
_HELD = 3  # index in the cache's layer of the first mixer; before it are the parts of `Cache` behind `past`


class ScanMixer(nn.Module):
    """A Mamba2 mixer whose convolution and scan run in int8.

    Attributes:
        scan, weight, bias, in_scale: as `kernels.mixer` takes them; weight float32 [width, kernel].
        layer: its index in transformers' cache. first: that of the model's first mixer, whose layer holds the number of tokens
            since the state was rounded, for all. last: it is the last to run, and counts.
    """

    def __init__(self, mixer: Mixer, points: dict[str, Static]) -> None:
        """points: by their names within the mixer.

        Raises:
            ValueError: the kernels do not compute such a scan.
        """
        super().__init__()
        m = mixer.module
        if not mixer.second:
            raise ValueError("there is no kernel for the scans of Mamba")
        missing = [name for name in _NEEDED if name not in points]
        if missing:
            raise ValueError(f"the kernels of scans need int8 {', '.join(missing)}")
        sample = torch.linspace(-4, 4, 9, device=m.A_log.device)
        if not torch.allclose(m.act(sample), F.silu(sample), atol=1e-5):
            raise ValueError(f"its activation is {m.act}, not SiLU")
        if m.conv1d.kernel_size[0] > LONGEST:
            raise ValueError(f"its convolution has more than {LONGEST} taps")
        low, high = getattr(m, "time_step_limit", (0.0, float("inf")))
        self.scan: Scan = scan_of(
            A=-m.A_log.float().exp(), D=m.D, dt_bias=m.dt_bias, groups=mixer.groups, limits=(float(low), float(high)),
            **{name: points[name] for name in (*_NEEDED[1:], "z", "dt") if name in points},
        )  # fmt: skip
        before = points["conv_in"]
        if before.spec.format.name != "int8" or before.largest.numel() != 1:
            raise ValueError("the kernels of scans need conv_in as int8 under one scale")
        self.in_scale = float(before.largest) / before.spec.format.max
        self.weight = m.conv1d.weight.data.float().squeeze(1).contiguous()
        self.bias = None if m.conv1d.bias is None else m.conv1d.bias.data.float()
        self.sizes = [mixer.channels, len(self.weight), mixer.heads]
        self.in_proj, self.out_proj = m.in_proj, m.out_proj
        self.norm = _GroupedNorm(m.norm.weight.data, m.norm.variance_epsilon, mixer.norm_groups())
        self.layer = self.first = int(m.layer_idx)
        self.last = True

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states [batch, l, width]; the other arguments as transformers' mixers have them."""
        batch, length, _ = hidden_states.shape
        projected = self.in_proj(hidden_states)
        if attention_mask is not None:  # as if padded tokens were 0 before the projection
            empty = projected.new_zeros(()) if self.in_proj.bias is None else self.in_proj.bias
            projected = torch.where(attention_mask[:, -length:, None].bool(), projected, empty)
        z, conv_in, dt = projected.split(self.sizes, -1)
        layer = None if cache_params is None else cache_params.layers[self.layer]
        fresh = layer is None or not layer.has_previous_state[0]
        cache = self._empty(batch) if layer is None else self._kept(layer, batch)
        counts: Any = None if layer is None else cache_params.layers[self.first].recurrent_states[_HELD]
        how = (self.weight, self.bias, self.in_scale)
        if length == 1 and not fresh and attention_mask is None:
            y = stepped(conv_in[:, 0], dt[:, 0], z[:, 0], cache, *how, counts, self.scan, torch.float32).unsqueeze(1)
        else:
            held = 0 if fresh else int(counts[0])
            codes = convolved(conv_in, cache, *how, self.scan, held=held)
            if attention_mask is not None:
                codes = codes * attention_mask[:, -length:, None].to(codes.dtype)
            y = prefilled(codes, dt, z, cache, self.scan, torch.float32, held=held)
        if counts is not None and self.last:
            counts.add_(length).remainder_(CHUNK)
        return self.out_proj(self.norm(y))

    def _empty(self, batch: int) -> Cache:
        return Cache.empty(self.scan, batch, self.weight.shape[1], self.weight.device)

    def _kept(self, layer: Any, batch: int) -> Cache:
        """What a layer of transformers' cache holds, which may select and reorder rows of it; laid out at the first call."""
        kept = layer.recurrent_states
        if layer.conv_states[0] is None or len(layer.conv_states[0]) != batch:
            past, *parts = self._empty(batch)
            if self.layer == self.first:
                parts.append(torch.zeros(batch, dtype=torch.int32, device=past.device))
            layer.device, layer.dtype, layer.number_of_states = past.device, past.dtype, len(parts)
            for i, part in enumerate(parts):
                kept[i], layer.is_recurrent_states_initialized[i] = part, True
                layer.is_conv_states_initialized[i] = i == 0
                layer.has_previous_state[i] = False
            layer.conv_states[0] = past
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        return Cache(layer.conv_states[0], *(kept[i] for i in range(_HELD)))

    def _apply(self, fn: Any, recurse: bool = True) -> "ScanMixer":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.weight.device)).device  # follows .to(device) alone
        self.scan = self.scan.to(device)
        self.weight = self.weight.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)
        return self


class _GroupedNorm(nn.Module):
    """RMSNorm in as many groups of channels; one is replaced by a kernel when the model is fused.

    Takes float32, because what a scan gives may be more than float16 holds, and gives the dtype of its weight.
    """

    def __init__(self, weight: Tensor, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        return (F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight).to(self.weight.dtype)


def place(arch: Arch, source: QuantizedSource) -> tuple[dict[str, str], dict[Site, Static]]:
    """Have the mixers of a filled model run as the checkpoint says; parameters of theirs become float32.

    Returns:
        by the checkpoint's name of each mixer with quantized points, why it runs simulated, "" if on kernels; where in the
        model points are to be simulated, and how.
    """
    known = source.points()
    simulated: dict[Site, Static] = {}
    reasons: dict[str, str] = {}
    placed: list[ScanMixer] = []
    for block in arch.blocks:
        for path in {point.mixer: None for point in block.points if point.name in known}:
            points = [point for point in block.points if point.mixer == path]
            module = arch.model.get_submodule(path)
            for point in points:
                if point.tensor is not None:
                    exact = source.read([point.tensor])[point.tensor].to(arch.device, torch.float32)
                    module.get_parameter(point.local).data = exact
            mixer = Mixer(module, path)
            statics = {point.local: known[point.name] for point in points if point.name in known}
            name = points[0].name.removesuffix(f".{points[0].local}")
            try:
                scan = ScanMixer(mixer, statics)
            except ValueError as error:
                module.forward = mixer
                simulated |= {point.site: known[point.name] for point in points if point.name in known}
                reasons[name] = str(error)
                continue
            parent, _, leaf = path.rpartition(".")
            setattr(arch.model.get_submodule(parent), leaf, scan)
            placed.append(scan)
            reasons[name] = ""
    for scan in placed:
        scan.first = min(each.layer for each in placed)
        scan.last = scan.layer == max(each.layer for each in placed)
    return reasons, simulated
