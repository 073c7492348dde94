"""`lora_plus`: AdamW with a larger step for B (Hayou et al. 2024, section 4; grouped as PEFT groups it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update.adamw import adamw, decayed, others, trained

#: Both factors of an embedding, in the authors' code and PEFT's: its inputs are one-hot, so their rows need no width.
EMBEDDING_RATE = 1e-6


def optimizer(
    layers: Sequence[AdaptedLayer],
    rest: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    ratio: float = 16.0,
) -> torch.optim.Optimizer:
    """AdamW; the rate of B, and as in PEFT of vectors, is `ratio` times that of A, cores and heads.

    Embeddings learn at 1e-6 as in PEFT's `create_loraplus_optimizer`. Vectors are not decayed.
    """
    embeddings = trained(layer for layer in layers if layer.embedding)
    plain = [layer for layer in layers if not layer.embedding]
    fast = [layer.B for layer in plain if isinstance(layer.B, nn.Parameter)] + [p for p in others(rest) if p.ndim <= 1]
    taken = {*embeddings, *fast}
    slow = [p for p in (*trained(plain), *others(rest)) if p not in taken]
    groups = [
        *decayed(slow, weight_decay, lr=learning_rate),
        *decayed(embeddings, weight_decay, lr=EMBEDDING_RATE),
        *decayed(fast, weight_decay, lr=learning_rate * ratio),
    ]
    return adamw(groups, learning_rate)
