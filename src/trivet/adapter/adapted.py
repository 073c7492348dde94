"""An adapted linear layer as functions of larger layers compute it, by `trivet.kernels.low_rank`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from trivet.kernels import low_rank
from trivet.kernels.product import Weight


class Adapted(NamedTuple):
    """A linear layer and its adapter: x Wᵀ + bias + scale (x Aᵀ) Bᵀ, or `transposed`, x W + ….

    Attributes:
        a: A, (rank, k), float32.
        b: B, (m, rank), float32.
        weight: W, or what makes it.
        learns: whether A learns, and B: hooks on what autograd saves may give back others that don't say.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None
    scale: float
    transposed: bool
    learns: tuple[bool, bool]

    @property
    def w(self) -> torch.Tensor:
        """(k, m), where the weight is a tensor."""
        weight: Any = self.weight
        return weight if self.transposed else weight.T

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the functions below take x (n, k)."""
        return isinstance(self.weight, torch.Tensor) and low_rank.serves(x, self.w, self.a, self.b, self.bias)

    def forward(self, x: torch.Tensor, out: torch.Tensor, **then: torch.Tensor | None) -> torch.Tensor | None:
        """`low_rank.product` of x; what is returned is None if B doesn't learn."""
        turned = low_rank.product(x, x, self.w, self.a, self.b, self.scale, self.bias, out, **then)
        return turned if self.learns[1] else None

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        turned: torch.Tensor | None,
        dx: torch.Tensor | None,
        **then: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`low_rank.backward`: the gradients of A and B, where they learn; x may be None if A doesn't."""
        low = x if self.learns[0] else None
        return low_rank.backward(grad, low, self.w, turned, self.a, self.b, self.scale, dx, **then)


def apart(layers: Iterable[Adapted]) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """The layers' tensors, which autograd has to know, and what else they have: for `together`."""
    layers = list(layers)
    return [each for layer in layers for each in layer[:4]], [layer[4:] for layer in layers]


def together(tensors: Sequence[Any], settings: Sequence[tuple[Any, ...]]) -> list[Adapted]:
    """The layers again."""
    return [Adapted(*tensors[4 * i : 4 * i + 4], *rest) for i, rest in enumerate(settings)]


def gradients(found: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """What a backward pass returns for the tensors of `apart`, of each layer's gradients of A and B."""
    return [each for da, db in found for each in (da, db, None, None)]
