"""`preconditioned`: each factor's gradient divided by the other's Gram matrix (Zhang & Pilanci 2024, algorithm 2).

Gram matrices are divided by their mean eigenvalue first. To Adam a constant factor is nothing, but B grows from 0: with
BᵀB as it is A's gradients, about 1 / ‖B‖, would be largest in the first steps, and Adam's second moment would remember
them for a thousand more, in which A hardly moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update import adamw
from trivet.update.chain import chain
from trivet.update.solve import batched, damped, gram, inverse, mean_eigenvalue, wide


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
) -> torch.optim.Optimizer:
    """AdamW on G_B K⁻¹ with K = A Aᵀ, and K⁻¹ G_A with K = BᵀB.

    Of a core U between L and A it is (LᵀL)⁻¹ G_U (A Aᵀ)⁻¹; a core that layers share is trained by AdamW as it is.

    Args:
        damping: δ; K⁻¹ stands for (K / κ + δ I)⁻¹, where κ is K's mean eigenvalue.
    """
    base = adamw.optimizer(layers, rest, learning_rate=learning_rate, weight_decay=weight_decay)
    return chain(base, lambda _: precondition(layers, damping))


def precondition(layers: Sequence[AdaptedLayer], damping: float) -> None:
    """Rewrite the gradients of all factors and cores that have one."""
    sides = [side for layer in layers if layer.rank for side in _sides(layer)]
    inverses = batched(lambda k: mean_eigenvalue(k) * inverse(damped(k, damping)), [k for _, k, _ in sides])
    for (gradient, _, left), factor in zip(sides, inverses, strict=True):
        gradient.copy_(factor @ wide(gradient) if left else wide(gradient) @ factor)


def _sides(layer: AdaptedLayer) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    """(gradient, Gram matrix to divide it by, whether from the left)."""
    if layer.form == "tensor-core":
        return []
    if layer.core is not None:
        g = layer.core.grad
        return [] if g is None else [(g, gram(layer.basis.T), True), (g, gram(layer.A), False)]
    sides = []
    if layer.A.grad is not None:
        sides.append((layer.A.grad, gram(layer.B.T), True))
    if layer.B.grad is not None:
        sides.append((layer.B.grad, gram(layer.A), False))
    return sides
