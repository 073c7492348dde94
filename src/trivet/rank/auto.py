"""`auto`: the total is chosen too: the smallest budget whose validation loss is as good as the best.

What was trained wide is cut to half, a quarter and so on of what it holds when training has ended, on the best
checkpoint: forward passes only, on the same validation rows. The smallest cut stays whose loss is above the best of
them by less than `tolerance` of the gain over the base, one paired standard error included. A task on which nothing is
gained, as the base model solves it already, ends near rank zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics
from trivet.rank.policy import Situation, parameters
from trivet.rank.score import cut, directions
from trivet.rank.squeeze import Squeeze

#: Passes over the validation rows: what there is, nothing, and six halvings.
PASSES = 8


@dataclass
class Auto(Squeeze):
    """A squeeze whose one step comes after training, to a budget that it finds there."""

    begin: float = 1.0
    end: float = 1.0
    tolerance: float = 0.005
    validates = True

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        self.budget, self.start_rank = None, self.start_rank or 2 * self.lora_rank
        ranks = super().start(layers, statistics, total)
        self.target = self.wide
        return ranks

    def due(self, step: int, total: int) -> bool:
        return False

    def settled(self, step: int, total: int) -> bool:
        return False  # not before training has ended

    def decide(self, now: Situation) -> dict[str, Change]:
        found = directions(now.layers, now.statistics if self.metric == "whitened" else None)
        validation, held = now.validation, parameters(now.layers)
        assert validation is not None  # noqa: S101 - asked for before training

        def measured(budget: int) -> torch.Tensor:
            ranks = self.ranks(now.layers, found, budget)[0] if budget else [0] * len(now.layers)
            return validation(cut(now.layers, found, ranks)).double()

        losses = {budget: measured(budget) for budget in (held, 0)}
        self.target = self._smallest(losses, min(sum(layer.shape) for layer in now.layers), measured)
        tried = {str(budget): float(losses[budget].mean()) for budget in sorted(losses, reverse=True)}
        self.history.append({"step": now.step, "tried": tried, "budget": self.target})
        return self.squeeze(now, self.target) if self.target < held else {}

    def _smallest(self, losses: dict[int, torch.Tensor], least: int, measured: Callable[[int], torch.Tensor]) -> int:
        """Halve the budget while that is as good as the best, down to `least`; `losses` takes what was measured."""
        chosen = max(losses)
        while len(losses) < PASSES and (budget := chosen // 2) >= least:
            losses[budget] = measured(budget)
            if not self._as_good(losses, budget):
                break
            chosen = budget
        return 1 if self._nothing_gained(losses) else chosen

    def _as_good(self, losses: Mapping[int, torch.Tensor], budget: int) -> bool:
        """Whether a cut costs less than what is tolerated, and does so beyond one standard error.

        Against the best of what keeps something: where no update at all is best, half of a harmful one is still better.
        """
        best = min((b for b in losses if b), key=lambda b: float(losses[b].mean()))
        above, error = _paired(losses[budget], losses[best])
        return budget == best or above + error <= self.tolerance * float((losses[0] - losses[best]).mean())

    def _nothing_gained(self, losses: Mapping[int, torch.Tensor]) -> bool:
        """Whether no update at all is within one standard error of the best."""
        best = min(losses, key=lambda b: float(losses[b].mean()))
        above, error = _paired(losses[0], losses[best])
        return above <= error


def _paired(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The mean difference of two losses on the same rows, and its standard error."""
    paired = one - other
    return float(paired.mean()), float(paired.std() / len(paired) ** 0.5) if len(paired) > 1 else 0.0
