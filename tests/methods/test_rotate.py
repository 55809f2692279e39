"""Rotations against explicit matrices, and rotated models against the originals, on every architecture."""

from pathlib import Path

import pytest
import tiny
import torch

from lowbit.arch import Arch, discover
from lowbit.methods.rotate import _logits, make_rotation, rotate
from lowbit.source import open_source

TURN = ("llama", "llama_untied", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe")
REASONS = {
    "gemma2": "post_attention_layernorm.weight does not turn along",
    "gemma3": "post_attention_layernorm.weight does not turn along",
    "opt": "LayerNorm",
    "gpt2": "rotate",
    "gpt_neox": "LayerNorm",
    "bloom": "LayerNorm",
    "falcon_new": "LayerNorm",
    "gptj": "LayerNorm",
    "mamba": "rotate",
    "bert": "rotate",
}


@pytest.mark.parametrize(("width", "block"), [(64, 0), (64, 16), (48, 0), (48, 8), (7, 0)])
def test_rotations_are_orthogonal(width: int, block: int) -> None:
    turn = make_rotation(width, block, seed=3)
    matrix = turn(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    size = block or width
    within = torch.arange(width)[:, None] // size == torch.arange(width) // size
    assert not matrix[~within].any()
    assert (matrix[within].abs() < 0.99).all() or size < 8  # spread over all channels of a block
    assert not torch.equal(matrix, make_rotation(width, block, seed=4)(torch.eye(width, dtype=torch.float64)))


@pytest.mark.parametrize("block", [3, 128, 24])
def test_blocks_that_do_not_fit(block: int) -> None:
    with pytest.raises(ValueError, match="not a power of two that divides"):
        make_rotation(64, block, seed=0)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in TURN])
def test_models_compute_the_same(name: str, tmp_path: Path) -> None:
    """The function is that of the original, and outliers in single channels of the hidden states are gone."""
    tiny.save(name, tmp_path, dtype=torch.float32, seed=2)
    arch = discover(open_source(str(tmp_path)))
    for options in ({}, {"block": 16, "seed": 5}, {"heads": False}):
        rotated = rotate(arch, **options)
        rotated.exact = True
        before, after = _logits(arch, arch.source), _logits(arch, rotated)
        assert float((after - before).norm()) < 1e-5 * float(before.norm())
        assert float((after - before).norm()) > 0  # other products, hence other last bits
        values = rotated.read(list(arch.blocks[0].tensors))
        norms = [value for tensor, value in values.items() if value.dim() == 1 and tensor.endswith("norm.weight")]
        assert norms and all(bool((value == value[0]).all()) for value in norms if len(value) == tiny.HIDDEN)
        again = Arch(rotated)
        again.probe()
        assert [linear.name for block in again.blocks for linear in block.linears] == [
            linear.name for block in arch.blocks for linear in block.linears
        ]


def test_heads_turn(tmp_path: Path) -> None:
    """With heads, values and the columns of the output projection are other ones than without."""
    tiny.save("llama", tmp_path, dtype=torch.float32)
    arch = discover(open_source(str(tmp_path)))
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qvo"]
    plain, heads = (rotate(arch, heads=flag) for flag in (False, True))
    plain.exact = heads.exact = True  # type: ignore[attr-defined]
    a, b = plain.read(names), heads.read(names)
    assert torch.equal(a[names[0]], b[names[0]])
    assert not torch.allclose(a[names[1]], b[names[1]], atol=1e-3) and not torch.allclose(a[names[2]], b[names[2]], atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("gemma3", "opt") else pytest.mark.slow) for name in REASONS]
)
def test_models_that_do_not_turn(name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path, dtype=torch.float32)
    arch = discover(open_source(str(tmp_path)))
    with pytest.raises(ValueError, match=REASONS[name]):
        rotate(arch)
