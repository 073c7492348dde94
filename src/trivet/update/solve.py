"""Small symmetric systems: r x r matrices in float64, those of one size in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def gram(x: torch.Tensor) -> torch.Tensor:
    """x xᵀ, (r, r) for x (r, n)."""
    x = wide(x.detach())
    return x @ x.T


def batched(function: Callable[..., torch.Tensor], *columns: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[function(*row) for row in zip(*columns)], called once for all rows whose first tensors are of one size.

    `function` takes and returns stacks, with the rows along their first dimension.
    """
    alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, (first, *_) in enumerate(zip(*columns, strict=True)):
        alike.setdefault((first.shape, first.device), []).append(i)
    results = dict[int, torch.Tensor]()
    for rows in alike.values():
        stacked = function(*(torch.stack([column[i] for i in rows]) for column in columns))
        results.update(zip(rows, stacked.unbind(), strict=True))
    return [results[i] for i in range(len(results))]


def mean_eigenvalue(matrix: torch.Tensor) -> torch.Tensor:
    """tr K / r of (..., r, r), as (..., 1, 1); above 0 so that it may divide."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-30


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """K + δ tr K / r I, positive definite also where K is 0, as BᵀB is at the start; rounding alone asks for 1e-12."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + max(damping, 1e-12) * mean_eigenvalue(matrix) * eye


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of positive definite matrices, (..., r, r), by Cholesky. NaN stays NaN, for the loss to show it."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


def spectrum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, at least 0, and eigenvectors of positive semidefinite matrices. NaN stays NaN, as in `inverse`."""
    broken = ~torch.isfinite(matrix).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(broken[..., None, None], 0.0, matrix))
    return torch.where(broken[..., None], torch.nan, values.clamp_min(0)), vectors
