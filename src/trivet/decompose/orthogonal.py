"""`orthogonal`: A has orthonormal rows, scaled to Kaiming's size, and B is 0.

Random orthogonal matrices as starts are Saxe et al. 2014 (arXiv 1312.6120); for LoRA's factors Büyükakyüz 2024 (OLoRA,
arXiv 2406.01775), who takes them from the QR of W and changes the base. Here they are random and the base stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import kaiming_sized


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """Set the factors of every layer: A Aᵀ = I / 3 (Aᵀ A where r > in), B = 0."""
    for layer in layers:
        draw = nn.init.orthogonal_(torch.empty(layer.A.shape, dtype=torch.float32), generator=generator)
        layer.set_factors(kaiming_sized(draw))
