"""The scans against the recurrence they are defined by, and mixers against transformers' own, in runs and step by step."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lowbit.ssm import CHUNK, Mixer, chunk_mamba, chunk_mamba2, is_mixer, scan

BOTH = pytest.mark.parametrize("name", ["mamba", "mamba2"])


def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token: x, dt [b, l, c], B, C [b, l, c, n], A [c, n]."""
    found = []
    for t in range(x.shape[1]):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        found.append((state * C[:, t]).sum(-1))
    return torch.stack(found, 1), state


@pytest.mark.parametrize("length", [1, 7, 64])
def test_runs_are_the_recurrence(length: int) -> None:
    b, heads, p, groups, n = 2, 6, 5, 2, 3
    x = torch.randn(b, length, heads, p, dtype=torch.float64)
    dt = torch.rand(b, length, heads, dtype=torch.float64) * 3
    B, C = (torch.randn(b, length, groups, n, dtype=torch.float64) for _ in range(2))
    state, A = torch.randn(b, heads, p, n, dtype=torch.float64), -torch.rand(heads, dtype=torch.float64) * 16
    wide = [part.repeat_interleave(heads // groups * p, 2) for part in (B, C)]
    expected, last = recurrence(
        x.flatten(2), dt.repeat_interleave(p, 2), *wide, state.flatten(1, 2), A.repeat_interleave(p).unsqueeze(1).expand(-1, n)
    )
    y, end = chunk_mamba2(x, dt, B, C, state, A)
    torch.testing.assert_close(y.flatten(2), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end.flatten(1, 2), last, rtol=1e-10, atol=1e-10)

    A = -torch.rand(heads * p, n, dtype=torch.float64) * 16
    dt = torch.rand(b, length, heads * p, dtype=torch.float64) * 3
    shared = [part[:, :, 0] for part in (B, C)]
    spread = [part.unsqueeze(2).expand(-1, -1, heads * p, -1) for part in shared]
    expected, last = recurrence(x.flatten(2), dt, *spread, state.flatten(1, 2), A)
    y, end = chunk_mamba(x.flatten(2), dt, *shared, state.flatten(1, 2), A)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


def test_states_are_rounded_at_the_ends_of_runs_alone() -> None:
    """Whatever the lengths of the calls, so that decoding step by step is a prefill."""
    length, channels, n = 2 * CHUNK + 9, 3, 2
    tokens = tuple(torch.rand(1, length, width, dtype=torch.float64) for width in (channels, channels, n, n))
    A = -torch.rand(channels, n, dtype=torch.float64)

    def chunk(*given: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_mamba(*given, A)  # type: ignore[call-arg]

    def rounded(state: Tensor) -> Tensor:
        return (state * 4).round() / 4

    zero = torch.zeros(1, channels, n, dtype=torch.float64)
    whole, state, kept = scan(chunk, tokens, zero, 0, rounded)
    assert kept == 9 and torch.equal(state, rounded(state))
    parts, anchor, held, start = [], zero, 0, 0
    for size in (1, 5, 70, 1, 1, length - 78):
        given = tuple(part[:, start - held : start + size] for part in tokens)
        y, anchor, held = scan(chunk, given, anchor, held, rounded)
        parts.append(y)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(anchor, state)
    assert not torch.allclose(whole, scan(chunk, tokens, zero, 0, lambda state: state)[0])


def own(model: Any) -> Any:
    """The model with lowbit's forward in its mixers."""
    for path, module in model.named_modules():
        if is_mixer(module):
            module.forward = Mixer(module, path)
    return model


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba"])
@torch.no_grad()
def test_mixers_are_those_of_transformers(name: str) -> None:
    """In one pass and in several, the last token by token; padded rows too."""
    tokens = tiny.tokens(2, CHUNK + 20)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    expected, masked = (tiny.build(name)(tokens, **given).logits for given in ({}, {"attention_mask": mask}))
    model = own(tiny.build(name))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[1], masked[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[0, 9:], masked[0, 9:], rtol=1e-4, atol=1e-4)
    if name == "bamba":
        return
    first = model(tokens[:, :30], use_cache=True)
    found, cache = [first.logits], first.cache_params
    for part in (tokens[:, 30:70], *tokens[:, 70:].split(1, 1)):
        found.append(model(part, cache_params=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@BOTH
@torch.no_grad()
def test_generation_goes_through_the_cache(name: str) -> None:
    prompt = tiny.tokens(2, 10)
    options: dict[str, Any] = {"max_new_tokens": CHUNK, "num_beams": 3, "eos_token_id": None, "pad_token_id": tiny.PAD}
    expected = tiny.build(name).generate(prompt, **options)
    assert torch.equal(own(tiny.build(name)).generate(prompt, **options), expected)
