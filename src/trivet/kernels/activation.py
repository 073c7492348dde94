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
    if not _in_c(x, function):
        return carries(function(x), function, x)
    x = x.contiguous()
    return carries(_GELU.apply(x), native.gelu, x)


def computed(x: torch.Tensor, function: Activation) -> torch.Tensor:
    """`function(x)`, without gradient; x is contiguous."""
    return native.gelu(x) if _in_c(x, function) else function(x)


def gradient(grad: torch.Tensor, x: torch.Tensor, function: Activation) -> torch.Tensor:
    """That of x, from that of `function(x)`; both contiguous."""
    if _in_c(x, function):
        return native.gelu_backward(grad, x)
    if function is ACTIVATIONS[2]:
        return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    approximate = "none" if function is ACTIVATIONS[0] else "tanh"
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)  # type: ignore[no-any-return]


def _in_c(x: torch.Tensor, function: Activation) -> bool:
    """Whether C functions compute it: torch takes more than twice the time for GELU by tanh, but not for the others."""
    return function is ACTIVATIONS[1] and compiled.serves(x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        return native.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return native.gelu_backward(grad.contiguous(), *ctx.saved_tensors)
