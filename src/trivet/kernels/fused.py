"""Triton kernels for GPUs: norms, gated activations, rotations and cross-entropy, each in one pass over memory.

What torch does in five to ten kernels, writing every intermediate result to memory and reading it again, is bound by
memory there; these read their inputs once and write their results once. Arithmetic is in float32. Triton comes with
torch for CUDA on Linux.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the kernels below are never called
    triton = None

    def jit(function: Any) -> Any:
        return function


log = logging.getLogger("trivet")

#: The longest row that a program holds at once, and how much of a longer one it reads at a time.
LONGEST, _BLOCK = 16384, 4096
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def fuses(x: torch.Tensor) -> bool:
    """Whether these kernels take x."""
    return x.is_cuda and x.dtype in _TYPES and x.numel() > 0 and _work(x.device, x.dtype)


@functools.cache
def _work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is there, has what it needs, and knows the GPU: each kernel is started once."""
    if triton is None:
        return False
    try:
        row, angles = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1, 2), (1, 1, 2)))
        silu_gate_backward(row, silu_gate(row, row), row)
        rms_norm_backward(row, row, row[0], rms_norm(row, row[0], 1.0)[1])
        rotate(row[None, None], angles, angles)
        cross_entropy_(row, torch.zeros(1, device=device, dtype=torch.int64))
        return bool(row.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of compilers, drivers and Triton, which have no common class
        log.warning("Triton's kernels can't be used on %s, so that steps take longer: %s", device, error)
        return False


def _warps(length: int) -> int:
    return 4 if length <= 2048 else 8 if length <= 8192 else 16


# -- RMS norm --------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """weight · x / √(mean(x²) + eps) over the last dimension of a contiguous x, and 1 / √(…) of each row in float32."""
    width = x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):  # Triton would take the current one
        _norm[(len(inverse),)](x, weight, y, inverse, width, eps, block, num_warps=_warps(block))
    return y, inverse


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The gradient in x, from that in the result; both contiguous."""
    out, width = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _norm_backward[(len(inverse),)](grad, x, weight, inverse, out, width, block, num_warps=_warps(block))
    return out


@jit
def _norm(x, weight, y, inverse, width, eps, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(inverse + row, factor)
    tl.store(y + row * width + columns, value * factor * scale, mask=inside)


@jit
def _norm_backward(grad, x, weight, inverse, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(inverse + row)
    along = tl.sum(g * value) * factor * factor / width
    tl.store(out + row * width + columns, (g - value * along) * factor, mask=inside)


# -- SiLU(gate) · up -------------------------------------------------------------------------------------------


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate · sigmoid(gate) · up of two contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    count = gate.numel()
    with torch.cuda.device_of(gate):
        _gate[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, _BLOCK, num_warps=8)
    return out


def silu_gate_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in gate and up, from that in the result; all contiguous."""
    in_gate, in_up = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    with torch.cuda.device_of(gate):
        _gate_backward[(triton.cdiv(count, _BLOCK),)](grad, gate, up, in_gate, in_up, count, _BLOCK, num_warps=8)
    return in_gate, in_up


@jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, g * u / (1.0 + tl.exp(-g)), mask=inside)


@jit
def _gate_backward(grad, gate, up, in_gate, in_up, count, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-g))
    tl.store(in_gate + place, d * u * opened * (1.0 + g * (1.0 - opened)), mask=inside)
    tl.store(in_up + place, d * g * opened, mask=inside)


# -- rotary positions ------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Each head's halves (a, b) to (a cos - b sin, b cos + a sin); `back` is the transpose, which gradients take.

    Args:
        x: (batch, heads, length, width), of any strides but the last, which is 1.
        cos, sin: (batch or 1, length, width), contiguous.

    Returns:
        x's shape, laid out as (batch, length, heads, width).
    """
    batch, heads, length, width = x.shape
    strides = length * heads * width, width, heads * width, 1
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)  # no view: it may be changed in place
    together, half = triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)
    each = 0 if len(cos) == 1 else length * width
    sizes = *x.stride()[:3], each, heads, length, width // 2
    with torch.cuda.device_of(x):
        _rotate[(batch * length,)](x, cos, sin, out, *sizes, back, together, half, num_warps=_warps(together * half))
    return out


@jit
def _rotate(
    x, cos, sin, out, by_batch, by_head, by_place, each, heads, length, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, place = row // length, row % length
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    start = x + batch * by_batch + place * by_place + head * by_head + column
    a = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    angle = batch * each + place * half * 2 + column
    known = column < half
    cos_a = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=known, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=known, other=0.0).to(tl.float32)
    target = out + (row * heads + head) * half * 2 + column
    if BACK:
        tl.store(target, a * cos_a + b * sin_b, mask=inside)
        tl.store(target + half, b * cos_b - a * sin_a, mask=inside)
    else:
        tl.store(target, a * cos_a - b * sin_a, mask=inside)
        tl.store(target + half, b * cos_b + a * sin_b, mask=inside)


# -- cross-entropy ---------------------------------------------------------------------------------------------


def cross_entropy_(
    products: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, cap: float | None = None, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the logits cap · tanh(scale · products / cap), whose place their gradients in `products` take.

    Args:
        products: (n, vocabulary), contiguous; overwritten.
        targets: n ids, int64, contiguous.
        scale, cap, z_loss: as in `trivet.kernels.cross_entropy`.

    Returns:
        losses (n,) float32, NaN where a target is no token; and whether none is likelier than the target, (n,) bool.
    """
    n, vocabulary = products.shape
    losses = products.new_empty(n, dtype=torch.float32)
    right = products.new_empty(n, dtype=torch.bool)
    settings = vocabulary, scale, cap or 1.0, z_loss, cap is not None, _BLOCK
    with torch.cuda.device_of(products):
        _entropy[(n,)](products, targets, losses, right, *settings, num_warps=8)
    return losses, right


@jit
def _entropy(
    products, targets, losses, right, vocabulary, scale, cap, z_loss, CAPPED: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = products + row * vocabulary
    target = tl.load(targets + row)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane, and what its exponentials sum up to
    total = tl.zeros((BLOCK,), tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(start + column, mask=column < vocabulary, other=0.0).to(tl.float32) * scale
        if CAPPED:
            logit = cap * (2.0 / (1.0 + tl.exp(-2.0 * logit / cap)) - 1.0)
        found = tl.where(column == target, logit, found)
        logit = tl.where(column < vocabulary, logit, float("-inf"))
        higher = tl.maximum(largest, logit)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen nothing yet
        total = total * tl.exp(largest - safe) + tl.exp(logit - safe)
        largest = higher
    most = tl.max(largest)
    summed = tl.sum(total * tl.exp(largest - most))
    log_z = most + tl.log(summed)
    chosen = tl.sum(found)  # read with the others: a load of its own could meet what the loop below has stored
    known = (target >= 0) & (target < vocabulary)
    tl.store(losses + row, tl.where(known, log_z - chosen + z_loss * log_z * log_z, float("nan")))
    tl.store(right + row, chosen >= most)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < vocabulary
        logit = tl.load(start + column, mask=inside, other=0.0).to(tl.float32) * scale
        slope = scale
        if CAPPED:
            squashed = 2.0 / (1.0 + tl.exp(-2.0 * logit / cap)) - 1.0
            logit = cap * squashed
            slope = scale * (1.0 - squashed * squashed)
        p = tl.exp(logit - most) / summed * (1.0 + 2.0 * z_loss * log_z)  # log_z would bring its rounding
        p = tl.where(column == target, p - 1.0, p)
        tl.store(start + column, p * slope, mask=inside)
