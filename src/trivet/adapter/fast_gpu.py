"""The adapted layer on GPUs, where starting a kernel costs the processor more time than many a small product takes.

`trivet.adapter.fast` makes 14 kernels of an adapter's forward and backward pass, this makes 6: all factors of a model
are cast together at the beginning of its forward pass, the scale is a factor of a product, and the factors' gradients
come out of their products in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.kernels.dropout import dropped
from trivet.kernels.recipe import kept_for, rows_from


def wanted(x: torch.Tensor) -> bool:
    """Whether this pass is the one for x."""
    return x.is_cuda


class Halves:
    """16-bit copies of a model's float32 factors, made together when its forward pass begins and dropped at its end.

    They are made anew each time: nothing tells reliably whether a factor has been changed meanwhile.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """`layers` get the copies: `halves`, by adapter (A, B), None without a forward pass of the whole model."""
        self.layers, self.given = list(layers), list[Any]()

    def begin(self, *_: Any) -> None:
        if not self.layers or not wanted(next(self.layers[0].parameters())):
            return
        places: dict[tuple[torch.device, torch.dtype], list[tuple[Any, str, torch.Tensor, torch.Tensor]]] = {}
        for layer in self.layers:
            parts = layer._modules  # a module's attributes are looked up slowly, and these are thousands in a model
            for name, factor in parts["lora_A"]._modules.items():
                if name not in layer.active_adapters:
                    continue
                modules = parts["base_layer"], factor, parts["lora_B"]._modules[name]
                base, a, b = (module._parameters.get("weight") for module in modules)
                if any(w is None or type(w.data) is not torch.Tensor for w in (base, a, b)):
                    continue  # computed from others, or shared out over processes
                if a.dtype != base.dtype and a.device == b.device == base.device:
                    places.setdefault((base.device, base.dtype), []).append((layer, name, a, b))
        for (device, dtype), found in places.items():
            masters = [factor.detach() for *_, a, b in found for factor in (a, b)]
            sizes = [factor.numel() for factor in masters]
            split = torch.empty(sum(sizes), device=device, dtype=dtype).split(sizes)
            halves = [piece.view(factor.shape) for piece, factor in zip(split, masters, strict=True)]
            torch._foreach_copy_(halves, masters)
            for place, half_a, half_b in zip(found, halves[::2], halves[1::2], strict=True):
                vars(place[0]).setdefault("halves", {})[place[1]] = half_a, half_b
                self.given.append(place[0])

    def end(self, *_: Any) -> None:
        while self.given:
            vars(self.given.pop()).pop("halves", None)

    def follow(self, model: nn.Module) -> None:
        """Be there in every forward pass of `model`, also one that fails."""
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)


def adapted(*given: Any) -> torch.Tensor:
    """`_AdaptedLinear`'s y of (x, A, B, their 16-bit copies or None, W, bias, s, whether W is transposed, p, seed)."""
    return _AdaptedLinear.apply(*given)


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ, with gradients in x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, a: Any, b: Any, halves: Any, weight: Any, bias: Any, scale: float, transposed: bool, p: float,
        seed: int,
    ) -> torch.Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        small_a, small_b = (a.to(x.dtype), b.to(x.dtype)) if halves is None else halves
        w = weight if transposed else weight.T
        y = x.new_empty(*x.shape[:-1], w.shape[1])  # no view of another tensor, so that it may be changed in place
        flat = y.view(-1, w.shape[1])
        torch.mm(rows, w, out=flat) if bias is None else torch.addmm(bias, rows, w, out=flat)
        inner = _scaled(dropped(rows, p, seed), small_a.T, scale / (1 - p))
        flat.addmm_(inner, small_b.T)
        a_learns, b_learns = ctx.needs_input_grad[1:3]
        ctx.maker, kept = kept_for(x, rows) if a_learns else (None, ())
        ctx.save_for_backward(inner if b_learns else None, small_a, small_b, weight, *kept)
        ctx.settings = scale / (1 - p), transposed, p, seed, x.shape, a.dtype, b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        inner, a, b, weight, *kept = ctx.saved_tensors
        scale, transposed, p, seed, shape, a_type, b_type = ctx.settings
        g = grad.reshape(-1, grad.shape[-1])
        low = _scaled(g, b, scale)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g, weight.T if transposed else weight)
            if p:
                dx += dropped(torch.mm(low, a), p, seed)
            else:
                dx.addmm_(low, a)
            dx = dx.view(shape)
        if ctx.needs_input_grad[1]:
            da = _product(low.T, dropped(rows_from(ctx.maker, kept), p, seed), a_type)
        if inner is not None:
            db = _product(g.T, inner, b_type)
        return dx, da, db, None, None, None, None, None, None, None


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · a b in one kernel."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in `dtype`, which a GPU's product writes by itself."""
    widens = a.element_size() == 2 and dtype == torch.float32
    if a.is_cuda and widens and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
