"""Generation with a static cache gives what transformers' generate gives."""

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from lowbit.decoding import Decoder, generate, reason_against, reason_against_graph


def theirs(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt", "mixtral", "falcon_old", "mamba", "mamba2"])
def test_greedy_output_is_that_of_transformers(name: str) -> None:
    model, prompt = tiny.build(name), tiny.tokens(2, 9)
    assert torch.equal(generate(model, prompt, tokens=20), theirs(model, prompt, 20))


def test_ends() -> None:
    """Rows that end are filled up, and what all had ended before is cut off, between two looks as well."""
    model, prompt = tiny.build("llama"), tiny.tokens(3, 9)
    free = theirs(model, prompt, 40)[:, 9:]
    for ends in ([int(free[0, 3])], [int(free[0, 3]), int(free[1, 7]), int(free[2, 11])]):
        model.generation_config.eos_token_id = ends
        for pad in (tiny.PAD, None):
            model.generation_config.pad_token_id = pad
            assert torch.equal(generate(model, prompt, tokens=40), theirs(model, prompt, 40))


def test_a_decoder_starts_anew() -> None:
    """A second prompt finds nothing of the first, and steps go on from tokens that are put in."""
    model, prompts = tiny.build("llama"), tiny.tokens(2, 9)
    decoder = Decoder(model, 1, 16)
    decoder.prefill(prompts[:1])
    decoder.step()
    decoder.prefill(prompts[1:])
    decoder.token.fill_(5)
    logits = decoder.step()
    with torch.no_grad():
        wanted = model(torch.cat([prompts[1:], torch.tensor([[5]])], 1)).logits[:, -1]
    assert torch.allclose(logits, wanted, atol=1e-5) and int(decoder.position) == 10


def test_a_prompt_attends_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to all there is room for, under a mask, which takes a slower kernel."""
    seen = []
    attention = F.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((k.shape[2], kwargs.get("attn_mask")))
        return attention(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    decoder = Decoder(tiny.build("llama"), 1, 64)
    for _ in range(2):
        seen.clear()
        decoder.prefill(tiny.tokens(1, 9))
        assert seen == [(9, None)] * tiny.LAYERS
        decoder.step()


def test_what_cannot_be() -> None:
    """Said, and done by transformers' generate."""
    prompt = tiny.tokens(1, 8)
    bloom = tiny.build("bloom")
    assert reason_against(bloom)
    with pytest.warns(UserWarning, match="takes no position_ids"):
        assert torch.equal(generate(bloom, prompt, tokens=5), theirs(bloom, prompt, 5))
    llama = tiny.build("llama")
    llama.generation_config.repetition_penalty = 1.5
    with pytest.warns(UserWarning, match="repetition_penalty"):
        assert torch.equal(generate(llama, prompt, tokens=5), theirs(llama, prompt, 5))
    with pytest.raises(ValueError, match="repetition_penalty"):
        Decoder(llama, 1, 8)
    assert "no CUDA graphs" in str(reason_against_graph(llama, 8))
    decoder = Decoder(tiny.build("llama"), 1, 16)
    decoder.prefill(prompt)
    with pytest.raises(ValueError, match="no CUDA graphs"):
        decoder.capture()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba2"])
def test_graph(name: str) -> None:
    """A captured step gives the same tokens, and serves a second prompt."""
    model, prompts = tiny.build(name).cuda(), tiny.tokens(4, 9).cuda()
    if name == "gemma3":  # its window slides, which no graph holds
        with pytest.warns(UserWarning, match="slides"):
            assert torch.equal(generate(model, prompts, tokens=20), theirs(model, prompts, 20))
        return
    assert torch.equal(generate(model, prompts, tokens=20, graph=True), theirs(model, prompts, 20))
    decoder = Decoder(model, 2, 29)
    decoder.prefill(prompts[:2])
    decoder.capture()
    for rows in (prompts[:2], prompts[2:]):
        decoder.prefill(rows)
        found = [decoder.token.clone()]
        for _ in range(19):
            decoder.step()
            found.append(decoder.token.clone())
        assert torch.equal(torch.cat([rows, *found], 1), theirs(model, rows, 20))
