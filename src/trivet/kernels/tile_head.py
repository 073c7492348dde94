"""Cross-entropy of a frozen head by AMX: a few thousand words at a time, whose logits never leave the cache.

A first pass over all logits for the largest one is not needed: e^logit is taken less the target's logit, which is found
before, and only where a word is e^70 times as likely as the target is all of it done again. So a word's e^logit can be
multiplied with the head as soon as it is there, and the row's sum divides the result (the idea of Wijmans et al. 2024,
arXiv 2411.09009, without computing logits twice). Logits are not rounded to 16 bits, e^logit is.
"""

from __future__ import annotations

import torch

from trivet.kernels import compiled, tile_product
from trivet.kernels.heap import workspace
from trivet.kernels.tile_product import DEPTH, up

#: Words at a time, and rows.
_WORDS, _ROWS = 1024, 1024
#: Numbers that a thread packs of the head for the second product: half of a core's second cache.
_PACKED = 2**19


def serves(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `cross_entropy` takes hidden (n, k), weight (vocabulary, k) and bias (vocabulary,)."""
    contiguous = weight.is_contiguous() and (bias is None or (bias.is_contiguous() and compiled.serves(bias)))
    whole = weight[: len(weight) // DEPTH * DEPTH]
    alike = weight.dtype == hidden.dtype and (bias is None or bias.dtype == hidden.dtype)
    return contiguous and alike and len(whole) > 0 and tile_product.serves(hidden, whole.T)


def cross_entropy(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    cap: float | None,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (n,), whether targets are the likeliest words (n,), and the losses' gradients in hidden (n, k).

    Args:
        hidden, weight, bias: as `serves` takes them.
        targets: (n,) int64, contiguous.
        scale, cap, z_loss: as in `trivet.kernels.cross_entropy`.
    """
    n, vocabulary = len(hidden), len(weight)
    losses, right = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.bool)
    grad = torch.empty_like(hidden)
    whole = vocabulary // DEPTH * DEPTH
    tail, tail_bias = _padded(weight[whole:]), None if bias is None else _padded(bias[whole:])
    given = weight, tail, bias, tail_bias
    size = -(-n // max(1, -(-n // _ROWS)))  # equal chunks
    for start in range(0, n, max(size, 1)):
        rows = slice(start, start + size)
        _chunk(hidden[rows], given, targets[rows], losses[rows], right[rows], grad[rows], (scale, cap, z_loss))
    return losses, right, grad


def _chunk(
    hidden: torch.Tensor,
    given: tuple[torch.Tensor | None, ...],
    targets: torch.Tensor,
    losses: torch.Tensor,
    right: torch.Tensor,
    grad: torch.Tensor,
    settings: tuple[float, float | None, float],
) -> None:
    weight: torch.Tensor = given[0]  # type: ignore[assignment]
    (n, k), vocabulary, threads = hidden.shape, len(weight), torch.get_num_threads()
    words, blocks = min(_WORDS, up(vocabulary, DEPTH)), up(n, DEPTH)
    count, most, pieces = tile_product.needs(n, k)
    panels = max(1, _PACKED // (words * DEPTH))
    room = panels * words * DEPTH
    memory = workspace(blocks * words + max(count, threads * room), hidden.dtype)
    wide = workspace(blocks * k + (2 + 32 * threads) * n, torch.float32)
    scale, cap, z_loss = settings
    places = memory, wide, wide[blocks * k :], memory[blocks * words :]
    sizes = most, pieces, panels, room, n, k, vocabulary, words, float(scale), float(cap or 0), float(z_loss)
    compiled.call("head_cross_entropy", hidden, hidden, *given, targets, losses, right, grad, *places, *sizes)


def _padded(last: torch.Tensor) -> torch.Tensor:
    """DEPTH rows, 0 behind the given ones."""
    out = last.new_zeros(DEPTH, *last.shape[1:])
    out[: len(last)] = last
    return out
