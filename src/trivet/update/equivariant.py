"""`equivariant`: matrix moments, so that the path of B A doesn't depend on how it is split (cf. LoRA-RITE).

Yen et al. 2024, arXiv 2410.20625, normalise gradients in orthonormal bases of A and B. Here the same step is written
without bases: with K = A Aᵀ and V the mean of G_Bᵀ G_B / out it is ΔB = −η M (K # V)⁻¹, where M is the mean of G_B and
K # V = K^½ (K^-½ V K^-½)^½ K^½ the geometric mean. Under B → B T, A → T⁻¹ A each of M, V and K changes by T's action
alone, and so does ΔB; hence moments are kept as they are, and no basis is stored or followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update.adamw import others, trained
from trivet.update.chain import chain, joint
from trivet.update.solve import batched, gram, spectrum, wide

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

#: The longest step of A, in units of its own rows.
REACH = 0.3


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Equivariant steps for A and B, AdamW for cores and the `rest`.

    Where A's rows (B's columns) are orthonormal, the entries of B's (A's) step are of Adam's size.
    """
    pairs = [layer for layer in layers if layer.core is None]
    cores = [layer for layer in layers if layer.core is not None]
    base = joint(trained(pairs), [*trained(cores), *others(rest)], learning_rate, weight_decay)
    return chain(base, lambda optimizer: equilibrate(optimizer, pairs))


def equilibrate(optimizer: torch.optim.Optimizer, layers: Sequence[AdaptedLayer]) -> None:
    """Rewrite the gradients of A and B into steps."""
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    ready = [layer for layer in layers if layer.rank and not (layer.A.grad is None and layer.B.grad is None)]
    rows: list[tuple[torch.Tensor, ...]] = []
    for layer in ready:
        k_a, k_b = gram(layer.A), gram(layer.B.T)
        rate = rates.get(layer.A, 0.0)
        reach = k_a.new_tensor(rate**2 * layer.A.shape[1] / REACH**2)
        rows.append((k_a, k_b, _observe(optimizer, layer.A, 0), _observe(optimizer, layer.B, 1), reach))
    for layer, (for_a, for_b) in zip(ready, batched(_dividers, *zip(*rows, strict=True)), strict=True):
        if layer.A.grad is not None:
            layer.A.grad.copy_(for_a @ wide(_mean(optimizer, layer.A)))
        if layer.B.grad is not None:
            layer.B.grad.copy_(wide(_mean(optimizer, layer.B)) @ for_b)


def _observe(optimizer: torch.optim.Optimizer, p: torch.Tensor, side: int) -> torch.Tensor:
    """Take p's gradient into its moments; the unbiased second one, (r, r), is returned: 0 without a gradient."""
    r = p.shape[side]
    if p.grad is None:
        return wide(p.new_zeros(r, r))
    state: dict[str, Any] = optimizer.state[p]
    if not state:
        state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "gram": p.new_zeros(r, r)}
    state["step"] += 1
    state["exp_avg"].lerp_(p.grad, 1 - BETA1)
    second = gram(p.grad.T if side else p.grad) / p.shape[1 - side]
    state["gram"].lerp_(second.to(state["gram"]), 1 - BETA2)
    return wide(state["gram"]) / (1 - BETA2 ** state["step"].item())


def _mean(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> torch.Tensor:
    state = optimizer.state[p]
    return state["exp_avg"] / (1 - BETA1 ** state["step"].item())


def _dividers(
    k_a: torch.Tensor, k_b: torch.Tensor, v_a: torch.Tensor, v_b: torch.Tensor, reach: torch.Tensor
) -> torch.Tensor:
    """(K_B # V_A)⁻¹ and (K_A # V_B)⁻¹, stacked along dimension 1; all are (n, r, r), `reach` is (n,).

    While B is small a step of A that counts for as much as B's would turn A's rows to anywhere. So BᵀB is taken for no
    less than ρ² (A Aᵀ)⁻¹, which changes under T as BᵀB does, where ρ = η √in / REACH (`reach` is ρ²).
    """
    root_a = _inverse_root(k_a)
    root_b = _inverse_root(k_b + reach[:, None, None] * root_a @ root_a.mT)
    return torch.stack([_divider(root_b, v_a), _divider(root_a, v_b)], dim=1)


def _inverse_root(k: torch.Tensor) -> torch.Tensor:
    """R with R Rᵀ the pseudo-inverse of k; only what rounding leaves of a zero is taken for zero."""
    values, vectors = spectrum(k)
    zero = values <= values[:, -1:] * k.shape[-1] * torch.finfo(k.dtype).eps
    return vectors * torch.where(zero, 0.0, values.rsqrt())[:, None, :]


def _divider(root: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(K # V)⁻¹ with K = (R Rᵀ)⁻¹: R (Rᵀ V R)^-½ Rᵀ. Rᵀ V R is only rotated by T, so ε may be added to its root."""
    values, vectors = spectrum(root.mT @ v @ root)
    root = root @ vectors
    return (root / (values.sqrt() + EPSILON)[:, None, :]) @ root.mT
