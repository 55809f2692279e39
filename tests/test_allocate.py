"""The planner's solver: exact, within the budget, quick."""

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.allocate import allocate

candidates = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=4)


def total(rows: list[list[float]] | list[list[int]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[j] for row, j in zip(rows, chosen, strict=True))


@given(st.lists(candidates, min_size=1, max_size=5), st.floats(0, 1))
def test_least_cost_within_the_budget(decisions: list[list[tuple[float, int]]], share: float) -> None:
    """As cheap as the best of all mixes, found by trying them."""
    costs = [[cost for cost, _ in row] for row in decisions]
    sizes = [[size for _, size in row] for row in decisions]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    budget = int(low + share * (high - low))
    mix = allocate(costs, sizes, budget)
    chosen = mix.chosen
    assert str(mix) == "proven optimal" and total(sizes, chosen) <= budget
    mixes = itertools.product(*(range(len(row)) for row in decisions))
    best = min(total(costs, mix) for mix in mixes if total(sizes, mix) <= budget)
    assert total(costs, chosen) <= best + 1e-5 * max(1.0, best)


def test_too_small_a_budget() -> None:
    """The message says how small a mix can be."""
    with pytest.raises(ValueError, match=r"the smallest mix has 30 bytes, more than the budget of 29"):
        allocate([[1.0, 0.0], [1.0, 0.0]], [[10, 20], [20, 40]], 29)


def test_bits_go_where_they_matter() -> None:
    """Of two alike, the more sensitive gets the larger scheme; sensitivities the other way round, the other."""
    sizes = [[2, 4], [2, 4]]
    assert allocate([[9.0, 1.0], [3.0, 1.0]], sizes, 6).chosen == [1, 0]
    assert allocate([[3.0, 1.0], [9.0, 1.0]], sizes, 6).chosen == [0, 1]


def test_a_large_model_is_planned_in_seconds() -> None:
    """32 layers of 7 linears, 6 candidates each."""
    chance = random.Random(0)
    bits = (2.25, 2.5, 3.125, 4.125, 4.5, 8.125)
    costs, sizes = [], []
    for _ in range(32 * 7):
        weights = chance.choice((4096 * 4096, 4096 * 11008))
        sensitivity = chance.lognormvariate(0, 2)
        costs.append([sensitivity * weights * 4.0**-b * chance.uniform(0.9, 1.1) for b in bits])
        sizes.append([int(weights * b / 8) for b in bits])
    budget = int(sum(row[3] for row in sizes) * 0.77)
    began = time.process_time()
    chosen = allocate(costs, sizes, budget).chosen
    assert time.process_time() - began < 5
    assert 0.999 * budget < total(sizes, chosen) <= budget


def test_what_is_found_in_too_little_time() -> None:
    """Without time for the solver the mix is within the budget and not much worse, and says that it is not proven."""
    chance = random.Random(1)
    costs = [[chance.random() * 4.0**-j for j in range(6)] for _ in range(200)]
    sizes = [[int(1000 * chance.random() * (j + 1)) + 1 for j in range(6)] for _ in range(200)]
    budget = int(0.4 * sum(map(max, sizes)))
    best, hasty = allocate(costs, sizes, budget), allocate(costs, sizes, budget, seconds=1e-6)
    assert str(best) == "proven optimal" and best.gap == 0
    assert hasty.gap is None or hasty.gap > 0
    assert str(hasty).startswith("best found in ") and "gap" in str(hasty)
    assert total(sizes, hasty.chosen) <= budget
    assert total(costs, best.chosen) <= total(costs, hasty.chosen) <= 1.1 * total(costs, best.chosen)
    if hasty.gap is not None:
        assert total(costs, hasty.chosen) * (1 - hasty.gap) <= total(costs, best.chosen) * (1 + 1e-6)
