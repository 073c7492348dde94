"""`adamw`: Adam with decoupled weight decay on every trained tensor (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer

#: Where the fused kernel is used; `meta` has no numbers, and counts them.
_FUSED = ("cpu", "cuda", "meta")


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999) over the layers' factors and the `rest`; vectors (biases, norms) are not decayed."""
    return adamw(decayed([*trained(layers), *others(rest)], weight_decay), learning_rate)


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """torch's AdamW over parameter groups, each tensor in one pass where its fused kernel can be trusted.

    That kernel takes a tensor's numbers in the order in which they lie in memory and does not look whether its gradient
    lies likewise, so parameters must be contiguous and gradients are laid out anew where they are not.
    """
    trusted = all(p.is_contiguous() and p.device.type in _FUSED for group in groups for p in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=trusted or None)
    if trusted:
        optimizer.register_step_pre_hook(_lay_out)
    return optimizer


def _lay_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def trained(layers: Iterable[AdaptedLayer]) -> list[nn.Parameter]:
    """The trained tensors of all layers, a core that several of them share once."""
    return list(dict.fromkeys(p for layer in layers for p in layer.trained()))


def others(rest: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The trained tensors among named parameters."""
    return [p for _, p in rest if p.requires_grad]


def decayed(parameters: Iterable[nn.Parameter], weight_decay: float, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups in which matrices are decayed and vectors are not; groups without parameters are left out."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, **settings},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]
