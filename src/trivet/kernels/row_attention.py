"""Attention within rows, one C function for all of them: nothing is padded, copied or kept.

`attention.py` makes torch's batched products of blocks of queries: many calls for little arithmetic where rows are
short, passes over memory between them, and rows of one length. Here a row's key head is one piece of work, whose keys,
values and scores stay in cache; probabilities are computed again in the backward pass, as there. Products are of 16-bit
numbers by AMX where the processor has it, else of float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, native
from trivet.kernels.heap import empty
from trivet.kernels.product import multiplied

#: Numbers of a row's keys from which on `attention.py` is faster: with AMX here too, 16-bit products there alone, else.
_LARGE_TILED, _LARGE, _LARGE_ELSE = 2**19, 2**15, 2**17
#: Pieces of work that a thread should have at least, as they are not alike: with AMX here too, else.
_PIECES_TILED, _PIECES = 1, 4


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether attention is better computed here; arguments as below."""
    width, dtype = query.shape[-1], query.dtype
    if not all(compiled.serves(each) and each.stride(-1) == 1 and each.dtype == dtype for each in (query, key, value)):
        return False
    if not width == key.shape[-1] == value.shape[-1] <= native.WIDEST:
        return False
    return fits(query, key.shape[1], rows)


def fits(query: torch.Tensor, key_heads: int, rows: torch.Tensor) -> bool:
    """Whether so many pieces of such a size are better computed here, of queries (…, width)."""
    tiled = native.tiled(query)
    most = _LARGE_TILED if tiled else _LARGE if multiplied(query) else _LARGE_ELSE
    pieces = (_PIECES_TILED if tiled else _PIECES) * torch.get_num_threads()
    return native.extent(rows)[0] * query.shape[-1] <= most and len(rows) * key_heads >= pieces


def rows_between(borders: torch.Tensor) -> torch.Tensor:
    """Causal `rows` that lie behind each other: where each begins, and where the last ends; all see what is before."""
    return native.once(borders, "rows", borders._version, lambda: _rows_between(borders))


def _rows_between(borders: torch.Tensor) -> torch.Tensor:
    shared, lengths = borders[0], borders.diff()
    zero = torch.zeros_like(lengths)
    rows = torch.stack([zero, borders[:-1], lengths, shared.expand_as(lengths), lengths], 1).long()
    beginning = torch.tensor([[0, 0, int(shared), 0, int(shared)]])
    rows = torch.cat([beginning, rows])
    return rows[rows[:, 2] > 0]


def rows_of(batch: int, queries: int, keys: int, mask: torch.Tensor | None, *, causal: bool) -> torch.Tensor | None:
    """`rows` of a batch; None where they don't tell what is seen: a mask that is not that of padding on the right."""
    if causal:
        return _causal_rows(batch, keys) if queries == keys and mask is None else None
    if mask is None:
        return _rows_of(batch, queries, keys, None)
    sizes = batch, queries, keys, mask._version
    return native.once(mask, "rows", sizes, lambda: _rows_of(batch, queries, keys, mask))


@functools.lru_cache(maxsize=16)
def _causal_rows(batch: int, keys: int) -> torch.Tensor:
    return torch.tensor([[place, 0, keys, 0, keys] for place in range(batch)])


def _rows_of(batch: int, queries: int, keys: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None:
        seen = torch.full((batch,), keys)
    else:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
            return None
        seen = mask[:, 0, 0].sum(-1)
        plain = (torch.arange(keys) < seen[:, None])[:, None, None]
        if not bool((mask == plain).all()) or not bool(seen.all()):
            return None
        seen = seen.expand(batch)
    zero = torch.zeros_like(seen)
    return torch.stack([torch.arange(batch), zero, torch.full_like(seen, queries), seen, zero], 1)


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ) V of each row, which sees its own keys and no others.

    Args:
        query, key, value, scale: as of `trivet.kernels.attention.attention`.
        rows: (n, 5) int64, which together have each query once: the place in the batch, the first query, how many
            queries, how many of the batch's first keys all of them see, and their own keys. These are as many as there
            are queries, in the same places, and a query sees those up to its own (causal rows; of a batch of one, if
            they see others, too); or none, and then the keys are this row's alone and the rest of the batch's is seen
            by nobody.
        dropout: probability of dropping an attention weight. The choice is drawn again in the backward pass, from a
            seed that torch's global state gives, by a hash of the weight's place.

    Returns:
        (batch, queries, heads, width), contiguous.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _RowAttention.apply(query, key, value, rows, native.Weights(scale, dropout, seed))


def _alone(x: torch.Tensor) -> torch.Tensor:
    """x without what it is a part of: to keep GPT-2's queries is to keep the keys and values, too, that were copied."""
    return x if x.untyped_storage().nbytes() < 2 * x.nbytes else x.contiguous()


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, rows: torch.Tensor, weights: native.Weights
    ) -> torch.Tensor:
        batch, heads, queries, width = query.shape
        out = empty(batch, queries, heads, width, like=query)
        native.row_attention(query, key, value, out.transpose(1, 2), rows, weights)
        ctx.save_for_backward(*(_alone(each) for each in (query, key, value)))
        ctx.settings = rows, weights
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return *gradients(grad.transpose(1, 2), *ctx.saved_tensors, *ctx.settings), None, None


def gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    weights: native.Weights,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of query, key and value, laid out by token as what made them reads its gradient.

    Args:
        grad: (batch, heads, queries, width), with heads in one piece; of what `row_attention` returns.
    """
    dq, dk, dv = (empty(*x.transpose(1, 2).shape, like=x).transpose(1, 2) for x in (query, key, value))
    begun = native.row_attention_backward(grad, query, key, value, dq, dk, dv, rows, weights)
    before = begun.shape[-2]
    if before:
        for found, more in zip((dk, dv), begun.sum(0).unbind(1), strict=True):
            found[0, :, :before] = (found[0, :, :before].float() + more).to(found.dtype)
    return dq, dk, dv
