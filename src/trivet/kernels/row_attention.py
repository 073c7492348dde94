"""Causal attention within rows, one C function for all of them: nothing is padded, copied or kept.

`attention.py` makes torch's batched products of blocks of queries: many calls for little arithmetic where rows are
short, passes over memory between them, and rows of one length. Here a row's key head is one piece of work, whose keys,
values and scores stay in cache, in float32; probabilities are computed again in the backward pass, as there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import native
from trivet.kernels.heap import empty
from trivet.kernels.product import multiplies

#: Numbers of a row's keys from which on `attention.py` is faster: in 16 bits where the processor multiplies them, else.
_LARGE, _LARGE_ELSE = 2**15, 2**17
#: Pieces of work that a thread should have at least, as they are not alike.
_PIECES = 4


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether causal attention is better computed here; arguments as below."""
    width, dtype = query.shape[-1], query.dtype
    if not all(native.serves(each) and each.stride(-1) == 1 and each.dtype == dtype for each in (query, key, value)):
        return False
    if not width == key.shape[-1] == value.shape[-1] <= native.WIDEST:
        return False
    most = _LARGE if dtype.itemsize == 2 and multiplies(dtype) else _LARGE_ELSE
    longest = int((rows[:, 2] + rows[:, 3]).max())
    return longest * width <= most and len(rows) * key.shape[1] >= _PIECES * torch.get_num_threads()


def rows_between(borders: torch.Tensor) -> torch.Tensor:
    """`rows` of packed ones: where each begins, and where the last ends; what is before the first all of them see."""
    shared, lengths = borders[0], borders.diff()
    rows = torch.stack([torch.zeros_like(lengths), borders[:-1], lengths, shared.expand_as(lengths)], 1).long()
    return torch.cat([torch.tensor([[0, 0, int(shared), 0]]), rows]) if shared else rows


def rows_of(batch: int, length: int) -> torch.Tensor:
    """`rows` of a batch that are all of one length."""
    return torch.tensor([[place, 0, length, 0] for place in range(batch)])


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ) V of each row: a token sees its row up to itself, and what is before.

    Args:
        query: (batch, heads, tokens, width).
        key, value: (batch, key heads, tokens, width); `heads` is a multiple of `key heads`.
        rows: (n, 4) int64, which together have each token once: the place in the batch, the first token, how many
            tokens, and how many of the batch's first tokens they see before their own (of a batch of one, if any).
        scale: 1 / √width where it is None.

    Returns:
        (batch, tokens, heads, width), contiguous.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _RowAttention.apply(query, key, value, rows, scale)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, rows: torch.Tensor, scale: float) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        out = empty(batch, tokens, heads, width, like=query)
        native.row_attention(query, key, value, out.transpose(1, 2), rows, scale)
        ctx.save_for_backward(query, key, value)
        ctx.settings = rows, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        rows, scale = ctx.settings
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        query, key, value = ctx.saved_tensors
        # laid out by token, as the gradients of what made them are read
        dq, dk, dv = (empty(*x.transpose(1, 2).shape, like=x).transpose(1, 2) for x in (query, key, value))
        begun = native.row_attention_backward(grad.transpose(1, 2), query, key, value, dq, dk, dv, rows, scale)
        before = begun.shape[-2]
        if before:
            for found, more in zip((dk, dv), begun.sum(0).unbind(1), strict=True):
                found[0, :, :before] = (found[0, :, :before].float() + more).to(found.dtype)
        return dq, dk, dv, None, None
