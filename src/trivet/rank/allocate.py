"""A budget of parameters -> ranks, at one price for the whole model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def allocate(
    worth: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], budget: float, *, at_least: int = 1
) -> tuple[list[int], float]:
    """How many of its directions each layer keeps, and the price.

    Greedy on worth per parameter. A layer's worths fall and its costs do not, so what is kept is optimal among all
    choices of the same or smaller size (the price is its Lagrange multiplier), and short of the budget by less than one
    direction.

    Args:
        worth: per layer, the gain of each direction in nats, falling.
        cost: per layer, the parameters that each direction adds, not falling.
        budget: parameters; never exceeded, except that the `at_least` best directions always stay.

    Returns:
        The ranks, and λ in nats per parameter: the rate of the dearest direction that was dropped (0 if none was).
    """
    ranks = [0] * len(worth)
    heap = [(-w[0] / c[0], i) for i, (w, c) in enumerate(zip(worth, cost, strict=True)) if len(w)]
    heapq.heapify(heap)
    spent = 0.0
    while heap:
        rate, i = heap[0]
        price = cost[i][ranks[i]]
        if spent + price > budget and sum(ranks) >= at_least:
            return ranks, -rate
        heapq.heappop(heap)
        spent += price
        ranks[i] += 1
        if ranks[i] < len(worth[i]):
            heapq.heappush(heap, (-worth[i][ranks[i]] / cost[i][ranks[i]], i))
    return ranks, 0.0


def spent(ranks: Sequence[int], cost: Sequence[Sequence[float]]) -> int:
    """The parameters that `ranks` hold."""
    return int(sum(sum(c[:r]) for r, c in zip(ranks, cost, strict=True)))
