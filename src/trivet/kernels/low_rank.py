"""An adapted layer's products with its two factors, by AMX: one C function for a forward pass, one for a backward one.

torch takes two products for the one and four for the other, of large tensors with thin ones: each is little work for
its library, x and the gradients are read from memory twice, and the factors are copied to 16 bits first. `low_rank.c`
has them by instructions of the processor, chunk by chunk; sums are in float32, and so are the gradients.
"""

from __future__ import annotations

import torch

from trivet.kernels import compiled

#: Of low_rank.c: what features and, in its results, ranks and rows are rounded up to.
_TILE, _DEPTH = 16, 32
#: Above so many ranks torch's own products are as fast.
_MOST_RANKS = 128


def serves(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether these functions take x (n, k), the factors A (rank, k) and B (m, rank), and the layer's bias (m)."""
    if x.dtype != torch.bfloat16 or not compiled.serves(x) or not compiled.multiplies_tiles():
        return False
    factors = all(f.dtype == torch.float32 and f.is_contiguous() and compiled.serves(f) for f in (a, b))
    fits = a.shape[1] % _DEPTH == b.shape[0] % _DEPTH == 0 and len(x) >= _DEPTH and len(a) <= _MOST_RANKS
    return factors and fits and x.is_contiguous() and (bias is None or bias.dtype == x.dtype)


def add_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y += scale · (x Aᵀ) Bᵀ + bias, in place.

    Args:
        y: (n, m), contiguous.
        x, a, b: as `serves` takes them.
        bias: (m,). torch's product would write it to all rows first.

    Returns:
        (x Aᵀ)ᵀ, for `backward`.
    """
    (n, k), (m, rank) = x.shape, b.shape
    turned = x.new_empty(_up(rank, _TILE), _up(n, _DEPTH))
    packed = x.new_empty(_up(rank, _DEPTH) * (k + m))
    compiled.call("low_rank_add", x, y, x, a, b, bias, turned, packed, n, k, m, rank, float(scale))
    return turned


def backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    turned: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dx: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of A, where there is x, and of B, where there is `turned`, in float32.

    Args:
        grad: (n, m), that of what was added to y.
        x, turned, a, b, scale: what `add_` was given, and has returned.
        dx: (n, k), contiguous, or None: what is added to x's gradient is added to it.
    """
    (n, m), (rank, k) = grad.shape, a.shape
    grad = grad.contiguous()
    da = None if x is None else torch.empty_like(a)
    db = None if turned is None else torch.empty_like(b)
    packed = grad.new_empty(_up(rank, _DEPTH) * (k + m))
    parts = a.new_empty(torch.get_num_threads() * _up(rank, _TILE) * (k + m))
    sizes = n, k, m, rank
    compiled.call("low_rank_backward", grad, grad, x, turned, a, b, dx, da, db, packed, parts, *sizes, float(scale))
    return da, db


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
