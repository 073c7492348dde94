"""`auto`: the total is chosen too: the smallest budget whose validation loss is as good as the best.

After training wide, the update is cut to a few budgets in turn, forward passes only, on the same validation rows. The
smallest one stays that loses, against the best of them, no more than one paired standard error or `tolerance` of the
gain over the base. A task that the base model solves, and labels that mean nothing, end near rank zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank.policy import Situation, parameters
from trivet.rank.score import directions
from trivet.rank.squeeze import Squeeze

#: Budgets that are tried, as shares of what is held: at most 8 passes over the validation rows.
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0)


@dataclass
class Auto(Squeeze):
    """`budget` stays None: it is found after the steps that are trained wide, at `begin`."""

    begin: float = 0.3
    tolerance: float = 0.01
    chosen: bool = False

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        self.budget, self.start_rank = None, self.start_rank or 2 * self.lora_rank
        ranks = super().start(layers, statistics, total)
        self.target = self.wide
        return ranks

    def decide(self, now: Situation) -> dict[str, Change]:
        if not self.chosen:
            self._choose(now)
        return super().decide(now)

    def _choose(self, now: Situation) -> None:
        """Measure the budgets and set the target."""
        if now.validation is None:
            raise ConfigError("method.rank: auto chooses on validation rows; set data.validation, or use squeeze")
        found = directions(now.layers, now.statistics if self.metric == "whitened" else None)
        whole = parameters(now.layers)
        losses = []
        for share in SHARES:
            ranks, _ = self.ranks(now.layers, found, int(share * whole)) if share else ([0] * len(now.layers), 0.0)
            changes = {
                layer.name: found[layer.name].keep(rank)
                for layer, rank in zip(now.layers, ranks, strict=True)
                if rank < layer.rank
            }
            losses.append(now.validation(changes).double())
        means = [float(x.mean()) for x in losses]
        best = min(range(len(SHARES)), key=means.__getitem__)
        gain = means[-1] - means[best]
        for i in reversed(range(len(SHARES))):
            paired = losses[i] - losses[best]
            error = float(paired.std() / len(paired) ** 0.5) if len(paired) > 1 else 0.0
            if means[i] - means[best] <= max(error, self.tolerance * gain):
                break
        self.target, self.chosen = max(1, int(SHARES[i] * whole)), True
        self.history.append(
            {
                "step": now.step,
                "tried": dict(zip((str(int(s * whole)) for s in SHARES), means, strict=True)),
                "budget": self.target,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": self.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.chosen = bool(state["chosen"])
