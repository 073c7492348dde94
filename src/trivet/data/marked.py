"""A row as the model sees it, with the part that is learned set apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivet.data.encode import Encoded

_ARROW = " → "


def pieces(row: Encoded, tokenizer: Any, classes: Sequence[str] | None = None) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is learned; a label or a target stands behind an arrow.

    Args:
        classes: names for labels that are indices; without them the index is shown.
    """
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(labels, list):
        label = classes[labels] if classes else str(labels)
        return [(tokenizer.decode(ids), False), (_ARROW, False), (label, True)]
    if len(labels) != len(ids) or all(x >= 0 for x in labels):  # encoder-decoder: source, then target
        return [(tokenizer.decode(ids), False), (_ARROW, False), (tokenizer.decode(labels), True)]
    parts, start = [], 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or (labels[end] < 0) != (labels[start] < 0):
            parts.append((tokenizer.decode(ids[start:end]), labels[start] >= 0))
            start = end
    return parts
