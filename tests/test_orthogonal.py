"""Hadamard matrices against their definition."""

import pytest
import torch

from lowbit.orthogonal import hadamard, paley_order


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 32, 40, 48, 80, 96, 160, 44])
def test_hadamard(size: int) -> None:
    """Entries of one size, orthogonal rows."""
    matrix = hadamard(torch.eye(size, dtype=torch.float64)) * size**0.5
    torch.testing.assert_close(matrix.abs(), torch.ones_like(matrix))
    torch.testing.assert_close(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_sylvester() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ matrix / 32**0.5)


@pytest.mark.parametrize("size", [3, 14, 36])
def test_sizes_without_a_matrix(size: int) -> None:
    assert paley_order(size) is None
    with pytest.raises(ValueError, match=f"no Hadamard matrix of {size} columns"):
        hadamard(torch.ones(size))


@pytest.mark.parametrize("size", [1536, 5120, 3072, 4096, 8192])
def test_widths_of_real_models(size: int) -> None:
    assert paley_order(size) is not None
