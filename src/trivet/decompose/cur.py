"""`cur`: ΔW = s Q_C U Q_R, where Q_C and Q_R are bases of columns and rows of W and only the r x r core U is trained.

Fawi 2024 (CURLoRA, arXiv 2408.14572): ΔW = C U R with columns and rows drawn by the inverse of their norms,
so with preference for the least important, and U starting at 0. Two things differ. Columns and rows are chosen by
pivoted QR, which takes large ones that are independent of each other: the choice needs no luck and no two are alike.
And C, R are replaced by orthonormal bases Q_C, Q_R of the same spaces: C U R ranges over the same matrices, and a step
on U moves ΔW alike in every direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import core_step, pivots
from trivet.decompose.zero import start_embeddings


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """Set bases and cores of every layer, of rank min(r, out, in); embeddings start as `zero`'s do.

    The left basis is orthonormal; the right one is, times the constant that `bases.core_step` asks for.
    """
    for layer in start_embeddings(layers, generator):
        w = layer.weight.float()
        rank = min(layer.rank, *w.shape)
        left = torch.linalg.qr(w[:, pivots(w, rank, generator)]).Q
        right = torch.linalg.qr(w[pivots(w.T, rank, generator)].T).Q.T
        layer.set_core(left, right * (core_step(w.shape[0], rank) / rank))
