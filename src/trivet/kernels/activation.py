"""Activations in one pass over memory, of which the input alone is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trivet.kernels.recipe import carries

Activation = Callable[[torch.Tensor], torch.Tensor]

#: GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415), by the error function and by its approximation, and SiLU. ReLU is
#: none of them: torch keeps its result, and so does the layer that reads it.
ACTIVATIONS: tuple[Activation, ...] = (
    nn.functional.gelu,
    partial(nn.functional.gelu, approximate="tanh"),
    nn.functional.silu,
)


def activate(x: torch.Tensor, function: Activation) -> torch.Tensor:
    """`function(x)`, one of `ACTIVATIONS`."""
    return carries(function(x), function, x)
