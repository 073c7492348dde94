"""Replaces parts of a transformers model by faster ones that compute the same: attention on CPUs and RMS norms.

Nothing is replaced on faith. Every norm is compared with the model's own before it is used; what is not known stays.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trivet.kernels.attention import attention
from trivet.kernels.norm import rms_norm

#: What the attention is called in transformers' table.
ATTENTION = "trivet"


def speed_up(model: Any) -> None:
    """Put the faster parts into a frozen transformers model, in place; its weights and what it computes stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _eps(module) is not None and _is_rms_norm(module):
            module.forward = types.MethodType(fused_norm, module)


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
    """transformers' signature. On GPUs, without gradient, and where an argument is unknown, its own SDPA."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    learned = attention_mask is not None and attention_mask.requires_grad
    ours = query.device.type == "cpu" and torch.is_grad_enabled() and not learned
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


def _eps(norm: Any) -> Any:
    """The norm's epsilon, by whichever name it has it; None where it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes what `rms_norm` does (some multiply by 1 + weight)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight.device.type != "cpu":
        return False
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    theirs, ours = module(x), rms_norm(x, weight, _eps(module))
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance)
