"""Root-mean-square norm (Zhang & Sennrich 2019, arXiv 1910.07467) of a frozen weight: x and a number a row are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import fused


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, computed in float32 (float64 in float64); x's type.

    Args:
        x: (…, n).
        weight: (n,), without gradient.
    """
    at_once = fused.fuses(x) and x.shape[-1] <= fused.LONGEST
    return (_FusedRMSNorm if at_once else _RMSNorm).apply(x, weight, eps)


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> torch.Tensor:
        x = x.contiguous()
        y, inverse = fused.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return fused.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x.to(wide) * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        g, wide = grad.to(inverse.dtype) * weight, x.to(inverse.dtype)
        along = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse * inverse / x.shape[-1])
        return g.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), None, None
