"""C kernels for CPUs: norms, activations, rotations, softmax, dropout and cross-entropy, each in one pass over memory,
and attention within rows.

The counterpart of `trivet.kernels.fused`, with its functions and arguments. torch takes several operations for each of
these, rounds what lies between them to 16 bits, or copies all of it to float32 and back. Arithmetic is in float32, sums
of long rows in float64. `trivet.kernels.compiled` says which tensors these functions take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from trivet.kernels.compiled import call, multiplies_tiles
from trivet.kernels.heap import empty, workspace

# -- norms and activations ---------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.rms_norm`."""
    width = x.shape[-1]
    y, inverse = empty(*x.shape, like=x), x.new_empty(x.numel() // width, dtype=torch.float32)
    call("rms_norm", x, x, weight, y, inverse, len(inverse), width, float(eps))
    return y, inverse


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `fused.rms_norm_backward`, and `plus` added."""
    out = empty(*x.shape, like=x)
    call("rms_norm_backward", x, grad, x, weight, inverse, plus, out, len(inverse), x.shape[-1])
    return out


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of x by tanh (Hendrycks & Gimpel 2016, section 2)."""
    out = empty(*x.shape, like=x)
    call("gelu", x, x, out, x.numel())
    return out


def gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x's gradient."""
    out = empty(*x.shape, like=x)
    call("gelu_backward", x, grad, x, out, x.numel())
    return out


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `fused.silu_gate`."""
    out = empty(*gate.shape, like=gate)
    call("silu_gate", gate, gate, up, out, gate.numel())
    return out


def silu_gate_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.silu_gate_backward`."""
    in_gate, in_up = empty(*gate.shape, like=gate), empty(*up.shape, like=up)
    call("silu_gate_backward", gate, grad, gate, up, in_gate, in_up, gate.numel())
    return in_gate, in_up


# -- rotary positions ----------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """As `fused.rotate`, of angles that both halves share.

    Returns:
        x's shape, laid out by head, as attention on CPUs reads it; with `back` as (batch, length, heads, width).
    """
    batch, heads, length, width = x.shape
    out = empty(batch, length, heads, width, like=x).transpose(1, 2) if back else empty(*x.shape, like=x)
    each = 0 if len(cos) == 1 else length * width
    strides = _strides(x), _strides(out)
    call("rotate", x, x, cos, sin, out, batch, heads, length, width, *strides, each, -1.0 if back else 1.0)
    return out


# -- softmax ---------------------------------------------------------------------------------------------------------


def softmax_(scores: torch.Tensor, queries: int = 0, before: int = 0) -> torch.Tensor:
    """softmax(scores) over the last axis, in place.

    Args:
        scores: (…, keys), bfloat16, contiguous; a row must have a finite entry.
        queries: where rows are query after query of `queries`, over and over, and causal: the first of them sees
            `before` keys and one more, the next another one; what a query does not see becomes 0. 0: all is seen.

    Raises:
        TypeError: scores of another type.
    """
    if scores.dtype != torch.bfloat16:
        raise TypeError(f"scores are {scores.dtype}; torch's own softmax is as fast but for bfloat16")
    keys = scores.shape[-1]
    call("softmax", scores, scores, scores.numel() // keys, keys, queries, before)
    return scores


# -- dropout ---------------------------------------------------------------------------------------------------------


def dropout(x: torch.Tensor, p: float, seed: int, kept: float) -> torch.Tensor:
    """`kept` · x with a share `p` of its entries 0, to the nearest multiple of 2⁻³².

    Which ones, a hash of place and seed says (MurmurHash3's last step).
    """
    x = x.contiguous()
    out = empty(*x.shape, like=x)
    call("dropout", x, x, out, x.numel(), min(round(p * 2**32), 2**32 - 1), seed, float(kept))
    return out


# -- attention within rows -----------------------------------------------------------------------------------------

#: Numbers of a head.
WIDEST = 1024
_Made = TypeVar("_Made")
#: Of native.c, where COLUMNS are 16 or 32, and of tile_attention.c.
_COLUMNS, _QUERIES, _SEGMENT = 32, 32, 128


class Weights(NamedTuple):
    """How scores become weights: their scale, the probability that a weight is dropped, and the seed of the choice."""

    scale: float
    dropout: float
    seed: int


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, weights: Weights
) -> None:
    """Into `out`, (batch, heads, queries, width): see `trivet.kernels.row_attention`."""
    in_tiles, sizes, scratch = _sizes(query, key, rows, weights, backward=False)
    tensors = (part for each in (query, key, value, out) for part in (each, _strides(each)))
    name = "tile_attention" if in_tiles else "row_attention"
    call(name, query, *tensors, rows, sizes, scratch, weights.scale)


def row_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    in_query: torch.Tensor,
    in_key: torch.Tensor,
    in_value: torch.Tensor,
    rows: torch.Tensor,
    weights: Weights,
) -> torch.Tensor:
    """The gradients, into the tensors given for them.

    Returns:
        (rows, key heads, 2, most before, width) float32: what each causal row adds to the gradients of the keys and
        values of what is before it. The tensors have what it adds to its own.
    """
    in_tiles, sizes, scratch = _sizes(query, key, rows, weights, backward=True)
    begun = scratch.new_zeros(len(rows), key.shape[1], 2, sizes[5], query.shape[-1])
    given = (grad, query, key, value, in_query, in_key, in_value)
    tensors = (part for each in given for part in (each, _strides(each)))
    name = "tile_attention_backward" if in_tiles else "row_attention_backward"
    call(name, query, *tensors, rows, sizes, begun, scratch, weights.scale)
    return begun


def tiled(query: torch.Tensor) -> bool:
    """Whether the products within rows are AMX's."""
    return query.dtype == torch.bfloat16 and query.shape[-1] % _COLUMNS == 0 and multiplies_tiles()


def extent(rows: torch.Tensor) -> tuple[int, int]:
    """The most keys that a row sees, and the most that lie before a causal one."""
    return once(rows, "extent", rows._version, lambda: _extent(rows))


def _extent(rows: torch.Tensor) -> tuple[int, int]:
    return int((rows[:, 3] + rows[:, 4]).max()), int((rows[:, 3] * (rows[:, 4] > 0)).max())


def once(x: torch.Tensor, name: str, state: object, make: Callable[[], _Made]) -> _Made:
    """`make()`, which stays with x under a name for the next layer that asks in the same state."""
    known = getattr(x, name, None)
    if known is None or known[0] != state:
        known = state, make()
        setattr(x, name, known)
    return known[1]


def _sizes(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, weights: Weights, *, backward: bool
) -> tuple[bool, ctypes.Array[ctypes.c_int64], torch.Tensor]:
    """Whether it is done in tiles, what the C functions have to know, and memory for their threads."""
    most, before = extent(rows)
    keys, width = (-(-n // _COLUMNS) * _COLUMNS for n in (most, query.shape[-1]))
    in_tiles = tiled(query)
    if in_tiles:  # in float32 numbers: of all keys, of a block of queries and of a segment
        of_keys = (4 if backward else 3) * keys * width // 2 + backward * 2 * keys * width
        of_block = _QUERIES * (keys * (2 if backward else 1) + keys // 2 + width + (1 + backward) * width // 2)
        each = of_keys + of_block + backward * _SEGMENT * (width + keys)
    else:
        each = (5 if backward else 2) * keys * width + _QUERIES * (2 * keys + 3 * width)
    heads = query.shape[1], key.shape[1]
    dropped = round(weights.dropout * 2**32)
    sizes = len(rows), *heads, query.shape[-1], most, before, each, key.shape[2], dropped, weights.seed
    scratch = workspace(torch.get_num_threads() * each, torch.float32)
    return in_tiles, (ctypes.c_int64 * len(sizes))(*sizes), scratch


def _strides(x: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 3)(*x.stride()[:3])


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def cross_entropy_(
    products: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, cap: float | None = None, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.cross_entropy_`."""
    n, vocabulary = products.shape
    losses, right = products.new_empty(n, dtype=torch.float32), products.new_empty(n, dtype=torch.bool)
    settings = float(scale), float(cap or 0), float(z_loss)
    call("cross_entropy", products, products, targets, losses, right, n, vocabulary, *settings)
    return losses, right
