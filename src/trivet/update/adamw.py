"""`adamw`: Adam with decoupled weight decay on every trained tensor (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999) over named parameters; vectors (biases, norms) are not decayed."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate)
