"""A row as the model sees it, with the part that is learned set apart."""

from __future__ import annotations

from typing import Any

from trivet.data.encode import Encoded


def pieces(row: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is learned; a label is a piece of its own."""
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(labels, list):
        return [(tokenizer.decode(ids), False), (str(labels), True)]
    if len(labels) != len(ids) or all(x >= 0 for x in labels):  # encoder-decoder: source, then target
        return [(tokenizer.decode(ids), False), (tokenizer.decode(labels), True)]
    parts, start = [], 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or (labels[end] < 0) != (labels[start] < 0):
            parts.append((tokenizer.decode(ids[start:end]), labels[start] >= 0))
            start = end
    return parts
