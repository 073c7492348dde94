"""Out of memory: go on with half as many rows at a time. A micro-batch's loss is a sum, so those of halves add up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trivet.data.batch import halves, rows_in
from trivet.errors import TrivetError

log = logging.getLogger("trivet")

Batch = dict[str, Any]


class Halver:
    """Runs micro-batches through `step`; one that memory has no room for is halved, and so are later ones as large.

    Args:
        parameters: gives what is trained; its gradients are put back to what they were before one that failed.
        gave_up: called when a backward pass broke off, before it is tried again.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]], gave_up: Callable[[], None]) -> None:
        self.parameters, self.gave_up = parameters, gave_up
        #: The fewest entries (rows x length) for which there was no room.
        self.too_many: int | None = None

    def run(self, step: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
        """The loss of the micro-batch, its gradients added to the model's.

        Raises:
            torch.OutOfMemoryError, RuntimeError: even a single row does not fit.
        """
        if self.too_many is not None and _size(batch) >= self.too_many and rows_in(batch) > 1:
            return self._halved(step, batch)
        before = {p: p.grad.clone() for p in self.parameters() if p.grad is not None}
        try:
            return step(dict(batch))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or rows_in(batch) < 2:
                raise
        for p in self.parameters():
            p.grad = before.get(p)
        self.gave_up()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.too_many = _size(batch)
        log.warning(
            "out of memory at %d rows with %d tokens: going on with half as many at a time, which changes no result",
            rows_in(batch),
            _size(batch),
        )
        return self._halved(step, batch)

    def _halved(self, step: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
        first, second = (self.run(step, half) for half in halves(batch))
        return first + second


def _size(batch: Batch) -> int:
    return batch["input_ids"].numel()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained_memory() -> Iterator[None]:
    """Says what to do where even a single row did not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrivetError(
            "out of GPU memory; lower training.batch_size (and raise gradient_accumulation_steps), or set "
            "training.gradient_checkpointing: true"
        ) from error
