"""Matrix products that x86 processors are slow at: of 16-bit tensors without instructions for them, of few rows, and
those that one of two threads computes alone.

Where a processor has no instructions for 16-bit numbers, torch takes 4 to 100 times as long for them as in float32.
Here both sides are widened to float32, a large one part by part so that no copy of a whole weight is held, and the
result is rounded once: what a processor with such instructions computes, in float32's time and 16 bits' memory.

With AVX2, a layer's output for a few rows, which is what writing an answer asks for token by token, takes two thirds of
the time, down to a third, as (W xᵀ)ᵀ instead of x Wᵀ.

Where it has them, torch's library makes code for each new shape, which takes as long as several products: numbers of
rows that may as well be others come from a few (`few_sizes`).

With AMX and several threads, the library divides a 16-bit product of few columns badly; `tile_product` has those.
Everywhere else these are torch's own products.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch

from trivet.kernels import tile_product
from trivet.kernels.heap import empty

#: Entries of a large matrix that are widened at a time: 4 MiB, about a core's share of the cache.
_PART = 2**20
#: Below so many rows torch's own product of a 16-bit x Wᵀ is no slower, as it reads W once and in 16 bits.
_FEW = 8
#: Products of so few rows are turned: from the lower number on where W lies as x Wᵀ reads it, from the higher one else.
_TURNED, _TURNED_ACROSS, _TURNED_UNTIL = 2, 16, 128
#: 16-bit products of more columns, and of fewer rows, are torch's.
_NARROW, _LONG = 768, 128
_FLOAT32 = torch.empty(0)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's x86 processor multiplies matrices of `dtype` by instructions of its own."""
    parts = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    able = torch.cpu.get_capabilities()
    return dtype not in parts or any(able.get(part) for part in parts[dtype])


def widens(x: torch.Tensor) -> bool:
    """Whether products of x are better computed in float32. On other processors than x86 that was not measured."""
    return x.device.type == "cpu" and not multiplies(x.dtype) and platform.machine() in ("x86_64", "AMD64")


def turns(x: torch.Tensor) -> bool:
    """Whether products of few rows of x are better turned. On processors with more than AVX2 that was not measured."""
    own = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkl.is_available()
    return own and torch.backends.cpu.get_cpu_capability() == "AVX2"


def improves(x: torch.Tensor) -> bool:
    """Whether any product of x is computed otherwise than by torch."""
    return widens(x) or turns(x)


def multiplied(x: torch.Tensor) -> bool:
    """Whether x is in 16 bits that this machine's processor multiplies by instructions of its own."""
    return x.device.type == "cpu" and x.element_size() == 2 and multiplies(x.dtype)


def few_sizes(number: int, *, like: torch.Tensor) -> int:
    """How many rows to give to products that need `number`: as many, or where each size costs, the next of a few.

    Of 16-bit numbers like `like`, where the processor multiplies them, there are sixteen sizes for each doubling.
    """
    if not multiplied(like):
        return number
    step = size_step(number)
    return -(-number // step) * step


def size_step(number: int) -> int:
    """What lies between two of the few sizes near `number`."""
    return 2 ** max(0, number.bit_length() - 5)


def unrounded() -> torch.autocast:
    """No autocast, which would make 16-bit products of float32 ones again."""
    return torch.autocast("cpu", enabled=False)


def mm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a b + bias in a's type.

    Args:
        a: (n, k).
        b: (k, m), contiguous or the transpose of what is.
        bias: (m,).
        out: (n, m), where to put it; without gradient.
    """
    by_column = b.stride(0) == 1
    if _turned(a, b):
        turned = torch.mm(b.T, a.T).T
        out = a.new_empty(turned.shape) if out is None else out
        return out.copy_(turned) if bias is None else torch.add(turned, bias, out=out)
    if len(a) >= _LONG and b.shape[1] <= _NARROW and torch.get_num_threads() > 1 and tile_product.serves(a, b, bias):
        return tile_product.product(a, b, bias, out)
    if not widens(a) or (by_column and len(a) < _FEW):
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    out = a.new_empty(len(a), b.shape[1]) if out is None else out
    with unrounded():
        wide = empty(*a.shape, like=_FLOAT32).copy_(a)
        _widened(wide, b, bias, by_column, out)
    return out


def _widened(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, by_column: bool, out: torch.Tensor) -> None:
    """out = a b + bias for a float32 a, with b's columns, or its rows, in parts: those that lie together in memory."""
    step = max(1, _PART // b.shape[0 if by_column else 1])
    if by_column:
        for start in range(0, b.shape[1], step):
            some = slice(start, start + step)
            total = _product(a, b[:, some])
            out[:, some] = total if bias is None else total.add_(bias[some])
        return
    total = _product(a[:, :step], b[:step])
    for start in range(step, len(b), step):
        some = slice(start, start + step)
        total.addmm_(a[:, some], b[some].float())
    out.copy_(total if bias is None else total.add_(bias))


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y += a b in place, for an a of few columns."""
    if not widens(y):
        return y.addmm_(a, b)
    with unrounded():
        return y.add_(_product(a.float(), b))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b for a float32 a; laid out by columns where it is turned."""
    b = b.float()
    return torch.mm(b.T, a.T).T if _turned(a, b) else torch.mm(a, b, out=empty(len(a), b.shape[1], like=a))


def _turned(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a b is better computed as (bᵀ aᵀ)ᵀ."""
    least = _TURNED if b.stride(0) == 1 else _TURNED_ACROSS
    few = least <= len(a) <= _TURNED_UNTIL <= min(b.shape) and a.stride(1) == 1
    return few and turns(a)


#: A frozen layer's W, or what makes it in a type for each product anew.
Weight = torch.Tensor | Callable[[torch.dtype], torch.Tensor]


def made(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """W itself; where it has to be made, in `dtype`."""
    return weight if isinstance(weight, torch.Tensor) else weight(dtype)


def keep_apart(weight: Weight) -> tuple[torch.Tensor | None, Callable[[torch.dtype], torch.Tensor] | None]:
    """(what autograd saves of W, what else the backward pass needs to have it)."""
    return (weight, None) if isinstance(weight, torch.Tensor) else (None, weight)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias of a frozen layer: x (..., k), W (m, k), bias (m,). The gradient reaches x alone."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Weight, bias: Any) -> torch.Tensor:
        saved, ctx.make_weight = keep_apart(weight)
        ctx.save_for_backward(saved)
        w = made(weight, x.dtype)
        y = empty(*x.shape[:-1], len(w), like=x)  # no view of another tensor, so that it may be changed in place
        mm(x.reshape(-1, x.shape[-1]), w.T, bias, out=y.view(-1, len(w)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (saved,) = ctx.saved_tensors
        w = made(ctx.make_weight or saved, grad.dtype)
        return mm(grad.reshape(-1, grad.shape[-1]), w).view(*grad.shape[:-1], w.shape[1]), None, None
