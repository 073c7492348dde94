"""PEFT's LoRA linear layer as one autograd function: the same numbers with less memory moved.

PEFT's layer casts x to float32, keeps that copy for the backward pass, and makes four temporaries as large as x or y.
Here the small factors are cast to x's type instead (they stay float32 masters, and their gradients come back in
float32), x is kept once and as it is, or made again if it says how (`trivet.kernels.recipe`), products are added in
place, and dropout's choice is drawn again, not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from trivet.adapter import fast_gpu
from trivet.adapter.adapted import Adapted
from trivet.adapter.decoder import adapted_decoder
from trivet.adapter.encoder import adapted_encoder
from trivet.adapter.gated import adapted_gate
from trivet.fast import frozen_linear
from trivet.fast_modules import hooked
from trivet.four_bit import FourBitLinear
from trivet.kernels import low_rank, tile_product
from trivet.kernels.dropout import dropped
from trivet.kernels.heap import empty
from trivet.kernels.product import addmm_, keep_apart, made, mm
from trivet.kernels.recipe import kept_for, rows_from


class MergingLinear(lora.Linear):  # type: ignore[misc]
    """`lora.Linear` that merges into an ordinary layer where its base layer's weight is in 4 bits."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        if isinstance(base, FourBitLinear):
            self.base_layer = base.plain()
            self.fan_in_fan_out = isinstance(self.base_layer, Conv1D)
        super().merge(*args, **kwargs)


