"""What a training step computes and keeps, counted by running the model without numbers (on torch's meta device).

The model is built from its config, adapted by the same code as for training, and run forward and backward: every matrix
product is counted, and every tensor that autograd keeps. So the counts follow the architecture and trivet's fast path,
whatever they are. Nothing is allocated: 405B parameters take seconds and a few hundred MiB.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from trivet.adapter.attach import attach
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.fast import fused_norm
from trivet.four_bit import count_parameters, in_four_bit
from trivet.kernels.cross_entropy import GPU_CHUNK, held_at_once
from trivet.kernels.dropout import for_cpus
from trivet.methods import Method
from trivet.scale.adapter import give_form

#: What the attention is called in transformers' table.
_ATTENTION = "trivet-plan"


@dataclass(frozen=True)
class Trace:
    """One micro-step on one device, without the adapter's optimizer.

    Attributes:
        tokens: rows x length.
        parameters: of the base model.
        weights: bytes of the frozen weights and buffers.
        blocks: transformer blocks.
        block_weights: bytes of the largest block's frozen weights.
        outer_weights: bytes of frozen weights outside of blocks: embeddings, output head.
        adapted: the adapted layers, on the meta device.
        whole: numbers of each tensor that is trained whole beside the adapter, such as a classifier's head.
        forward, backward: FLOPs of matrix products, the output head's included; a multiplication and an addition are 2.
        recomputed: FLOPs that activation checkpointing adds.
        kept: bytes that autograd keeps for the backward pass.
        kept_with_checkpointing: likewise, with activation checkpointing: every block's input, and one block's tensors.
        working: bytes of the largest thing that is held for a moment: a chunk of logits (on GPUs without Triton also in
            float32), or a weight that is made from its 4 bits.
    """

    tokens: int
    parameters: int
    weights: int
    blocks: int
    block_weights: int
    outer_weights: int
    adapted: Sequence[AdaptedLayer]
    whole: Sequence[int]
    forward: int
    backward: int
    recomputed: int
    kept: int
    kept_with_checkpointing: int
    working: int

    def flops(self, checkpointing: bool) -> int:
        """Of one micro-step."""
        return self.forward + self.backward + (self.recomputed if checkpointing else 0)

    def activations(self, checkpointing: bool) -> int:
        """Bytes held at the end of the forward pass, and the most that is held for a moment."""
        return (self.kept_with_checkpointing if checkpointing else self.kept) + self.working


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, with the in-place ones that it leaves out."""

    def product(into: Sequence[int], a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * prod(a) * b[-1]

    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: product, aten.baddbmm_: product})


