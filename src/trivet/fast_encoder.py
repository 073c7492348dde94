"""Encoder layers whose forward pass is BERT's, as one function where all that is in them is known to it.

As `trivet.fast_decoder` does for decoder layers: what is not known, for a batch or for good, the parts compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from trivet.adapter.encoder import Dropped, LayerNorm, Shape
from trivet.fast_attention import ATTENTION, rows_seen
from trivet.fast_modules import as_the_parts, drawn, forwards, hooked, names, own_pass, whole
from trivet.kernels import compiled, native
from trivet.kernels.row_attention import fits

#: The modules in a layer that have a forward pass of their class, and all that it speaks of.
_OWN = {
    "": {
        *("ValueError", "apply_chunking_to_forward", "attention", "chunk_size_feed_forward", "crossattention"),
        *("feed_forward_chunk", "hasattr", "is_decoder", "seq_len_dim"),
    },
    "attention": {"is_cross_attention", "output", "self"},
    "attention.self": {
        *("ALL_ATTENTION_FUNCTIONS", "EncoderDecoderCache", "_attn_implementation", "attention_head_size", "config"),
        *("contiguous", "dropout", "eager_attention_forward", "get_interface", "isinstance", "key", "layer_idx", "p"),
        *("query", "reshape", "scaling", "self_attention_cache", "shape", "training", "transpose", "update", "value"),
        "view",
    },
    "attention.output": {"LayerNorm", "dense", "dropout"},
    "intermediate": {"dense", "intermediate_act_fn"},
    "output": {"LayerNorm", "dense", "dropout"},
}
#: Those whose forward passes have been replaced; norms, dropouts and the activation, and what replaced each kind.
_REPLACED = (
    *("attention.output.LayerNorm", "output.LayerNorm", "attention.output.dropout", "output.dropout"),
    "intermediate.intermediate_act_fn",
)
_PROJECTIONS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)


def encoder_forward(layer: Any, norm: Any, dropout: Any, activated: Any) -> Callable[..., torch.Tensor] | None:
    """A forward pass for such a layer, which takes it first; None for others.

    Args:
        norm, dropout, activated: the forward passes that its norms, dropouts and activation have, if they have been
            replaced; the last with `function`.
    """
    if names(type(layer).forward) != _OWN[""]:
        return None
    try:
        own = [layer.get_submodule(name) for name in _OWN]
        parts = [layer.get_submodule(name) for name in (*_REPLACED, *_PROJECTIONS)]
    except AttributeError:
        return None
    if any(names(type(one).forward) != named for one, named in zip(own, _OWN.values(), strict=True)):
        return None
    given, chunk = forwards(parts[: len(_REPLACED)]), names(layer.feed_forward_chunk)
    if given != [norm, norm, dropout, dropout, activated] or chunk != {"intermediate", "output"}:
        return None
    return functools.partial(_encoded, known=given) if _same(layer, given) else None


def _same(layer: Any, known: Any) -> bool:
    """Whether one function gives what the parts give; False too where it doesn't take them."""
    weight = layer.output.LayerNorm.weight
    if weight is None or weight.device.type != "cpu":
        return False
    x = drawn(weight, 2, 24, len(weight)).requires_grad_()
    return as_the_parts(layer, lambda: _together(layer, x, None, known), lambda: own_pass(layer)(layer, x))


def _encoded(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    *,
    known: Any,
    **given: Any,
) -> torch.Tensor:
    """The forward pass of an encoder layer that was replaced: transformers' arguments."""
    given |= {"attention_mask": attention_mask, "encoder_hidden_states": encoder_hidden_states}
    inside: Callable[..., torch.Tensor] = functools.partial(_whole_or_parts, self, known=known, **given)
    return whole(self, inside, hidden_states, given.get("past_key_values") is not None)


def _whole_or_parts(self: Any, x: torch.Tensor, known: Any, **given: Any) -> torch.Tensor:
    asked = {name for name, value in given.items() if value is not None and value is not False}
    y = _together(self, x, given["attention_mask"], known) if asked <= {"attention_mask"} else None
    return own_pass(self)(self, x, **given) if y is None else y  # type: ignore[no-any-return]


def _together(layer: Any, x: torch.Tensor, mask: torch.Tensor | None, known: Any) -> torch.Tensor | None:
    """The layer's result by one function; None where that doesn't take what it is given, or a part has been changed."""
    if not torch.is_grad_enabled() or not compiled.serves(x) or not x.is_contiguous():
        return None
    attention, intermediate, output = (layer._modules[name] for name in ("attention", "intermediate", "output"))
    inner, added = attention._modules["self"], attention._modules["output"]
    norms = added._modules["LayerNorm"], output._modules["LayerNorm"]
    dropouts = added._modules["dropout"], output._modules["dropout"]
    active = intermediate._modules["intermediate_act_fn"]
    parts = *norms, *dropouts, active
    around = attention, inner, added, intermediate, output
    if forwards(parts) != known or any(hooked(part) for part in (*around, *parts)):
        return None
    if layer.chunk_size_feed_forward or layer.is_decoder or attention.is_cross_attention or inner.is_causal:
        return None
    if inner.config._attn_implementation != ATTENTION:
        return None
    for norm in norms:
        affine = norm.weight, norm.bias
        if any(w is None or w.requires_grad or w.dtype != x.dtype or len(w) != x.shape[-1] for w in affine):
            return None
    shares = {dropout.p if dropout.training else 0.0 for dropout in dropouts}
    function = active.__dict__["forward"].__func__.keywords["function"]
    if len(shares) > 1 or max(shares) == 1:
        return None
    batch, length, _ = x.shape
    rows = rows_seen(batch, length, mask, causal=False)
    projections = [
        *(inner._modules[name] for name in ("query", "key", "value")),
        *(part._modules["dense"] for part in (added, intermediate, output)),
    ]
    together = getattr(type(projections[0]), "encoded", None)  # an adapted layer's
    width = inner.attention_head_size
    if rows is None or together is None or not fits(x[..., :width], inner.num_attention_heads, rows):
        return None
    p, share = inner.dropout.p if inner.training else 0.0, shares.pop()
    # in the order in which the parts draw theirs
    seeds = [int(torch.randint(2**62, ())) if chance else 0 for chance in (p, share, share)]
    weights = native.Weights(inner.scaling, p, seeds[0])
    shape = Shape(width, rows, weights, Dropped(share, (seeds[1], seeds[2])), function)
    given = [LayerNorm(norm.weight, norm.bias, norm.eps) for norm in norms]
    return together(x, given, shape, projections)  # type: ignore[no-any-return]
