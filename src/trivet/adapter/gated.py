"""A gated feed-forward layer with adapted projections as one autograd function: y = down(SiLU(gate x) · up x).

The activation is computed where a product's sums are still in cache, forward and backward, and its result is not kept:
the backward pass writes it again beside the gradients that go through it (Shazeer 2020, arXiv 2002.05202; for what is
made again, `trivet.kernels.recipe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from trivet.adapter.adapted import Adapted, apart, gradients, together
from trivet.kernels import low_rank
from trivet.kernels.heap import empty
from trivet.kernels.recipe import kept_for, rows_from


class Gate(NamedTuple):
    """What the backward pass reads: gate x and up x, and what `Adapted.forward` has returned."""

    gate: torch.Tensor
    up: torch.Tensor
    of_gate: torch.Tensor | None
    of_up: torch.Tensor | None
    of_down: torch.Tensor | None


def forward(x: torch.Tensor, layers: Sequence[Adapted], out: torch.Tensor, plus: torch.Tensor | None = None) -> Gate:
    """Into `out` (n, m): down(SiLU(gate x) · up x) + plus.

    Args:
        x: (n, k).
        layers: gate, up and down, which serve.
        plus: (n, m), contiguous.
    """
    gate, up, down = layers
    opened, raised, product = (low_rank.blocks(len(x), len(gate.b), like=x) for _ in range(3))
    of_gate = gate.forward(x, opened)
    of_up = up.forward(x, raised, gate=opened, gated=product)
    return Gate(opened, raised, of_gate, of_up, down.forward(product, out, plus=plus))


def backward(
    grad: torch.Tensor, x: torch.Tensor | None, layers: Sequence[Adapted], kept: Gate, dx: torch.Tensor
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The gradients of x, into `dx`, and of each layer's factors.

    Args:
        grad: (n, m).
        x: (n, k), or None where neither gate's A nor up's learns.
    """
    gate, up, down = layers
    in_gate, in_up, product = (low_rank.blocks(len(grad), len(gate.b), like=grad) for _ in range(3))
    through = low_rank.Gated(kept.gate, kept.up, product, in_gate, in_up)
    of_down = down.backward(grad, product, kept.of_down, None, gated=through)
    of_gate = gate.backward(in_gate, x, kept.of_gate, dx)
    return [of_gate, up.backward(in_up, x, kept.of_up, dx, plus=dx), of_down]


def adapted_gate(x: torch.Tensor, layers: Sequence[Adapted]) -> torch.Tensor:
    """y of x (…, k), which has a gradient, by the layers gate, up and down, which serve."""
    tensors, settings = apart(layers)
    return _AdaptedGate.apply(x, *tensors, settings)


class _AdaptedGate(torch.autograd.Function):
    """With gradients in x and, where they learn, the factors."""

    @staticmethod
    def forward(ctx: Any, x: Any, *given: Any) -> torch.Tensor:
        *tensors, ctx.layers = given
        layers = together(tensors, ctx.layers)
        rows = x.reshape(-1, x.shape[-1])
        y = empty(*x.shape[:-1], len(layers[2].b), like=x)  # no view of another tensor: it may be changed in place
        gate = forward(rows, layers, y.view(len(rows), -1))
        ctx.maker, kept = kept_for(x, rows) if any(layer.learns[0] for layer in layers[:2]) else (None, None)
        ctx.save_for_backward(*tensors, *gate, *(kept or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        saved = ctx.saved_tensors
        tensors, gate, kept = saved[:12], saved[12:17], saved[17:]
        layers = together(tensors, ctx.layers)
        x = rows_from(ctx.maker, kept) if kept else None
        dx = empty(*grad.shape[:-1], layers[0].a.shape[1], like=grad)
        rows = grad.reshape(-1, grad.shape[-1])
        found = backward(rows, x, layers, Gate(*gate), dx.view(len(rows), -1))
        return dx, *gradients(found), None
