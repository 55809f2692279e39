"""Low-rank corrections: the optimum of both norms, sums, and the file there and back."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit.adapter import FOLDER, LowRank, low_rank, merged, read_adapter, write_adapter


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_plain_is_the_optimum(rank: int) -> None:
    """What is left has the energy of the singular values after the first `rank` (Eckart and Young)."""
    error = drawn(12, 20)
    a, b = low_rank(error, rank)
    assert a.shape == (rank, 20) and b.shape == (12, rank)
    left = torch.linalg.svdvals(error.double())[rank:].square().sum()
    torch.testing.assert_close((error - b @ a).double().square().sum(), left, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_whitened_is_the_optimum_of_the_outputs(rank: int) -> None:
    """By the singular values of error X^T on explicit inputs; and better there than the plain one, worse elsewhere."""
    error, x = drawn(12, 20), drawn(64, 20, seed=1) * torch.logspace(-1, 1, 20)
    white, plain = low_rank(error, rank, x.T @ x, damping=1e-9), low_rank(error, rank)
    left = torch.linalg.svdvals(error.double() @ x.double().T)[rank:].square().sum()
    outputs = [((error - b @ a) @ x.T).double().square().sum() for a, b in (white, plain)]
    torch.testing.assert_close(outputs[0], left, rtol=1e-3, atol=1e-6)
    assert outputs[0] < 0.95 * outputs[1]
    assert (error - white.b @ white.a).norm() > (error - plain.b @ plain.a).norm()


def test_inputs_that_never_occur() -> None:
    """A singular Gram matrix is damped."""
    x = drawn(64, 20)
    x[:, 5:] = 0
    a, b = low_rank(drawn(12, 20, seed=1), 4, x.T @ x)
    assert bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_is_rounded_once(dtype: torch.dtype) -> None:
    w, low = drawn(6, 8).to(dtype), LowRank(drawn(2, 8, seed=1).to(dtype), drawn(6, 2, seed=2).to(dtype))
    found = merged(w, low)
    assert found.dtype == dtype
    assert torch.equal(found, (w.double() + low.b.double() @ low.a.double()).to(dtype))


def test_there_and_back(tmp_path: Path) -> None:
    """By the checkpoint's names, under the model's in the file, and scaled by 1."""
    given = {f"h.{i}.proj": LowRank(drawn(2, 8, seed=i), drawn(6, 2, seed=i + 5)) for i in range(3)}
    assert read_adapter(tmp_path) == {}
    write_adapter(tmp_path, given, {name: f"model.{name}" for name in given}, causal=True)
    found = read_adapter(tmp_path)
    assert set(found) == set(given)
    assert all(torch.equal(found[name].a, low.a) and torch.equal(found[name].b, low.b) for name, low in given.items())
    config = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    assert config["target_modules"] == ["model.h.0.proj", "model.h.1.proj", "model.h.2.proj"]
