"""`frozen_a`: A stays as it started, B is trained by AdamW (Zhang et al. 2023, LoRA-FA, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update import adamw


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Freeze every layer's A, then AdamW; cores, whose A is frozen already, are trained as ever."""
    for layer in layers:
        layer.freeze_A()
    return adamw.optimizer(layers, rest, learning_rate=learning_rate, weight_decay=weight_decay)
