"""Rotary embedding against the reference, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from lowbit.kernels import entry, reference  # noqa: E402


@pytest.mark.parametrize("shared", [True, False])
def test_turns_queries_and_keys(shared: bool) -> None:
    """Views into one product, heads that fill no block, a width that is no power of two, angles of their own for each row."""
    rows, tokens, width = 2, 5, 24
    both = torch.randn(rows, tokens, (9 + 2) * width, dtype=torch.float16)
    q, k = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in both.split([9 * width, 2 * width], -1))
    cos, sin = torch.randn(2, 1 if shared else rows, tokens, width, dtype=torch.float16)
    for found, x in zip(entry.rope(q, k, cos, sin), (q, k), strict=True):
        assert found.dtype == torch.float16 and found.stride(-1) == 1
        assert torch.allclose(found.float(), reference.rope(x, cos, sin), rtol=2e-3, atol=2e-3)


def test_refused() -> None:
    q, angles = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match=r"\[1, 2, 3, 8\], \[1, 2, 4, 8\].*do not belong together"):
        entry.rope(q, torch.zeros(1, 2, 4, 8), angles, angles)
    with pytest.raises(ValueError, match="do not belong together"):
        entry.rope(q, q, angles[..., :4], angles[..., :4])
