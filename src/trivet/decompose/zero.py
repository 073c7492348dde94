"""`zero`: A is Kaiming-uniform, B is 0, so that training starts at the base model (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer


def start(layers: Iterable[AdaptedLayer], generator: torch.Generator) -> None:
    """Set the factors of every layer, from `generator` alone: the same seed gives the same adapter anywhere."""
    for layer in layers:
        draw = torch.empty(layer.A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(draw, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.A.copy_(draw)
            layer.B.zero_()
