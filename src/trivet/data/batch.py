"""Encoded rows as tensors: padded to one length, or packed behind each other, what they begin with alike once."""

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

    With `share`, what all of a batch's rows begin with (a template's head, an instruction) comes once, before them, and
    a mask lets each row see it: a causal model computes the same there for all of them, and its gradient is the sum of
    theirs (Wang & Hegde 2024, arXiv 2410.20305, for pairs of answers to one prompt). The first border says how long it
    is. `few_sizes` makes a packed batch's size one of a few, where a new one costs much.
    """

    pad_id: int
    multiple: int = MULTIPLE
    side: str = "right"
    shift: Callable[..., torch.Tensor] | None = None
    packed: bool = False
    share: bool = False
    few_sizes: Callable[[int], int] = int

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
        shared = shared_length(rows) if self.share else 0
        lengths = [len(row["input_ids"]) - shared for row in rows]
        size = self._round(self.few_sizes(shared + sum(lengths)))
        rest = size - shared - sum(lengths)  # a last row, of padding or empty
        ids = [*rows[0]["input_ids"][:shared], *(i for row in rows for i in row["input_ids"][shared:])]
        labels = [*[IGNORE] * shared, *(label for row in rows for label in row["labels"][shared:])]
        positions = [torch.arange(shared), *(torch.arange(shared, shared + n) for n in (*lengths, rest))]
        borders = torch.tensor([shared, *lengths, rest]).cumsum(0)
        return {
            "input_ids": F.pad(torch.tensor(ids), (0, rest), value=self.pad_id)[None],
            "position_ids": torch.cat(positions)[None],
            "labels": F.pad(torch.tensor(labels), (0, rest), value=IGNORE)[None],
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


def shared_length(rows: Sequence[Encoded]) -> int:
    """How many first tokens all `rows` have in common, none of which tells a learned one; 0 of a single row."""
    first, last = (choose(row["input_ids"] for row in rows) for choose in (min, max))  # all others lie between
    pairs = zip(first, last, strict=False)
    shared = next((i for i, (one, other) in enumerate(pairs) if one != other), len(first)) if len(rows) > 1 else 0
    for row in rows:
        head = row["labels"][: shared + 1]
        learned = next((i for i, label in enumerate(head) if label != IGNORE), len(head))
        shared = max(0, min(shared, learned - 1))
    return shared


def seen(borders: torch.Tensor) -> torch.Tensor:
    """What each token of packed rows sees: its row until itself, and what is shared; (1, 1, tokens, tokens) bool.

    Args:
        borders: where each row begins, and where the last ends; what is before the first belongs to all of them.
    """
    place = torch.arange(int(borders[-1]), device=borders.device)
    row = torch.bucketize(place, borders, right=True)
    return (((row == row[:, None]) | (row == 0)) & (place <= place[:, None]))[None, None]


def tokens_in(batch: dict[str, Any]) -> torch.Tensor:
    """How many tokens the batch's rows have, without padding; those that rows share count for each."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    borders = batch["cu_seq_lens_q"]
    return borders[-2] + borders[0] * (rows_in(batch) - 1)  # the last row is padding


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
    shared, cut = int(borders[0]), int(borders[middle])
    first = torch.cat([borders[: middle + 1], borders[middle : middle + 1]])  # its last row, of padding, is empty
    for begin, end, own in ((shared, cut, first), (cut, None, borders[middle:] - cut + shared)):
        parts = {
            key: torch.cat([batch[key][:, :shared], batch[key][:, begin:end]], 1)
            for key in ("input_ids", "position_ids", "labels")
        }
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
