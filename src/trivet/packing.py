"""Whether a model keeps packed rows apart and shares what they begin with: asked of itself, before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trivet.data.batch import Collator, shared_length, to_device
from trivet.data.encode import IGNORE, Encoded
from trivet.loss import token_losses
from trivet.session import Session

#: Tokens of a row that are looked at, as a model's positions may end soon; and how many of them it shares with others.
_LENGTH, _SHARED = 48, 16
#: What configs of transformers' models call the number of tokens that a layer looks back.
_WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "attention_window", "attention_chunk_size",
    "local_attention", "local_attn_chunk_length",
)  # fmt: skip
#: Rows that begin with fewer tokens alike are not worth a mask.
_WORTH = 8


def why_not_packed(session: Session, rows: Sequence[Encoded]) -> str | None:
    """Why `rows` can't be packed; None where, packed, their tokens have the losses that they have in single rows."""
    if session.base.task != "causal-lm":
        return f"is for causal language models, and the task is {session.base.task}"
    few = [row[:_LENGTH] for row in _shortest(rows)]
    return _why_not(session, few, replace(session.collator, packed=True), shared=0)


def worth_sharing(rows: Sequence[Encoded]) -> int:
    """How many tokens all rows begin with alike; 0 where they are too few to share."""
    shared = shared_length(rows)
    return shared if shared >= _WORTH else 0


def why_not_shared(session: Session, rows: Sequence[Encoded], shared: int, tokens: int) -> str | None:
    """Why packed rows can't share their first tokens; None where the others have the losses that single rows have.

    Args:
        shared: how many first tokens all rows have in common.
        tokens: of the longest batch. No layer may look back less: a short trial would not show that the mask of packed
            rows took the place of a window.
    """
    window = _window(session.base.model.config)
    if window is not None and window < tokens:
        return f"{type(session.base.model).__name__} looks back {window} tokens, and a batch may have {tokens}"
    ids = _shortest(rows)
    beginning = ids[0][: min(shared, _SHARED)]
    few = [[*beginning, *row[shared:][: _LENGTH - _SHARED]] for row in ids]
    return _why_not(session, few, replace(session.collator, packed=True, share=True), shared=len(beginning))


def _shortest(rows: Sequence[Encoded]) -> list[list[int]]:
    return sorted((row["input_ids"] for row in rows if len(row["input_ids"]) > 1), key=len)[:3]


def _window(config: Any) -> int | None:
    """The fewest tokens that a layer looks back, as the config has it; None where it names no limit."""
    named = (getattr(config.get_text_config(), name, None) for name in _WINDOWS)
    sizes = [size for value in named for size in (value if isinstance(value, (list, tuple)) else [value])]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _why_not(session: Session, few: list[list[int]], pack: Collator, shared: int) -> str | None:
    """Why the rows `few`, which begin with `shared` tokens alike, can't be packed so.

    In 16 bits rounding may move a loss by more than a row shows of another one that it sees. But where nothing except
    the first row is another one, what follows it is computed alike, so that there any difference shows. Wrong positions
    don't, and are looked for in the mean over all tokens. Both are compared with what the first row's change does to
    itself.
    """
    if not few:
        return None
    name = type(session.base.model).__name__
    was_training = session.model.training
    session.model.eval()
    alone = _losses(session, session.collator, few, shared)
    try:
        packed = _losses(session, pack, few, shared)
        apart = (packed - alone).abs()
        wrong = _above(apart)
        if session.base.dtype != torch.float32:
            size, first = min(len(session.tokenizer), 1000), len(few[0]) - shared - 1
            other = [*few[0][:shared], *((token + 1) % size for token in few[0][shared:])]
            own, seen = (_losses(session, pack, [other, *few[1:]], shared) - packed).abs().tensor_split([first])
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


def _losses(session: Session, collator: Collator, rows: list[list[int]], shared: int) -> torch.Tensor:
    """Of all tokens but the `shared` and each row's next one, with gradient, as in training."""
    unlearned = [IGNORE] * (shared + 1)
    batch = to_device(
        collator([Encoded(input_ids=ids, labels=[*unlearned, *ids[shared + 1 :]]) for ids in rows]), session.base.device
    )
    labels = batch.pop("labels")
    return token_losses(session.model, batch, labels, shifted=True)[0].detach()


def _above(differences: torch.Tensor, rounding: torch.Tensor | float = 0.0) -> bool:
    return bool((differences > max(float(rounding), 1e-3)).any())
