"""Attention by the kernel, as transformers calls it."""

from pathlib import Path

import pytest
import tiny
import torch
from test_runtime import written
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowbit import attention, export, runtime
from lowbit.attention import _attention, _mask


class Attends(torch.nn.Module):
    """What a model says of its attention."""

    def __init__(self, is_causal: bool, groups: int) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder(padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a layer, with a mask of keys or none, and the same output as without the kernels, where that is read."""
    out, calls = written("bert", tmp_path, "w8a8"), []
    attend = attention.entry.attend

    def noted(*args):
        calls.append(args[3])
        return attend(*args)

    monkeypatch.setattr(attention.entry, "attend", noted)
    model, tokens = runtime.load(out, dtype=torch.float16, kernels=True), tiny.tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    calls.clear()
    with torch.no_grad():
        found, wanted = (
            each(input_ids=tokens, **({"attention_mask": mask} if padded else {})).logits for each in (model, export.load(out))
        )
    assert len(calls) == tiny.LAYERS
    assert all((call.shape == (2, 1, 1, 12)) if padded else (call is None) for call in calls)
    error = (found.float() - wanted.float())[mask == 1].norm() / wanted.float()[mask == 1].norm()
    assert error < 0.03


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_architecture_says_the_same(name: str) -> None:
    """With padding, without, and generating; a model that may attend by nothing else stays as it is."""
    model, tokens = tiny.build(name).eval(), tiny.tokens(3, 11)
    if model.config._attn_implementation != "sdpa":
        attention.join(model)
        assert model.config._attn_implementation == "eager"
        return
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    if name in tiny.MASKED:
        mask = mask.flip(1)

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [model(tokens, attention_mask=mask).logits[mask > 0], model(tokens).logits]
            if model.can_generate():
                found.append(model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False).float())
        return found

    wanted = outputs()
    attention.join(model)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs(), wanted, strict=True))


def test_no_mask_is_made_where_none_is_needed() -> None:
    """Nor looked for; with padding, a cache, or a window it is transformers' own."""
    shape = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 5,
        "q_offset": 0,
        "kv_offset": 0,
        "allow_is_causal_skip": True,
        "device": "cpu",
    }
    causal, every = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    assert _mask(**shape, mask_function=causal) is None and _mask(**shape, mask_function=every) is None
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) > 0
    assert torch.equal(_mask(**shape, mask_function=every, attention_mask=padding), padding[:, None, None])
    assert _mask(**shape, mask_function=causal, attention_mask=padding).shape == (2, 1, 5, 5)
    assert _mask(**shape | {"allow_is_causal_skip": False}, mask_function=causal).shape[2:] == (5, 5)
    cached = shape | {"kv_length": 9, "q_offset": torch.tensor(4)}
    assert _mask(**cached, mask_function=causal).shape == (2, 1, 5, 9)
    window = masking_utils.sliding_window_causal_mask_function(2)
    assert not _mask(**shape, mask_function=window, local_size=2)[0, 0, 4, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_as_torch_has_it(causal: bool, mask: str, heads: int) -> None:
    """Whatever the kernel does not do is left to torch; heads of keys may be shared."""
    q, k, v = (torch.randn(2, count, 6, 16, dtype=torch.float16) for count in (4, heads, heads))
    given = {"none": None, "keys": torch.rand(2, 1, 1, 6) < 0.6, "pairs": torch.rand(2, 1, 6, 6) < 0.6}[mask]
    if given is not None:
        given[..., 0] = True
    module = Attends(causal, 4 // heads)
    found, wanted = (attend(module, q, k, v, given, scaling=0.3)[0] for attend in (_attention, sdpa_attention_forward))
    assert torch.allclose(found.float(), wanted.float(), rtol=5e-3, atol=5e-3)


def test_long_rows_without_a_mask_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.entry, "attend", None)
    q, k, v = (torch.randn(1, 1, 300, 16, dtype=torch.float16) for _ in range(3))
    assert _attention(Attends(False, 1), q, k, v, None)[0].shape == (1, 300, 1, 16)
