"""An adapted layer by AMX: one C function for its forward pass, one for its backward one.

torch takes three products for the one and five for the other, most of them of large tensors with thin ones: each is
little work for its library, x and the gradients are read from memory again, what an adapter adds is a pass over all of
y, and the factors are copied to 16 bits first. `low_rank.c` has them by instructions of the processor, and what is
added is a term of the layer's own product: it is not rounded by itself, nor lost where it is less than y's last place.
Sums are in float32, and so are the factors' gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trivet.kernels import compiled, tile_product
from trivet.kernels.heap import empty, workspace
from trivet.kernels.tile_product import DEPTH, up

#: Of tiles.h: what ranks are rounded up to in results.
_TILE = 16
#: Above so many ranks torch's own products are as fast.
_MOST_RANKS = 128


def serves(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> bool:
    """Whether these functions take x (n, k), a layer's w (k, m) and bias (m), and A (rank, k) and B (m, rank)."""
    if len(a) > _MOST_RANKS or not tile_product.serves(x, w, bias):
        return False
    return all(f.dtype == torch.float32 and f.is_contiguous() and compiled.serves(f) for f in (a, b))


def product(
    x: torch.Tensor,
    low: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plus: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    gated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Into `out` (n, m), contiguous: x w + bias + scale · (low Aᵀ) Bᵀ + plus.

    With a gate, into `gated`: SiLU(gate) · out.

    Args:
        x, w, a, b, bias: as `serves` takes them. x may be in blocks, as `blocks` makes them, where `low` is x.
        low: (n, k), what the adapter reads: x, or x after its dropout.
        plus, gate, gated: (n, m), contiguous, or in blocks as `out` is; `plus` may be `out`.

    Returns:
        (low Aᵀ)ᵀ, for `backward`.
    """
    (rank, k), m, n = a.shape, len(b), len(out if x.dim() > 2 else x)
    turned = x.new_empty(up(rank, _TILE), up(n, DEPTH))
    layer = w, tile_product.by_column(w)
    memory = tile_product.scratch(n, k, like=x, more=_thin(n, k, m, rank))
    given = out, _in_blocks(out), x, low.contiguous(), _in_blocks(x), *layer, a, b, bias
    then = plus, gate, gated, turned, *memory
    compiled.call("adapted_product", x, *given, *then, n, k, m, rank, float(scale))
    return turned


class Gated(NamedTuple):
    """Of what a layer read, SiLU(gate) · up: the two; where it is to be written again; and where their gradients are.

    All (n, k) and contiguous, or all in blocks.
    """

    gate: torch.Tensor
    up: torch.Tensor
    product: torch.Tensor
    in_gate: torch.Tensor
    in_up: torch.Tensor


def backward(
    grad: torch.Tensor,
    low: torch.Tensor | None,
    w: torch.Tensor | None,
    turned: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dx: torch.Tensor | None,
    dlow: torch.Tensor | None = None,
    *,
    plus: torch.Tensor | None = None,
    gated: Gated | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of A, where there is `low`, and of B, where there is `turned`, in float32.

    Args:
        grad: (n, m), `out`'s; it may be in blocks where there is dx.
        low, w, turned, a, b, scale: what `product` was given, and has returned; w wherever there is dx or `gated`.
        dx: (n, k), contiguous, or None: becomes the gradient of x, and of `low` too unless that has its own.
        dlow: the same for `low`, where it is not x.
        plus: (n, k), contiguous, added to dx, which it may be.
        gated: where the layer read this: instead of dx, the gradients of what it was made of; `low` is its product,
            which need not be there yet.
    """
    (rank, k), m, n = a.shape, len(b), len(dx if dx is not None and grad.dim() > 2 else grad)
    grad = grad.contiguous()
    da = None if low is None else torch.empty_like(a)
    db = None if turned is None else torch.empty_like(b)
    low = None if low is None else low.contiguous()
    layer = w, 0 if w is None else tile_product.by_column(w)
    memory = tile_product.scratch(n, m, like=grad, more=_thin(n, k, m, rank))
    parts = workspace(torch.get_num_threads() * up(rank, _TILE) * (k + m), torch.float32)
    then = plus, *(gated or (None,) * 5)
    beside = _in_blocks(gated.gate if gated else low)
    given = grad, _in_blocks(grad), low, beside, *layer, turned, a, b, dx, dlow, *then, da, db, *memory, parts
    compiled.call("adapted_product_backward", grad, *given, n, k, m, rank, float(scale))
    return da, db


def blocks(n: int, k: int, *, like: torch.Tensor) -> torch.Tensor:
    """(n, k), not filled, in blocks that follow each other: (blocks of rows, blocks of columns, DEPTH, DEPTH).

    What functions of here alone read and write: in rows, a matrix is as many streams as rows are worked on.
    """
    return empty(up(n, DEPTH) // DEPTH, k // DEPTH, DEPTH, DEPTH, like=like)


def _in_blocks(x: torch.Tensor | None) -> int:
    return int(x is not None and x.dim() > 2)


def _thin(n: int, k: int, m: int, rank: int) -> int:
    """How many numbers of 16 bits there are that have a column for each rank."""
    return (2 * up(n, DEPTH) + k + m) * up(rank, DEPTH)
