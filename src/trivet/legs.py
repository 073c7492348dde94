"""The vocabulary of the tables: the three legs, a part of a leg, and its options. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

LEGS = ("decompose", "rank", "update")


@dataclass(frozen=True)
class Option:
    """One setting of a part."""

    name: str
    default: Any
    help: str
    kind: str = "number"  # number, whole, share (0 to 1), switch, budget, ranks, or choices a|b|c

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, in words that follow the option's name; None where it is fine."""
        if value is None and self.default is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if self.kind == "budget":
            from trivet.rank.budget import budget_problem

            return budget_problem(value)
        if self.kind == "ranks":
            good = isinstance(value, Mapping) and all(
                isinstance(k, str) and isinstance(v, int) and not isinstance(v, bool) and v >= 0
                for k, v in value.items()
            )
            return None if good and value else "is a mapping of layer-name patterns to ranks of at least 0"
        checks = {
            "number": (number and value >= 0, "is a number of at least 0"),
            "whole": (number and value >= 1 and value == int(value), "is a whole number of at least 1"),
            "share": (number and 0 <= value <= 1, "is a share from 0 to 1"),
            "switch": (isinstance(value, bool), "is true or false"),
        }
        if self.kind in checks:
            good, words = checks[self.kind]
            return None if good else words
        return None if value in self.kind.split("|") else f"is one of {', '.join(self.kind.split('|'))}"


@dataclass(frozen=True)
class Part:
    """One row of a leg's table.

    `traits` are words about the part that others may refuse; `refuses` says which of them it can't stand, and why.
    """

    summary: str
    source: str
    cost: str
    home: str  # "module:attribute"
    options: tuple[Option, ...] = ()
    traits: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Any:
        """The part's function or class (this imports torch)."""
        module, _, attribute = self.home.partition(":")
        return getattr(import_module(module), attribute)
