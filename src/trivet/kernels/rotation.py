"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of queries and keys, without intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, fused, native
from trivet.kernels.heap import empty


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated by their places' angles.

    Computed in float32, without a C compiler on CPUs in their own type. On GPUs laid out as (batch, length, heads,
    width); on CPUs by head, as attention on CPUs reads them.

    Args:
        query, key: (batch, heads, length, width).
        cos, sin: (batch or 1, length, width), of angles that the halves of a head share; without gradient.
    """
    return _Rotation.apply(query, key, cos.contiguous(), sin.contiguous())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, cos: Any, sin: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        turn = _turning(query)
        return turn(_rows(query), cos, sin), turn(_rows(key), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        turn = _turning(grads[0])
        return *(turn(_rows(grad), cos, sin, back=True) for grad in grads), None, None


def _turning(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    return fused.rotate if fused.fuses(x) else native.rotate if compiled.serves(x) else _rotate


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With every head in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """The halves of each head, (u, v) -> (u cos - v sin, v cos + u sin), or by the opposite angle.

    Laid out by head; backwards by place, as the layer that made x reads its gradient.
    """
    batch, heads, length, width = x.shape
    half, sign = width // 2, -1 if back else 1
    out = empty(batch, length, heads, width, like=x).transpose(1, 2) if back else empty(*x.shape, like=x)
    cos, sin = (angle[:, None, :, :half] for angle in (cos, sin))
    u, v = x[..., :half], x[..., half:]
    torch.mul(u, cos, out=out[..., :half]).addcmul_(v, sin, value=-sign)
    torch.mul(v, cos, out=out[..., half:]).addcmul_(u, sin, value=sign)
    return out
