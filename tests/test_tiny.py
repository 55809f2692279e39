"""The tiny models build deterministically and survive a round trip through a checkpoint."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_loads_to_identical_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.save(name, tmp_path, dtype=dtype, seed=3)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    loaded, report = tiny.auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(parameter.dtype == dtype for parameter in loaded.parameters())
    rows = tiny.tokens(2, 24, seed=1)
    with torch.no_grad():
        expected, found = model(rows).logits, loaded.eval()(rows).logits
    assert expected.isfinite().all() and 0.3 < expected.float().std() < 5.0
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_follow_from_the_seed(name: str) -> None:
    first = tiny.build(name, seed=1).state_dict()
    torch.manual_seed(12345)
    again, other = tiny.build(name, seed=1).state_dict(), tiny.build(name, seed=2).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_shape_of_the_model(name: str) -> None:
    model = tiny.build(name)
    assert model.config.vocab_size == tiny.VOCAB
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.in_features % 32 == 0
        elif isinstance(module, Conv1D):
            assert module.nx % 32 == 0
        elif "Norm" in type(module).__name__ and isinstance(weight := getattr(module, "weight", None), torch.Tensor):
            assert weight.unique().numel() > 4
    largest = max((len(list(m.parameters())), len(m)) for m in model.modules() if isinstance(m, nn.ModuleList))
    assert largest[1] == tiny.LAYERS


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_number_of_shards(shards: int, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) == shards


def test_tokenizer(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (tiny.BOS, tiny.EOS, tiny.PAD)
    assert len(tokenizer) <= tiny.VOCAB
    text = "The error of one {weight}\nis paid for by ~32 others!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the other")["input_ids"]) < len("the other")
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A grid."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|bos|>user: What is it?<|eos|>\nassistant: A grid.<|eos|>\n"
    )
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str) and prompt.endswith("\nassistant: ")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[0] == tiny.BOS and tiny.EOS in ids and max(ids) < tiny.VOCAB


def test_tokens() -> None:
    rows = tiny.tokens(4, 50, seed=7, vocab=100)
    assert rows.shape == (4, 50) and rows.dtype == torch.int64
    assert rows.min() > tiny.PAD and rows.max() < 100
    assert torch.equal(rows, tiny.tokens(4, 50, seed=7, vocab=100))
    assert not torch.equal(rows, tiny.tokens(4, 50, seed=8, vocab=100))
