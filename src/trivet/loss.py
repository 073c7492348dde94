"""Cross-entropy where there are labels, shared by training and evaluation.

Only supervised positions are looked at: the logits of all others (padding, prompts) are never computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from trivet.data.batch import seen
from trivet.data.encode import IGNORE
from trivet.head import Batch, Call, directly, supervised_losses


def token_losses(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    shifted: bool,
    z_loss: float = 0.0,
    call: Call = directly,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of every supervised token.

    Args:
        model: a language model.
        batch: its inputs, without labels.
        labels: (batch, length); -100 where nothing is learned.
        shifted: position t predicts label t + 1 (causal language models) rather than label t (encoder-decoders).
        z_loss: see `trivet.kernels.cross_entropy.linear_cross_entropy`.
        call: see `trivet.head.supervised_losses`.

    Returns:
        Over the n supervised tokens in row order: losses in nats (n, float32), whether the most likely token was the
        right one (n, bool), and each one's row in the batch (n, int64).
    """
    if shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        batch = _with_mask(model, _without_idle_mask(batch))
    ids = labels.flatten()
    chosen = (ids != IGNORE).nonzero()[:, 0]  # a GPU is waited for here, and not again after the forward pass
    losses, right = supervised_losses(model, batch, chosen, ids[chosen], z_loss=z_loss, call=call)
    return losses, right, chosen.div(labels.shape[1], rounding_mode="floor")


def _without_idle_mask(batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Padding on the right comes after all that a causal model sees at a token: without a mask, attention is faster."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool(mask[:, 0].all() & (mask[:, 1:] <= mask[:, :-1]).all()):
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def _with_mask(model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Packed rows' borders say how they are kept apart; that they share their beginning takes a mask."""
    borders = batch.get("cu_seq_lens_q")
    if borders is None or not borders[0]:
        return batch
    mask = seen(borders)
    if model.config._attn_implementation == "eager":  # which adds a mask to the scores
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**batch, "attention_mask": mask}


def training_loss(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    task: str,
    z_loss: float = 0.0,
    call: Call = directly,
) -> torch.Tensor:
    """The loss of a micro-batch, weighted so that a whole optimizer step is the mean over all its supervised items.

    Args:
        model: what is trained.
        batch: its inputs, without labels.
        labels: token ids (batch, length), class indices (batch,) or numbers (batch,).
        num_items_in_batch: supervised tokens (or rows) in all micro-batches of the step; None for this one alone.
        task: causal-lm, seq2seq, classification or regression.
        z_loss: see `token_losses`; of language models.
        call: calls what gives the logits of a batch, or of a language model the hidden states; a
            `trivet.graphs.Recorder`, for one.
    """

    def logits(batch: Batch) -> torch.Tensor:
        return model(**batch).logits  # type: ignore[no-any-return]

    if task == "regression":
        total = F.mse_loss(call(logits, batch).float().squeeze(-1), labels.float(), reduction="sum")
        count = labels.numel()
    elif task == "classification":
        total = F.cross_entropy(call(logits, batch).float(), labels, reduction="sum")
        count = labels.numel()
    else:
        losses, _, _ = token_losses(model, batch, labels, shifted=task == "causal-lm", z_loss=z_loss, call=call)
        total, count = losses.sum(), losses.numel()
    return total / (count if num_items_in_batch is None else num_items_in_batch)
