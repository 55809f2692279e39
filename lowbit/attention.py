"""Attention of models on the kernels, where all tokens of a row see the same keys: in encoders, and in a step of decoding.

It is an implementation of attention as transformers lets one register it. transformers leaves a mask away where nothing is
padded, which it must look for; in a CUDA graph it cannot look, writes out a mask of all pairs of tokens and takes a slower
kernel. Here a mask of an encoder is one bit a key, and nobody looks at it; where none is given, none is made. In decoding,
heads of keys that several heads of queries share are not copied for each. All else is attended to as before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from lowbit.kernels import entry

NAME = "lowbit"
_WIDEST = 256  # of a head, that the kernel has room for
_LONGEST = 256  # tokens without a mask: of more PyTorch's own kernel is faster (27 us, ours 33, at 8 x 512, 16 heads of 64)


def join(model: Any) -> None:
    """Have a model attend by the kernel, if PyTorch's function is what it attends by and may be another."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [rows, heads, tokens, width], key and value alike, maybe of fewer heads; returns [rows, tokens, heads, width]."""
    if attention_mask is None:
        causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        of_keys = not causal and query.shape[2] <= _LONGEST
    else:
        of_keys = attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1)
    if of_keys and key.shape == value.shape and key.shape[3] <= _WIDEST and not dropout and others.get("position_bias") is None:
        return entry.attend(query, key, value, attention_mask, scaling).transpose(1, 2), None
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return out


def _mask(*, q_length: int, kv_length: int, mask_function: Any, attention_mask: Tensor | None = None, **others: Any) -> Any:
    """As PyTorch's attention takes it; but bool [rows, 1, 1, keys] where all tokens see the same keys, None where nothing is
    hidden from them, or from each what comes after it."""
    if mask_function is bidirectional_mask_function and (attention_mask is None or attention_mask.shape[-1] == kv_length):
        return None if attention_mask is None else attention_mask[:, None, None].bool()
    offsets = [others.get(name) for name in ("q_offset", "kv_offset")]
    whole = q_length == kv_length and not any(isinstance(each, Tensor) or each for each in offsets)
    if mask_function is causal_mask_function and attention_mask is None and whole and others.get("allow_is_causal_skip"):
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **others
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
