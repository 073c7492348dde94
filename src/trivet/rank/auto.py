"""`auto`: the total is chosen too: the smallest budget whose validation loss is as good as the best.

After training wide, and three times more until the ranks settle, the update is cut to half, a quarter and so on of what
it holds, forward passes only, on the same validation rows. The smallest cut stays that loses, against the best of them,
no more than one paired standard error or `tolerance` of the gain over the base; training mends it before the next look.
A task that the base model solves, and labels that mean nothing, end near rank zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank.policy import Situation, parameters
from trivet.rank.score import Directions, cut, directions
from trivet.rank.squeeze import Squeeze

#: Passes over the validation rows in a whole run: what there is, six halvings of it, and nothing.
PASSES = 8
#: How often the validation rows are looked at, from `begin` to `end`.
LOOKS = 4


@dataclass
class Auto(Squeeze):
    """`budget` stays None: it is found on the way. `passes` are left; `base` is the loss without any update."""

    begin: float = 0.3
    tolerance: float = 0.01
    passes: int = PASSES
    base: float | None = None

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        self.budget, self.start_rank = None, self.start_rank or 2 * self.lora_rank
        ranks = super().start(layers, statistics, total)
        self.target = self.wide
        return ranks

    def due(self, step: int, total: int) -> bool:
        first, last = self._span(total)
        looks = {first + round(i * (last - first) / (LOOKS - 1)) for i in range(LOOKS)}
        return step in looks and self.passes >= 2

    def decide(self, now: Situation) -> dict[str, Change]:
        if now.validation is None:
            raise ConfigError("method.rank: auto chooses on validation rows; set data.validation, or use squeeze")
        found = directions(now.layers, now.statistics if self.metric == "whitened" else None)
        held = parameters(now.layers)
        losses = {held: now.validation({}).double()}
        if self.base is None:
            losses[0] = now.validation(self._cut(now.layers, found, 0)).double()
            self.base = float(losses[0].mean())
        self.passes -= len(losses)
        self.target = self._smallest(now, found, held, losses)
        tried = {str(budget): float(losses[budget].mean()) for budget in sorted(losses, reverse=True)}
        self.history.append({"step": now.step, "tried": tried, "budget": self.target})
        return self.squeeze(now, self.target) if self.target < held else {}

    def _smallest(
        self, now: Situation, found: Mapping[str, Directions], held: int, losses: dict[int, torch.Tensor]
    ) -> int:
        """Halve the budget while that is as good as the best; `losses` takes what was measured."""
        assert now.validation is not None and self.base is not None  # noqa: S101 - `decide` saw to it
        least = min(sum(layer.shape) for layer in now.layers)
        chosen, budget = held, held // 2
        while self.passes and budget >= least:
            losses[budget] = now.validation(self._cut(now.layers, found, budget)).double()
            self.passes -= 1
            # Against what keeps something: where no update at all is best, half of a harmful one is still better.
            if not self._as_good({b: x for b, x in losses.items() if b}, budget):
                break
            chosen, budget = budget, budget // 2
        return 1 if 0 in losses and self._as_good(losses, 0) else chosen

    def _as_good(self, losses: Mapping[int, torch.Tensor], budget: int) -> bool:
        means = {b: float(x.mean()) for b, x in losses.items()}
        best = min(means, key=means.__getitem__)
        paired = losses[budget] - losses[best]
        error = float(paired.std() / len(paired) ** 0.5) if len(paired) > 1 else 0.0
        assert self.base is not None  # noqa: S101
        return means[budget] - means[best] <= max(error, self.tolerance * (self.base - means[best]))

    def _cut(self, layers: Sequence[AdaptedLayer], found: Mapping[str, Directions], budget: int) -> dict[str, Change]:
        """The changes that leave `budget` parameters; none at all for 0."""
        ranks = self.ranks(layers, found, budget)[0] if budget else [0] * len(layers)
        return cut(layers, found, ranks)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "passes": self.passes, "base": self.base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.passes, self.base = int(state["passes"]), state["base"]
