"""`uniform_squeeze`: squeezed to the budget with the same rank in every layer, each keeping its best directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivet.adapter.layers import AdaptedLayer
from trivet.rank.allocate import spent
from trivet.rank.score import Directions, costs
from trivet.rank.squeeze import Squeeze


@dataclass
class UniformSqueeze(Squeeze):
    """What `squeeze` has to beat: the same schedule and directions, no prices between layers."""

    def ranks(
        self, layers: Sequence[AdaptedLayer], found: Mapping[str, Directions], budget: int
    ) -> tuple[list[int], float]:
        cost = [costs(layer, layer.rank) for layer in layers]
        size = max(layer.rank for layer in layers)
        while size > 1 and spent([min(size, layer.rank) for layer in layers], cost) > budget:
            size -= 1
        ranks = [min(size, layer.rank) for layer in layers]
        while spent(ranks, cost) > budget and sum(ranks) > 1:  # below one direction each, the last layers go
            ranks[max(i for i, r in enumerate(ranks) if r)] = 0
        return ranks, 0.0
