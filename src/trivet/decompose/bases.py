"""What several decompositions share: singular vectors, pivots, and how large a start is.

Sizes follow one rule, so that a learning rate found for plain LoRA is a fair one for every decomposition. Where A is
trained, it has the Frobenius norm of plain LoRA's A. Where only a core is, one step of Adam on the core moves ΔW as
far, in Frobenius norm, as one on plain LoRA's B does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import ConfigError

#: Up to this many rows or columns a factorisation is exact; above it, of a random sketch.
EXACT = 256


def truncated_svd(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular triplets of an (m, n) matrix: U (m, r), σ (r,), V (n, r), with r = min(rank, m, n).

    Exact where a side is at most `EXACT`; else a random range finder with four power iterations (Halko, Martinsson &
    Tropp 2011, algorithm 4.4), from `generator` alone.
    """
    w = matrix.float()
    rank = min(rank, *w.shape)
    if min(w.shape) <= EXACT:
        u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        q = torch.linalg.qr(w @ random(w.shape[1], min(rank + 10, *w.shape), generator, w)).Q
        for _ in range(4):
            q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
        u, sigma, vt = torch.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    return u[:, :rank], sigma[:rank], vt[:rank].T


def pivots(matrix: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """The columns of an (m, n) matrix that column-pivoted QR takes first, (count,).

    Where m is large, of a random projection to 2 count + 8 rows, which keeps the choice nearly as good (Voronin &
    Martinsson 2017, "Efficient algorithms for CUR and interpolative matrix decompositions").
    """
    from scipy.linalg import qr

    w = matrix.float()
    if w.shape[0] > max(EXACT, 2 * count + 8):
        w = random(2 * count + 8, w.shape[0], generator, w) @ w
    order = qr(w.cpu().numpy(), mode="r", pivoting=True)[1]
    return torch.from_numpy(order[:count]).long().to(matrix.device)


def complete(rows: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """(rank, n): `rows` (k, n), then random ones of their mean size, orthogonal to them and to each other.

    Where n has no room for so many orthogonal rows, the random ones are merely random.
    """
    k, n = rows.shape
    if k >= rank:
        return rows[:rank]
    draw = random(rank - k, n, generator, rows)
    if rank <= n:
        known = torch.linalg.qr(rows.T).Q
        for _ in range(2):  # once more for what rounding leaves
            draw = torch.linalg.qr((draw - draw @ known @ known.T).T).Q.T
    size = rows.norm() / math.sqrt(k) if k else 1.0
    return torch.cat([rows, draw * (size / draw.norm(dim=1, keepdim=True))])


def kaiming_sized(a: torch.Tensor) -> torch.Tensor:
    """A (r, in) scaled to the Frobenius norm √(r / 3), the expected one of `zero`'s Kaiming-uniform A."""
    return a * (math.sqrt(a.shape[0] / 3) / a.norm())


def core_step(out_features: int, rank: int) -> float:
    """‖B A‖ after a first step of Adam on plain LoRA's B, per unit of learning rate: √(out r / 3).

    Every entry of B becomes ±1 and A has the Frobenius norm √(r / 3). A core's bases L and R are scaled so that
    L X R has this norm for X of random signs, where its mean square is ‖L‖² ‖R‖².
    """
    return math.sqrt(out_features * rank / 3)


def random(rows: int, columns: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """A standard normal (rows, columns), drawn on the generator's device, so alike on every accelerator."""
    return torch.randn(rows, columns, generator=generator, device=generator.device).to(like.device)


def known(statistics: Mapping[str, LayerStatistics] | None, layer: AdaptedLayer, what: str) -> LayerStatistics:
    """The layer's statistics; `ConfigError` where the probe that `what` needs was not run or did not see the layer."""
    if statistics is None:
        raise ConfigError(
            f"starting the adapter: {what} needs statistics of the training data, and none were gathered; "
            "attach the adapter with a probe (a few training batches), or choose another decomposition"
        )
    if layer.name not in statistics:
        raise ConfigError(
            f"starting the adapter: {what} needs statistics of every adapted layer, and {layer.name} has none; "
            "leave it out of target_modules, or gather them from batches that use it"
        )
    return statistics[layer.name]
