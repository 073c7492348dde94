"""`zero`: A is Kaiming-uniform, B is 0, so that training starts at the base model (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """Set the factors of every layer, from `generator` alone: the same seed gives the same adapter anywhere.

    A (r, in) is uniform within ±1 / √in, PEFT's own start; its expected squared Frobenius norm is r / 3.
    """
    for layer in layers:
        draw = torch.empty(layer.A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(draw, a=math.sqrt(5), generator=generator)
        layer.set_factors(draw)


def start_embeddings(layers: Sequence[AdaptedLayer], generator: torch.Generator) -> list[AdaptedLayer]:
    """Start the embeddings among `layers` and return the others.

    For decompositions by bases of W, x or G: a table of tokens has none that speak of tokens not seen yet.
    """
    start([layer for layer in layers if layer.embedding], generator)
    return [layer for layer in layers if not layer.embedding]