class FastLinear(MergingLinear):
    """With a fused pass wherever one unmerged plain adapter is on; else PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._single(x, args, kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        part = self._part(name)
        if fast_gpu.wanted(x) and isinstance(part.weight, torch.Tensor):
            return self._on_gpu(x, name, part)
        p = self._dropped(name)
        seed = int(torch.randint(2**62, ())) if p else 0
        settings = part.scale, part.transposed, p, seed
        return _AdaptedLinear.apply(x, part.a, part.b, part.weight, part.bias, *settings)

    def _on_gpu(self, x: torch.Tensor, name: str, part: Adapted) -> torch.Tensor:
        """With the layers that read x next, where they are alike."""
        siblings: fast_gpu.Siblings | None = vars(self).get("siblings")
        if siblings is not None and (y := siblings.made(self, x)) is not None:
            return y
        p = self._dropped(name)
        seed = int(torch.randint(2**62, ())) if p else 0
        others = [] if siblings is None or p else siblings.others(self, x)
        parts: list[Any] = [part, *(each._like(x, name, part) for each in others)]
        if None in parts:
            others, parts = [], [part]
        halves = [vars(layer).get("halves", {}).get(name) for layer in (self, *others)]
        y, *rest = fast_gpu.adapted(x, parts, halves, p, seed)
        if siblings is not None:
            siblings.keep(others, x, rest)
        return y  # type: ignore[no-any-return]

    def _like(self, x: torch.Tensor, name: str, other: Adapted) -> Adapted | None:
        """The part, if one function computes it with the other."""
        if self._single(x, (), {}) != name or self._dropped(name):
            return None
        part = self._part(name)
        alike = part.scale == other.scale and part.learns == other.learns and part.a.dtype == other.a.dtype
        return part if alike and isinstance(part.weight, torch.Tensor) else None

    @staticmethod
    def gated(x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor | None:
        """`gated.adapted_gate` of such layers; None where it doesn't take them."""
        parts = _plain_parts(x, layers)
        return None if parts is None else adapted_gate(x, parts)

    @staticmethod
    def decoded(x: torch.Tensor, norms: Any, sight: Any, layers: Sequence[nn.Module]) -> torch.Tensor | None:
        """`decoder.adapted_decoder` of such layers; None where it doesn't take them."""
        parts = _plain_parts(x, layers)
        return None if parts is None else adapted_decoder(x, norms, sight, parts)

    @staticmethod
    def encoded(x: torch.Tensor, norms: Any, shape: Any, layers: Sequence[nn.Module]) -> torch.Tensor | None:
        """`encoder.adapted_encoder` of such layers; None where it doesn't take them."""
        parts = _plain_parts(x, layers)
        return None if parts is None else adapted_encoder(x, norms, shape, parts)

    def _part(self, name: str) -> Adapted:
        parts: Any = self._modules  # a module's attributes are looked up slowly, and a model has hundreds of layers
        base = parts["base_layer"]
        a, b = parts["lora_A"]._modules[name].weight, parts["lora_B"]._modules[name].weight
        weight = base.weight_in if type(base) is FourBitLinear else base._parameters["weight"]
        learns = a.requires_grad, b.requires_grad
        return Adapted(a, b, weight, base._parameters["bias"], self.scaling[name], type(base) is Conv1D, learns)

    def _dropped(self, name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def _single(self, x: torch.Tensor, args: Any, kwargs: Any) -> str | None:
        """The adapter to apply, where the fused pass computes what PEFT's would."""
        if args or kwargs or self.disable_adapters or self.merged:
            return None
        parts: Any = self._modules
        base = parts["base_layer"]
        on = [name for name in self.active_adapters if name in parts["lora_A"]._modules]
        if len(on) != 1 or on[0] in self.lora_variant or type(base) not in _BASES:
            return None
        weight, bias = base._parameters.get(_BASES[type(base)]), base._parameters.get("bias")
        if weight is None or x.dtype != weight.dtype:
            return None
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        biased = getattr(parts["lora_B"]._modules[on[0]], "bias", None) is not None
        changed = hooked(base) or _replaced(base)
        device = x.device.type
        able = torch.amp.is_autocast_available(device)  # not on the meta device
        cast = able and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype
        return None if not frozen or biased or changed or cast else on[0]


#: Layers that the fused pass knows, and the parameter that says in which type each computes.
_BASES = {nn.Linear: "weight", Conv1D: "weight", FourBitLinear: "like"}


def _plain_parts(x: torch.Tensor, layers: Sequence[Any]) -> list[Adapted] | None:
    """The layers' parts, where larger functions take all of them: no hook, no dropout, and `low_rank` serves."""
    if fast_gpu.wanted(x) or not tile_product.works(x):
        return None
    parts = []
    rows = x.reshape(-1, x.shape[-1])
    for layer in layers:
        name = layer._single(x, (), {}) if type(layer) is FastLinear and not hooked(layer) else None
        if name is None or layer._dropped(name):
            return None
        parts.append(layer._part(name))
    return parts if all(part.serves(rows) for part in parts) else None


def _replaced(base: nn.Module) -> bool:
    """Whether somebody else has given the layer a forward pass of its own."""
    forward = vars(base).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not frozen_linear


def make_fast(model: nn.Module) -> None:
    """Give every plain LoRA linear layer of a PEFT model the fused pass."""
    layers = [module for module in model.modules() if type(module) in (lora.Linear, MergingLinear)]
    for layer in layers:
        layer.__class__ = FastLinear
    halves = fast_gpu.Halves(layers)
    for module in model.modules():
        if len(together := [child for child in module.children() if isinstance(child, FastLinear)]) > 1:
            halves.siblings.append(siblings := fast_gpu.Siblings())
            for layer in together:
                layer.siblings = siblings
    halves.follow(getattr(model, "base_model", model))


def make_merging(model: nn.Module) -> None:
    """Let every plain LoRA linear layer of a PEFT model merge into a base layer in 4 bits."""
    for layer in [module for module in model.modules() if type(module) is lora.Linear]:
        layer.__class__ = MergingLinear


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ, with gradients in x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, a: Any, b: Any, weight: Any, bias: Any, scale: float, transposed: bool, p: float, seed: int
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        saved, ctx.make_weight = keep_apart(weight)
        w = made(weight, x.dtype) if transposed else made(weight, x.dtype).T
        y = empty(*x.shape[:-1], w.shape[1], like=x)  # no view of another tensor, so that it may be changed in place
        flat = y.view(-1, w.shape[1])
        ctx.at_once = low_rank.serves(rows, w, a, b, bias)
        if ctx.at_once:
            small_a, small_b = a, b
            inner = low_rank.product(rows, dropped(rows, p, seed), w, a, b, scale / (1 - p), bias, flat)
        else:
            mm(rows, w, bias, out=flat)
            small_a, small_b = a.to(x.dtype), (b * (scale / (1 - p))).to(x.dtype)
            inner = mm(dropped(rows, p, seed), small_a.T)
            addmm_(flat, inner, small_b.T)
        a_learns, b_learns = ctx.needs_input_grad[1:3]
        ctx.maker, kept = kept_for(x, rows) if a_learns else (None, ())
        ctx.save_for_backward(inner if b_learns else None, small_a, small_b, saved, *kept)
        ctx.settings = scale / (1 - p), transposed, p, seed, x.shape, a.dtype, b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        inner, a, b, saved, *kept = ctx.saved_tensors
        scale, transposed, p, seed, shape, a_type, b_type = ctx.settings
        g = grad.reshape(-1, grad.shape[-1])
        x = dropped(rows_from(ctx.maker, kept), p, seed) if ctx.needs_input_grad[1] else None
        dx = low_dx = w = da = db = None
        if ctx.needs_input_grad[0]:
            weight = made(ctx.make_weight or saved, g.dtype)
            w = weight if transposed else weight.T
        if ctx.at_once:
            if w is not None:
                dx = empty(len(g), len(w), like=g)
                low_dx = torch.empty_like(dx) if p else None
            da, db = low_rank.backward(g, x, w, inner, a, b, scale, dx, low_dx)
        else:
            low = mm(g, b)
            if w is not None:
                dx = mm(g, w.T)
                low_dx = mm(low, a) if p else None
            if dx is not None and not p:
                addmm_(dx, low, a)
            da = None if x is None else mm(low.T, x).to(a_type)
            db = None if inner is None else mm(g.T, inner).to(b_type).mul_(scale)
        if dx is not None and low_dx is not None:
            dx += dropped(low_dx, p, seed)
        return None if dx is None else dx.view(shape), da, db, None, None, None, None, None, None
