"""Encoded rows as padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trivet.data.encode import IGNORE, Encoded


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch to the longest, rounded up to `multiple` tokens (a new shape costs new CPU kernels).

    `side` is where padding goes: right to train and to score, left to generate. Encoder-decoders also get
    `decoder_input_ids`, made from the labels by `shift` (the model's own function).
    """

    pad_id: int
    multiple: int = 8
    side: str = "right"
    shift: Callable[..., torch.Tensor] | None = None

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        length = self._round(max(len(row["input_ids"]) for row in rows))
        batch = {
            "input_ids": self._stack([row["input_ids"] for row in rows], self.pad_id, length),
            "attention_mask": self._stack([[1] * len(row["input_ids"]) for row in rows], 0, length),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._stack([row["token_type_ids"] for row in rows], 0, length)
        labels = [row["labels"] for row in rows if "labels" in row]
        if labels and isinstance(labels[0], list):
            batch["labels"] = self._stack(labels, IGNORE, self._round(max(map(len, labels))))
            if self.shift is not None:
                batch["decoder_input_ids"] = self.shift(labels=batch["labels"])
        elif labels:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _round(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def _stack(self, rows: Sequence[Sequence[int]], fill: int, length: int) -> torch.Tensor:
        out = torch.full((len(rows), length), fill)
        for index, row in enumerate(rows):
            values = torch.tensor(row)
            if self.side == "right":
                out[index, : len(row)] = values
            else:
                out[index, length - len(row) :] = values
        return out


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on the model's device."""
    return {key: value.to(device) for key, value in batch.items()}
