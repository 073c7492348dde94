"""`pattern`: ranks given by the user, by patterns of layer names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError
from trivet.rank.policy import Policy


@dataclass
class Pattern(Policy):
    """`ranks` maps a part of a layer's name (a regular expression) to its rank; the first that is found counts."""

    ranks: Mapping[str, int] | None = field(default=None)

    def start(
        self, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, total: int
    ) -> dict[str, int]:
        if not self.ranks:
            raise ConfigError("method.rank: pattern needs ranks, e.g. {name: pattern, ranks: {q_proj: 4, mlp: 0}}")
        try:
            patterns = {re.compile(pattern): rank for pattern, rank in self.ranks.items()}
        except re.error as error:
            raise ConfigError(f"method.rank: pattern {error.pattern!r} is no regular expression: {error}") from error
        chosen = {}
        for layer in layers:
            fitting = [rank for pattern, rank in patterns.items() if pattern.search(layer.name)]
            chosen[layer.name] = fitting[0] if fitting else self.lora_rank
        for pattern in patterns:
            if not any(pattern.search(layer.name) for layer in layers):
                names = sorted({layer.name.rpartition(".")[2] for layer in layers})
                raise ConfigError(
                    f"method.rank: pattern {pattern.pattern!r} fits no adapted layer; they are called "
                    f"{', '.join(names)} (whole names such as {layers[0].name})"
                )
        if not any(chosen.values()):
            raise ConfigError(
                "method.rank: these patterns leave no layer with a rank above 0; nothing would be trained"
            )
        return chosen
