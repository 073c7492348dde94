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
    don't, and are looked for in the mean over all tokens. Both are compared with what the first row's change does to
    itself.
    """
    if session.base.task != "causal-lm":
        return f"is for causal language models, and the task is {session.base.task}"
    pack = replace(session.collator, packed=True)
    ids = sorted((row["input_ids"] for row in rows if len(row["input_ids"]) > 1), key=len)
    few = [row[:_LENGTH] for row in ids[:3]]
    if not few:
        return None
    name = type(session.base.model).__name__
    was_training = session.model.training
    session.model.eval()
    alone = _losses(session, session.collator, few)
    try:
        packed = _losses(session, pack, few)
        apart = (packed - alone).abs()
        wrong = _above(apart)
        if session.base.dtype != torch.float32:
            size, first = min(len(session.tokenizer), 1000), len(few[0]) - 1
            others = [[(token + 1) % size for token in few[0]], *few[1:]]
            own, seen = (_losses(session, pack, others) - packed).abs().tensor_split([first])
            wrong = _above(apart.mean(), 0.03 * own.mean()) or _above(seen, 0.005 * own.max())
            apart = torch.cat([apart, seen])
    except Exception as error:  # noqa: BLE001 - what models answer to arguments that they don't know
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{name} does not take packed rows ({said})"
    finally:
        session.model.train(was_training)
    if wrong:
        by = f"by up to {float(apart.max()):.2g}"
        return f"{name} gives packed rows other losses than single ones ({by}): it does not keep them apart"
    return None


def _losses(session: Session, collator: Collator, rows: list[list[int]]) -> torch.Tensor:
    """Of all tokens but each row's first, with gradient, as in training."""
    batch = to_device(
        collator([Encoded(input_ids=ids, labels=[IGNORE, *ids[1:]]) for ids in rows]), session.base.device
    )
    labels = batch.pop("labels")
    return token_losses(session.model, batch, labels, shifted=True)[0].detach()


def _above(differences: torch.Tensor, rounding: torch.Tensor | float = 0.0) -> bool:
    return bool((differences > max(float(rounding), 1e-3)).any())
