"""Exact attention in blocks of queries, for CPUs: as memory-lean as flash attention, and several times as fast.

Where no mask but that of padding is there, and rows are not long or AMX is there, `row_attention.py` is faster still.

A block's scores are one batched product over all query heads that share a key head, so keys and values are never
repeated. Probabilities are not kept but computed again in the backward pass (Dao et al. 2022, arXiv 2205.14135,
section 3.1). Blocks above the diagonal are skipped where attention is causal.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trivet.kernels import compiled, native
from trivet.kernels.dropout import keep, zero
from trivet.kernels.heap import empty
from trivet.kernels.product import multiplied, unrounded, widens
from trivet.kernels.row_attention import row_attention, rows_of, serves
from trivet.kernels.softmax import softmax, softmax_backward

#: Queries in a block: small blocks skip more above the diagonal and stay in cache, large ones are better products.
_SHORT, _LONG, _LONG_FROM = 64, 128, 1024
#: 16-bit rows of fewer keys go to torch's softmax.
_NATIVE_FROM = 64


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + mask) V.

    Args:
        query: (batch, heads, queries, width).
        key, value: (batch, key heads, keys, width); `heads` is a multiple of `key heads`.
        mask: what may be attended to (bool), or what is added to the scores (float, without gradient); it broadcasts
            to (batch, heads, queries, keys).
        causal: the last query sees all keys, the one before it all but one, and so on; there is no mask.
        scale: 1 / √width where it is None.
        dropout: probability of dropping an attention weight. The choice is drawn again in the backward pass, from a
            seed that torch's global state gives, so nothing of it is stored.

    Returns:
        (batch, queries, heads, width), contiguous: ready to be viewed as (batch, queries, features).
    """
    plain = mask is None and not causal and not dropout  # products are nearly all of it
    sizes = len(query), query.shape[2], key.shape[2]
    rows = None if plain and multiplied(query) and not native.tiled(query) else rows_of(*sizes, mask, causal=causal)
    if rows is not None and serves(query, key, value, rows):
        return row_attention(query, key, value, rows, scale, dropout)
    if widens(query):
        q, k, v = (t.float() for t in (query, key, value))
        with unrounded():
            return attention(q, k, v, mask, causal=causal, scale=scale, dropout=dropout).to(query.dtype)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min  # not -inf: a row that sees nothing would be NaN
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    seed = int(torch.randint(2**62, ())) if dropout else None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, mask, causal, scale, dropout, seed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float, dropout: float, seed: Any
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        shared = heads // key.shape[1]
        q = query.reshape(-1, shared, length, width)
        k, v = (t.reshape(-1, *t.shape[2:]) for t in (key, value))
        out = empty(batch, length, heads, v.shape[-1], like=q)
        by_head = out.view(batch, length, -1, shared, v.shape[-1])
        random, share = _random(seed), 1 / (1 - dropout)
        weighted = v if random is None else v * share
        for rows, seen in _blocks(length, k.shape[1], causal):
            p = _probabilities(q, k, mask, rows, seen, causal, scale, batch)
            if random is not None:
                p = zero(p, keep(p.shape, dropout, random))
            part = torch.bmm(p, weighted[:, :seen]).view(batch, -1, shared, rows.stop - rows.start, v.shape[-1])
            by_head[:, rows] = part.permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(q, k, v, mask)
        ctx.settings = causal, scale, dropout, seed, batch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, mask = ctx.saved_tensors
        causal, scale, dropout, seed, batch = ctx.settings
        shared, length = q.shape[1], q.shape[2]
        grads = grad.reshape(batch, length, -1, shared, v.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        random, share = _random(seed), 1 / (1 - dropout)
        weighted = v if random is None else v * share
        for rows, seen in _blocks(length, k.shape[1], causal):
            p = _probabilities(q, k, mask, rows, seen, causal, scale, batch)
            g = grads[:, rows].permute(0, 2, 3, 1, 4).reshape(len(k), -1, v.shape[-1])
            dp = torch.bmm(g, weighted[:, :seen].transpose(1, 2))
            left = p
            if random is not None:
                kept = keep(p.shape, dropout, random)
                left, dp = zero(p, kept), zero(dp, kept)
            dv[:, :seen].baddbmm_(left.transpose(1, 2), g, alpha=share)
            ds = softmax_backward(dp, p)
            dq[:, :, rows] = torch.bmm(ds, k[:, :seen]).mul_(scale).view(len(k), shared, -1, q.shape[-1])
            dk[:, :seen].baddbmm_(ds.transpose(1, 2), _rows(q, rows), alpha=scale)
        heads = shared * len(k) // batch
        shapes = (batch, heads, length, -1), (batch, heads // shared, k.shape[1], -1)
        return dq.view(shapes[0]), dk.view(shapes[1]), dv.view(shapes[1]), None, None, None, None, None


def _blocks(length: int, keys: int, causal: bool) -> list[tuple[slice, int]]:
    """(the queries of a block, how many keys they see)."""
    size = _LONG if length >= _LONG_FROM else _SHORT
    starts = range(0, length, size) if causal else range(0, length, max(size, 2**14 // keys))
    stops = [*starts[1:], length]
    before = keys - length  # keys that every query sees
    return [(slice(i, j), before + j if causal else keys) for i, j in zip(starts, stops, strict=True)]


def _rows(q: torch.Tensor, rows: slice) -> torch.Tensor:
    return q[:, :, rows].reshape(len(q), -1, q.shape[-1])


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, mask: Any, rows: slice, seen: int, causal: bool, scale: float, batch: int
) -> torch.Tensor:
    """(batch · key heads, shared · queries of the block, keys seen)."""
    x = _rows(q, rows)
    scores = torch.baddbmm(x.new_empty(1), x, k[:, :seen].transpose(1, 2), beta=0, alpha=scale)
    count = rows.stop - rows.start
    ours = scores.dtype == torch.bfloat16 and seen >= _NATIVE_FROM and compiled.serves(scores)
    if causal and ours:
        return native.softmax_(scores, count, seen - count)
    if causal:
        corner = torch.full((count, count), -math.inf, dtype=x.dtype, device=x.device).triu_(1)
        scores.view(len(q), -1, count, seen)[..., seen - count :].add_(corner)
    elif mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        by_head = scores.view(batch, -1, q.shape[1], count, seen)
        by_head.add_(part.unsqueeze(2) if part.shape[1] == 1 else part.view(len(part), -1, q.shape[1], *part.shape[2:]))
    return native.softmax_(scores) if ours else softmax(scores)


def _random(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)
