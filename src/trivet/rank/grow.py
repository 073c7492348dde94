"""`grow`: squeeze, and where the gradient asks for it clearly enough, a layer gets one direction back.

A new direction a is worth buying when the best step along the whitened gradient's first singular direction promises
½ σ_1² > hysteresis · λ (out + in), with λ the price of the last squeeze.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trivet.adapter.layers import Change
from trivet.rank.policy import Situation
from trivet.rank.score import costs
from trivet.rank.squeeze import Squeeze


@dataclass
class Grow(Squeeze):
    """`hysteresis` above 1 keeps directions from coming and going. Layers that left do not come back."""

    hysteresis: float = 2.0
    sketch = 4

    def measures(self, step: int, total: int) -> bool:
        return self._measured(step, total)

    def squeeze(self, now: Situation, budget: int) -> dict[str, Change]:
        """Squeeze below the budget by what the growing layers need, then grow them within it."""
        assert now.statistics is not None  # noqa: S101 - `measures` asked for them
        found = {}
        price = next((h["price"] for h in reversed(self.history) if h.get("price")), None)
        if price is not None and now.step < self._span(now.total)[1]:
            for layer in now.layers:
                _, sigma, v = now.statistics[layer.name].gradient(1)
                cost = float(sum(layer.shape))
                if len(sigma) and layer.form == "plain" and layer.rank < min(layer.shape):
                    gain = 0.5 * float(sigma[0]) ** 2
                    if gain > self.hysteresis * price * cost:
                        found[layer.name] = (gain / cost, cost, v[:, 0])
        reserve = min(sum(cost for _, cost, _ in found.values()), 0.1 * budget)
        changes = super().squeeze(now, int(budget - reserve))
        last = self.history[-1]
        room = budget - last["parameters"]
        grown = []
        for layer in sorted(now.layers, key=lambda x: -found.get(x.name, (0.0,))[0]):
            rank = last["ranks"][layer.name]
            if layer.name not in found or not rank or found[layer.name][1] > room:
                continue
            _, cost, v = found[layer.name]
            known = now.statistics[layer.name].inputs.clamp_min(1e-12)
            row = (v / known.sqrt())[None]
            row = row * (layer.A.detach().norm() / layer.rank**0.5 / row.norm())  # as long as its sisters
            same = torch.eye(layer.rank, dtype=torch.float64, device=row.device)
            change = changes.get(layer.name, Change(same, same))
            changes[layer.name] = replace(change, rows=row)
            room -= cost
            grown.append(layer.name)
            last["ranks"][layer.name] = rank + 1
        last["parameters"] = int(sum(sum(costs(x, last["ranks"][x.name])) for x in now.layers))
        last["grown"] = grown
        return changes
