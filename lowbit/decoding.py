"""Generation with a static cache of keys and values, or of states, where every step after the prompt is one CUDA graph.

A step takes its token, its position and its cache from fixed addresses and leaves the next token and position there, so that it
is captured once and replayed without Python; what is generated is looked at every few steps only. On a CPU the same step
runs without a graph. Greedy output is that of transformers' generate.

At batch 1 a step is many small kernels, so those that need not be are left out: layers of the cache share one position instead
of counting each, attention reads the mask as it is, and no logits are copied.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from lowbit import attention
from lowbit.kernels import entry
from lowbit.ssm import Mixer

LOOK = 16  # steps between two looks for the end of the text
_WARM_UP = 3
_ALIGNED = 16  # tokens of a cache; with others attention of torch copies its mask
_STATES = "cache_params"  # what models with nothing but states call their cache, which takes no positions
# Settings of generation that change what greedy decoding gives, and their values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,), "sequence_bias": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "num_beams": (None, 1), "guidance_scale": (None, 1.0), "stop_strings": (None,), "exponential_decay_length_penalty": (None,),
    "top_k": (None, 50, 0), "top_p": (None, 1.0), "min_p": (None,), "watermarking_config": (None,), "penalty_alpha": (None,),
}  # fmt: skip


class _Layer(StaticLayer):
    """Keys and values of a layer, with room for all tokens.

    Attributes:
        at: [tokens], where those of the next call go.
        begins: whether the next call is the first, which attends to its own tokens and not to all there is room for.
    """

    at: Tensor
    begins = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [rows, heads, tokens, width] where they go; returns what is to be attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        entry.put(self.keys, self.values, key_states, value_states, self.at)
        return (key_states, value_states) if self.begins else (self.keys, self.values)

    def get_seq_length(self) -> Any:
        """How many tokens came before this call."""
        return 0 if self.begins else self.at[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there are for so many tokens, and where the first is."""
        return (query_length, 0) if self.begins else (self.max_cache_len, 0)


class Decoder:
    """A causal language model with a static cache for `rows` sequences of up to `length` tokens.

    Attributes:
        token, position: [rows, 1] int64, of the next step; a step replaces them by the likeliest token and its position.
        logits: [rows, vocabulary], what the last call gave for its last position.
    """

    def __init__(self, model: Any, rows: int, length: int, *, compiled: bool = False) -> None:
        """The model attends by `attention` from now on. compiled: have torch.compile join what lies between the products, which
        takes a minute.

        Raises:
            ValueError: the model cannot decode so; see `reason_against`.
        """
        reason = reason_against(model)
        if reason is not None:
            raise ValueError(reason)
        attention.join(model)
        self.model = model
        self.length = _room(length)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.length)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self.logits: Tensor = torch.empty(0)
        if _share_positions(self.cache, self.length):
            self.cache.layers = [_Layer(self.length) for _ in self.cache.layers]
        self._forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
        self._takes = inspect.signature(model.forward).parameters
        self._graph: Any = None

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Start anew with a prompt [rows, tokens]; returns `logits`."""
        self.cache.reset()
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        self._put_at(positions, begins=True)
        out = self._run(self.model, prompt, positions.expand(len(prompt), -1))
        if self._graph is None:
            self.logits = out.logits[:, -1].clone()
        else:
            self.logits.copy_(out.logits[:, -1])
        torch.argmax(self.logits, -1, keepdim=True, out=self.token)
        self.position.fill_(prompt.shape[1])
        self._put_at(self.position[0], begins=False)
        return self.logits

    def _put_at(self, positions: Tensor, *, begins: bool) -> None:
        for layer in self.cache.layers:
            if isinstance(layer, _Layer):
                layer.at, layer.begins = positions, begins

    @torch.no_grad()
    def capture(self) -> None:
        """Have later steps replay a CUDA graph; after the first `prefill`, which lays out the cache.

        Raises:
            ValueError: the step of this model cannot be captured; see `reason_against_graph`.
        """
        reason = reason_against_graph(self.model, self.length)
        if reason is not None:
            raise ValueError(reason)
        before = [(layer, [part.clone() for part in _changing(layer)]) for layer in self.cache.layers]
        token, position, logits = self.token.clone(), self.position.clone(), self.logits
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
                self._restore(before, token, position)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph
        self._restore(before, token, position)
        self.logits.copy_(logits)

    def _restore(self, before: list[tuple[Any, list[Tensor]]], token: Tensor, position: Tensor) -> None:
        for layer, parts in before:
            for part, value in zip(_changing(layer), parts, strict=True):
                part.copy_(value)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = int(layer.cumulative_length)
        self.token.copy_(token)
        self.position.copy_(position)

    def step(self) -> Tensor:
        """Run `token` at `position`; returns `logits`, and both have gone on."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad():
                self._step()
        return self.logits

    def _step(self) -> None:
        out = self._run(self._forward, self.token, self.position)
        self.logits = out.logits[:, -1]
        torch.argmax(self.logits, -1, keepdim=True, out=self.token)
        self.position.add_(1)

    def _run(self, forward: Callable[..., Any], tokens: Tensor, positions: Tensor) -> Any:
        given = {"position_ids": positions, "past_key_values": self.cache, _STATES: self.cache, "logits_to_keep": 1}
        return forward(input_ids=tokens, use_cache=True, **{name: each for name, each in given.items() if name in self._takes})


