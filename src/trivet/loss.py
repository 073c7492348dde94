"""Cross-entropy where there are labels, shared by training and evaluation.

Only supervised positions are looked at: the logits of all others (padding, prompts) are never converted or reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trivet.data.encode import IGNORE


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, *, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of every supervised token.

    Args:
        logits: (batch, length, vocabulary), any float type.
        labels: (batch, length); -100 where nothing is learned.
        shifted: position t predicts label t + 1 (causal language models) rather than label t (encoder-decoders).

    Returns:
        Over the n supervised tokens in row order: losses in nats (n, float32), whether the most likely token was the
        right one (n, bool), and each one's row in the batch (n, int64).
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != IGNORE
    scores, targets = logits[chosen].float(), labels[chosen]
    losses = F.cross_entropy(scores, targets, reduction="none")
    return losses, scores.argmax(-1) == targets, chosen.nonzero()[:, 0]


def training_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, *, task: str
) -> torch.Tensor:
    """The loss of a micro-batch, weighted so that a whole optimizer step is the mean over all its supervised items.

    Args:
        outputs: the model's outputs, with `logits`.
        labels: token ids (batch, length), class indices (batch,) or numbers (batch,).
        num_items_in_batch: supervised tokens (or rows) in all micro-batches of the step; None for this one alone.
        task: causal-lm, seq2seq, classification or regression.
    """
    if task == "regression":
        total = F.mse_loss(outputs.logits.float().squeeze(-1), labels.float(), reduction="sum")
        count = labels.numel()
    elif task == "classification":
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        count = labels.numel()
    else:
        losses, _, _ = token_losses(outputs.logits, labels, shifted=task == "causal-lm")
        total, count = losses.sum(), losses.numel()
    return total / (count if num_items_in_batch is None else num_items_in_batch)
