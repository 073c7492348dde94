"""The one owner of rank: changes factors, optimizer state, r, alpha and PEFT's config together; nobody else does.

A Parameter keeps its identity and gets new `.data`, so optimizers, schedulers and hooks that hold it stay right. No
graph of a loss may be alive meanwhile: autograd's accumulators would still expect the old shape.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trivet.adapter.forms import Core, Frozen, Offset
from trivet.adapter.layers import AdaptedLayer, Change, adapted_layers


def resize(model: PeftModel, changes: Mapping[str, Change], optimizer: Any = None) -> None:
    """Apply `changes` (by layer name). A layer of new rank 0 leaves the model.

    Gradients are dropped. Of the optimizer's state, tensors of the parameter's shape are carried over like gradients,
    those whose key ends in `_sq` by squared mixing, and square ones whose key ends in `gram` on both sides.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for layer in adapted_layers(model):
        if layer.name in changes:
            change = changes[layer.name]
            _change(layer, change, optimizer)
            if change.rank == 0:
                _leave(model, layer, optimizer)
    write_patterns(model)


def set_ranks(model: PeftModel, ranks: Mapping[str, int]) -> None:
    """Give plain layers zeroed factors of other ranks, before their decomposition starts them."""
    for layer in adapted_layers(model):
        rank = ranks.get(layer.name, layer.rank)
        if rank != layer.rank:
            a, b = layer.A, layer.B
            _swap(a, a.new_zeros(rank, a.shape[1]))
            _swap(b, b.new_zeros(b.shape[0], rank))
            _renumber(layer, rank)
            if rank == 0:
                _leave(model, layer, None)
    write_patterns(model)


def _change(layer: AdaptedLayer, change: Change, optimizer: Any) -> None:
    """One layer's factors and moments. Under B' = B L, A' = Rᵀ A the gradients become G_B R and Lᵀ G_A."""
    a, b = layer.factors()
    left, right = change.left.to(b), change.right.to(a)
    extra = a.new_zeros(0, a.shape[1]) if change.rows is None else change.rows.to(a)
    core, basis = layer.core, None
    if core is not None:  # the bases turn with the core: basis (core left) = (basis q)(qᵀ core left), q orthonormal
        q, _ = torch.linalg.qr(core.detach() @ left)
        basis = layer.basis @ q
        _carry(optimizer, core, q.T, right)
        _swap(core, q.T @ core.detach() @ left)
        module = layer.module
        module.lora_B[layer.adapter].basis = basis
        module.lora_A[layer.adapter].weight = right.T @ a
    else:
        if layer.form == "offset":
            _plain(layer, optimizer)
        pad = extra.shape[0]
        for tensor, new, inner, outer in (
            (layer.A, torch.cat([right.T @ a, extra]), left.T, None),
            (layer.B, torch.cat([b @ left, b.new_zeros(b.shape[0], pad)], 1), None, right),
        ):
            if isinstance(tensor, nn.Parameter):
                _carry(optimizer, tensor, inner, outer, pad)
                _swap(tensor, new)
            else:
                layer.module.lora_A[layer.adapter].weight = new  # a frozen A
    _renumber(layer, change.rank)


def _swap(parameter: Any, value: torch.Tensor) -> None:
    parameter.grad = None
    parameter.data = value.contiguous()


def _carry(
    optimizer: Any, parameter: Any, inner: torch.Tensor | None, outer: torch.Tensor | None, pad: int = 0
) -> None:
    """Move the moments of a gradient that becomes inner · g · outer; new directions start at zero."""
    if optimizer is None or parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    old = parameter.shape
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim != 2:
            continue
        if key.endswith("gram"):
            m = outer if outer is not None else inner.T  # type: ignore[union-attr]
            state[key] = nn.functional.pad(m.to(value).T @ value @ m.to(value), (0, pad, 0, pad))
            continue
        if value.shape != old:
            continue
        squared = key.endswith("_sq")
        first, second = (None if m is None else (m.to(value) ** 2 if squared else m.to(value)) for m in (inner, outer))
        value = value if first is None else first @ value
        value = value if second is None else value @ second
        if pad:
            value = nn.functional.pad(value, (0, 0, 0, pad) if inner is not None else (0, pad))
        state[key] = value.contiguous()


def _plain(layer: AdaptedLayer, optimizer: Any) -> None:
    """An offset's four factors become two plain ones of twice the rank; the frozen halves begin without moments."""
    for side, dim in (("A", 0), ("B", 1)):
        factor: Any = layer._factor(side)
        whole = factor.weight.detach()
        free = factor.free
        state = optimizer.state.get(free, {}) if optimizer is not None else {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == free.shape:
                state[key] = torch.cat([value, torch.zeros_like(value)], dim)
            elif isinstance(value, torch.Tensor) and key.endswith("gram"):
                state[key] = nn.functional.pad(value, (0, value.shape[1], 0, value.shape[0]))
        _swap(free, whole)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = free  # the same Parameter, so that the optimizer still holds it
        getattr(layer.module, f"lora_{side}")[layer.adapter] = linear


def _renumber(layer: AdaptedLayer, rank: int) -> None:
    """PEFT's own books: r, alpha (the scale stays), and the sizes that Linear prints."""
    module = layer.module
    module.r[layer.adapter] = rank
    module.lora_alpha[layer.adapter] = layer.scale * rank
    if not layer.embedding:
        for side in "AB":
            factor = getattr(module, f"lora_{side}")[layer.adapter]
            if isinstance(factor, nn.Linear):
                factor.out_features, factor.in_features = factor.weight.shape


def _leave(model: PeftModel, layer: AdaptedLayer, optimizer: Any) -> None:
    """The base layer takes its adapted layer's place; the parameters leave the optimizer."""
    gone = {id(p) for p in layer.module.parameters() if p.requires_grad}
    parent, _, child = layer.name.rpartition(".")
    setattr(model.get_base_model().get_submodule(parent), child, layer.module.get_base_layer())
    if optimizer is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in gone:
                    optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]
    config = model.peft_config[layer.adapter]
    before = config.exclude_modules or []  # a pattern, or names, as other tools write them
    before = [before] if isinstance(before, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(before)]
    config.exclude_modules = "|".join([*before, re.escape(layer.name)])


