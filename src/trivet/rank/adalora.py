"""`adalora`: directions scored by smoothed sensitivity times uncertainty (Zhang et al. 2023, section 3.2, eq. 7-11).

Faithful in scores, smoothing and budget schedule. Two differences, both of the ground here: a direction is the pair
(column of B, row of A) without a separate Λ, whose score would be one more term of the sum; and what is dropped is
gone, where AdaLoRA masks and may bring it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.errors import TrivetError
from trivet.rank.allocate import allocate
from trivet.rank.policy import Situation
from trivet.rank.score import costs
from trivet.rank.squeeze import Squeeze


@dataclass
class AdaLora(Squeeze):
    """`beta1` smooths the sensitivity |w ∂L/∂w|, `beta2` its deviation."""

    beta1: float = 0.85
    beta2: float = 0.85
    #: Per layer: smoothed sensitivity and uncertainty of A (r, in) and of B (out, r).
    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def measures(self, step: int, total: int) -> bool:
        return False

    def observe(self, layers: Sequence[AdaptedLayer]) -> None:
        for layer in layers:
            now = [
                (f.detach() * f.grad).abs() if f.grad is not None else torch.zeros_like(f) for f in (layer.A, layer.B)
            ]
            if layer.name not in self.scores:
                self.scores[layer.name] = [torch.zeros_like(x) for x in now for _ in range(2)]
            for i, sensitivity in enumerate(now):
                smooth, doubt = self.scores[layer.name][2 * i : 2 * i + 2]
                smooth.mul_(self.beta1).add_(sensitivity, alpha=1 - self.beta1)
                doubt.mul_(self.beta2).add_((sensitivity - smooth).abs(), alpha=1 - self.beta2)

    def squeeze(self, now: Situation, budget: int) -> dict[str, Change]:
        order, worth = {}, []
        for layer in now.layers:
            if layer.name not in self.scores:
                raise TrivetError(f"adalora has seen no gradient of layer {layer.name} before its first squeeze")
            smooth_a, doubt_a, smooth_b, doubt_b = self.scores[layer.name]
            score = (smooth_a * doubt_a).mean(1) + (smooth_b * doubt_b).mean(0)
            values, order[layer.name] = score.sort(descending=True)
            # AdaLoRA counts directions, not parameters: its budget is the number of kept triplets.
            worth.append((values.double() * sum(layer.shape)).tolist())
        ranks, price = allocate(worth, [costs(layer, layer.rank) for layer in now.layers], budget)
        changes = {}
        for layer, rank in zip(now.layers, ranks, strict=True):
            if rank < layer.rank:
                kept = order[layer.name][:rank].sort().values
                pick = torch.eye(layer.rank, dtype=torch.float64, device=kept.device)[:, kept]
                changes[layer.name] = Change(pick, pick)
                a, da, b, db = self.scores[layer.name]
                self.scores[layer.name] = [a[kept], da[kept], b[:, kept], db[:, kept]]
        self.note(now, ranks, price)
        return changes

    def state_dict(self) -> dict[str, Any]:
        flat = {f"{name}/{i}": t for name, four in self.scores.items() for i, t in enumerate(four)}
        return {**super().state_dict(), **flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        names = {key.rpartition("/")[0] for key in state if "/" in key}
        self.scores = {name: [state[f"{name}/{i}"].clone() for i in range(4)] for name in names}
