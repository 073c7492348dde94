"""Whether a model keeps packed rows apart: asked of the model itself, before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from trivet.data.batch import Collator, to_device
from trivet.data.encode import IGNORE, Encoded
from trivet.loss import token_losses
from trivet.session import Session

#: Tokens of a row that are looked at: a model's positions may end soon.
_LENGTH = 48


def why_not_packed(session: Session, rows: Sequence[Encoded]) -> str | None:
    """Why `rows` can't be packed; None where, packed, their tokens have the losses that they have in single rows.

    In 16 bits rounding may move a loss by more than a row shows of another one that it sees. But where nothing except
    the first row is another one, what follows it is computed alike, so that there any difference shows. Wrong positions
    don't, and are looked for with more tolerance.
    """
    if session.base.task != "causal-lm":
        return f"is for causal language models, and the task is {session.base.task}"
    pack = replace(session.collator, packed=True)
    few = [row["input_ids"][:_LENGTH] for row in sorted(rows, key=lambda row: len(row["input_ids"]))[:3]]
    name = type(session.base.model).__name__
    was_training = session.model.training
    session.model.eval()
    alone = _losses(session, session.collator, few)
    try:
        packed = _losses(session, pack, few)
        moved = [(packed - alone, 0.0)]  # and what may be rounding
        if session.base.dtype != torch.float32:
            size, first = min(len(session.tokenizer), 1000), len(few[0]) - 1
            changed = _losses(session, pack, [[(token + 1) % size for token in few[0]], *few[1:]]) - packed
            scale = _largest(changed[:first])
            moved = [(packed - alone, 0.2 * scale), (changed[first:], 0.005 * scale)]
    except Exception as error:  # noqa: BLE001 - what models answer to arguments that they don't know
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{name} does not take packed rows ({said})"
    finally:
        session.model.train(was_training)
    for by, rounding in moved:
        if (apart := _largest(by)) > max(rounding, 1e-3):
            return f"{name} gives packed rows other losses than single ones (by up to {apart:.2g}): they see each other"
    return None


def _losses(session: Session, collator: Collator, rows: list[list[int]]) -> torch.Tensor:
    """Of all tokens but each row's first, with gradient, as in training."""
    batch = to_device(
        collator([Encoded(input_ids=ids, labels=[IGNORE, *ids[1:]]) for ids in rows]), session.base.device
    )
    labels = batch.pop("labels")
    return token_losses(session.model, batch, labels, shifted=True)[0].detach()


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0
