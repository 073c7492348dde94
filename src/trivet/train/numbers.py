"""Bad numbers: steps whose loss or gradient is not finite change nothing; sudden losses are pointed out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch

#: Steps in a row without a usable gradient after which training can't go on by itself.
LIMIT = 3
#: The fewest losses that a new one can be compared with.
_ENOUGH = 20


class Watch:
    """Says of each step whether it can be taken."""

    def __init__(self) -> None:
        #: All steps, and skipped ones in a row.
        self.steps = self.skipped = 0
        #: Why the last step was skipped, e.g. "its loss is nan"; None where it was not.
        self.reason: str | None = None
        self._losses: list[torch.Tensor] = []

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Remember a micro-batch's loss; gives 0 in place of one that is not finite (sums would never recover)."""
        self._losses.append(loss.detach())
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def total(self) -> torch.Tensor:
        """The loss of the step's micro-batches, as they were; begins the next step."""
        total = torch.stack(self._losses).sum()
        self._losses.clear()
        return total

    def step(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step can be taken; to be asked once a step."""
        numbers = (("loss", loss), ("gradient's norm", gradient_norm))
        self.reason = next((f"its {what} is {number}" for what, number in numbers if not math.isfinite(number)), None)
        self.steps += 1
        self.skipped = 0 if self.reason is None else self.skipped + 1
        return self.reason is None


class Spikes:
    """Finds losses that are suddenly high.

    Such a one is above twice the median of the last 50, and further from it than ten times their median distance.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=50)

    def found(self, loss: float) -> bool:
        """Whether a step's loss is one; remembers it."""
        recent = list(self.recent)
        self.recent.append(loss)
        if len(recent) < _ENOUGH:
            return False
        middle = median(recent)
        spread = median(abs(value - middle) for value in recent)
        return loss > 2 * middle and loss - middle > 10 * spread


def listed(rows: Sequence[str], most: int = 8) -> str:
    """Names of rows for a message, the first few of many."""
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
