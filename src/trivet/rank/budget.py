"""Parameter budgets as people write them: 500k, 0.5%, r4-equivalent, 20000. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from trivet.errors import ConfigError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmb]?)", re.IGNORECASE)
_SHARE = re.compile(r"([0-9]*\.?[0-9]+)\s*%")
_RANK = re.compile(r"r([0-9]*\.?[0-9]+)-equivalent")


def budget_problem(value: Any) -> str | None:
    """What is wrong with a written budget, in words that follow "budget"; None where it can be read."""
    try:
        parameters(value, [(8, 8)], 1000)
    except ConfigError as error:
        return str(error)
    return None


def parameters(budget: Any, shapes: Iterable[tuple[int, int]], total: int) -> int:
    """The number of adapter parameters that `budget` allows.

    Args:
        budget: a number, "500k", "1.5m", "0.5%" (of the model's parameters), or "r4-equivalent" (what plain LoRA of
            that rank holds; a fraction such as r0.5 is fine).
        shapes: (out, in) of every adapted layer.
        total: parameters of the base model.
    """
    words = "is a number, 500k, 0.5% (of the model's parameters) or r4-equivalent (what plain LoRA of rank 4 holds)"
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise ConfigError(words)
    if isinstance(budget, (int, float)):
        amount = float(budget)
    elif found := _RANK.fullmatch(budget.strip()):
        amount = float(found[1]) * sum(out + inside for out, inside in shapes)
    elif found := _SHARE.fullmatch(budget.strip()):
        amount = float(found[1]) / 100 * total
    elif found := _NUMBER.fullmatch(budget.strip()):
        amount = float(found[1]) * _UNITS[found[2].lower()]
    else:
        raise ConfigError(words)
    if not math.isfinite(amount) or amount <= 0:
        raise ConfigError(f"{words}, above 0")
    return max(1, int(amount))
