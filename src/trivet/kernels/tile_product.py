"""Products of 16-bit numbers with frozen weights, by AMX.

torch's library divides a product among threads, and among its tiles, well for some shapes only: of two threads it may
leave one idle, or read a long row of x from memory again for each few columns. `tile_product.c` divides columns,
packs their weights into the second cache, and reads x once; no shape costs code of its own.
"""

from __future__ import annotations

import torch

from trivet.kernels import compiled
from trivet.kernels.heap import empty, workspace

#: Of tiles.h: columns of a panel, which features have to be a multiple of.
DEPTH = 32
#: Bytes of weights that a thread packs at a time, half of a core's second cache, and the most terms of a sum.
_ROOM, _TERMS = 2**20, 2048
#: Fewer rows than that are not worth packing weights for; level up to 64, but rounded as more rows are.
_LEAST_ROWS = 16


def serves(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether `product` takes x (n, k), w (k, m), and bias (m)."""
    if not works(x):
        return False
    alike = w.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) and compiled.serves(w)
    in_piece = x.is_contiguous() and (w.is_contiguous() or w.T.is_contiguous())
    return alike and in_piece and w.shape[0] % DEPTH == w.shape[1] % DEPTH == 0 and len(x) >= _LEAST_ROWS


def works(x: torch.Tensor) -> bool:
    """Whether x is of the kind that these functions multiply, and this machine has them."""
    return x.dtype == torch.bfloat16 and compiled.serves(x) and compiled.multiplies_tiles()


def product(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x w + bias.

    Args:
        x, w, bias: as `serves` takes them.
        out: (n, m), contiguous, where to put it.
    """
    n, k = x.shape
    out = empty(n, w.shape[1], like=x) if out is None else out
    sizes = n, k, w.shape[1]
    compiled.call("tile_product", x, out, x, w, by_column(w), bias, *scratch(n, k, like=x), *sizes)
    return out


def by_column(w: torch.Tensor) -> int:
    """Whether w lies in memory column by column: 0 or 1."""
    return int(w.stride(0) == 1)


def scratch(n: int, k: int, *, like: torch.Tensor, more: int = 0) -> tuple[torch.Tensor, int, int]:
    """What a product of (n, k) needs: memory, how many panels a thread packs at a time, and pieces of each sum.

    Args:
        more: as many numbers in the memory, before what the product needs.
    """
    count, most, pieces = needs(n, k)
    return workspace(more + count, like.dtype), most, pieces


def needs(n: int, k: int) -> tuple[int, int, int]:
    """The same, of memory how many numbers."""
    pieces = -(-k // _TERMS)
    terms = up(-(-k // pieces), DEPTH)
    most = max(1, _ROOM // (2 * terms * DEPTH))
    sums = 0 if pieces == 1 else 2 * up(n, DEPTH)
    return torch.get_num_threads() * most * DEPTH * (terms + sums), most, pieces


def up(number: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-number // to) * to
