"""`core`: ΔW = s L X R with frozen bases L and R from singular vectors; only the r x r core X is trained.

bases="weight" is LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): L = U_r, R = Σ_r V_rᵀ of W = U Σ Vᵀ. (The paper writes
x W + x A R B, so its A = U_r Σ_r is on the input's side, as Σ_r is here.) bases="gradient" is LoRA-SB (Ponkshe et al.
2024, arXiv 2411.19557): L = U_r, R = V_rᵀ of the loss's gradient at the base model.

The papers start X at small noise, and at the gradient's Σ_r; here X = 0, so that the base model is unchanged. With L
and R fixed X = 0 is no saddle: its gradient is s Lᵀ G Rᵀ. R is scaled by the constant that `bases.core_step` asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import complete, core_step, known, truncated_svd
from trivet.decompose.zero import start_embeddings


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    bases: str = "weight",
) -> None:
    """Set bases and cores of every layer, of rank min(r, out, in); embeddings start as `zero`'s do.

    Args:
        bases: whose singular vectors the bases are, of the "weight" or of the "gradient". Where the gradient has fewer
            directions than r, random ones orthogonal to them fill up.

    Raises:
        ConfigError: bases="gradient" and there are no statistics.
    """
    for layer in start_embeddings(layers, generator):
        rank = min(layer.rank, *layer.shape)
        if bases == "gradient":
            u, _, v = known(statistics, layer, "decompose core with bases: gradient").gradient(rank, whitened=False)
            left, right = complete(u.T, rank, generator).T, complete(v.T, rank, generator)
        else:
            left, sigma, v = truncated_svd(layer.weight, rank, generator)
            right = (v * sigma.clamp(min=1e-6)).T  # a row of 0 would leave its part of the core without effect
        step = core_step(left.shape[0], rank) / (left.norm() * right.norm())
        layer.set_core(left, right * step)
