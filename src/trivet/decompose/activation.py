"""`activation`: the rows of A are the principal components of the layer's inputs, and B is 0.

Paischer et al. 2024 (EVA, arXiv 2410.07170), for equal ranks. Theirs are unit rows; here they are scaled to Kaiming's
size, since with B = 0 the size of A acts as a learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import complete, kaiming_sized, known
from trivet.decompose.zero import start_embeddings


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> None:
    """Set the factors of every layer; embeddings start as `zero`'s do.

    Where the inputs have fewer directions than r, random ones orthogonal to them fill up.

    Raises:
        ConfigError: there are no statistics.
    """
    for layer in start_embeddings(layers, generator):
        v = known(statistics, layer, "decompose activation").input_components(layer.rank)
        layer.set_factors(kaiming_sized(complete(v.T, layer.rank, generator)))
