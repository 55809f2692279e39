"""What must hold for every class of models that transformers has, not for those that somebody thought of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import save_file
from torch import nn
from transformers import Cache, DynamicCache

from lowbit.arch import Arch, leaves
from lowbit.data import DataSpec, calibration_tokens
from lowbit.export import QuantizedSource, check_export, check_loading, library_config
from lowbit.outputs import positions
from lowbit.qtensor import parse_scheme
from lowbit.recipe import Rule, short_recipe
from lowbit.run import quantize, set_aside
from lowbit.source import open_source
from lowbit.unit import Stream

# Classes that are refused, with a part of the message.
REFUSED = {
    "cpmant": "one hidden state for every token",
    "evolla": "only 0 of 6 blocks run",
    "git": "only 0 of 2 blocks run",
    "hrm_text": "lacks 8 tensors",
    "mistral_large4": "takes more from the block before it than hidden states",
    "phi4_multimodal": "only 0 of 24 blocks run",
    "qianfan_ocr": "lacks 2 tensors",
    "shieldgemma2": "lacks 29 tensors",
    "unlimited_ocr": "lacks 2 tensors",
    "xlm": "does not start from the output of the block before it",
    "xlnet": "one hidden state for every token",
    "zaya": "takes more from the block before it than hidden states",
}
FAST = ("qwen3_5", "internvl", "llava", "granitemoe", "granitemoehybrid", "deepseek_v4", "gemma3n_text", "gpt2", "mamba")


# Of the others, those that people use most run in every full suite, the rest in the long one.
POPULAR = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_moe",
        "qwen2_moe",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
    ),
    *("gemma2", "gemma3", "gemma4", "gemma4_text", "mistral", "mistral3", "mixtral", "ministral3", "phi3", "phimoe"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "gpt_oss", "llama4", "llama4_text", "glm4", "glm4_moe", "minimax_m2"),
    *("kimi_linear", "lfm2", "granite", "nemotron_h", "smollm3", "olmo2", "olmo3", "ernie4_5_moe", "exaone4", "seed_oss"),
    *("falcon_mamba", "qwen3_vl_moe", "zaya", "bamba", "mamba2"),
)


def _every_type() -> list[Any]:
    built = [name for name in zoo.types() if name not in zoo.UNBUILT]
    marks = {name: pytest.mark.slow if name in POPULAR else pytest.mark.long for name in built if name not in FAST}
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in built]


@pytest.mark.parametrize("model_type", _every_type())
def test_no_cache_enters_a_call_and_blocks_give_the_same_twice(model_type: str, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            Arch(open_source(str(tmp_path))).probe()
        return
    arch = Arch(open_source(str(tmp_path)))
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
    with pytest.raises(ValueError, match="holds all experts of a layer"):
        check_export("compressed-tensors", "vllm", experts, {linear.name: parse_scheme("w4a16-g32") for linear in experts})


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "deepseek_v4"])
def test_arguments_that_depend_on_tokens_reach_every_batch_also_after_a_restart(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.unit.TOKENS_PER_BATCH", 32)
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    shared = kinds if model_type == "gemma4_text" else {}
    zoo.save(model_type, tmp_path / "model", **shared)
    arch = Arch(open_source(str(tmp_path / "model")))
    arch.probe()
    assert arch.calls_differ
    assert any(block.varying for block in arch.blocks)
    assert any(block.carried for block in arch.blocks) == model_type.startswith("gemma")
    tokens = torch.randint(10, 100, (5, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "work").mkdir()
    for index, block in enumerate(arch.blocks):
        stream = Stream(arch, tokens, tmp_path / "work")  # as after a kill
        assert len(stream.taken) == 3
        stream.start()
        arch.load(block.tensors)
        hidden, call = stream.stand_in(index)
        assert arch.call(block, hidden, call).shape == hidden.shape
        stream.advance(block, lambda hidden, call, block=block: arch.call(block, hidden, call))
        arch.free(block.name)
        stream.drop(index)
    arch.load_outside()
    found = arch.finish(tokens, stream.read(len(arch.blocks), 0, 5))
    expected = arch.fill()(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_tensors_without_a_place_are_kept_named_and_ignored(tmp_path: Path) -> None:
    model = zoo.save("llama", tmp_path / "model")
    further = {
        "mtp.fc.weight": torch.randn(64, 128),
        "mtp.norm.weight": torch.randn(64),
        "model.layers.2.mlp.experts.up": torch.randn(2, 64, 64),
    }
    save_file(model.state_dict() | further, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    report = quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32")
    left = {row["name"]: row["reason"] for row in report["float_matrices"]}
    assert left["mtp.fc"] == left["mtp.norm"] == "kept as it is: the model has no place for it"
    out = QuantizedSource(tmp_path / "out")
    assert all(torch.equal(out.read([name])[name], value) for name, value in further.items())
    ignore = out.config["quantization_config"]["ignore"]
    assert {"mtp.fc", "model.layers.2.mlp.experts.up"} <= set(ignore)
    assert "mtp.norm" not in ignore


def test_a_stack_that_transformers_turns_is_found(tmp_path: Path) -> None:
    zoo.save("qwen3_vl_moe", tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    (name,) = [name for name in source.tensors if name.endswith("layers.1.mlp.experts.down_proj")]
    report = quantize(str(tmp_path / "model"), tmp_path / "out", scheme="w4a16-g32", format="lowbit")
    rows = {row["name"]: row["shape"] for row in report["linears"]}
    assert [rows[f"{name}.{i}"] for i in range(4)] == [[64, 64]] * 4
    assert QuantizedSource(tmp_path / "out").tensors[name].shape == source.tensors[name].shape


def test_small_linears_that_vllm_has_no_kernel_for_stay_float(tmp_path: Path) -> None:
    zoo.save("qwen3_5", tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    linears = {linear.name.rpartition(".")[2] for block in arch.blocks for linear in block.linears}
    assert {"in_proj_a", "in_proj_b", "k_proj"} <= linears
    set_aside(arch, short_recipe(scheme="w4a16-g32", engine="transformers"))
    assert not any(block.aside for block in arch.blocks)
    set_aside(arch, short_recipe(scheme="w4a16-g32"))
    aside = {linear.name.rpartition(".")[2]: reason for block in arch.blocks for linear, reason in block.aside}
    assert set(aside) == {"in_proj_a", "in_proj_b"}
    assert all("vLLM has no kernel for 4 x 64" in reason for reason in aside.values())
    kept = [linear for block in arch.blocks for linear in block.linears]
    assert {linear.shares for linear in kept} <= {linear.name for linear in kept}


@pytest.mark.parametrize(("name", "limit"), [("bert", 256), ("roberta", 256 - 1 - 2), ("gpt2", 256), ("llama", 256)])
def test_rows_are_as_long_as_the_model_has_positions(name: str, limit: int, tmp_path: Path) -> None:
    tiny.save(name, tmp_path / "model")
    data = DataSpec(source="random", rows=2)
    arch = Arch(open_source(str(tmp_path / "model")))
    assert positions(arch.model) == limit
    told: list[str] = []
    report = quantize(
        str(tmp_path / "model"),
        tmp_path / "out",
        scheme="w4a16-g32",
        data=data,
        format="lowbit",
        progress=lambda stage, done, total: told.append(stage),
    )
    assert report["data"]["length"] == limit
    assert f"calibrating on 2 rows of {limit} tokens, all that the model and the text have" in told
    with pytest.raises(ValueError, match=f"length = {limit + 1}: the model has {limit} positions"):
        quantize(
            str(tmp_path / "model"),
            tmp_path / "long",
            scheme="w4a16-g32",
            data=replace(data, length=limit + 1),
            format="lowbit",
        )
    assert not (tmp_path / "long.partial").exists()


def test_rows_and_length_fit_a_short_text_unless_they_are_given(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("A smaller model is a faster model. " * 30, encoding="utf-8")
    spec = DataSpec(source=str(text), length=16)
    found = calibration_tokens(spec, tokenizer, vocab_size=tiny.VOCAB)
    assert 2 <= len(found.tokens) < 128
    assert found.describe()["rows"] == len(found.tokens)
    assert calibration_tokens(DataSpec(source=str(text)), tokenizer, vocab_size=tiny.VOCAB).tokens.shape[0] == 1
    with pytest.raises(ValueError, match="use a length <= "):
        calibration_tokens(replace(spec, rows=1, length=4096), tokenizer, vocab_size=tiny.VOCAB)


# What `from_pretrained` did with a packed checkpoint of the class, by transformers 5.22.
LOADS = {"llama": True, "bamba": True, "jamba": True, "gpt_neox": True, "qwen3_5": True, "granitemoehybrid": True}
FAILS = {
    "falcon": "its code for FalconLinear reads weights",
    "falcon_mamba": "its code for FalconMambaMixer reads weights",
    "mamba2": "its code for Mamba2Mixer reads weights",
    "kimi_linear": "makes one parameter of",
}


@pytest.mark.parametrize("model_type", [*LOADS, *FAILS])
def test_what_transformers_cannot_load_is_refused_by_running_its_code(model_type: str, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path)
    arch = Arch(open_source(str(tmp_path)))
    arch.probe()
    linears = [linear for block in arch.blocks for linear in block.linears if not linear.stacked]
    schemes = {linear.name: parse_scheme("w4a16-g32") for linear in linears}
    check_loading(arch, "compressed-tensors", "vllm", linears, schemes)
    check_loading(arch, "lowbit", "transformers", linears, schemes)
    if model_type in LOADS:
        check_loading(arch, "compressed-tensors", "transformers", linears, schemes)
        return
    with pytest.raises(ValueError, match=FAILS[model_type]):
        check_loading(arch, "compressed-tensors", "transformers", linears, schemes)


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
