"""Dropout (Srivastava et al. 2014) for CPUs: in C by a hash of each entry's place, which every thread can compute.

Without a compiler, and for other types: four choices from a random number, where torch draws one for each entry. Random
numbers are drawn one after the other by one thread, so drawing fewer is what saves time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, native

#: A choice is 16 of a number's 64 bits.
_LEVELS, _CHOICES = 2**16, 4
#: The integers of a floating-point type's size.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Whether tensors without data stand for a CPU's.
_FOR_CPUS: ContextVar[bool] = ContextVar("for CPUs", default=False)


@contextlib.contextmanager
def for_cpus() -> Iterator[None]:
    """What is computed on the meta device keeps what it does in C; else a byte an entry, as on GPUs."""
    before = _FOR_CPUS.set(True)
    try:
        yield
    finally:
        _FOR_CPUS.reset(before)


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """x with a share `p` of its entries 0 and the others divided by 1 - p; which ones, torch's global state decides.

    Args:
        x: any shape, on a CPU (or without data, on the meta device). In C nothing is kept for the backward pass, else a
            byte an entry.
        p: above 0 and below 1; taken to the nearest multiple of 2⁻³² in C, else of 2⁻¹⁶.
    """
    if compiled.serves(x) or (x.is_meta and _FOR_CPUS.get()):
        return _Hashed.apply(x, p, int(torch.randint(2**62, ())))
    return _Dropout.apply(x, p)


def keep(
    shape: Sequence[int], p: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which entries stay, for `zero`: int8 of `shape`, 0 with probability `p`, else -1 (every bit is set)."""
    count = torch.Size(shape).numel()
    numbers = torch.empty(-(-count // _CHOICES), dtype=torch.int64, device=device)
    numbers.random_(-(2**63), None, generator=generator)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    kept = torch.empty(count, dtype=torch.int8, device=device)  # comparing into bool, torch takes eight times as long
    torch.ge(numbers.view(torch.int16)[:count], dropped - _LEVELS // 2, out=kept)
    return kept.neg_().view(shape)


def zero(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x where `kept` has -1, and 0 where it has 0: their bits' and, a tenth of the time of `torch.where`."""
    bits = _BITS[x.element_size()]
    return (x.view(bits) & kept.to(bits)).view(x.dtype)


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x, on any device, with a share p of its entries 0 and the others as they are; the same ones for one seed."""
    if not p:
        return x
    if compiled.serves(x):
        return native.dropout(x, p, seed, 1.0)
    random = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cpu":
        return zero(x, keep(x.shape, p, random))
    return x * (torch.rand(x.shape, generator=random, device=x.device) >= p)


class _Hashed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, p: float, seed: int) -> torch.Tensor:
        ctx.settings = p, seed, 1 / (1 - p)
        return torch.empty_like(x) if x.is_meta else native.dropout(x, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return torch.empty_like(grad) if grad.is_meta else native.dropout(grad, *ctx.settings), None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, p: float) -> torch.Tensor:
        kept = keep(x.shape, p, device=x.device)
        ctx.save_for_backward(kept)
        ctx.factor = 1 / (1 - p)
        return zero(x, kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (kept,) = ctx.saved_tensors
        return zero(grad, kept).mul_(ctx.factor), None
