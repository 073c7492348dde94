"""Decoder layers whose forward pass is Llama's, as one function where all that is in them is known to it.

Where it is not, for a batch or for good, the layer's own forward pass calls its parts, as `trivet.fast` has replaced
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from trivet.adapter.decoder import Norm, Sight
from trivet.fast_attention import ATTENTION, rows_seen
from trivet.fast_modules import as_the_parts, drawn, eps, forwards, hooked, names, own_pass, whole
from trivet.kernels import compiled, native
from trivet.kernels.row_attention import fits

#: A decoder layer's parts, and all that its forward pass may speak of: a factor might not show in one comparison.
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
#: What attention's may speak of; a sliding window is in the mask.
_ATTENTION = {
    *("ALL_ATTENTION_FUNCTIONS", "apply_rotary_pos_emb", "attention_dropout", "_attn_implementation", "config"),
    *("contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim", "k_proj", "layer_idx", "o_proj"),
    *("q_proj", "reshape", "scaling", "shape", "sliding_window", "training", "transpose", "update", "v_proj", "view"),
}
_OF_ATTENTION, _OF_MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
#: What the model may tell its layers: no cache.
_ARGUMENTS = {
    *("attention_mask", "position_ids", "use_cache", "position_embeddings"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


def decoder_forward(layer: Any, norm: Any, gate: Any) -> Callable[..., torch.Tensor] | None:
    """A forward pass for such a layer, which takes it first; None for others.

    Args:
        norm, gate: the forward passes that its norms and its feed-forward layer have, if they have been replaced.
    """
    parts = [getattr(layer, name, None) for name in _PARTS]
    given = forwards(parts)
    replaced = given[0] is given[2] is norm and given[3] is gate and given[1]
    if names(type(layer).forward) != set(_PARTS) or not replaced:
        return None
    attention: Any = parts[1]
    if not names(type(attention).forward) <= _ATTENTION:
        return None
    return functools.partial(_decoded, known=given) if _same(layer, given) else None


def _same(layer: Any, known: Any) -> bool:
    """Whether one function gives what the parts give; False too where it doesn't take them."""
    weight, width = layer.input_layernorm.weight, layer.self_attn.head_dim
    if weight.device.type != "cpu":
        return False
    x, angles = drawn(weight, 2, 24, len(weight)).requires_grad_(), drawn(weight, 1, 24, width // 2).repeat(1, 1, 2)
    turns = angles.cos(), angles.sin()
    return as_the_parts(
        layer,
        lambda: _together(layer, x, None, turns, None, known),
        lambda: own_pass(layer)(layer, x, position_embeddings=turns),
    )


def _decoded(self: Any, hidden_states: torch.Tensor, *, known: Any, **given: Any) -> torch.Tensor:
    """The forward pass of a decoder layer that was replaced: transformers' arguments."""
    inside: Callable[..., torch.Tensor] = functools.partial(_whole_or_parts, self, known=known, **given)
    return whole(self, inside, hidden_states, given.get("past_key_values") is not None)


def _whole_or_parts(self: Any, x: torch.Tensor, known: Any, **given: Any) -> torch.Tensor:
    asked = {name for name, value in given.items() if value is not None and value is not False}
    if asked <= _ARGUMENTS and "position_embeddings" in asked:
        borders = given.get("cu_seq_lens_q")
        y = _together(self, x, given.get("attention_mask"), given["position_embeddings"], borders, known)
        if y is not None:
            return y
    return own_pass(self)(self, x, **given)  # type: ignore[no-any-return]


def _together(
    layer: Any, x: torch.Tensor, mask: torch.Tensor | None, turns: Any, borders: torch.Tensor | None, known: Any
) -> torch.Tensor | None:
    """The layer's result by one function; None where that doesn't take what it is given, or a part has been changed."""
    if not torch.is_grad_enabled() or not compiled.serves(x) or not x.is_contiguous():
        return None
    inside = layer._modules
    parts = [inside[name] for name in _PARTS]
    if forwards(parts) != known or any(hooked(part) for part in parts):
        return None
    first, attention, second, mlp = parts
    if not getattr(attention, "is_causal", True):
        return None
    cos, sin = turns
    plain = cos.dtype == sin.dtype == x.dtype and cos.dim() == 3 and cos.shape[-1] == attention.head_dim
    if not plain or not native.tiled(cos) or attention.config._attn_implementation != ATTENTION:
        return None
    if any(norm.weight.requires_grad or norm.weight.dtype != x.dtype for norm in (first, second)):
        return None
    rows = rows_seen(x.shape[0], x.shape[1], mask, borders)
    projections = [attention._modules[name] for name in _OF_ATTENTION] + [mlp._modules[name] for name in _OF_MLP]
    together = getattr(type(projections[0]), "decoded", None)  # an adapted layer's
    if rows is None or together is None:
        return None
    if not fits(cos, projections[1].out_features // attention.head_dim, rows):
        return None
    dropout = attention.attention_dropout if attention.training else 0.0
    seed = int(torch.randint(2**62, ())) if dropout else 0
    sight = Sight(cos.contiguous(), sin.contiguous(), rows, native.Weights(attention.scaling, dropout, seed))
    norms = [Norm(norm.weight, eps(norm)) for norm in (first, second)]
    return together(x, norms, sight, projections)  # type: ignore[no-any-return]
