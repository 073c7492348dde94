"""`fixed`: the same rank for every layer, from start to end (Hu et al. 2021)."""

from __future__ import annotations

from trivet.rank.policy import Policy


class Fixed(Policy):
    """`lora_rank` everywhere."""
