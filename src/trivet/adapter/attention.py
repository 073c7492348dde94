"""The projections of queries, keys and values in functions of whole layers, which lie by head between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from trivet.adapter.adapted import Adapted
from trivet.kernels.heap import empty


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """(batch, length, features) as (batch, heads, length, width)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def projected(
    x: torch.Tensor, layers: Sequence[Adapted], batch: int
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What the layers make of x (batch · length, n), each (batch, length, features); and what they keep."""
    made = [empty(batch, len(x) // batch, len(layer.b), like=x) for layer in layers]
    return made, [layer.forward(x, y.view(len(x), -1)) for layer, y in zip(layers, made, strict=True)]


def gradients_of_projected(
    grads: Iterable[torch.Tensor],
    x: torch.Tensor,
    layers: Sequence[Adapted],
    kept: Sequence[torch.Tensor | None],
    dx: torch.Tensor | None,
    plus: torch.Tensor | None = None,
) -> list[Any]:
    """What `Adapted.backward` says of each layer; into `dx`, if it is there: the gradient of x, and `plus`.

    Args:
        grads: by head, of each layer's result.
    """
    found: list[Any] = []
    for layer, grad, turned in zip(layers, grads, kept, strict=True):
        flat = grad.transpose(1, 2).reshape(len(x), -1)
        found.append(layer.backward(flat, x, turned, dx, plus=None if dx is None else plus))
        plus = dx
    return found
