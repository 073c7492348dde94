"""The adapted layer on GPUs, where starting a kernel costs the processor more time than many a small product takes.

`trivet.adapter.fast` makes 14 kernels of an adapter's forward and backward pass, this makes 6: all factors of a model
are cast together at the beginning of its forward pass, the scale is a factor of a product, and the factors' gradients
come out of their products in float32. What several layers read at once is read once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.adapter.adapted import Adapted
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
        self.siblings: list[Siblings] = []

    def begin(self, *_: Any) -> None:
        if not self.layers or not wanted(next(self.layers[0].parameters())):
            return
        for siblings in self.siblings:
            siblings.begin()
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


class Siblings:
    """Layers of one module that read the same tensor one after the other, as queries, keys and values are made of it.

    Which ones do is seen in a first pass of the whole model. From the next one on the first of them computes for all:
    their adapters' small products are one, and so is the sum of their gradients in what they read. Where a pass goes
    otherwise, each computes for itself, and in later ones too. (Nothing changes within a pass: under checkpointing it
    is computed again.)
    """

    def __init__(self) -> None:
        self.runs: list[list[Any]] | None = []
        self.following: dict[Any, list[Any]] = {}
        self.ready: dict[Any, tuple[Any, int, torch.Tensor]] = {}
        self.last: weakref.ref[torch.Tensor] | None = None
        self.otherwise = False

    def begin(self) -> None:
        """Before a pass of the whole model."""
        self._leave()
        if self.otherwise:
            self.following = {}
        elif self.runs:
            self.following = {run[0]: run[1:] for run in self.runs if len(run) > 1}
            self.runs = self.last = None

    def made(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """What was computed for a layer together with one before."""
        known, version, y = self.ready.pop(layer, (None, 0, None))
        if known is not None and (known() is not x or version != _version(x)):
            self.otherwise, y = True, None
        return y

    def others(self, layer: Any, x: torch.Tensor) -> list[Any]:
        """The layers to compute together with one, whose turn it is."""
        if self.runs is not None and not any(layer in run for run in self.runs):
            if self.last is None or self.last() is not x:
                self.runs.append([])
                self.last = weakref.ref(x)
            self.runs[-1].append(layer)
        self._leave()
        return self.following.get(layer, [])

    def _leave(self) -> None:
        if self.ready:  # nobody has come for it
            self.otherwise = True
            self.ready.clear()

    def keep(self, layers: Sequence[Any], x: torch.Tensor, results: Sequence[torch.Tensor]) -> None:
        """Until the layers' turn comes."""
        for layer, y in zip(layers, results, strict=True):
            self.ready[layer] = weakref.ref(x), _version(x), y


def _version(x: torch.Tensor) -> int:
    """How often x was changed in place, which inference mode does not count."""
    return 0 if x.is_inference() else x._version


#: A layer's A and B in 16 bits, where they have been made.
Half = tuple[torch.Tensor, torch.Tensor] | None


def adapted(x: torch.Tensor, layers: Sequence[Adapted], halves: Sequence[Half], p: float = 0.0, seed: int = 0) -> Any:
    """y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ of each layer, of one scale s; with gradients in x, A and B alone."""
    tensors = [each for layer in layers for each in layer[:2]]
    return _AdaptedLinear.apply(x, layers, halves, p, seed, *tensors)


class _AdaptedLinear(torch.autograd.Function):
    """The adapters' parts are written first, and the large products added to them: one rounding of the sum, and what
    is read beside a product's own tensors is read while it computes."""

    @staticmethod
    def forward(ctx: Any, x: Any, layers: Any, halves: Any, p: float, seed: int, *factors: Any) -> Any:
        rows, scale = x.reshape(-1, x.shape[-1]), layers[0].scale / (1 - p)
        made = zip(layers, halves, strict=True)
        small = [(one.a.to(x.dtype), one.b.to(x.dtype)) if half is None else half for one, half in made]
        a = small[0][0] if len(small) == 1 else torch.cat([each for each, _ in small])
        ranks = [len(each) for each, _ in small]
        inner = _scaled(dropped(rows, p, seed), a.T, scale)
        results = []
        for one, (_, b), part in zip(layers, small, inner.split(ranks, 1), strict=True):
            y = x.new_empty(*x.shape[:-1], one.w.shape[1])  # no view of another tensor: it may be changed in place
            flat = y.view(-1, one.w.shape[1])
            torch.mm(part, b.T, out=flat) if one.bias is None else torch.addmm(one.bias, part, b.T, out=flat)
            flat.addmm_(rows, one.w)
            results.append(y)
        a_learns = any(ctx.needs_input_grad[5::2])
        ctx.maker, kept = kept_for(x, rows) if a_learns else (None, ())
        weights = [one.weight for one in layers]
        ctx.save_for_backward(inner, a, *(b for _, b in small), *weights, *kept)
        ctx.settings = ranks, [(one.transposed, one.a.dtype, one.b.dtype) for one in layers]
        ctx.of_adapter, ctx.shape = (scale, p, seed), x.shape
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        count = len(grads)
        inner, a, *saved = ctx.saved_tensors
        bs, weights, kept = saved[:count], saved[count : 2 * count], saved[2 * count :]
        ranks, settings = ctx.settings
        scale, p, seed = ctx.of_adapter
        gs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        low = inner.new_empty(inner.shape)
        for g, b, part in zip(gs, bs, low.split(ranks, 1), strict=True):
            torch.addmm(part, g, b, beta=0, alpha=scale, out=part)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(low, a)
            if p:
                dx = dropped(dx, p, seed)
            for g, weight, (transposed, *_) in zip(gs, weights, settings, strict=True):
                dx.addmm_(g, weight.T if transposed else weight)
            dx = dx.view(ctx.shape)
        da: Sequence[Any] = [None] * count
        if any(ctx.needs_input_grad[5::2]):
            da = _product(low.T, dropped(rows_from(ctx.maker, kept), p, seed), settings[0][1]).split(ranks)
        found: list[Any] = []
        for i, (g, part) in enumerate(zip(gs, inner.split(ranks, 1), strict=True)):
            a_learns, b_learns = ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i]
            found += [da[i] if a_learns else None, _product(g.T, part, settings[i][2]) if b_learns else None]
        return dx, None, None, None, None, *found


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · a b in one kernel."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in `dtype`, which a GPU's product writes by itself."""
    widens = a.element_size() == 2 and dtype == torch.float32
    if a.is_cuda and widens and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
