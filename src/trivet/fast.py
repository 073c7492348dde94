"""Replaces parts of a transformers model by faster or leaner ones that compute the same: norms, activations and rotary
positions; on CPUs attention, dropout, frozen linear layers where the processor is slow at torch's products, and whole
layers (`trivet.fast_decoder`, `trivet.fast_encoder`).

Nothing is replaced on faith. Every part is compared with the model's own before it is used; what is not known stays.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from trivet.fast_attention import ATTENTION
from trivet.fast_decoder import decoder_forward
from trivet.fast_dropout import calls_dropout, dropout_layer, with_fast_dropout
from trivet.fast_encoder import encoder_forward
from trivet.fast_modules import close, drawn, eps
from trivet.kernels.activation import ACTIVATIONS, Activation, activate
from trivet.kernels.fused import fuses
from trivet.kernels.gate import silu_gate
from trivet.kernels.norm import layer_norm, rms_norm
from trivet.kernels.product import improves, linear
from trivet.kernels.rotation import rotate


def speed_up(model: Any) -> None:
    """Put the faster parts into a frozen transformers model, in place; its weights and what it computes stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and eps(module) is not None and _is_rms_norm(module):
            module.forward = types.MethodType(fused_norm, module)
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            module.forward = types.MethodType(_layer_norm, module)  # type: ignore[method-assign]
        elif (same := _activation(module)) is not None:
            module.forward = types.MethodType(functools.partial(_activated, function=same), module)
        elif _is_gated(module):
            module.forward = types.MethodType(_gated, module)
        elif (own := _rotating(module)) is not None:
            module.forward = types.MethodType(own, module)
        elif type(module) in (nn.Linear, Conv1D) and improves(module.weight) and _frozen(module):
            module.forward = types.MethodType(frozen_linear, module)
        elif type(module) is nn.Dropout:
            module.forward = types.MethodType(dropout_layer, module)  # type: ignore[method-assign]
        elif calls_dropout(module):
            module.forward = types.MethodType(with_fast_dropout(type(module).forward), module)
    for module in model.modules():  # of parts that are replaced by now
        whole = decoder_forward(module, fused_norm, _gated)
        whole = whole or encoder_forward(module, _layer_norm, dropout_layer, _activated)
        if whole is not None:
            module.forward = types.MethodType(whole, module)


def fused_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward pass of an RMS norm that was replaced."""
    if not _learns(hidden_states) or self.weight.requires_grad:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, eps(self))


def _layer_norm(self: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a layer norm that was replaced."""
    if not (_learns(input) and _frozen(self)):
        return type(self).forward(self, input)
    return layer_norm(input, self.weight, self.bias, self.eps)


def _learns(x: torch.Tensor) -> bool:
    """Whether a gradient reaches x: else results are to the bit as without adapter. torch.compile fuses by itself."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def _frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


def frozen_linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a linear layer that was replaced. A copy of it that learns has its own back."""
    if input.dtype != self.weight.dtype or not _frozen(self):
        return type(self).forward(self, input)
    return linear(input, self.weight.T if isinstance(self, Conv1D) else self.weight, self.bias)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes what `rms_norm` does (some multiply by 1 + weight)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.device.type not in ("cpu", "cuda"):
        return False  # FalconMamba's norms without weights have a buffer called so, of another size than what they norm
    x = drawn(weight, 4, len(weight))
    return close(module(x), rms_norm(x, weight, eps(module)))


# -- activations -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _activation(module: nn.Module) -> Activation | None:
    """Which of `ACTIVATIONS` a module computes; None where it is none of them."""
    if type(module) not in _ACTIVATIONS or any(True for _ in module.parameters()):
        return None
    x = torch.linspace(-12, 12, 1001, device="cpu")  # past what some of them clip
    found = module(x.clone())
    size = float(found.abs().max())  # torch's own GELU is off by 8e-7 at -3.3 on processors with AVX512
    return next((function for function in ACTIVATIONS if close(found, function(x), size)), None)


