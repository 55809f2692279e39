"""Tiny randomly initialised models of many architectures, for tests that need a real checkpoint on disk."""

import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCAB = 128
HIDDEN = 64
FFN = 128
LAYERS = 3
BOS, EOS, PAD = 0, 1, 2

_IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_PLAIN: dict[str, Any] = {**_IDS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
_HEADS: dict[str, Any] = {
    **_PLAIN,
    "intermediate_size": FFN,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED: dict[str, Any] = {**_HEADS, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {**_IDS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": FFN, "n_positions": 256}
_FALCON: dict[str, Any] = {
    **_PLAIN,
    "num_attention_heads": 4,
    "ffn_hidden_size": FFN,
    "max_position_embeddings": 256,
    "alibi": False,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}

# name -> (model type, configuration arguments)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_untied": ("llama", {**_GROUPED, "tie_word_embeddings": False}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {**_GROUPED, "original_max_position_embeddings": 256}),
    "opt": (
        "opt",
        {
            **_PLAIN,
            "ffn_dim": FFN,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _HEADS),
    "bloom": ("bloom", {**_IDS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    "falcon_new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_old": ("falcon", {**_FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": FFN}),
    # The first block of this one is dense.
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "head_dim": 32, "mlp_only_layers": [0]}),
    "bert": ("bert", _HEADS),
    "roberta": ("roberta", _HEADS),
    "mamba": ("mamba", {**_PLAIN, "state_size": 16, "time_step_rank": 32}),
    "mamba2": (
        "mamba2",
        {**_PLAIN, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    ),
    # Two blocks with a scan, one with attention.
    "bamba": (
        "bamba",
        {
            **_GROUPED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
        },
    ),
}

HYBRIDS = ("bamba",)  # whose blocks differ
NAMES: tuple[str, ...] = tuple(name for name in _CONFIGS if name not in HYBRIDS)
MASKED = ("bert", "roberta")

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "A smaller model is a faster model, if the rounding is done with care.",
    "Every weight is rounded to a grid; the error of one is paid for by the others.",
    "In the beginning there were 32 bits, then 16, then 8, then 4.",
    "What is the capital of the country? The answer is in the other sentence.",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def config(name: str) -> transformers.PreTrainedConfig:
    """Return the configuration of the tiny model `name`."""
    model_type, arguments = _CONFIGS[name]
    return transformers.AutoConfig.for_model(model_type, **arguments)


def auto_class(name: str) -> Any:
    """Return the auto class that builds and loads the tiny model `name`."""
    return transformers.AutoModelForMaskedLM if name in MASKED else transformers.AutoModelForCausalLM


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Build the tiny model `name` in evaluation mode; its weights follow from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = auto_class(name).from_config(config(name), dtype=dtype)
        # Buffers computed under the model's own dtype differ from those of a loaded model; this computes them again.
        model.apply(model._init_weights)
    model.tie_weights()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # a tied weight appears once, as the embedding
            path, _, leaf = key.rpartition(".")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
            parameter.copy_(_value(model.get_submodule(path), leaf, parameter.detach().float(), generator))
    model.eval()
    return model


def save(
    name: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "64KB",
    shards: int | None = None,
) -> transformers.PreTrainedModel:
    """Save the tiny model `name` to `folder` in several shards and return it.

    `shards`, where given, replaces `max_shard_size`: the shards are as small as they can be with at most that many.
    """
    model = build(name, seed, dtype)
    if shards is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model
    low, high = 1, sum(tensor.nbytes for tensor in model.state_dict().values())
    while low < high:
        middle = (low + high) // 2
        model.save_pretrained(folder, max_shard_size=middle)
        if len(list(Path(folder).glob("*.safetensors"))) <= shards:
            high = middle
        else:
            low = middle + 1
    model.save_pretrained(folder, max_shard_size=high)
    return model


def save_tokenizer(folder: str | Path) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that fits the tiny models, save it to `folder` and return it.

    It knows printable ASCII and the newline; other characters are dropped.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = {
        character
        for word in ("".join(map(chr, range(32, 127))), "\n")
        for part, _ in split.pre_tokenize_str(word)
        for character in part
    }
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def tokens(rows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Return random token ids [rows, length] in int64, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PAD + 1, vocab, (rows, length), generator=generator)


def _value(module: nn.Module, leaf: str, start: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the value of a parameter whose initial value is `start`."""
    noise = torch.randn(start.shape, generator=generator)
    if isinstance(module, nn.Embedding):
        return _embedding(noise, generator)
    if isinstance(module, Conv1D) and leaf == "weight":
        return _matrix(noise.T, generator).T
    if isinstance(module, nn.Conv1d) and leaf == "weight":
        return noise / start.shape[-1] ** 0.5
    if start.dim() >= 2 and leaf != "A_log":
        return _matrix(noise, generator)
    if "Norm" in type(module).__name__ and leaf == "weight":
        # Around 1, or around 0 where the layer adds the 1 itself.
        value = start + 0.1 * noise
        value[_few(value.shape[0], generator)] += 2.0
        return value
    return start + 0.1 * noise


def _matrix(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scale noise [..., out, in] like trained weights, with outliers among the rows and among the columns."""
    rows, columns = noise.shape[-2:]
    value = noise * (0.7 / columns**0.5)
    value[..., _few(columns, generator)] *= 4.0
    value[..., _few(rows, generator), :] *= 2.0
    return value


def _embedding(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Correlate the channels of noise [tokens, channels] and enlarge a few of them."""
    width = noise.shape[1]
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    decay = 1.5 / (1.0 + torch.arange(width) / 8.0)
    value = 0.2 * (0.3 * noise + (noise * decay) @ mixing)
    value[:, _few(width, generator)] *= 4.0
    return value


def _few(width: int, generator: torch.Generator) -> torch.Tensor:
    """Pick about one of 32 indices."""
    return torch.randperm(width, generator=generator)[: max(1, width // 32)]
