"""What every rank policy is: ranks to start with, and changes at some steps of the training.

A policy decides; `trivet.train.ranks` measures what it asks for and `trivet.adapter.resize` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank import budget as budgets
from trivet.rank.score import held


@dataclass(frozen=True)
class Situation:
    """What a policy may look at after a step.

    Attributes:
        step, total: optimizer steps done, and of the whole run.
        layers: as they are now.
        statistics: averaged second moments by layer name; None where the policy asked for none.
        validation: changes -> the loss of each validation row as it would be after them (n,); None without such rows.
    """

    step: int
    total: int
    layers: Sequence[AdaptedLayer]
    statistics: Mapping[str, LayerStatistics] | None = None
    validation: Callable[[Mapping[str, Change]], torch.Tensor] | None = None


@dataclass
class Policy:
    """A policy that never changes its mind: the base of the others.

    Attributes:
        lora_rank: r of the plain LoRA that the method is compared with; the default of every budget.
    """

    lora_rank: int
    #: Whether each layer's step is scaled by √(8 / r).
    rank_aware_step: bool = False
    #: What it decided, for the record: step, parameters, price and whatever else a policy notes.
    history: list[dict[str, Any]] = field(default_factory=list)

    #: Width of the gradient's sketch that it wants measured during training; 0 for second moments alone.
    sketch = 0
    #: Whether ranks may change during training, or after it.
    moving = False
    #: Whether it decides by the losses of validation rows.
    validates = False

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        """The rank of every layer before training; `total` is the number of the base model's parameters."""
        return {layer.name: self.lora_rank for layer in layers}

    def widest(self, layers: Sequence[AdaptedLayer], total: int) -> int:
        """The largest rank that it may start a layer with: how much a probe has to know."""
        return max(self.start(layers, None, total).values())

    def measures(self, step: int, total: int) -> bool:
        """Whether second moments are to be measured during the step after `step`."""
        return False

    def observe(self, layers: Sequence[AdaptedLayer]) -> None:
        """Called with this step's gradients in place, before the update."""

    def due(self, step: int, total: int) -> bool:
        """Whether `decide` is to be asked after `step`."""
        return False

    def decide(self, now: Situation) -> dict[str, Change]:
        """The changes after a step that is `due`, by layer name."""
        return {}

    def settled(self, step: int, total: int) -> bool:
        """Whether no change comes after `step`. Training that ends before is followed by one more `decide`."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the moments: JSON values and tensors."""
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = list(state["history"])

    def allowed(self, budget: Any, layers: Sequence[AdaptedLayer], total: int) -> int:
        """A written budget in parameters."""
        try:
            written = f"r{self.lora_rank}-equivalent" if budget is None else budget
            return budgets.parameters(written, [layer.shape for layer in layers], total)
        except ConfigError as error:
            raise ConfigError(f"budget {budget!r} {error}") from error


def parameters(layers: Sequence[AdaptedLayer]) -> int:
    """The numbers that the layers' updates hold."""
    return sum(held(layer) for layer in layers)
