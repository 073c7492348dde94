"""How a page says amounts and long texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Characters of a text that a page has room for.
_LONG = 1500


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def clip(text: Any, room: int = _LONG) -> str:
    """A text without what is beyond `room` characters; by default what a page has room for."""
    text = str(text)
    return text if len(text) <= room else f"{text[:room]} …"


def middle_out(text: str, room: int) -> str:
    """A text without its middle, where it is longer than `room`."""
    return text if len(text) <= room else f"{text[: room // 2]}\n … \n{text[-room // 2 :]}"


def mean(values: Sequence[float]) -> float:
    """0 where there are none."""
    return sum(values) / len(values) if values else 0.0