class Kept:
    """Bytes that autograd keeps for the backward pass: each storage once, parameters and buffers not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.alive: list[torch.Tensor] = []  # a storage that is freed may have its place taken by another
        self.bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def build(config: Any, task: str, dtype: torch.dtype) -> Any:
    """The base model of a transformers config, on the meta device."""
    import transformers

    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }.get(task, transformers.AutoModelForSequenceClassification)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    model.config.use_cache = False
    return model


def trace(
    base: Any,
    method: Method,
    *,
    task: str,
    rows: int,
    length: int,
    learned: float = 1.0,
    cpu: bool = False,
    **adapter: Any,
) -> Trace:
    """Count one micro-step.

    Args:
        base: what `build` returned; it is adapted in place.
        method: whose factors and update rule are taken, and whose ranks where the data does not decide them.
        task: causal-lm, seq2seq, classification or regression.
        rows, length: of the micro-batch; an encoder-decoder reads and writes `length` tokens.
        learned: share of the tokens that are supervised: the output head reads these alone.
        cpu: with the norms, the dropout and the chunks of logits that trivet has on CPUs.
        adapter: arguments of `attach`.
    """
    own = count_parameters(base)
    widened = max((x.out_features * x.in_features * x.like.element_size() for x in in_four_bit(base)), default=0)
    weights, blocks = _size((*base.parameters(), *base.buffers())), _blocks(base)
    in_blocks = [_size(block.parameters()) for block in blocks]
    probed = "probe" in method.spec("rank").traits
    rank = "fixed" if probed else method.rank.written()
    model = attach(base, task=task, method={"rank": rank}, **adapter)
    layers = adapted_layers(model)
    for layer in layers:
        give_form(layer, method)
    method.part("update")(layers, [], learning_rate=1.0, **method.options("update"))  # it may freeze factors
    if cpu and adapter.get("fast", True):
        for module in base.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(fused_norm, module)
    factors = {id(p) for layer in layers for p in layer.trained()}
    whole = [p.numel() for p in model.parameters() if p.requires_grad and id(p) not in factors]

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # models without one look for padding in ids
    if task == "seq2seq":
        inputs["decoder_input_ids"] = ids
    head = model.get_output_embeddings() if task in ("causal-lm", "seq2seq") else None
    seen: list[torch.Tensor] = []
    if isinstance(head, nn.Linear):
        head.forward = _held_back(seen, head.out_features)  # type: ignore[assignment]
    counter, kept = flop_counter(), Kept(model)
    watch = _Blocks(blocks, counter, kept)
    model.train()
    with counter, for_cpus() if cpu else contextlib.nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            out = model(**inputs)
        forward = counter.get_total_flops()
        (seen[0] if seen else out.logits).sum().backward()
    backward = counter.get_total_flops() - forward
    forward, total, working = int(forward), kept.bytes, widened
    if seen:
        assert isinstance(head, nn.Linear)  # noqa: S101 - else nothing was held back
        width, size = seen[0].shape[-1], seen[0].element_size()
        supervised = int(rows * length * learned)
        if task == "causal-lm":
            supervised = min(supervised, rows * (length - 1))  # nothing tells what a row begins with
        product = 2 * supervised * width * head.out_features
        forward, backward = forward + product, backward + product
        total += supervised * (width * size + 8)  # what the head reads, and where it was
        held = min(supervised * head.out_features, held_at_once(size) if cpu else GPU_CHUNK)
        working = max(working, held * (4 + (size if size < 4 else 0)))
    return Trace(
        tokens=rows * length,
        parameters=own,
        weights=weights,
        blocks=len(blocks),
        block_weights=max(in_blocks, default=0),
        outer_weights=weights - sum(in_blocks),
        adapted=layers,
        whole=whole,
        forward=forward,
        backward=int(backward),
        recomputed=sum(watch.flops),
        kept=total,
        kept_with_checkpointing=total - sum(watch.kept) + sum(watch.inputs) + max(watch.kept, default=0),
        working=working,
    )


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that activation checkpointing recomputes."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class _Blocks:
    """FLOPs of each block's forward pass, and bytes that it keeps and that come into it."""

    def __init__(self, blocks: Sequence[nn.Module], counter: FlopCounterMode, kept: Kept) -> None:
        self.flops: list[int] = []
        self.kept: list[int] = []
        self.inputs: list[int] = []
        self.before = (0, 0)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.before = (counter.get_total_flops(), kept.bytes)
            stream = args[0] if args else kwargs["hidden_states"]
            self.inputs.append(stream.numel() * stream.element_size())

        def leave(*_: Any) -> None:
            self.flops.append(int(counter.get_total_flops() - self.before[0]))
            self.kept.append(kept.bytes - self.before[1])

        for block in blocks:
            block.register_forward_pre_hook(enter, with_kwargs=True)
            block.register_forward_hook(leave)


def _held_back(seen: list[torch.Tensor], vocabulary: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A head's forward pass that keeps what it would have read, as trivet's loss does (see `trivet.head`)."""

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden.new_zeros(1, 1, vocabulary)

    return keep


class _Attention(torch.autograd.Function):
    """Exact attention that keeps Q, K, V and its output, and computes its weights again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        ctx.causal = causal
        _multiply(query, key, causal, 2)  # Q Kᵀ, P V
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, _ = ctx.saved_tensors
        _multiply(query, key, ctx.causal, 5)  # Q Kᵀ again; the gradients of P, V, Q and K
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _multiply(query: torch.Tensor, key: torch.Tensor, causal: bool, times: int) -> None:
    """The products of an attention's pass, for the counter: half of the keys where a query sees only earlier ones."""
    seen = -(-key.shape[2] // 2) if causal else key.shape[2]
    rows = query.reshape(-1, *query.shape[2:])
    columns = query.new_empty(len(rows), query.shape[-1], seen)
    for _ in range(times):
        torch.bmm(rows, columns)


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    causal = bool(getattr(module, "is_causal", True)) and query.shape[2] == key.shape[2]
    return _Attention.apply(query, key, value, causal), None


AttentionInterface.register(_ATTENTION, _attend)  # and no mask: transformers makes none for what its table lacks
