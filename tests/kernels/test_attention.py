"""Attention against torch, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lowbit.kernels import attention, entry  # noqa: E402


@pytest.mark.parametrize(("tokens", "processors"), [(1, 4), (1, 60), (70, 4)])  # of one: a part; several, some without a key
@pytest.mark.parametrize("shared", [True, False])
def test_against_torch(tokens: int, processors: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that is no power of two, keys that fill no block, views, a mask for each row; the same bits twice."""
    monkeypatch.setattr(attention, "processors", lambda device: processors)
    rows, heads, keys, width = 2, 3, 150, 24
    q = torch.randn(rows, tokens, heads, width, dtype=torch.float16).transpose(1, 2)
    k, v = (torch.randn(rows, keys, heads, width, dtype=torch.float16).transpose(1, 2) * 4 for _ in range(2))
    mask = torch.rand(1 if shared else rows, 1, 1, keys) < 0.5
    mask[..., :40] = False
    k[:, :, :40], v[:, :, :40] = torch.nan, torch.nan  # hidden, not read
    found = entry.attend(q, k, v, mask, 0.3)
    wanted = F.scaled_dot_product_attention(
        q.float(), k.float().nan_to_num(), v.float().nan_to_num(), attn_mask=mask, scale=0.3
    )
    assert found.shape == q.shape and found.dtype == torch.float16
    assert torch.allclose(found.float(), wanted, rtol=2e-3, atol=2e-3)
    assert torch.equal(found, entry.attend(q, k, v, mask, 0.3))


@pytest.mark.parametrize("tokens", [1, 70])
def test_without_a_mask(tokens: int) -> None:
    q, k, v = (torch.randn(2, 3, length, 32, dtype=torch.float16) for length in (tokens, 75, 75))
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.allclose(entry.attend(q, k, v, None).float(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [1, 70])
def test_heads_of_keys_that_are_shared(tokens: int) -> None:
    q, k, v = (torch.randn(2, heads, length, 32, dtype=torch.float16) for heads, length in ((6, tokens), (2, 75), (2, 75)))
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True)
    assert torch.allclose(entry.attend(q, k, v, None).float(), wanted, rtol=2e-3, atol=2e-3)


def test_put() -> None:
    """Views of different widths, tokens in any order; the rest of the cache stays."""
    k, v = (torch.randn(2, 3, 4, width, dtype=torch.float16).transpose(1, 2) for width in (24, 16))
    keys, values = (torch.randn(2, 4, 10, width, dtype=torch.float16) for width in (24, 16))
    at = torch.tensor([7, 0, 5])
    wanted = keys.index_copy(2, at, k), values.index_copy(2, at, v)
    entry.put(keys, values, k, v, at)
    assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])
    with pytest.raises(ValueError, match="does not go into a cache torch.float32"):
        entry.put(keys.float(), values, k, v, at)


def test_refused() -> None:
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 5, 8)
    for other in (torch.ones(1, 1, 1, 4), torch.ones(1, 2, 1, 5)):
        with pytest.raises(ValueError, match="do not belong together"):
            entry.attend(q, k, k, other > 0)
    with pytest.raises(ValueError, match="do not belong together"):
        entry.attend(q, k[:, :1], k, torch.ones(1, 1, 1, 5) > 0)
