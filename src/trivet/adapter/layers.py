"""The vocabulary of the three legs: `AdaptedLayer`, one layer's low-rank update without a word of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: it computes x W^T + s (x A^T) B^T.

    Attributes:
        name: the layer's path in the base model, e.g. "model.layers.0.self_attn.q_proj".
        A: (r, in_features), trained.
        B: (out_features, r), trained.
        scale: s = alpha / r.
        module: PEFT's layer; only `trivet.adapter` looks inside.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    module: nn.Module

    @property
    def rank(self) -> int:
        """r, the number of directions of the update."""
        return self.A.shape[0]

    def delta(self) -> torch.Tensor:
        """s B A, (out_features, in_features) in float32."""
        return self.scale * (self.B.float() @ self.A.float())


def adapted_layers(model: nn.Module, adapter: str = "default") -> list[AdaptedLayer]:
    """Every linear layer with a LoRA update named `adapter`, in the model's order."""

    def found() -> Iterator[AdaptedLayer]:
        module: Any  # PEFT's layers carry dictionaries by adapter name
        for path, module in model.named_modules():
            if adapter in getattr(module, "lora_A", ()):
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                yield AdaptedLayer(path.removeprefix("base_model.model."), a, b, float(module.scaling[adapter]), module)

    return list(found())
