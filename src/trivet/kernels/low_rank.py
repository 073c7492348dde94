"""An adapted layer's products with its two factors, one C function for those of a forward pass and one for a backward one.

torch takes three products for the one and four for the other, of large tensors with thin ones: AMX is given too little work
by each to be worth its code's start, x and the gradients are read from memory twice, and the factors are copied to 16 bits
first. `low_rank.c` has them by AMX instructions, in one pass over memory; sums are in float32, and so are the gradients.
"""

from __future__ import annotations

import functools

import torch

from trivet.kernels import native

#: Of low_rank.c: what features and, in its results, ranks and rows are rounded up to.
_TILE, _DEPTH = 16, 32
#: Above so many ranks torch's own products are as fast.
_MOST_RANKS = 128


def serves(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these functions take x (n, k) and the factors A (rank, k) and B (m, rank)."""
    if x.dtype != torch.bfloat16 or not native.serves(x) or not _ready():
        return False
    factors = all(f.dtype == torch.float32 and f.is_contiguous() and native.serves(f) for f in (a, b))
    fits = a.shape[1] % _DEPTH == b.shape[0] % _DEPTH == 0 and len(x) >= _DEPTH and len(a) <= _MOST_RANKS
    return factors and fits and x.is_contiguous()


@functools.cache
def _ready() -> bool:
    """Whether this processor has AMX, and its system lets us use it."""
    return native.ready("low_rank")


def add_(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y += scale · (x Aᵀ) Bᵀ, in place.

    Args:
        y: (n, m), contiguous.
        x, a, b: as `serves` takes them.

    Returns:
        (x Aᵀ)ᵀ, for `backward`.
    """
    (n, k), (m, rank) = x.shape, b.shape
    turned = x.new_empty(_up(rank, _TILE), _up(n, _DEPTH))
    packed = x.new_empty(_up(rank, _DEPTH) * (k + m))
    native.call("low_rank_add", x, y, x, a, b, turned, packed, n, k, m, rank, float(scale))
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
    native.call("low_rank_backward", grad, grad, x, turned, a, b, dx, da, db, packed, parts, *sizes, float(scale))
    return da, db


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
