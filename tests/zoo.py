"""A tiny model of every class that transformers' auto classes know for causal language modelling and for images with text.

The config of each class gets small values for the names that configs have in common. What more it needs is in `_OVERRIDES`.
What cannot be built, or cannot run from tokens alone, is in `UNBUILT`, with the reason.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

_SMALL: dict[str, Any] = {
    **{"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size_per_layer_input": 128},
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "projection_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "lru_width", "moe_intermediate_size", "projector_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "output_dim", "n_positions_"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("feed_forward_size", "mamba_d_ssm"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_d_state"), 16),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size", "sliding_window"), 16),
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4},
    **{"mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_n_groups": 1, "time_step_rank": 8, "mamba_dt_rank": 8},
    **{"image_size": 28, "patch_size": 14, "hidden_size_per_layer_input": 32, "num_nextn_predict_layers": 0},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("image_token_id", "image_token_index"), 5),
    **{"video_token_id": 6, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_ROPE = {"rope_parameters": {**_ROPE["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}

# What a class needs beside `_SMALL`; of sub-configs, by their names.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LINEAR, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_head": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": _LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    **{name: {"text_config": _ROPE} for name in ("glm4v", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")},
    **{name: {"text_config": _ROPE} for name in ("glm46v", "glmga", "qwen2_5_omni_thinker")},
    **{name: {"text_config": _HALF_ROPE} for name in ("glm4v_moe", "glm_ocr")},
    **{name: {"text_config": _LINEAR} for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen4_exp")},
    "qwen4_exp_text": _LINEAR,
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_d_state": 16},
}

_NEEDS_IMAGE = "runs with an image only"
_BOTH = "is an encoder-decoder"
_MORE = "its config needs more than small values"
UNBUILT: dict[str, str] = {
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
        ),
        _BOTH,
    ),
    **dict.fromkeys(
        (
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "pix2struct",
            "plbart",
        ),
        _BOTH,
    ),
    **dict.fromkeys(
        (
            "pp_formulanet",
            "prophetnet",
            "t5gemma2",
            "udop",
            "vision-encoder-decoder",
            "whisper",
        ),
        _BOTH,
    ),
    **dict.fromkeys(("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "pi0"), _NEEDS_IMAGE),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "needs the library timm"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, from its hidden states"),
    **dict.fromkeys(
        ("blt", "chameleon", "cohere_compass", "cohere_compass_text", "cosmos3_edge", "dbrx", "deepseek_ocr2"), _MORE
    ),
    **dict.fromkeys(("diffusion_gemma", "emu3", "ernie4_5_vl_moe", "florence2", "glm5_next", "granite4_vision"), _MORE),
    **dict.fromkeys(("hunyuan_vl", "janus", "molmo2", "muse_spark", "nemotron_h_omni", "xlstm", "xmod", "zamba"), _MORE),
}
PARAMETERS = 40_000_000  # a class whose tiny config still makes more is listed as unbuilt


def types() -> list[str]:
    """The model types of all classes, sorted."""
    return sorted({**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def model_class(model_type: str) -> Any:
    """The class with a head for a model type: for images with text where there is one."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def config(model_type: str, **more: Any) -> Any:
    """The small config of a model type; `more` overrides further values, of sub-configs by their names."""
    return _made(CONFIG_MAPPING[model_type], _merged(_OVERRIDES.get(model_type, {}), more))


def build(model_type: str, **more: Any) -> transformers.PreTrainedModel:
    """A tiny model with random weights that follow from a fixed seed, in evaluation mode.

    Raises:
        ValueError: the class is in `UNBUILT`.
    """
    if model_type in UNBUILT:
        raise ValueError(f"{model_type}: {UNBUILT[model_type]}")
    made, kind = config(model_type, **more), model_class(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(made).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{model_type} has {size / 1e6:.0f} million parameters: name more of its config in _OVERRIDES")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = kind(made)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2 and parameter.is_floating_point():
                    parameter.normal_(std=0.1)
                elif not bool(torch.isfinite(parameter).all()):
                    parameter.zero_()
    return model.eval().requires_grad_(False)


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> transformers.PreTrainedModel:
    """Save the tiny model of a type to a folder and return it."""
    model = build(model_type, **more).to(dtype)
    model.save_pretrained(folder)
    return model


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    found = dict(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = _merged(found[name], value) if both else value
    return found


def _made(kind: Any, more: dict[str, Any]) -> Any:
    return kind(**_arguments(kind, more))


def _arguments(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(kind.__init__).parameters)
    names |= {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    other = getattr(kind, "attribute_map", {})
    given = {name: value for name, value in _SMALL.items() if name in names}
    given |= {other[name]: value for name, value in _SMALL.items() if other.get(name) in names - set(_SMALL)}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        given["num_key_value_heads"] = 4
    parts = getattr(kind, "sub_configs", {})
    default = kind() if any(part.__name__ == "AutoConfig" for part in parts.values()) else None
    for name, part in parts.items():
        if name not in names:
            continue
        if part.__name__ == "AutoConfig":
            part = type(getattr(default, name))
            if not hasattr(part, "model_type"):
                continue
        small = _arguments(part, more.get(name, {}))
        given[name] = {"model_type": part.model_type, **small} if part.model_type else small
    return _merged(given, {name: value for name, value in more.items() if name not in parts})
