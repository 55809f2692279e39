"""A quantized key-value cache: its FP8 scales for engines, and what fewer bits would cost in accuracy, simulated.

`CacheRanges` finds the largest keys and values of each attention module, from which come the scales of a checkpoint.

While a `QuantizedCache` is active, every scaled_dot_product_attention sees keys and values as they come back from such a cache,
that is after rotary embeddings. Integers have zero points. Values are quantized token by token; keys too, or channel by channel
over runs of tokens, as their outliers sit in few channels (KIVI, Liu et al., ICML 2024, section 3). The `window` latest tokens
of every query stay float (KIVI's residual); a run of tokens that is not full yet stays float as well.

Engines load FP8 caches only; widths below 8 bits are here to see what they would cost.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.formats import FP8_E4M3, Format, integer
from lowbit.qtensor import CHANNEL, TENSOR, Spec, fake_quantize_input

_EXAMPLES = "fp8, int8, int4-g64, int4-kchannel-w128, int3-g32-kchannel-w64"
_GRAMMAR = re.compile(
    r"(?:(?P<fp8>fp8)|int(?P<bits>[2-8]))(?:-g(?P<group>[1-9]\d*))?(?P<channel>-kchannel)?(?:-w(?P<window>\d+))?"
)
RUN = 32  # tokens in a run, where none is said


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How keys and values are kept.

    Attributes:
        name: what the user wrote.
        format: of the codes; fp8 has one scale a tensor, integers one and a zero point for each group.
        group: consecutive channels of a token, or tokens of a channel, that share a scale; None: the whole head, or RUN tokens.
        channel_keys: keys are quantized channel by channel.
        window: latest tokens that stay float.
    """

    name: str
    format: Format
    group: int | None = None
    channel_keys: bool = False
    window: int = 0


def parse_cache(text: str) -> CacheSpec:
    """Read `fp8` or `intB` (B = 2..8) with any of `-gK`, `-kchannel`, `-wN`, in this order.

    Raises:
        ValueError: not in the grammar.
    """
    match = _GRAMMAR.fullmatch(text.strip().lower())
    if match is None or (match["fp8"] and (match["group"] or match["channel"])):
        raise ValueError(f"unknown key-value cache {text!r}; examples of what is allowed: {_EXAMPLES}")
    return CacheSpec(
        name=text.strip().lower(),
        format=FP8_E4M3 if match["fp8"] else integer(int(match["bits"])),
        group=int(match["group"]) if match["group"] else None,
        channel_keys=match["channel"] is not None,
        window=int(match["window"] or 0),
    )


def through_cache(x: Tensor, spec: CacheSpec, *, keys: bool, scale: float | None = None) -> Tensor:
    """Keys or values [..., tokens, channels] as they come back from the cache; same shape and dtype.

    Args:
        scale: of an FP8 cache; by default the largest magnitude of x becomes the largest of the format.

    Raises:
        ValueError: the group does not divide the channels of a head.
    """
    if spec.format == FP8_E4M3:
        whole = Spec(format=spec.format, group=TENSOR)
        largest = scale * spec.format.max if scale is not None else float(x.abs().max()) or 1.0
        return fake_quantize_input(x, whole, largest)
    if keys and spec.channel_keys:
        run = spec.group or RUN
        full = x.shape[-2] // run * run
        grouped = Spec(format=spec.format, group=run, symmetric=False, dynamic=True)
        stored = fake_quantize_input(x[..., :full, :].transpose(-1, -2).contiguous(), grouped).transpose(-1, -2)
        return torch.cat([stored, x[..., full:, :]], -2)
    group = spec.group or CHANNEL
    if group != CHANNEL and x.shape[-1] % group:
        raise ValueError(f"key-value cache {spec.name}: groups of {group} do not divide the {x.shape[-1]} channels of a head")
    return fake_quantize_input(x, Spec(format=spec.format, group=group, symmetric=False, dynamic=True))


class QuantizedCache(TorchFunctionMode):
    """While active, attention sees keys and values through the cache; `calls` counts how often it did.

    scales: of keys and values, for FP8; see `through_cache`.
    """

    def __init__(self, spec: CacheSpec, scales: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.scales = scales or (None, None)
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        query, key, value = args[:3]
        stored = (
            through_cache(key, self.spec, keys=True, scale=self.scales[0]),
            through_cache(value, self.spec, keys=False, scale=self.scales[1]),
        )
        if self.spec.window == 0:
            return func(query, *stored, *args[3:], **kwargs)
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = dict(zip(names, args[3:], strict=False)) | kwargs
        return _with_window(query, (key, value), stored, self.spec.window, given)


def _with_window(
    query: Tensor, recent: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], window: int, given: dict[str, Any]
) -> Tensor:
    """Attention of query [batch, heads, q, c] to keys and values [batch, heads or fewer, k, c]: `recent` ones for the last
    `window` positions up to that of the query, `stored` ones before; `given` as scaled_dot_product_attention takes it."""
    heads = query.shape[1]
    parts = [part.repeat_interleave(heads // part.shape[1], 1) for part in (*recent, *stored)]
    near_key, near_value, far_key, far_value = parts
    rows, columns = query.shape[-2], near_key.shape[-2]
    here = torch.arange(columns - rows, columns, device=query.device).unsqueeze(1)
    distance = here - torch.arange(columns, device=query.device)
    near = distance < window
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = torch.where(near, query @ near_key.transpose(-1, -2), query @ far_key.transpose(-1, -2)) * scale
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores.float(), -1).to(query.dtype)
    return (weights * near) @ near_value + (weights * ~near) @ far_value


def simulate_cache(module: Any, spec: CacheSpec, scales: tuple[float, float] | None = None) -> None:
    """Make every forward of a module, the model or one attention module, go through a quantized cache.

    Raises (at the first forward):
        ValueError: the module does not use scaled_dot_product_attention.
    """
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with QuantizedCache(spec, scales) as cache:
            out = original(*args, **kwargs)
        if not cache.calls:
            name = type(module).__name__
            raise ValueError(f"{name} does not call scaled_dot_product_attention, so its cache cannot be simulated")
        return out

    module.forward = forward


class CacheRanges(TorchFunctionMode):
    """Records the largest magnitudes of keys and values in the attention of a block while active.

    Attributes:
        largest: [key, value] by the path of the innermost module that called scaled_dot_product_attention.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        """name: path of the block in the model."""
        super().__init__()
        self.largest: dict[str, list[float]] = {}
        self._block = block
        self._name = name
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "CacheRanges":
        for path, module in self._block.named_modules():
            name = f"{self._name}.{path}" if path else self._name
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._running.pop() and None))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            seen = self.largest.setdefault(self._running[-1], [0.0, 0.0])
            for i, part in enumerate(args[1:3]):
                seen[i] = max(seen[i], float(part.abs().max()))
        return func(*args, **(kwargs or {}))

    def scales(self) -> dict[str, Tensor]:
        """FP8 scales, as vLLM reads them: float32 [1] PATH.k_scale and PATH.v_scale."""
        found = {}
        for path, largest in self.largest.items():
            for name, value in zip(("k_scale", "v_scale"), largest, strict=True):
                found[f"{path}.{name}"] = torch.tensor([(value or 1.0) / FP8_E4M3.max])
        return found
