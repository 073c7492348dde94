"""Activations in one pass over memory, of which the input alone is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, native
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
    if function is not ACTIVATIONS[1] or not compiled.serves(x):
        return carries(function(x), function, x)
    x = x.contiguous()
    return carries(_GELU.apply(x), native.gelu, x)


class _GELU(torch.autograd.Function):
    """By tanh, in C: torch takes more than twice the time for that one, but not for the others."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        return native.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return native.gelu_backward(grad.contiguous(), *ctx.saved_tensors)
