"""Attention of transformers' models on CPUs, by `trivet.kernels`: which rows there are, and what computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trivet.kernels import native
from trivet.kernels.attention import attention
from trivet.kernels.gather import Padded, Unpadded
from trivet.kernels.product import widens
from trivet.kernels.row_attention import row_attention, rows_between, rows_of, serves

#: What the attention is called in transformers' table.
ATTENTION = "trivet"


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature. On GPUs, where an argument is unknown, and mostly without gradient, its own SDPA."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    learned = attention_mask is not None and attention_mask.requires_grad
    wanted = torch.is_grad_enabled() or (widens(query) and query.shape[2] > 1)
    ours = query.device.type == "cpu" and wanted and not learned
    if not ours or kwargs.get("position_bias") is not None or (causal and query.shape[2] != key.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None and len(query) == 1 and _says_no_more(attention_mask, borders):
        return _packed(query, key, value, borders, scaling, dropout), None
    return attention(query, key, value, attention_mask, causal=causal, scale=scaling, dropout=dropout), None


def rows_seen(
    batch: int, length: int, mask: torch.Tensor | None, borders: torch.Tensor | None = None, *, causal: bool = True
) -> torch.Tensor | None:
    """`rows` of `trivet.kernels.row_attention` for attention of a batch to itself; None where there are none.

    Args:
        mask, borders: what a model's layers are given as `attention_mask` and `cu_seq_lens_q`.
    """
    if mask is not None and mask.requires_grad:
        return None
    if borders is not None and batch == 1 and _says_no_more(mask, borders):
        return rows_between(borders)
    return rows_of(batch, length, length, mask, causal=causal and mask is None and length > 1)


def _says_no_more(mask: torch.Tensor | None, borders: torch.Tensor) -> bool:
    """Whether a mask only keeps rows apart and is causal: that of a sliding window hides more."""
    return mask is None or native.once(
        borders, "mask", (borders._version, id(mask), mask._version), lambda: _plain(mask, borders)
    )


def _plain(mask: torch.Tensor, borders: torch.Tensor) -> bool:
    shared, lengths = int(borders[0]), borders.diff().long()
    seen = int((lengths * (shared * 2 + lengths + 1)).sum() + shared * (shared + 1)) // 2
    return int(torch.count_nonzero(mask)) == seen


def _packed(query: Any, key: Any, value: Any, borders: torch.Tensor, scale: float | None, dropout: float) -> Any:
    """Causal attention within rows that lie behind each other: by C, or each to itself in a padded batch, and back.

    What lies before the first row is the beginning of all of them: see `trivet.data.batch.Collator`.
    """
    rows = rows_between(borders)
    if serves(query, key, value, rows):
        return row_attention(query, key, value, rows, scale, dropout)
    shared, lengths = int(borders[0]), borders.diff().long()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    places = torch.where(inside, borders[:-1, None] + torch.arange(inside.shape[1]), 0)
    kept = inside.flatten().nonzero()[:, 0]
    q, k, v = (Padded.apply(t[0], places, kept).transpose(0, 1) for t in (query, key, value))
    if not shared:
        return Unpadded.apply(attention(q, k, v, causal=True, scale=scale, dropout=dropout), kept)[None]
    first, *beginning = (t[:, :, :shared] for t in (query, key, value))
    k, v = (torch.cat([t.expand(len(q), -1, -1, -1), own], 2) for t, own in zip(beginning, (k, v), strict=True))
    own = Unpadded.apply(attention(q, k, v, causal=True, scale=scale, dropout=dropout), kept)[None]
    return torch.cat([attention(first, *beginning, causal=True, scale=scale, dropout=dropout), own], 1)


#: While `idle_masks` is on: whether the masks so far were none, and which of them are not to be made.
_NOTED: ContextVar[list[bool] | None] = ContextVar("masks", default=None)
_KNOWN: ContextVar[Iterator[bool] | None] = ContextVar("known masks", default=None)


@contextlib.contextmanager
def idle_masks(known: Sequence[bool] = ()) -> Iterator[list[bool]]:
    """Notes which of a forward pass's masks are none; or, as far as it is known, makes none of them.

    Whether rows are packed and need one is seen in their positions, which a recording can't look at.
    """
    noted: list[bool] = []
    tokens = _NOTED.set(noted), _KNOWN.set(iter(known))
    try:
        yield noted
    finally:
        _NOTED.reset(tokens[0])
        _KNOWN.reset(tokens[1])


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for SDPA."""
    known, noted = _KNOWN.get(), _NOTED.get()
    mask = None if known is not None and next(known, False) else sdpa_mask(*args, **kwargs)
    if noted is not None:
        noted.append(mask is None)
    return mask


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
