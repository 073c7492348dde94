"""What rows say about a model with its adapter: second moments for pricing directions, and the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.data.dataset import Dataset
from trivet.data.encode import Encoded
from trivet.errors import DataError
from trivet.evaluate.score import row_scores
from trivet.probe import probe
from trivet.session import Session, check_format, probe_loss


def halves(calibration: Dataset, session: Session, seed: int) -> tuple[Dataset, Dataset]:
    """Two disjoint halves, chosen by `seed`: the rows to measure moments on, and those to measure the loss on.

    Raises:
        DataError: the rows do not suit the session's task, or there is only one.
    """
    check_format(calibration, session.base.task)
    if len(calibration) < 2:
        raise DataError(f"{calibration.source}: one row; at least two are needed, to price and to measure with")
    return calibration.split(len(calibration) // 2, seed)


def statistics_of(
    session: Session, layers: Sequence[AdaptedLayer], rows: Sequence[Encoded], *, batch_size: int, seed: int
) -> dict[str, LayerStatistics]:
    """Second moments of the layers' inputs and output gradients over `rows`: all that a direction's worth takes."""
    batches = [session.collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    loss = partial(probe_loss, task=session.base.task)
    with _trainable(layers):
        return probe(session.model, layers, batches, sketch=0, seed=seed, loss=loss)


@contextlib.contextmanager
def _trainable(layers: Sequence[AdaptedLayer]) -> Iterator[None]:
    """With gradients of the factors, which a reopened adapter has not."""
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    before = [factor.requires_grad for factor in factors]
    for factor in factors:
        factor.requires_grad_(True)
    try:
        yield
    finally:
        for factor, wanted in zip(factors, before, strict=True):
            factor.requires_grad_(wanted)


def mean_loss(session: Session, rows: Sequence[Encoded], *, batch_size: int) -> float:
    """The training's loss over `rows`: their mean over all supervised tokens, or over the rows."""
    losses, _, items = row_scores(session.model, rows, session.collator, task=session.base.task, batch_size=batch_size)
    return float(losses.sum() / items.sum())
