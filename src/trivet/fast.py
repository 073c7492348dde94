"""Replaces parts of a transformers model by faster ones that compute the same: norms; on CPUs attention, dropout, and
frozen linear layers whose 16-bit type the processor can't multiply; on GPUs gated activations and rotary positions.

Nothing is replaced on faith. Every part is compared with the model's own before it is used; what is not known stays.
Dropout drops the same share, but other entries than torch's would for the same seed.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from trivet.kernels.attention import attention
from trivet.kernels.dropout import dropout as drop
from trivet.kernels.fused import fuses
from trivet.kernels.gate import silu_gate
from trivet.kernels.norm import rms_norm
from trivet.kernels.product import linear, widens
from trivet.kernels.rotation import rotate

#: What the attention is called in transformers' table.
ATTENTION = "trivet"


def speed_up(model: Any) -> None:
    """Put the faster parts into a frozen transformers model, in place; its weights and what it computes stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _eps(module) is not None and _is_rms_norm(module):
            module.forward = types.MethodType(fused_norm, module)
        elif _is_gated(module):
            module.forward = types.MethodType(_gated, module)
        elif (own := _rotating(module)) is not None:
            module.forward = types.MethodType(own, module)
        elif type(module) in (nn.Linear, Conv1D) and widens(module.weight) and _frozen(module):
            module.forward = types.MethodType(widened_linear, module)
        elif type(module) is nn.Dropout:
            module.forward = types.MethodType(_dropout_layer, module)  # type: ignore[method-assign]
        elif _calls_dropout(module):
            module.forward = types.MethodType(_with_fast_dropout(type(module).forward), module)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature. On GPUs, where an argument is unknown, and mostly without gradient, its own SDPA."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    learned = attention_mask is not None and attention_mask.requires_grad
    wanted = torch.is_grad_enabled() or (widens(query) and query.shape[2] > 1)
    ours = query.device.type == "cpu" and wanted and not learned
    if not ours or kwargs.get("position_bias") is not None or (causal and query.shape[2] != key.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None and len(query) == 1:
        return _packed(query, key, value, borders, scaling, dropout), None
    return attention(query, key, value, attention_mask, causal=causal, scale=scaling, dropout=dropout), None


def _packed(query: Any, key: Any, value: Any, borders: torch.Tensor, scale: float | None, dropout: float) -> Any:
    """Causal attention within rows that lie behind each other: each to itself in a padded batch, and back."""
    lengths = borders.diff().long()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    places = torch.where(inside, borders[:-1, None] + torch.arange(inside.shape[1]), 0)
    rows = (t[0][:, places].transpose(0, 1) for t in (query, key, value))
    return attention(*rows, causal=True, scale=scale, dropout=dropout)[inside][None]


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def fused_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward pass of an RMS norm that was replaced."""
    learns = torch.is_grad_enabled() and hidden_states.requires_grad  # else it is to the bit as without an adapter
    if not learns or self.weight.requires_grad:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, _eps(self))


def _frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


def widened_linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a linear layer that was replaced. A copy of it that learns has its own back."""
    if input.dtype != self.weight.dtype or not _frozen(self):
        return type(self).forward(self, input)
    return linear(input, self.weight.T if isinstance(self, Conv1D) else self.weight, self.bias)


def _eps(norm: Any) -> Any:
    """The norm's epsilon, by whichever name it has it; None where it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes what `rms_norm` does (some multiply by 1 + weight)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight.device.type not in ("cpu", "cuda"):
        return False
    x = _drawn(weight, 4, len(weight))
    return _close(module(x), rms_norm(x, weight, _eps(module)))


def _drawn(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Random numbers, the same whatever torch's global state, of another tensor's type and on its device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _close(theirs: torch.Tensor, ours: torch.Tensor, size: float = 1.0) -> bool:
    """Whether two results, as large as `size`, are the same but for rounding."""
    tolerance = 4 * torch.finfo(theirs.dtype).eps
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance * size)


# -- gated activations and rotary positions, on GPUs -------------------------------------------------------------


#: All that the forward pass of a gated layer may speak of: a clamp or a dropout would not show in one comparison.
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn", "activation_fn"}


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether the module computes down(SiLU(gate(x)) · up(x)), as Llama's feed-forward layers do."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or not set(code.co_names) <= _GATED:
        return False
    weights = [getattr(getattr(module, f"{part}_proj", None), "weight", None) for part in ("gate", "up", "down")]
    if not all(isinstance(weight, torch.Tensor) and weight.ndim == 2 and fuses(weight) for weight in weights):
        return False
    weight: Any = weights[0]
    x = _drawn(weight, 1, 4, weight.shape[1]) * 4  # so large that another activation would show
    with torch.random.fork_rng([weight.device.index] if weight.is_cuda else []):  # an adapter's dropout draws
        theirs, ours = module(x), module.down_proj(silu_gate(module.gate_proj(x), module.up_proj(x)))
    return _close(theirs, ours, float(theirs.abs().max()))


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a gated feed-forward layer that was replaced."""
    if not (torch.is_grad_enabled() and x.requires_grad and fuses(x)):
        return type(self).forward(self, x)
    return self.down_proj(silu_gate(self.gate_proj(x), self.up_proj(x)))


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
    if not known or not isinstance(width, int) or width % 2 or weight is None or not fuses(weight):
        return None
    own = names[_ROTATION]
    if tuple(inspect.signature(own).parameters)[:4] != ("q", "k", "cos", "sin"):
        return None
    query, key = (_drawn(weight, 2, 3, heads, width).transpose(1, 2) for heads in (4, 2))
    angles = _drawn(weight, 1, 3, width // 2).repeat(1, 1, 2)
    given = query, key, angles.cos(), angles.sin()
    try:
        theirs = own(*given)
    except Exception:  # noqa: BLE001 - whatever else it is for: gpt-oss has angles of half a head
        return None
    if not all(_close(t, o, 2.0) for t, o in zip(theirs, rotate(*given), strict=True)):
        return None

    def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        plain = rest or more or cos.shape[-1] != q.shape[-1] or cos.dim() != 3 or not fuses(q)
        plain = plain or not cos.dtype == q.dtype == k.dtype
        return (own if plain or not learns else rotate)(q, k, cos, sin, *rest, **more)

    copy = types.FunctionType(
        forward.__code__, names | {_ROTATION: turned}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward)


# -- dropout ---------------------------------------------------------------------------------------------------


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout`, by its signature."""
    here = input.device.type in ("cpu", "meta")  # without data, a plan counts the byte that GPUs keep, too
    if training and 0 < p < 1 and not inplace and here and input.is_floating_point():
        return drop(input, p)
    return nn.functional.dropout(input, p, training, inplace)


def _dropout_layer(self: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a dropout layer that was replaced."""
    return _dropout(input, self.p, self.training, self.inplace)


def _calls_dropout(module: nn.Module) -> bool:
    """Whether a module's own forward pass calls `nn.functional.dropout`, as BART's does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {"functional", "dropout"} <= {*code.co_names}


class _FastDropout(TorchFunctionMode):
    """While it is on, `nn.functional.dropout` is `_dropout`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_dropout if func is nn.functional.dropout else func)(*args, **(kwargs or {}))


def _computed_again(module: nn.Module) -> bool:
    """Whether gradient checkpointing computes the module, or a part of it, anew in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


#: Whether an outer module has switched it on: twice would cost twice.
_ON: ContextVar[bool] = ContextVar("fast dropout", default=False)


def _with_fast_dropout(own: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that finds the faster dropout while training.

    Not under gradient checkpointing, which would compute a layer again without passing here, and draw otherwise.
    """

    @functools.wraps(own)  # generation reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or _ON.get() or _computed_again(self):
            return own(self, *args, **kwargs)
        before = _ON.set(True)
        try:
            with _FastDropout():
                return own(self, *args, **kwargs)
        finally:
            _ON.reset(before)

    return forward
