"""`muon`: orthogonalised momentum of each factor (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update.adamw import others, trained
from trivet.update.chain import chain, joint
from trivet.update.solve import batched, gram, wide

#: Jordan's quintic: it takes singular values from 0.01 to 1 near 1 in five iterations.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Nesterov momentum, orthogonalised, for every matrix of the layers; AdamW for shared cores and the `rest`.

    A step's entries have a root mean square of 0.2 learning rates, as Adam's have (Liu et al. 2025, Moonlight,
    arXiv 2502.16982, section 2.2), so that learning rates of AdamW suit it.
    """
    matrices = [p for p in trained(layers) if p.ndim == 2]
    remaining = [p for p in trained(layers) if p.ndim != 2] + others(rest)
    base = joint(matrices, remaining, learning_rate, weight_decay)

    def transform(optimizer: torch.optim.Optimizer) -> None:
        directions = []
        for p in matrices:
            if p.grad is not None and p.numel():
                state = optimizer.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                directions.append(p.grad.lerp_(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum))
        orthogonalise(directions)

    return chain(base, transform)


def orthogonalise(gradients: Sequence[torch.Tensor]) -> None:
    """Replace each matrix by 0.2 √max(rows, columns) times its orthogonal factor, by five Newton-Schulz iterations.

    X ← (a + b S + c S²) X with S = X Xᵀ: all iterations act on S and the product of the factors, which are r x r.
    """
    flat = [g if g.shape[0] <= g.shape[1] else g.T for g in gradients]

    def iterate(s: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        norm = s.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp_min(1e-30)[:, None, None]
        s, product = s / norm**2, eye / norm
        for _ in range(5):
            q = _A * eye + _B * s + _C * s @ s
            s, product = q @ s @ q, q @ product
        return product

    for g, x, product in zip(gradients, flat, batched(iterate, [gram(x) for x in flat]), strict=True):
        x.copy_(0.2 * max(g.shape) ** 0.5 * (product @ wide(x)))
