"""What must hold for every class of models that transformers has, not for those that somebody thought of."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import Cache, DynamicCache

from lowbit.arch import Arch, leaves
from lowbit.source import open_source

# Classes that are refused, with a part of the message.
REFUSED = {
    "cpmant": "one hidden state for every token",
    "evolla": "only 0 of 6 blocks run",
    "git": "only 0 of 2 blocks run",
    "mllama": "only 1 of 2 blocks run",
    "zamba2": "blocks need parameters of their own",
}
FAST = ("qwen3_5", "internvl", "llava", "granitemoe", "granitemoehybrid", "deepseek_v4", "gemma3n_text", "gpt2", "mamba")


def _every_type() -> list[Any]:
    built = [name for name in zoo.types() if name not in zoo.UNBUILT]
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in built]


@pytest.mark.parametrize("model_type", _every_type())
def test_no_cache_enters_a_call_and_blocks_give_the_same_twice(model_type: str, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            arch.probe()
        return
    arch.probe()
    arch.load_outside()
    tokens = arch.sample_tokens()
    hidden, calls = arch.embed(tokens)
    assert hidden.shape[:2] == tokens.shape or hidden.shape[0] == len(tokens)
    for block, call in zip(arch.blocks, calls, strict=True):
        assert not any(isinstance(value, Cache) or "cache" in type(value).__name__.lower() for value in leaves(call)[0])
        arch.load(block.tensors)
        first, second = arch.call(block, hidden, call), arch.call(block, hidden, call)
        assert first.shape == hidden.shape
        torch.testing.assert_close(first, second, equal_nan=True)
        hidden = first
    logits = arch.finish(tokens, hidden)
    expected = arch.model(input_ids=tokens, use_cache=False) if model_type == "gpt2" else arch.run(tokens)
    expected = expected.logits if getattr(expected, "logits", None) is not None else expected.last_hidden_state
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_block_that_keeps_state_is_refused_before_any_work(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    attention = arch.model.get_submodule(f"{arch.blocks[1].name}.self_attn")
    cache, original = DynamicCache(), attention.forward

    def remembers(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"attention_mask": torch.zeros(1, 1, 16, cache.get_seq_length(1) + 16), "past_key_values": cache}
        return original(*args, **kwargs)

    attention.forward = remembers
    with pytest.raises(ValueError, match=r"model.layers.1 gives another output when it is called again"):
        arch.probe()


def test_the_model_keeps_its_own_setting_of_caches(tmp_path: Path) -> None:
    zoo.save("qwen3_5", tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    assert arch.model.config.text_config.use_cache
