"""Norms of frozen weights, of which x and a number or two a row are kept: root mean square (Zhang & Sennrich 2019,
arXiv 1910.07467), and torch's layer norm (Ba et al. 2016, arXiv 1607.06450).

Recipes get copies of the weights: FSDP takes a block's weights away while layers of other blocks may still read its
norm's result, as a decoder's do the encoder's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, fused, native
from trivet.kernels.heap import empty
from trivet.kernels.recipe import carries


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, computed in float32 (float64 in float64); x's type.

    Args:
        x: (…, n).
        weight: (n,), without gradient.
    """
    if fused.fuses(x) and x.shape[-1] <= fused.LONGEST:
        return _FusedRMSNorm.apply(x, weight, eps, fused)
    if compiled.serves(x) and weight.dtype == x.dtype:
        x = x.contiguous()
        return carries(_FusedRMSNorm.apply(x, weight, eps, native), partial(_again, eps), x, weight.clone())
    y, inverse = _RMSNorm.apply(x, weight, eps)
    return carries(y, _normed, x, inverse, weight.clone())


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """weight · (x − mean) / √(variance + eps) + bias over the last dimension, by torch.

    Args:
        x: (…, n).
        weight, bias: (n,), without gradient; None for 1 and 0, and no bias without a weight.
    """
    affine = [each for each in (weight, bias) if each is not None]
    make = partial(_layer_normed, eps)
    return carries(make(x, *affine), make, x, *(each.clone() for each in affine))


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float, kernels: Any) -> torch.Tensor:
        x = x.contiguous()
        y, inverse = kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.kernels.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> Any:
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _normed(x, inverse, weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        g, wide = grad.to(inverse.dtype) * weight, x.to(inverse.dtype)
        along = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse * inverse / x.shape[-1])
        return g.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), None, None


def _again(eps: float, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return native.rms_norm(x, weight, eps)[0]


def _normed(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.mul(x, inverse, out=empty(*x.shape, like=inverse)).mul_(weight)
    return y if y.dtype == x.dtype else empty(*x.shape, like=x).copy_(y)


def _layer_normed(
    eps: float, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
