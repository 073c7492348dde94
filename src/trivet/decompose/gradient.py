"""`gradient`: A spans the directions in which the loss falls fastest at the base model, and B is 0.

LoRA-GA (Wang et al. 2024, arXiv 2407.05000) and LoRA-One (Zhang et al. 2025, arXiv 2502.01235, algorithm
1) take the singular vectors of the gradient G. Here they are of G̃ = S^-½ G C^-½, in which inputs and output gradients
of every size count alike: of all updates of rank r with the same ‖S^½ ΔW C^½‖, a step along U Σ Vᵀ of G̃ lowers the
loss most. Back in W's coordinates it is S^-½ U Σ Vᵀ C^-½, whose rows lie in the span of A = Vᵀ C^-½.

B is 0, so the base model is unchanged. Each A is then scaled to plain LoRA's Frobenius norm: with B = 0 the size of A
does nothing but scale B's gradient and its effect, so it is a learning rate, and C's units must not decide that.
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

    Where the gradient sketch has fewer directions than r, random ones orthogonal to them fill up.

    Raises:
        ConfigError: there are no statistics.
    """
    for layer in start_embeddings(layers, generator):
        probe = known(statistics, layer, "decompose gradient")
        _, _, v = probe.gradient(layer.rank, whitened=True)
        _, root = probe.scales()
        rows = v.T / root
        layer.set_factors(kaiming_sized(complete(rows, layer.rank, generator)))
