"""Attention of models on the kernels, where all tokens of a row see the same keys: in encoders, and in a step of decoding.

It is an implementation of attention as transformers lets one register it. For an encoder transformers leaves the mask away
where nothing is padded. To see that, it waits for the GPU; in a CUDA graph it cannot, writes out a mask of all pairs of tokens
and takes a slower kernel. Here such a mask is one bit a key, and nobody looks at it. In decoding, heads of keys that several
heads of queries share are not copied for each. All else is attended to as before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from lowbit.kernels import entry

NAME = "lowbit"
_WIDEST = 256  # of a head, that the kernel has room for


def join(model: Any) -> None:
    """Have a model attend by the kernel, if PyTorch's function is what it attends by and may be another."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, is_causal: bool | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [rows, heads, tokens, width], key and value alike, maybe of fewer heads; returns [rows, tokens, heads, width]."""
    if attention_mask is None:
        of_keys = not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        of_keys = attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1)
    if of_keys and key.shape == value.shape and key.shape[3] <= _WIDEST and not dropout and position_bias is None:
        return entry.attend(query, key, value, attention_mask, scaling).transpose(1, 2), None
    others |= {} if position_bias is None else {"position_bias": position_bias}
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return out


def _mask(
    *, kv_length: int, mask_function: Any = bidirectional_mask_function, attention_mask: Tensor | None = None, **others: Any
) -> Tensor | None:
    """bool [rows, 1, 1, keys] or None where all tokens see the same; else as PyTorch's attention takes it."""
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_length:
            return attention_mask[:, None, None].bool()
    found: Tensor | None = sdpa_mask(kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **others)
    return found


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
