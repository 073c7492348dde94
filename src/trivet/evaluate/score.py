"""What a model gives to rows whose answer is known: likelihoods of tokens, or class scores. Forward passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trivet.data.batch import Collator, to_device
from trivet.data.encode import IGNORE, Encoded
from trivet.loss import token_losses


@dataclass(frozen=True)
class Likelihood:
    """Per row: summed negative log-likelihood in nats, supervised tokens, and how many of them came first."""

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


def batches(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Row indices, longest rows first: little padding, and memory trouble shows at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """With `model` in evaluation mode; its training mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Scorer:
    """Scores the supervised tokens of `rows` (causal-lm or seq2seq), each row once."""

    def __init__(self, model: Any, rows: Sequence[Encoded], collator: Collator, task: str) -> None:
        self.model, self.rows, self.collator, self.task = model, rows, collator, task
        self.left = set(range(len(rows)))
        self.out = np.zeros((3, len(rows)))

    @torch.inference_mode()
    def score(self, indices: Sequence[int], prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        """Score a batch, with the model as it is; `prepare` is given its inputs, and says what the model takes."""
        batch = to_device(self.collator([self.rows[i] for i in indices]), self.model.device)
        labels = batch.pop("labels")
        inputs = batch if prepare is None else prepare(batch)
        losses, right, row = token_losses(self.model, inputs, labels, shifted=self.task == "causal-lm")
        for slot, values in enumerate((losses.double(), torch.ones_like(losses), right)):
            sums = torch.zeros(len(indices), dtype=torch.float64, device=losses.device)
            self.out[slot, indices] = sums.index_add_(0, row, values.double()).cpu().numpy()
        self.left -= set(indices)

    def finish(self, batch_size: int) -> Likelihood:
        """Score what is left; the model's training mode is left as it was."""
        left = sorted(self.left)
        with evaluating(self.model):
            for places in batches([self.rows[i] for i in left], batch_size):
                self.score([left[place] for place in places])
        return Likelihood(self.out[0], self.out[1].astype(int), self.out[2].astype(int))


def likelihood(model: Any, rows: Sequence[Encoded], collator: Collator, *, task: str, batch_size: int) -> Likelihood:
    """Score the supervised tokens of `rows` (causal-lm or seq2seq); the model's training mode is left as it was."""
    return Scorer(model, rows, collator, task).finish(batch_size)


@torch.inference_mode()
def head_scores(model: Any, rows: Sequence[Encoded], collator: Collator, *, batch_size: int) -> np.ndarray:
    """The head's outputs, (rows, classes) float64; (rows, 1) for regression."""
    out: np.ndarray | None = None
    with evaluating(model):
        for indices in batches(rows, batch_size):
            batch = to_device(collator([rows[i] for i in indices]), model.device)
            batch.pop("labels", None)
            scores = model(**batch).logits.double().cpu().numpy()
            out = np.zeros((len(rows), scores.shape[1])) if out is None else out
            out[indices] = scores
    return np.zeros((0, 1)) if out is None else out


def row_scores(model: Any, rows: Sequence[Encoded], collator: Collator, *, task: str, batch_size: int) -> torch.Tensor:
    """Per row: summed loss, right answers, and supervised items; (3, rows) float64."""
    if task not in ("classification", "regression"):
        scored = likelihood(model, rows, collator, task=task, batch_size=batch_size)
        return torch.tensor(np.stack([scored.nll, scored.correct, scored.tokens]), dtype=torch.float64)
    scores = torch.tensor(head_scores(model, rows, collator, batch_size=batch_size))
    gold = torch.tensor([row["labels"] for row in rows])
    if task == "regression":
        losses, right = (scores[:, 0] - gold) ** 2, torch.zeros(len(rows))
    else:
        losses = torch.nn.functional.cross_entropy(scores, gold, reduction="none")
        right = scores.argmax(1) == gold
    return torch.stack([losses.double(), right.double(), torch.ones(len(rows), dtype=torch.float64)])


def without_ending(row: Encoded) -> Encoded:
    """The row with its last supervised token (the end of the answer) no longer scored."""
    labels = list(row["labels"])
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    labels[last] = IGNORE
    return Encoded(input_ids=row["input_ids"], labels=labels)