def _changing(layer: Any) -> list[Tensor]:
    """What a step changes in a layer of the cache, but for keys and values, which lie behind `cumulative_length`."""
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [part for part in (getattr(layer, "cumulative_length", None), *states) if part is not None]


def reason_against(model: Any) -> str | None:
    """Why a model cannot decode with a static cache at given positions; None if it can."""
    forward = inspect.signature(model.forward).parameters
    for name in () if _STATES in forward else ("past_key_values", "position_ids"):
        if name not in forward:
            return f"{type(model).__name__} takes no {name}"
    settings = getattr(model, "generation_config", None)
    changed = [name for name, plain in _PLAIN.items() if getattr(settings, name, None) not in plain]
    return f"its generation settings have {', '.join(changed)}" if changed else None


def reason_against_graph(model: Any, length: int) -> str | None:
    """Why a step cannot be a CUDA graph; None if it can."""
    if model.device.type != "cuda":
        return f"there are no CUDA graphs on {model.device}"
    scans = [name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), Mixer)]
    if scans:
        return f"a simulated scan leaves its state anywhere in memory ({scans[0]})"
    length = _room(length)
    for layer in StaticCache(config=model.config, max_cache_len=length).layers:
        if isinstance(layer, StaticLayer) and layer.max_cache_len < length:
            return f"a window of {layer.max_cache_len} tokens slides within {length}, which changes the step"
    experts = [name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    return f"which experts run depends on the tokens ({experts[0]})" if experts else None


def _room(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED


def _share_positions(cache: Any, length: int) -> bool:
    """Whether all layers of a cache can put a token at its position: they have keys and values, and room for all."""
    plain = (StaticLayer, StaticSlidingWindowLayer)
    return all(type(layer) in plain and layer.max_cache_len >= length for layer in cache.layers)


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, *, tokens: int, temperature: float = 0.0, graph: bool | None = None, compiled: bool = False
) -> Tensor:
    """Continue a prompt [rows, length] by up to `tokens` tokens.

    Args:
        temperature: 0 takes the likeliest token, more samples, from torch's default generator.
        graph: whether steps are one CUDA graph; by default wherever that can be, with a warning where it cannot on a GPU.
        compiled: see `Decoder`.

    Returns:
        [rows, length + tokens], or fewer where all rows have ended; ended rows are filled up as transformers fills them.
    """
    reason = reason_against(model)
    if reason is not None:
        warnings.warn(f"decoding by transformers' generate, without a graph: {reason}", stacklevel=2)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, **sampling)
    length = prompt.shape[1] + tokens
    decoder = Decoder(model, len(prompt), length, compiled=compiled)
    decoder.prefill(prompt)
    against = reason_against_graph(model, length)
    if graph or (graph is None and against is None):
        decoder.capture()
    elif graph is None and model.device.type == "cuda":
        warnings.warn(f"decoding without a graph: {against}", stacklevel=2)
    ends = _ends(model)
    found = prompt.new_zeros(len(prompt), tokens)
    made = 0
    while made < tokens:
        if temperature > 0:
            decoder.token.copy_(torch.multinomial((decoder.logits.float() / temperature).softmax(-1), 1))
        found[:, made] = decoder.token[:, 0]
        made += 1
        if ends and (made % LOOK == 0 or made == tokens) and bool(torch.isin(found[:, :made], _like(ends, found)).any(1).all()):
            break
        if made < tokens:
            decoder.step()
    return torch.cat([prompt, _ended(model, found[:, :made], ends)], 1)


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    given = getattr(model.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def _like(ids: list[int], tokens: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)


def _ended(model: Any, found: Tensor, ends: list[int]) -> Tensor:
    """Cut off what was generated after all rows had ended, and fill up those that ended earlier."""
    if not ends:
        return found
    ended = torch.isin(found, _like(ends, found)).int().cumsum(1)
    after = (ended - torch.isin(found, _like(ends, found)).int()) > 0  # an end came before
    fill = model.generation_config.pad_token_id
    found = found.masked_fill(after, ends[0] if fill is None else fill)
    alive = int((~after).any(0).sum())
    return found[:, :alive]
