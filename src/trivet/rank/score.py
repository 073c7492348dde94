"""What a direction of an update is worth, and the factors that keep the best ones.

With C and S the diagonals of the second moments of a layer's inputs and output gradients, removing ΔW's part D from a
trained model costs ½ ‖S^½ D C^½‖²: a diagonal Fisher (K-FAC) model of the loss. Its singular values σ̃ are found from
r x r Gram matrices; no matrix of W's size is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trivet.adapter.layers import AdaptedLayer, Change
from trivet.adapter.statistics import LayerStatistics


@dataclass(frozen=True)
class Directions:
    """One layer's directions, the most valuable first.

    Attributes:
        worth: ½ σ̃², (r,): nats where whitened, else half the squared singular values of ΔW.
        left, right: (r, r) float64; B left and rightᵀ A are the factors of these directions.
        gram_a, gram_b: A Aᵀ and Bᵀ B, (r, r) float64.
    """

    worth: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    gram_a: torch.Tensor
    gram_b: torch.Tensor

    def keep(self, k: int) -> Change:
        """The first k directions, in a balanced gauge (BᵀB = AAᵀ, as far as B is not zero)."""
        left, right = self.left[:, :k], self.right[:, :k]
        if k == 0:
            return Change(left, right)
        _, x, y = _singular(right.T @ self.gram_a @ right, left.T @ self.gram_b @ left)
        return Change(left @ x, right @ y)


def directions(
    layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None
) -> dict[str, Directions]:
    """The directions of every layer by name; `statistics` None takes C = S = 1, plain singular values."""
    grams: dict[str, tuple[torch.Tensor, ...]] = {}
    for layer in layers:
        a, b = (f.double() for f in layer.factors())
        plain, size = (a @ a.T, b.T @ b), layer.scale**2
        if statistics is None:
            grams[layer.name] = (*plain, plain[0], plain[1] * size)
        else:
            known = statistics[layer.name]
            c, s = known.inputs.to(a), known.outputs.to(b)
            grams[layer.name] = (*plain, (a * c) @ a.T, (b.T * s) @ b * size)
    found = {}
    sizes = {name: g[0].shape[0] for name, g in grams.items()}
    for size in sorted(set(sizes.values())):  # one batched eigenproblem for all layers of a rank
        names = [name for name, r in sizes.items() if r == size]
        stacked = [torch.stack([grams[name][i] for name in names]) for i in range(4)]
        sigma, left, right = _singular(stacked[2], stacked[3])
        for i, name in enumerate(names):
            found[name] = Directions(0.5 * sigma[i] ** 2, left[i], right[i], stacked[0][i], stacked[1][i])
    return found


def cut(layers: Sequence[AdaptedLayer], found: Mapping[str, Directions], ranks: Sequence[int]) -> dict[str, Change]:
    """The changes that leave each layer its best `ranks` directions, for the layers that lose any."""
    pairs = zip(layers, ranks, strict=True)
    return {layer.name: found[layer.name].keep(rank) for layer, rank in pairs if rank < layer.rank}


def _singular(gram_a: torch.Tensor, gram_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values of B A from A Aᵀ and BᵀB (…, r, r), with maps such that B left and rightᵀ A are balanced.

    left rightᵀ = I exactly, whatever the rounding of the Gram matrices. A direction whose singular value is (nearly)
    zero keeps its row of A: with both factors zero it could never learn.
    """
    values, vectors = torch.linalg.eigh(gram_a)
    top = values.amax(-1, keepdim=True).clamp_min(1e-30)
    root = values.clamp_min(1e-12 * top).sqrt()
    half, inverse = vectors * root.unsqueeze(-2), vectors / root.unsqueeze(-2)  # A Aᵀ = half halfᵀ; inverse = half^-T
    squares, turn = torch.linalg.eigh(half.mT @ gram_b @ half)
    sigma = squares.clamp_min(0).sqrt().flip(-1)
    turn = turn.flip(-1)
    largest = sigma.amax(-1, keepdim=True)
    balance = torch.where(largest > 0, sigma.maximum(1e-3 * largest), torch.ones_like(sigma)).sqrt()
    return sigma, half @ turn / balance.unsqueeze(-2), inverse @ turn * balance.unsqueeze(-2)


def costs(layer: AdaptedLayer, count: int) -> list[float]:
    """The trained numbers that each of a layer's directions adds: out + in, or 2 i + 1 for a core."""
    if layer.form == "core":
        return [2 * i + 1 for i in range(count)]
    return [float(sum(layer.shape))] * count


def held(layer: AdaptedLayer) -> int:
    """The numbers that a layer's update holds, frozen factors of plain form included."""
    return int(sum(costs(layer, layer.rank)))
