"""Rows that lie behind each other into a padded batch, and back, without the sums that torch's own gradients take.

A gradient of indexing adds up what comes from one place (`index_put`, an entry at a time on CPUs). Here each token has
one place in the batch, and what is put into the padding is read by nobody, so that both gradients are copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class Padded(torch.autograd.Function):
    """(heads, tokens, width) to (heads, rows, longest, width), by the `places` (rows, longest) of tokens.

    `kept` are the entries of `places`, flat and in the tokens' order, that hold one: those of the last tokens, each
    once. No gradient comes from the others.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.tokens = x.shape[1]
        return x.index_select(1, places.flatten()).view(len(x), *places.shape, x.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        found = grad.flatten(1, 2).index_select(1, kept)
        before = ctx.tokens - len(kept)  # what all rows begin with
        return nn.functional.pad(found, (0, 0, before, 0)), None, None


class Unpadded(torch.autograd.Function):
    """(rows, longest, …) to (tokens, …): the entries that are `kept`, as above."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        out.flatten(0, 1).index_copy_(0, kept, grad)
        return out, None
