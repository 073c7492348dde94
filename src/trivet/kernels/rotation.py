"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of queries and keys, on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import fused


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated by their places' angles, computed in float32; laid out as (batch, length, heads, width).

    Args:
        query, key: (batch, heads, length, width), on a GPU.
        cos, sin: (batch or 1, length, width), of angles that the halves of a head share; without gradient.
    """
    return _Rotation.apply(query, key, cos.contiguous(), sin.contiguous())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, cos: Any, sin: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        return fused.rotate(_rows(query), cos, sin), fused.rotate(_rows(key), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return *(fused.rotate(_rows(grad), cos, sin, back=True) for grad in grads), None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With every head in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()
