"""`planned`: ranks allotted before training, from what the loss's gradient promises each direction.

Under the same diagonal model of the loss as `rank.score`, the best step along direction i of the whitened gradient
S^-½ G C^-½ gains ½ σ_i². Directions are bought at one price per parameter until the budget is spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank.allocate import allocate
from trivet.rank.policy import Policy
from trivet.rank.score import costs


@dataclass
class Planned(Policy):
    """`budget` as written (None: plain LoRA's of `lora_rank`); `largest`, the rank that no layer exceeds."""

    budget: Any = None
    largest: int | None = None
    rank_aware_step: bool = True

    def widest(self, layers: Sequence[AdaptedLayer], total: int) -> int:
        even = self.allowed(self.budget, layers, total) / sum(sum(layer.shape) for layer in layers)
        return self.largest or max(1, math.ceil(4 * even))

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        if statistics is None:
            raise ConfigError("method.rank: planned needs a probe; pass a few batches")
        budget, limit = self.allowed(self.budget, layers, total), self.widest(layers, total)
        worth, cost = [], []
        for layer in layers:
            _, sigma, _ = statistics[layer.name].gradient(min(limit, *layer.shape))
            worth.append((0.5 * sigma.double() ** 2).tolist())
            cost.append(costs(layer, len(worth[-1])))
        ranks, price = allocate(worth, cost, budget)
        self.history.append({"step": 0, "budget": budget, "price": price})
        return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}
