"""Encoded rows as tensors: padded to one length, or packed behind each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from trivet.data.encode import IGNORE, Encoded

#: Lengths are rounded up to so many tokens.
MULTIPLE = 8


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch to the longest, rounded up to `multiple` tokens (a new shape costs new CPU kernels).

    `side` is where padding goes: right to train and to score, left to generate. Encoder-decoders also get
    `decoder_input_ids`, made from the labels by `shift` (the model's own function).

    Packed, the rows of a batch become one, without padding: positions begin anew with each row, and the rows' borders
    are given as transformers' attention functions read them, so that no row sees another (causal models alone).
    """

    pad_id: int
    multiple: int = MULTIPLE
    side: str = "right"
    shift: Callable[..., torch.Tensor] | None = None
    packed: bool = False

    def padded(self) -> Collator:
        """The same without packing."""
        return replace(self, packed=False)

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch; `{}` of no rows."""
        if not rows:
            return {}
        if self.packed:
            return self._pack(rows)
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

    def _pack(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        lengths = [len(i) for i in ids]
        rest = self._round(sum(lengths)) - sum(lengths)  # a last row, of padding or empty
        labels = torch.cat([torch.tensor(row["labels"]) for row in rows])
        positions = [torch.arange(n) for n in (*lengths, rest)]
        borders = torch.tensor([0, *lengths, rest]).cumsum(0)
        return {
            "input_ids": F.pad(torch.cat(ids), (0, rest), value=self.pad_id)[None],
            "position_ids": torch.cat(positions)[None],
            "labels": F.pad(labels, (0, rest), value=IGNORE)[None],
            "cu_seq_lens_q": borders.int(),
            "cu_seq_lens_k": borders.int(),
            "max_length_q": max(lengths),  # type: ignore[dict-item]
            "max_length_k": max(lengths),  # type: ignore[dict-item]
            "use_cache": False,  # type: ignore[dict-item] # with a cache, transformers does not look for borders
        }

    def _round(self, length: int) -> int:
        return rounded(length, self.multiple)

    def _stack(self, rows: Sequence[Sequence[int]], fill: int, length: int) -> torch.Tensor:
        out = torch.full((len(rows), length), fill)
        for index, row in enumerate(rows):
            values = torch.tensor(row)
            if self.side == "right":
                out[index, : len(row)] = values
            else:
                out[index, length - len(row) :] = values
        return out


def tokens_in(batch: dict[str, Any]) -> torch.Tensor:
    """How many tokens the batch's rows have, without padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    return batch["cu_seq_lens_q"][-2]  # the last row is padding


def rows_in(batch: dict[str, Any]) -> int:
    """How many rows a batch has."""
    return len(batch["cu_seq_lens_q"]) - 2 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def halves(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A batch's first rows and its others, as two batches."""
    middle = rows_in(batch) // 2
    borders = batch.get("cu_seq_lens_q")
    if borders is None:
        for rows in (slice(None, middle), slice(middle, None)):
            yield {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        return
    cut = int(borders[middle])
    first = torch.cat([borders[: middle + 1], borders[middle : middle + 1]])  # its last row, of padding, is empty
    for tokens, own in ((slice(None, cut), first), (slice(cut, None), borders[middle:] - cut)):
        parts = {key: batch[key][:, tokens] for key in ("input_ids", "position_ids", "labels")}
        yield {**batch, **parts, "cu_seq_lens_q": own, "cu_seq_lens_k": own}


def tokens_of(row: Encoded, multiple: int = 1) -> int:
    """How many tokens a row takes, rounded up as it is padded: an encoder-decoder's answers have room of their own."""
    labels = row.get("labels")
    beside = labels if isinstance(labels, list) and len(labels) != len(row["input_ids"]) else ()
    return rounded(len(row["input_ids"]), multiple) + rounded(len(beside), multiple)


def rounded(length: int, multiple: int) -> int:
    """`length`, or the next multiple above it."""
    return -(-length // multiple) * multiple


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on the model's device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
