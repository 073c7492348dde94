"""Which rows go together: rows of similar length, so that there is little padding, in an order that seed and epoch fix.

transformers' own samplers draw from torch's global state, so a resumed run would go through other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

#: Steps whose rows are sorted together: more would leave less padding, but make the same rows meet in every pass.
_SORTED = 50


class LengthSampler(torch.utils.data.Sampler[int]):
    """Rows of similar length are in one step, and the steps are in random order.

    The rows are shuffled, sorted by length some steps' worth at a time, and cut into steps, which are shuffled (not in
    transformers' sampler, where a short training goes from the longest rows to the shortest). The very first step has
    the longest row, so memory trouble shows at once.

    Args:
        lengths: tokens of every row.
        step: rows that an optimizer step learns from, over all its micro-batches and processes.
        packed: whether rows are put behind each other: without padding a step may as well have rows of any length.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int, *, packed: bool = False) -> None:
        self.lengths, self.step, self.seed, self.packed, self.epoch = lengths, step, seed, packed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each pass, also when it resumes in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self), generator=generator).tolist()
        if self.epoch == 0:
            _longest_first(rows, self.lengths)
        if self.packed:
            return iter(rows)
        together = self.step * max(1, min(_SORTED, len(self) // (4 * self.step)))  # of few rows, not all
        for i in range(0, len(self), together):
            rows[i : i + together] = sorted(rows[i : i + together], key=lambda row: -self.lengths[row])
        order = torch.randperm(len(self) // self.step, generator=generator).tolist()
        if self.epoch == 0:
            order.sort(key=bool)  # the first of the sorted steps stays the first
        whole = [row for i in order for row in rows[i * self.step : (i + 1) * self.step]]
        return iter(whole + rows[len(whole) :])


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of rows that hold at most so many tokens, padding included (but one row at least).

    Which rows go together is decided once, from their lengths and the seed, so every epoch has as many steps; their
    order changes with the epoch. Padded rows are of similar length; packed ones come as they are shuffled, but for the
    longest. The very first batch is that of the longest row, so memory trouble shows at once.

    Args:
        lengths: tokens of every row, as they are padded.
        budget: tokens in a batch.
        packed: whether the rows of a batch are put behind each other, without padding.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, *, packed: bool = False) -> None:
        self.seed, self.epoch = seed, 0
        rows = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        if packed:
            _longest_first(rows, lengths)
        else:
            rows.sort(key=lambda row: -lengths[row])
        self.batches: list[list[int]] = []
        held = longest = 0
        for row in rows:
            held += lengths[row] if packed else longest  # what the batch would hold with this row
            if self.batches and held <= budget:
                self.batches[-1].append(row)
            else:
                self.batches.append([row])
                held = longest = lengths[row]

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each pass, also when it resumes in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        batches = [self.batches[i] for i in order.tolist()]
        if self.epoch == 0:
            batches.sort(key=lambda batch: batch is not self.batches[0])
        return iter(batches)


def _longest_first(rows: list[int], lengths: Sequence[int]) -> None:
    """Exchange the first of `rows` for the longest."""
    if rows:
        at = max(range(len(rows)), key=lambda i: lengths[rows[i]])
        rows[0], rows[at] = rows[at], rows[0]


class Share(torch.utils.data.Sampler[list[int]]):
    """One process's part of every micro-step; all have as many micro-steps, and together every row once.

    The rows of a micro-step are dealt out one by one, those of a token budget batch by batch. At the end of a pass a
    process may get none: `[]`.

    Args:
        sampler: rows, or batches of rows; the same in every process.
        batch_size: rows for each process and micro-step; None where `sampler` gives batches.
        index, count: this process, and how many there are.
    """

    def __init__(self, sampler: Any, batch_size: int | None, index: int, count: int) -> None:
        self.sampler, self.batch_size, self.index, self.count = sampler, batch_size, index, count

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each pass, also when it resumes in the middle of one."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.count * (self.batch_size or 1)))

    def __iter__(self) -> Iterator[list[int]]:
        parts = iter(self.sampler)
        while together := list(islice(parts, self.count * (self.batch_size or 1))):
            mine = together[self.index :: self.count]
            yield mine if self.batch_size else mine[0] if mine else []


def rows_of_step(
    sampler: LengthSampler | TokenBudgetSampler, step: int, micro_batches: int, batch_size: int
) -> list[int]:
    """The rows that optimizer step `step` (from 0) of a run learns from, over its micro-batches on all processes."""
    count = -(-len(sampler) // (1 if isinstance(sampler, TokenBudgetSampler) else batch_size))
    epoch, index = divmod(step, -(-count // micro_batches))
    before = sampler.epoch
    sampler.set_epoch(epoch)
    if isinstance(sampler, TokenBudgetSampler):
        batches = list(sampler)
    else:
        order = list(sampler)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    sampler.set_epoch(before)
    return [row for batch in batches[index * micro_batches : (index + 1) * micro_batches] for row in batch]
