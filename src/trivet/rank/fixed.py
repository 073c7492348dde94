"""`fixed`: the same rank for every layer, from start to end (Hu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fixed:
    """A rank policy that never changes its mind."""

    rank: int

    @property
    def start_rank(self) -> int:
        """The rank that every layer is attached with."""
        return self.rank