def write_patterns(model: PeftModel) -> None:
    """Put the layers' ranks into PEFT's config: the commonest as r, the others in one anchored pattern a rank.

    They are those of the factors as they are saved: an offset's is twice what is trained.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank_config(
        {layer.name: (layer.factors()[0].shape[0], layer.scale) for layer in adapted_layers(model, name)}
    )


def rank_config(
    layers: Mapping[str, tuple[int, float]],
) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """(r, alpha, rank_pattern, alpha_pattern) for layers of (rank, scale); PEFT looks patterns up one by one."""
    groups: dict[tuple[int, float], list[str]] = {}
    for name, (rank, scale) in layers.items():
        groups.setdefault((rank, scale * rank), []).append(name)
    (common, alpha), _ = max(groups.items(), key=lambda item: len(item[1]))
    others = {key: f"^(?:{'|'.join(map(re.escape, names))})" for key, names in groups.items() if key != (common, alpha)}
    ranks = {pattern: rank for (rank, _), pattern in others.items()}
    return common, _whole(alpha), ranks, {pattern: _whole(a) for (_, a), pattern in others.items()}


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def departed(model: PeftModel) -> list[tuple[str, int, int]]:
    """(name, out, in) of the layers that left: targeted by name, excluded, and no head."""
    config = model.peft_config[model.active_adapter]
    if not isinstance(config.exclude_modules, str):
        return []
    heads, targets = tuple(config.modules_to_save or ()), config.target_modules
    found = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(targets, str):
            wanted = bool(re.fullmatch(targets, name))
        else:
            wanted = any(name == t or name.endswith(f".{t}") for t in targets)
        if wanted and re.fullmatch(config.exclude_modules, name) and not name.startswith(heads):
            weight = module.weight
            out, inside = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
            found.append((name, out, inside))
    return found


@contextlib.contextmanager
def tried(layers: Iterable[AdaptedLayer], changes: Mapping[str, Change]) -> Iterator[None]:
    """The model as it would be after `changes`, for measuring; what was there comes back at the end."""
    kept = []
    try:
        for layer in layers:
            if layer.name in changes:
                change = changes[layer.name]
                a, b = layer.factors()
                kept.append((layer, [layer._factor(side) for side in "AB"]))
                new_a, new_b = change.right.to(a).T @ a, b @ change.left.to(b)
                if layer.embedding:
                    _put(layer, nn.Parameter(new_a), nn.Parameter(new_b))
                else:
                    _put(layer, Frozen(new_a), Frozen(new_b))
        yield
    finally:
        for layer, factors in kept:
            _put(layer, *factors)


def _put(layer: AdaptedLayer, a: Any, b: Any) -> None:
    kind = "lora_embedding" if layer.embedding else "lora"
    getattr(layer.module, f"{kind}_A")[layer.adapter] = a
    getattr(layer.module, f"{kind}_B")[layer.adapter] = b


def match(model: PeftModel, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Give a freshly attached model the forms and ranks of saved factors, so that their values can be loaded.

    Args:
        tensors: shapes by PEFT's file keys, "base_model.model.<layer>.lora_A.weight" and so on.
    """
    for layer in adapted_layers(model):
        start = f"base_model.model.{layer.name}."
        keys = {k.removeprefix(start): shape for k, shape in tensors.items() if k.startswith(start)}
        if not keys:
            _change(layer, Change(*(layer.A.new_zeros(layer.factors()[0].shape[0], 0) for _ in "LR")), None)
            _leave(model, layer, None)
            continue
        if layer.form == "offset" and "lora_A.free" not in keys:
            _plain(layer, None)
        for key, shape in keys.items():
            head, _, field = key.rpartition(".")
            holder = layer._factor(head[-1]) if "embedding" not in key else None
            if isinstance(holder, (Core, Offset)) and field == "weight":
                continue  # written out of the others
            if "embedding" in key:
                _swap(layer._factor(key[-1]), layer.A.new_zeros(shape))
            elif head in ("lora_A", "lora_B"):
                tensor = getattr(holder, field)
                if isinstance(holder, (Core, Frozen)) and not isinstance(tensor, nn.Parameter):
                    setattr(holder, field, tensor.new_zeros(shape))
                elif isinstance(holder, Offset) and field == "fixed":
                    holder.fixed = tensor.new_zeros(shape)
                else:
                    _swap(tensor, tensor.new_zeros(shape))
        _renumber(layer, layer.rank)
    write_patterns(model)
