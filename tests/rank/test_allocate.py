"""Budgets and prices: against brute force, and against what the words mean."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivet.errors import ConfigError
from trivet.rank.allocate import allocate, spent
from trivet.rank.budget import budget_problem, parameters

#: Up to four layers: falling worths of up to four directions, and what a direction of the layer costs.
LAYERS = st.lists(
    st.tuples(
        st.lists(st.floats(0, 10, allow_nan=False), max_size=4).map(lambda w: sorted(w, reverse=True)),
        st.integers(1, 6),
    ),
    min_size=1,
    max_size=4,
)


def value(ranks: tuple[int, ...] | list[int], worth: list[list[float]]) -> float:
    return sum(sum(w[:r]) for r, w in zip(ranks, worth, strict=True))


def best(worth: list[list[float]], cost: list[list[float]], budget: float) -> float:
    """The largest worth that any choice of ranks has within the budget."""
    choices = itertools.product(*(range(len(w) + 1) for w in worth))
    return max(value(ranks, worth) for ranks in choices if spent(list(ranks), cost) <= budget)


@given(LAYERS, st.integers(0, 40))
def test_no_choice_of_the_same_size_is_worth_more(layers: list[tuple[list[float], int]], budget: int) -> None:
    worth = [w for w, _ in layers]
    cost = [[float(c)] * len(w) for w, c in layers]
    ranks, price = allocate(worth, cost, budget, at_least=0)
    used = spent(ranks, cost)
    assert used <= budget
    assert value(ranks, worth) == pytest.approx(best(worth, cost, used))
    left = [(w[r] / c[r]) for r, w, c in zip(ranks, worth, cost, strict=True) if r < len(w)]
    kept = [(w[r - 1] / c[r - 1]) for r, w, c in zip(ranks, worth, cost, strict=True) if r]
    assert max(left, default=0.0) == pytest.approx(price)  # one price: all that was dropped is cheaper
    assert min(kept, default=price) >= price * (1 - 1e-12)


@given(LAYERS, st.integers(0, 40))
def test_with_equal_costs_it_is_the_best_choice_there_is(layers: list[tuple[list[float], int]], budget: int) -> None:
    worth = [w for w, _ in layers]
    cost = [[3.0] * len(w) for w in worth]
    ranks, _ = allocate(worth, cost, budget, at_least=0)
    assert value(ranks, worth) == pytest.approx(best(worth, cost, budget))


@given(LAYERS, st.integers(0, 30), st.integers(0, 30))
def test_a_larger_budget_never_takes_a_direction_away(
    layers: list[tuple[list[float], int]], one: int, more: int
) -> None:
    worth, cost = [w for w, _ in layers], [[float(c)] * len(w) for w, c in layers]
    small, _ = allocate(worth, cost, one)
    large, _ = allocate(worth, cost, one + more)
    assert all(a <= b for a, b in zip(small, large, strict=True))


def test_the_best_direction_always_stays() -> None:
    assert allocate([[1.0, 0.5], [3.0]], [[5.0, 5.0], [4.0]], 0) == ([0, 1], 0.2)


def test_growing_costs_are_paid() -> None:
    """A core's i-th direction adds 2 i + 1 numbers."""
    assert allocate([[9.0, 6.0, 5.0]], [[1.0, 3.0, 5.0]], 4)[0] == [2]
    assert spent([3], [[1.0, 3.0, 5.0]]) == 9


SHAPES = [(8, 4), (16, 4)]


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (500, 500), (2.0, 2), ("500", 500), ("500k", 500_000), ("1.5M", 1_500_000), ("2b", 2_000_000_000),
        ("0.5%", 50), ("100 %", 10_000), ("r1-equivalent", 32), ("r8-equivalent", 256), ("r0.5-equivalent", 16),
    ],
)  # fmt: skip
def test_budgets_as_people_write_them(written: Any, number: int) -> None:
    assert parameters(written, SHAPES, 10_000) == number
    assert budget_problem(written) is None


@pytest.mark.parametrize(
    "written", ["", "many", "r-equivalent", "8-equivalent", "5kk", "-3", 0, -1, True, None, [3], "0%"]
)
def test_what_is_no_budget_says_so(written: Any) -> None:
    with pytest.raises(ConfigError, match="500k"):
        parameters(written, SHAPES, 10_000)
    assert budget_problem(written)
