"""A decoder layer with adapted projections as one autograd function: of Llama, and of those that have its forward pass.

What the parts compute one by one, in their order (`trivet.fast`), without what lies between them: a model has hundreds
of parts, and each call of a module and of autograd costs as much as a product of a few tokens. What is added to the
residual stream is a term of the sums, forward and backward, and not rounded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from trivet.adapter import gated
from trivet.adapter.adapted import Adapted, apart, gradients, together
from trivet.adapter.attention import gradients_of_projected, heads, projected
from trivet.kernels import native, row_attention
from trivet.kernels.heap import empty


class Norm(NamedTuple):
    """A root mean square norm: weight (n,), and what is added to the mean of squares."""

    weight: torch.Tensor
    eps: float


class Sight(NamedTuple):
    """What an attention layer has beside its projections.

    Attributes:
        cos, sin: (batch or 1, length, width), contiguous: see `trivet.kernels.rotation`.
        rows: see `trivet.kernels.row_attention`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor
    weights: native.Weights


def adapted_decoder(x: torch.Tensor, norms: Sequence[Norm], sight: Sight, layers: Sequence[Adapted]) -> torch.Tensor:
    """x + attention + feed-forward layer.

    Args:
        x: (batch, length, n), contiguous.
        norms: of what attention reads, and the feed-forward layer.
        layers: q, k, v and o, and gate, up and down, all of which serve.
    """
    tensors, settings = apart(layers)
    (first, first_eps), (second, second_eps) = norms
    rest = (first_eps, second_eps), sight.rows, sight.weights, settings
    return _AdaptedDecoder.apply(x, sight.cos, sight.sin, first, second, *tensors, rest)


class _AdaptedDecoder(torch.autograd.Function):
    """With gradients in x and, where they learn, the factors."""

    @staticmethod
    def forward(ctx: Any, x: Any, cos: Any, sin: Any, first: Any, second: Any, *given: Any) -> torch.Tensor:
        *tensors, settings = given
        (first_eps, second_eps), seen, weights, layers = ctx.settings = settings
        q, k, v, o, *feed = together(tensors, layers)
        batch, rows = len(x), x.view(-1, x.shape[-1])
        read = native.rms_norm(rows, first, first_eps)[0]
        made, of = projected(read, (q, k, v), batch)
        width = cos.shape[-1]
        query, key = (native.rotate(heads(each, width), cos, sin) for each in made[:2])
        value = heads(made[2], width)
        attended = empty(*made[0].shape, like=x)
        native.row_attention(query, key, value, heads(attended, width), seen, weights)
        middle, y = empty(*rows.shape, like=x), empty(*x.shape, like=x)
        of.append(o.forward(attended.view(len(rows), -1), middle, plus=rows))
        read = native.rms_norm(middle, second, second_eps)[0]
        gate = gated.forward(read, feed, y.view(len(rows), -1), plus=middle)
        kept = x, cos, sin, first, second, query, key, value, attended, middle
        ctx.save_for_backward(*kept, *of, *gate, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, cos, sin, first, second, query, key, value, attended, middle, *rest = ctx.saved_tensors
        of, gate, tensors = rest[:4], gated.Gate(*rest[4:9]), rest[9:]
        (first_eps, second_eps), seen, weights, layers = ctx.settings
        q, k, v, o, *feed = together(tensors, layers)
        rows, g = x.view(middle.shape), grad.contiguous().view(middle.shape)
        through = empty(*middle.shape, like=grad)

        read, inverse = native.rms_norm(middle, second, second_eps)
        of_feed = gated.backward(g, read, feed, gate, through)
        g = native.rms_norm_backward(through, middle, second, inverse, g)

        in_attended = empty(*attended.shape, like=grad)
        of_o = o.backward(g, attended.view(len(rows), -1), of[3], in_attended.view(len(rows), -1))
        by_head = heads(in_attended, cos.shape[-1])
        in_query, in_key, in_value = row_attention.gradients(by_head, query, key, value, seen, weights)
        turned = (native.rotate(each, cos, sin, back=True) for each in (in_query, in_key))
        read, inverse = native.rms_norm(rows, first, first_eps)
        target = through if ctx.needs_input_grad[0] else None
        of_read = gradients_of_projected((*turned, in_value), read, (q, k, v), of[:3], target)
        dx = native.rms_norm_backward(through, rows, first, inverse, g).view(x.shape) if target is not None else None
        return dx, None, None, None, None, *gradients((*of_read, of_o, *of_feed)), None
