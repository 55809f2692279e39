"""What must hold for every class of models that transformers has, not for those that somebody thought of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from compressed_tensors.utils.match import match_named_modules
from torch import nn
from transformers import Cache, DynamicCache

from lowbit.arch import Arch, leaves
from lowbit.export import check_export, library_config
from lowbit.qtensor import parse_scheme
from lowbit.recipe import Rule, short_recipe
from lowbit.run import set_aside
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


@pytest.mark.parametrize("model_type", _every_type())
def test_targets_without_ignore_are_exactly_the_linears_that_are_packed(model_type: str, tmp_path: Path) -> None:
    if model_type in REFUSED:
        pytest.skip(f"refused: {REFUSED[model_type]}")
    zoo.save(model_type, tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    set_aside(arch, short_recipe(scheme="w4a16-g32"))
    chosen = [linear for block in arch.blocks for linear in block.linears if not linear.stacked and not linear.transposed]
    if not chosen:
        return  # Conv1D and fused experts have no layout
    schemes = {linear.name: parse_scheme("w4a16-g32") for linear in chosen}
    given = library_config(arch, schemes)
    matched = match_named_modules(arch.model, given["config_groups"]["group_0"]["targets"], given["ignore"])
    packed = {linear.param.removesuffix(".weight") for linear in chosen if linear.index is None}
    assert {name for name, module in matched if isinstance(module, nn.Linear)} == packed


# What chooses experts in the classes that quantized it once, by the end of its name.
ROUTERS = {
    "phimoe": ("block_sparse_moe.gate",),
    "llama4_text": ("feed_forward.router",),
    "hunyuan_v1_moe": ("mlp.gate.wg",),
    "longcat_flash": ("mlp.router.classifier",),
    "afmoe": ("mlp.router.gate",),
    "jetmoe": ("router.layer",),
    "gemma4_text": ("router.proj",),
}


@pytest.mark.parametrize("model_type", ROUTERS)
def test_what_chooses_experts_stays_float(model_type: str, tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2} if model_type == "gemma4_text" else {}
    zoo.save(model_type, tmp_path, **experts)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    left = [name for block in arch.blocks for name, _ in block.skipped]
    left += [linear.name for block in arch.blocks for linear, reason in block.aside if reason == "router"]
    used = [linear.name for block in arch.blocks for linear in block.linears]
    for ending in ROUTERS[model_type]:
        assert any(name.endswith(ending) for name in left), left
        assert not any(name.endswith(ending) for name in used)


def test_a_rule_for_a_router_alone_counts_where_something_loads_it(tmp_path: Path) -> None:
    zoo.save("hunyuan_v1_moe", tmp_path)
    rules = (Rule(match=r"gate\.wg", scheme="w8a16"), Rule(match="", scheme="w4a16-g32"))
    recipe = replace(short_recipe(scheme="w4a16-g32"), rules=rules)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    set_aside(arch, recipe)
    routers = [linear for block in arch.blocks for linear in block.linears if linear.router]
    assert len(routers) == len(arch.blocks)
    schemes = recipe.schemes(linear.name for block in arch.blocks for linear in block.linears)
    assert all(schemes[linear.name].name == "w8a16" for linear in routers)
    with pytest.raises(ValueError, match="chooses experts, and vLLM keeps such linears float"):
        check_export("compressed-tensors", "vllm", routers, schemes)
    check_export("compressed-tensors", "transformers", routers, schemes)


def test_experts_multiplied_all_at_once_are_linears_that_no_engine_loads(tmp_path: Path) -> None:
    zoo.save("llama4_text", tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    experts = [linear for block in arch.blocks for linear in block.linears if linear.stacked]
    assert {(linear.out_features, linear.in_features) for linear in experts} == {(256, 64), (64, 128)}
    with pytest.raises(ValueError, match="is a slice of a 3-D tensor"):
        check_export("compressed-tensors", "vllm", experts, {linear.name: parse_scheme("w4a16-g32") for linear in experts})


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
