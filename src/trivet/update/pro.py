"""`pro`: steps of A and B that together are nearest to full fine-tuning's (Wang et al. 2024, LoRA-Pro, theorem 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update import adamw
from trivet.update.chain import chain
from trivet.update.preconditioned import precondition
from trivet.update.solve import batched, damped, gram, inverse, mean_eigenvalue, spectrum, wide


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
) -> torch.optim.Optimizer:
    """AdamW on the adjusted gradients, so that its moments are of the factors' size, not of W's.

    Of a core, which is linear, the nearest gradient is that of `preconditioned`, but for a constant; a core that layers
    share is trained by AdamW as it is.

    Args:
        damping: δ; K⁻¹ stands for (K + δ κ I)⁻¹, where κ is K's mean eigenvalue.
    """
    base = adamw.optimizer(layers, rest, learning_rate=learning_rate, weight_decay=weight_decay)
    return chain(base, lambda _: project(layers, damping))


def project(layers: Sequence[AdaptedLayer], damping: float) -> None:
    """Rewrite the gradients of all pairs of factors that have them, and of cores.

    With P = (BᵀB)⁻¹, Q = (A Aᵀ)⁻¹ and G_A, G_B divided by s²: g_A = P G_A + X A and
    g_B = (I − B P Bᵀ) G_B Q − B X, where BᵀB X + X A Aᵀ = −P G_A Aᵀ makes them nearest to the plain gradients. What is
    handed on is κ(BᵀB) g_A and κ(A Aᵀ) g_B, of the plain gradients' size while B grows from 0; `preconditioned` says
    why. At the start B and G_A are 0: then g_A is 0, and g_B is G_B Q, without a case of its own.
    """
    pairs, single = [], []
    for layer in layers:
        if layer.core is None and (g_a := layer.A.grad) is not None and (g_b := layer.B.grad) is not None:
            pairs += [(layer, g_a, g_b)] if layer.rank else []
        else:
            single.append(layer)
    precondition(single, damping)

    def solve(k_b: torch.Tensor, k_a: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        k_b, k_a = damped(k_b, damping), damped(k_a, damping)
        p, q = inverse(k_b), inverse(k_a)
        return torch.stack([k_b, k_a, p, q, _sylvester(k_b, k_a, -p @ cross)], dim=1)

    solved = batched(
        solve,
        [gram(layer.B.T) for layer, _, _ in pairs],
        [gram(layer.A) for layer, _, _ in pairs],
        [wide(g_a) @ wide(layer.A).T / layer.scale**2 for layer, g_a, _ in pairs],
    )
    for (layer, grad_a, grad_b), (k_b, k_a, p, q, x) in zip(pairs, solved, strict=True):
        a, b, g_a, g_b = wide(layer.A), wide(layer.B), wide(grad_a) / layer.scale**2, wide(grad_b) / layer.scale**2
        grad_a.copy_(mean_eigenvalue(k_b) * (p @ g_a + x @ a))
        grad_b.copy_(mean_eigenvalue(k_a) * ((g_b - b @ (p @ (b.T @ g_b))) @ q - b @ x))


def _sylvester(left: torch.Tensor, right: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """X with left X + X right = c, for positive definite left and right."""
    (lam, u), (mu, v) = spectrum(left), spectrum(right)
    return u @ ((u.mT @ c @ v) / (lam[..., :, None] + mu[..., None, :])) @ v.mT
