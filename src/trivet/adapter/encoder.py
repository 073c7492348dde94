"""An encoder layer with adapted projections as one autograd function: of BERT, and of those that have its forward pass.

What the parts compute one by one, in their order (`trivet.fast`), without what lies between them; see
`trivet.adapter.decoder`, which is the same for decoder layers. Norms come after the sums here (Vaswani et al. 2017,
arXiv 1706.03762, section 3.1), and dropout before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from trivet.adapter.adapted import Adapted, apart, gradients, together
from trivet.adapter.attention import gradients_of_projected, heads, projected
from trivet.kernels import native, row_attention
from trivet.kernels.activation import Activation, computed, gradient
from trivet.kernels.heap import empty


class LayerNorm(NamedTuple):
    """Weight and bias (n,), and what is added to the variance."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Dropped(NamedTuple):
    """What is dropped of what is added to the residual stream: a share of it, by seeds of the layer's two sums."""

    share: float
    seeds: tuple[int, int]

    def of(self, x: torch.Tensor, sum_: int) -> torch.Tensor:
        """x with that share of its entries 0, and the others as much larger."""
        return native.dropout(x, self.share, self.seeds[sum_], 1 / (1 - self.share)) if self.share else x


class Shape(NamedTuple):
    """What an encoder layer has beside its projections and norms.

    Attributes:
        width: of a head.
        rows: see `trivet.kernels.row_attention`.
        function: between the feed-forward layer's projections.
    """

    width: int
    rows: torch.Tensor
    weights: native.Weights
    dropped: Dropped
    function: Activation


def adapted_encoder(x: torch.Tensor, norms: Sequence[LayerNorm], shape: Shape, layers: Sequence[Adapted]) -> Any:
    """norm(h + feed-forward(h)), h = norm(x + attention(x)).

    Args:
        x: (batch, length, n), contiguous.
        norms: of the first sum, and the second.
        layers: q, k, v and o, and the feed-forward layer's two, all of which serve.
    """
    tensors, settings = apart(layers)
    of_norms = [each for norm in norms for each in norm[:2]]
    return _AdaptedEncoder.apply(x, *of_norms, *tensors, (shape, [norm.eps for norm in norms], settings))


class _AdaptedEncoder(torch.autograd.Function):
    """With gradients in x and, where they learn, the factors."""

    @staticmethod
    def forward(ctx: Any, x: Any, *given: Any) -> torch.Tensor:
        (w1, b1, w2, b2), tensors = given[:4], given[4:-1]
        shape, (eps1, eps2), settings = ctx.settings = given[-1]
        q, k, v, o, widening, narrowing = together(tensors, settings)
        batch, _, features = x.shape
        rows = x.view(-1, features)
        made, of = projected(rows, (q, k, v), batch)
        query, key, value = (heads(each, shape.width) for each in made)
        attended = empty(*made[0].shape, like=x)
        native.row_attention(query, key, value, heads(attended, shape.width), shape.rows, shape.weights)
        first, of_o = _added(o, attended.view(len(rows), -1), rows, shape.dropped, 0)
        middle, *of_first = torch.native_layer_norm(first, (features,), w1, b1, eps1)
        wide = empty(len(rows), len(widening.b), like=x)
        of.extend((of_o, widening.forward(middle, wide)))
        second, of_narrow = _added(narrowing, computed(wide, shape.function), middle, shape.dropped, 1)
        y, *of_second = torch.native_layer_norm(second, (features,), w2, b2, eps2)
        kept = x, query, key, value, attended, first, *of_first, wide, second, *of_second
        ctx.save_for_backward(*kept, w1, b1, w2, b2, *of, of_narrow, *tensors)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, query, key, value, attended, first, mean1, scale1, wide, second, mean2, scale2, *rest = ctx.saved_tensors
        (w1, b1, w2, b2), of, tensors = rest[:4], rest[4:10], rest[10:]
        shape, (eps1, _), settings = ctx.settings
        q, k, v, o, widening, narrowing = together(tensors, settings)
        features = (x.shape[-1],)
        rows, g = x.view(first.shape), grad.contiguous().view(first.shape)

        def through(g: torch.Tensor, x: torch.Tensor, mean: Any, scale: Any, weight: Any, bias: Any) -> torch.Tensor:
            only_x = (True, False, False)
            found = torch.ops.aten.native_layer_norm_backward(g, x, features, mean, scale, weight, bias, only_x)
            return found[0]  # type: ignore[no-any-return]

        g = through(g, second, mean2, scale2, w2, b2)
        in_active, in_middle = empty(*wide.shape, like=wide), empty(*first.shape, like=first)
        active = computed(wide, shape.function)
        of_narrow = narrowing.backward(shape.dropped.of(g, 1), active, of[5], in_active)
        middle = torch.native_layer_norm(first, features, w1, b1, eps1)[0]
        in_wide = gradient(in_active, wide, shape.function)
        of_wide = widening.backward(in_wide, middle, of[4], in_middle, plus=g)

        g = through(in_middle, first, mean1, scale1, w1, b1)
        in_attended = empty(*attended.shape, like=grad)
        flat = in_attended.view(first.shape[0], -1)
        of_o = o.backward(shape.dropped.of(g, 0), attended.view(flat.shape), of[3], flat)
        by_head = heads(in_attended, shape.width)
        in_heads = row_attention.gradients(by_head, query, key, value, shape.rows, shape.weights)
        dx = empty(*rows.shape, like=rows) if ctx.needs_input_grad[0] else None
        of_rows = gradients_of_projected(in_heads, rows, (q, k, v), of[:3], dx, plus=g)
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, None, None, *gradients((*of_rows, of_o, of_wide, of_narrow)), None


def _added(
    layer: Adapted, x: torch.Tensor, stream: torch.Tensor, dropped: Dropped, sum_: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a layer makes of x, dropped, and the residual stream; and what the layer keeps."""
    out = empty(*stream.shape, like=x)
    kept = layer.forward(x, out, plus=None if dropped.share else stream)
    return dropped.of(out, sum_).add_(stream) if dropped.share else out, kept
