"""`fixed`: the same rank for every layer, from start to end (Hu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from trivet.rank.policy import Policy


@dataclass
class Fixed(Policy):
    """`lora_rank` everywhere. With `rank_aware_step` a learning rate that suits one rank suits the others."""
