"""What a model takes in and gives out, and how far one model's output is from another's.

Three kinds of output, told by the model's class:

    next token   logits [rows, positions, vocabulary] of a causal language model, which also predicts the text itself
    choices      logits whose last axis are alternatives: of a masked language model [rows, positions, vocabulary], a
                 sequence classifier [rows, labels], a tagger [rows, positions, labels], and of extractive question answering
                 [rows, 2, positions], for the start and for the end of the answer
    values       numbers: hidden states [rows, positions, width], or logits of a regression, of several labels at once, or of
                 a multiple choice, which is given one choice a row

The distance of outputs with alternatives is KL(wanted || found) in nats; of values, the squared error relative to the square.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "n_ctx")  # in configs
_CHOICES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def predicts_next_token(model_class: type | None) -> bool:
    """Whether models of a transformers class are causal language models."""
    return bool(getattr(model_class, "can_generate", lambda: False)())


def gives_choices(model: Any) -> bool:
    """Whether the last axis of a transformers model's output are logits of alternatives; else they are values."""
    if model.get_output_embeddings() is not None:
        return True
    name, config = type(model).__name__, model.config
    if not any(kind in name for kind in _CHOICES):
        return False
    several = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    return "ForSequenceClassification" not in name or (config.num_labels > 1 and not several)


def input_ids(model: Any, tokens: Tensor) -> Tensor:
    """Tokens [rows, length] in the shape that the model takes: a multiple choice gets one choice a row."""
    return tokens[:, None] if "ForMultipleChoice" in type(model).__name__ else tokens


def positions(model: Any) -> int | None:
    """The most tokens in a row that a transformers model takes, as its config says; None where it does not."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    found = next((x for name in _POSITIONS if isinstance(x := getattr(config, name, None), int) and x > 0), None)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        # RoBERTa counts positions from behind the one of padding.
        if isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == found:
            return found if module.padding_idx is None else found - module.padding_idx - 1
    return found


def output_of(returned: Any) -> Tensor:
    """The tensor that a transformers model gives out, see the module docstring.

    Raises:
        ValueError: it returns neither logits, nor ends of an answer, nor hidden states.
    """
    for name in ("logits", "last_hidden_state"):
        if getattr(returned, name, None) is not None:
            return getattr(returned, name)
    if getattr(returned, "start_logits", None) is not None and returned.start_logits.shape == returned.end_logits.shape:
        return torch.stack((returned.start_logits, returned.end_logits), 1)
    names = ", ".join(returned) if isinstance(returned, Mapping) else "no names"
    raise ValueError(
        f"the model returns a {type(returned).__name__} with {names}; lowbit compares logits, last_hidden_state, or "
        "start_logits and end_logits"
    )


def distance(found: Tensor, wanted: Tensor, *, choices: bool) -> tuple[Tensor, Tensor]:
    """How far an output is from another of its shape; gradients pass.

    Returns:
        with `choices`, the sum of KL(wanted || found) in nats and the number of distributions; else the squared distance and
        the squared length of what is wanted. Scalars, float64.
    """
    a, b = found.float(), wanted.float()
    if not choices:
        return (a - b).square().sum(dtype=torch.float64), b.square().sum(dtype=torch.float64)
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return (b.exp() * (b - a)).sum(dtype=torch.float64), torch.tensor(a[..., 0].numel(), dtype=torch.float64)
