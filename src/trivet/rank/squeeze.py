"""`squeeze`: train wide, price every direction in nats per parameter, squeeze to the budget, settle.

The schedule is AdaLoRA's cubic one (Zhang et al. 2023, section 3.3), in parameters; the price is `rank.score`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank.allocate import allocate
from trivet.rank.policy import Policy, Situation, parameters
from trivet.rank.score import Directions, costs, cut, directions


@dataclass
class Squeeze(Policy):
    """Attributes are the options of `trivet methods`; `target` and `wide` are in parameters, known once started."""

    budget: Any = None
    start_rank: int | None = None
    begin: float = 0.1
    end: float = 0.6
    rank_aware_step: bool = True
    metric: str = "whitened"
    target: int = 0
    wide: int = 0
    moving = True

    def __post_init__(self) -> None:
        if not self.begin <= self.end:
            raise ConfigError(f"method.rank: begin ({self.begin:g}) must not come after end ({self.end:g})")

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        self.target = self.allowed(self.budget, layers, total)
        even = self.target / sum(sum(layer.shape) for layer in layers)
        wide = self.start_rank or max(1, math.ceil(4 * even))
        ranks = {}
        for layer in layers:
            limit = min(layer.shape) if self.start_rank else max(1, min(layer.shape) // 8, math.ceil(even))
            ranks[layer.name] = min(wide, limit, *layer.shape)
        self.wide = int(sum(sum(costs(layer, ranks[layer.name])) for layer in layers))
        return ranks

    # -- when ------------------------------------------------------------------------------------------------

    def _span(self, total: int) -> tuple[int, int]:
        """The first and last step after which something may be dropped."""
        first = max(1, round(self.begin * total))
        return first, max(first, min(round(self.end * total), total - 1))

    def _every(self, total: int) -> int:
        """Steps between squeezes: 50 or 2% of the run, but a tenth of the span where the run is short."""
        first, last = self._span(total)
        return max(1, min(max(50, total // 50), -(-(last - first) // 10)))

    def due(self, step: int, total: int) -> bool:
        """Whether something may be dropped after `step`."""
        first, last = self._span(total)
        return step == last or (first <= step < last and (step - first) % self._every(total) == 0)

    def settled(self, step: int, total: int) -> bool:
        return step >= self._span(total)[1]

    def measures(self, step: int, total: int) -> bool:
        return self.metric == "whitened" and self._measured(step, total)

    def _measured(self, step: int, total: int) -> bool:
        """Every 10th step until the last squeeze; three times before the first one where the run is short."""
        first, last = self._span(total)
        return step < last and step % max(1, min(10, -(-first // 3))) == 0

    def allowance(self, step: int, total: int) -> int:
        """The parameters that may be left after `step`: cubic from all to the target."""
        first, last = self._span(total)
        left = 1.0 if last == first else (last - step) / (last - first)
        return (
            self.target + int(max(0, self.wide - self.target) * min(1.0, max(0.0, left)) ** 3)
            if step < last
            else self.target
        )

    # -- what ------------------------------------------------------------------------------------------------

    def decide(self, now: Situation) -> dict[str, Change]:
        return self.squeeze(now, self.allowance(now.step, now.total))

    def squeeze(self, now: Situation, budget: int) -> dict[str, Change]:
        """Drop the cheapest directions until the layers hold at most `budget` parameters."""
        found = directions(now.layers, now.statistics if self.metric == "whitened" else None)
        ranks, price = self.ranks(now.layers, found, budget)
        self.note(now, ranks, price)
        return cut(now.layers, found, ranks)

    def ranks(
        self, layers: Sequence[AdaptedLayer], found: Mapping[str, Directions], budget: int
    ) -> tuple[list[int], float]:
        """The ranks under a budget, and the price at which the rest was dropped."""
        worth = [found[layer.name].worth[: layer.rank].tolist() for layer in layers]
        return allocate(worth, [costs(layer, layer.rank) for layer in layers], budget)

    def note(self, now: Situation, ranks: Sequence[int], price: float | None, **more: Any) -> None:
        """Write a decision into the history."""
        kept = sum(sum(costs(layer, r)) for layer, r in zip(now.layers, ranks, strict=True))
        names = [layer.name for layer in now.layers]
        self.history.append(
            {
                "step": now.step,
                "parameters_before": parameters(now.layers),
                "parameters": int(kept),
                "price": price,
                "ranks": dict(zip(names, ranks, strict=True)),
                **more,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "target": self.target, "wide": self.wide}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.target, self.wide = state["target"], state["wide"]
