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

from trivet.kernels import low_rank
from trivet.kernels.heap import empty
from trivet.kernels.product import Weight
from trivet.kernels.recipe import kept_for, rows_from


class Adapted(NamedTuple):
    """A linear layer and its adapter: x Wᵀ + bias + scale (x Aᵀ) Bᵀ, or `transposed`, x W + ….

    Attributes:
        a: A, (rank, k), float32.
        b: B, (m, rank), float32.
        weight: W, or what makes it.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None
    scale: float
    transposed: bool


def adapted_gate(x: torch.Tensor, layers: Sequence[Adapted]) -> torch.Tensor | None:
    """y of x (…, k), which has a gradient, by the layers gate, up and down; None where `low_rank` doesn't take them."""
    rows = x.reshape(-1, x.shape[-1])
    for layer in layers:
        plain = isinstance(layer.weight, torch.Tensor) and layer.bias is None and not layer.transposed
        if not plain or not low_rank.serves(rows, layer.weight.T, layer.a, layer.b):  # type: ignore[union-attr]
            return None
    each = [(layer.a, layer.b, layer.weight) for layer in layers]
    return _AdaptedGate.apply(x, *each[0], *each[1], *each[2], [layer.scale for layer in layers])


class _AdaptedGate(torch.autograd.Function):
    """With gradients in x and, where they learn, the factors."""

    @staticmethod
    def forward(ctx: Any, x: Any, *given: Any) -> torch.Tensor:
        (gate_a, gate_b, gate_w, up_a, up_b, up_w, down_a, down_b, down_w), ctx.scales = given[:-1], given[-1]
        rows = x.reshape(-1, x.shape[-1])
        n, middle = len(rows), len(gate_w)
        gate, up, gated = (empty(n, middle, like=x) for _ in range(3))
        y = empty(*x.shape[:-1], len(down_w), like=x)  # no view of another tensor: it may be changed in place
        scales = ctx.scales
        of_gate = low_rank.product(rows, rows, gate_w.T, gate_a, gate_b, scales[0], None, gate)
        of_up = low_rank.product(rows, rows, up_w.T, up_a, up_b, scales[1], None, up, gate, gated)
        flat = y.view(n, -1)
        of_down = low_rank.product(gated, gated, down_w.T, down_a, down_b, scales[2], None, flat)
        learns = ctx.needs_input_grad
        ctx.maker, kept = kept_for(x, rows) if learns[1] or learns[4] else (None, ())
        inner = (part if learns[i] else None for part, i in ((of_gate, 2), (of_up, 5), (of_down, 8)))
        ctx.save_for_backward(*given[:-1], gate, up, *inner, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        gate_a, gate_b, gate_w, up_a, up_b, up_w, down_a, down_b, down_w, gate, up, *rest = ctx.saved_tensors
        of_gate, of_up, of_down, *kept = rest
        learns, scales = ctx.needs_input_grad, ctx.scales
        in_gate, in_up, product = (empty(*gate.shape, like=gate) for _ in range(3))
        through = low_rank.Gated(gate, up, product, in_gate, in_up)
        g, low = grad.reshape(-1, grad.shape[-1]), product if learns[7] else None
        in_down = low_rank.backward(g, low, down_w.T, of_down, down_a, down_b, scales[2], None, gated=through)
        x = rows_from(ctx.maker, kept) if learns[1] or learns[4] else None
        dx = empty(*grad.shape[:-1], gate_w.shape[1], like=grad)
        flat = dx.view(len(gate), -1)
        first, second = x if learns[1] else None, x if learns[4] else None
        of_first = low_rank.backward(in_gate, first, gate_w.T, of_gate, gate_a, gate_b, scales[0], flat)
        of_second = low_rank.backward(in_up, second, up_w.T, of_up, up_a, up_b, scales[1], flat, more=True)
        return dx, *of_first, None, *of_second, None, *in_down, None, None