#: transformers' table of activations has classes, some of them with arguments.
_ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


def _activated(self: nn.Module, input: torch.Tensor, function: Activation) -> torch.Tensor:
    """The forward pass of an activation that was replaced."""
    if not _learns(input):
        return type(self).forward(self, input)
    return activate(input, function)


# -- gated activations and rotary positions ----------------------------------------------------------------------


#: All that the forward pass of a gated layer may speak of: a clamp or a dropout would not show in one comparison.
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn", "activation_fn"}


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether the module computes down(SiLU(gate(x)) · up(x)), as Llama's feed-forward layers do."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or not set(code.co_names) <= _GATED:
        return False
    weights = [getattr(getattr(module, f"{part}_proj", None), "weight", None) for part in ("gate", "up", "down")]
    if not all(isinstance(each, torch.Tensor) and each.ndim == 2 and each.is_floating_point() for each in weights):
        return False
    weight: Any = weights[0]
    if weight.is_meta:
        return True  # nothing is computed that could be wrong, and a plan counts what is kept
    x = drawn(weight, 1, 4, weight.shape[1]) * 4  # so large that another activation would show
    with torch.random.fork_rng([weight.device.index] if weight.is_cuda else []):  # an adapter's dropout draws
        theirs, ours = module(x), module.down_proj(silu_gate(module.gate_proj(x), module.up_proj(x)))
    return close(theirs, ours, float(theirs.abs().max()))


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a gated feed-forward layer that was replaced."""
    if not _learns(x):
        return type(self).forward(self, x)
    together = getattr(type(self.gate_proj), "gated", None)  # an adapted layer's
    found = None if together is None else together(x, (self.gate_proj, self.up_proj, self.down_proj))
    return self.down_proj(silu_gate(self.gate_proj(x), self.up_proj(x))) if found is None else found


#: What transformers' modules call to turn queries and keys, and how: (query, key, cos, sin).
_ROTATION = "apply_rotary_pos_emb"


@torch.no_grad()
def _rotating(module: nn.Module) -> Callable[..., Any] | None:
    """An attention layer's own forward pass with another rotation; None where it has none that is known.

    transformers' layers look the rotation up among their module's functions. A copy of the forward pass looks among
    others, so that nothing changes for other models.
    """
    forward, weight = type(module).forward, next(module.parameters(recurse=True), None)
    names: dict[str, Any] = getattr(forward, "__globals__", {})
    known = _ROTATION in names and _ROTATION in getattr(getattr(forward, "__code__", None), "co_names", ())
    width = getattr(module, "head_dim", None)
    if not known or not isinstance(width, int) or width % 2 or weight is None or not weight.is_floating_point():
        return None
    if weight.device.type != "cpu" and not fuses(weight):
        return None
    own = names[_ROTATION]
    if tuple(inspect.signature(own).parameters)[:4] != ("q", "k", "cos", "sin"):
        return None
    query, key = (drawn(weight, 2, 3, heads, width).transpose(1, 2) for heads in (4, 2))
    angles = drawn(weight, 1, 3, width // 2).repeat(1, 1, 2)
    given = query, key, angles.cos(), angles.sin()
    try:
        theirs = own(*given)
    except Exception:  # noqa: BLE001 - whatever else it is for: gpt-oss has angles of half a head
        return None
    if not all(close(t, o, 2.0) for t, o in zip(theirs, rotate(*given), strict=True)):
        return None

    def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        learns = _learns(q) or _learns(k)
        plain = rest or more or cos.shape[-1] != q.shape[-1] or cos.dim() != 3
        plain = plain or not cos.dtype == q.dtype == k.dtype
        return (own if plain or not learns else rotate)(q, k, cos, sin, *rest, **more)

    copy = types.FunctionType(
        forward.__code__, names | {_ROTATION: turned}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__

    @functools.wraps(forward)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch.compile looks for what it has compiled among the functions of the forward pass's own module
        return (forward if torch.compiler.is_compiling() else copy)(self, *args, **kwargs)

    return either
