"""The output head of a language model, at the positions that are asked for and nowhere else.

A transformers model computes the logits of every position, whatever they are for. Here its head is held back during
the forward pass: what it would have read is kept, and only supervised positions go through it afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from trivet.kernels.cross_entropy import Head, linear_cross_entropy
from trivet.kernels.gather import Unpadded

Batch = Mapping[str, Any]
#: What a model makes of a batch; and what calls it.
Compute = Callable[[Batch], torch.Tensor]
Call = Callable[[Compute, Batch], torch.Tensor]


def directly(compute: Compute, batch: Batch) -> torch.Tensor:
    """compute(batch)."""
    return compute(batch)


#: By model: its head's layer, scale and cap, and whether the model's own logits are what these say.
_known: WeakKeyDictionary[nn.Module, tuple[tuple[nn.Module, float, float | None], bool]] = WeakKeyDictionary()


def supervised_losses(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    chosen: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    call: Call = directly,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every chosen position.

    Args:
        model: a language model of transformers, adapted or not, wrapped for distribution or not.
        batch: its inputs, without labels.
        chosen: (n,), the positions whose logits are wanted, of a batch's rows behind each other: each once.
        targets: (n,), the token that each of them should give.
        z_loss: see `linear_cross_entropy`.
        call: calls what gives the hidden states of a batch; a `trivet.graphs.Recorder`, for one.

    Returns:
        losses in nats (n,) float32, and whether the target was the likeliest token (n,) bool.
    """
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    if layer is None:
        return _plain(model(**batch).logits.flatten(0, 1)[chosen], targets, z_loss)
    head = _head(inner, layer, batch)
    if head is None:  # an adapted or trained head, or one with arithmetic of its own: the model's, at those positions
        own = layer.forward
        with _instead(layer, lambda hidden: own(hidden.flatten(0, 1)[chosen][None])):
            logits = model(**batch).logits
        return _plain(logits[0], targets, z_loss)

    def states(batch: Batch) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with _instead(layer, _held_back(seen, len(head.weight))):
            model(**batch)
        return seen[0]

    return linear_cross_entropy(Unpadded.apply(call(states, batch), chosen), targets, head, z_loss=z_loss)


def _plain(logits: torch.Tensor, targets: torch.Tensor, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float()
    losses = F.cross_entropy(scores, targets, reduction="none")
    if z_loss:
        losses = losses + z_loss * scores.logsumexp(-1).square()
    return losses, scores.argmax(-1) == targets


def unwrapped(model: Any) -> Any:
    """The transformers model inside."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _held_back(seen: list[torch.Tensor], vocabulary: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden.new_zeros(1, 1, vocabulary)  # for what the model does to its logits

    return keep


@contextlib.contextmanager
def _instead(layer: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """With another forward pass of `layer`."""
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _head(model: Any, layer: nn.Module, batch: Mapping[str, torch.Tensor]) -> Head | None:
    """The head as `linear_cross_entropy` takes it, if the model's own logits say that this is what it computes."""
    head = _read(model, layer)  # afresh: its weights may have been exchanged, or made trainable
    if head is None:
        return None
    form, known = (layer, head.scale, head.cap), _known.get(model)
    if known is None or known[0] != form:
        known = _known[model] = form, _confirmed(model, layer, head, batch)
    return head if known[1] else None


def _read(model: Any, layer: nn.Module) -> Head | None:
    """The head as layer and config tell it; None where it is trained, or no plain linear layer."""
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    offset = getattr(model, "final_logits_bias", None)  # BART's family
    biases = [b.flatten() for b in (layer.bias, offset) if isinstance(b, torch.Tensor)]
    if any(tensor.requires_grad for tensor in (layer.weight, *biases)):
        return None
    bias = torch.stack(biases).sum(0) if biases else None
    if bias is not None and bias.device.type == "cpu" and not bias.any():  # BART's is there for whoever wants one
        bias = None
    return Head(layer.weight, bias, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _confirmed(model: Any, layer: nn.Module, head: Head, batch: Mapping[str, torch.Tensor]) -> bool:
    seen: list[torch.Tensor] = []
    weight = head.weight
    own = layer.forward

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return own(hidden)

    few = {key: value[:1, :16] for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    devices = [weight.device.index] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _instead(layer, keep):  # a resumed run draws what the first one did
        theirs = model(**few).logits.float()
    if len(seen) != 1 or seen[0].dtype != weight.dtype or seen[0].shape[:2] != theirs.shape[:2]:
        return False
    ours = head.logits(seen[0].flatten(0, 1)).view_as(theirs)
    close = 8 * torch.finfo(weight.dtype).eps * float(theirs.nan_to_num().abs().max())
    return torch.allclose(ours, theirs, rtol=0, atol=close, equal_nan=True)
