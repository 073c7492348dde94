"""`principal`: training starts from W's largest singular directions.

PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4) moves U_r Σ_r V_rᵀ out of the base weight into the adapter.
Here the base stays as it is and the layer computes W x + s (B A − B0 A0) x with s B0 A0 = U_r Σ_r V_rᵀ: the same
function and the same gradients, and what is saved is an ordinary adapter of rank 2 r for the base that everybody has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import truncated_svd
from trivet.decompose.zero import start_embeddings


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """A0 = (Σ/s)^½ Vᵀ, B0 = U (Σ/s)^½ of rank min(r, out, in); embeddings start as `zero`'s do."""
    for layer in start_embeddings(layers, generator):
        u, sigma, v = truncated_svd(layer.weight, layer.rank, generator)
        root = sigma.clamp(min=1e-6).sqrt() / math.sqrt(layer.scale)  # with both factors 0 it could never leave 0
        layer.set_offset((v * root).T, u * root)
