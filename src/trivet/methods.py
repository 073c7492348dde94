"""Named methods: which decomposition, rank policy and update rule work together. Imports no torch.

A new part is one file in its leg's package and one row in `PARTS`; a new method is one row in `METHODS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trivet.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One row of a leg's table: what it does, who found it, what it costs, where it lives."""

    summary: str
    source: str
    cost: str
    home: str  # "module:attribute"

    def load(self) -> Any:
        """The part's function or class (this imports torch)."""
        module, _, attribute = self.home.partition(":")
        return getattr(import_module(module), attribute)


PARTS: dict[str, dict[str, Part]] = {
    "decompose": {
        "zero": Part(
            "A Kaiming-uniform, B zero: training starts at the base model",
            "Hu et al. 2021, arXiv 2106.09685",
            "nothing",
            "trivet.decompose.zero:start",
        ),
    },
    "rank": {
        "fixed": Part(
            "the same rank for every layer, from start to end",
            "Hu et al. 2021, arXiv 2106.09685",
            "nothing",
            "trivet.rank.fixed:Fixed",
        ),
    },
    "update": {
        "adamw": Part(
            "Adam with decoupled weight decay",
            "Loshchilov & Hutter 2019, arXiv 1711.05101",
            "two fp32 numbers per trained parameter",
            "trivet.update.adamw:optimizer",
        ),
    },
}


@dataclass(frozen=True)
class Method:
    """One part of each leg."""

    decompose: str
    rank: str
    update: str
    summary: str

    def part(self, leg: str) -> Any:
        """The loaded part of `leg` (decompose, rank or update)."""
        return PARTS[leg][getattr(self, leg)].load()


METHODS: dict[str, Method] = {
    "lora": Method("zero", "fixed", "adamw", "plain LoRA on all linear layers"),
}


def find_method(name: str) -> Method:
    """The method of that name; `ConfigError` with the nearest one otherwise."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"method {name!r} is not known; {hint}there are: {', '.join(METHODS)}")
