"""What an adapter holds: its numbers, the optimizer's, and what is saved, counted on one real layer of each shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.errors import ConfigError
from trivet.methods import Method

#: Factors, gradients and moments are float32.
FLOAT = 4


@dataclass(frozen=True)
class AdapterSize:
    """Bytes of a whole adapter in training.

    Attributes:
        trained: numbers that are trained, parts that are trained whole included.
        frozen: numbers of factors that are not.
        optimizer: bytes of the optimizer's state.
        saved: numbers in the saved adapter.
    """

    trained: int
    frozen: int
    optimizer: int
    saved: int

    @property
    def factors(self) -> int:
        """Bytes of what is trained and of frozen factors."""
        return FLOAT * (self.trained + self.frozen)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients."""
        return FLOAT * self.trained

    @property
    def total(self) -> int:
        """Bytes held between two steps' forward passes and the update."""
        return self.factors + self.gradients + self.optimizer


def adapter_size(
    method: Method, shapes: Iterable[tuple[int, int]], ranks: Iterable[int], whole: Sequence[int] = ()
) -> AdapterSize:
    """The size of an adapter with layers of `shapes` (out, in) at `ranks`, and further tensors of `whole` numbers.

    A layer of every kind is made, given the method's form and stepped once by its update rule: what is then there is
    what is counted.

    Raises:
        ConfigError: the method's layers share a core, so that none can be counted by itself.
    """
    if "coupled" in method.spec("decompose").traits:
        raise ConfigError(f"method {method}: its core is shared by a stack of layers, which a plan can't count yet")
    trained = frozen = optimizer = saved = 0
    for (shape, rank), layers in Counter(zip(shapes, ranks, strict=True)).items():
        if rank:
            one = _layer_size(method, shape, rank)
            trained += layers * one.trained
            frozen += layers * one.frozen
            optimizer += layers * one.optimizer
            saved += layers * one.saved
    state = sum(2 * FLOAT * n + FLOAT for n in whole)  # stepped by AdamW: two moments, and how many steps were made
    return AdapterSize(trained + sum(whole), frozen, optimizer + state, saved + sum(whole))


def _layer_size(method: Method, shape: tuple[int, int], rank: int) -> AdapterSize:
    out, inside = shape
    factors = {"lora_A": nn.Linear(inside, rank, bias=False), "lora_B": nn.Linear(rank, out, bias=False)}
    module = SimpleNamespace(**{name: {"default": factor} for name, factor in factors.items()})
    layer = AdaptedLayer("layer", 1.0, module)
    give_form(layer, method)
    magnitude = "magnitude" in method.spec("decompose").traits
    rest = [("magnitude", nn.Parameter(torch.ones(out)))] if magnitude else []
    rule = method.part("update")
    made = rule([layer], rest, learning_rate=1e-3, **method.options("update"))
    parameters = [p for group in made.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.randn_like(p)
    made.step()
    held = _numbers(layer)
    trained = sum(p.numel() for p in parameters)
    return AdapterSize(
        trained=trained,
        frozen=held + sum(p.numel() for _, p in rest) - trained,
        optimizer=state_bytes(made),
        saved=sum(f.numel() for f in layer.factors()) + sum(p.numel() for _, p in rest),
    )


def give_form(layer: AdaptedLayer, method: Method) -> None:
    """The factors that the method's decomposition would leave, with no particular values."""
    traits = method.spec("decompose").traits
    a, b = (factor.clone() for factor in layer.factors())
    if "core" in traits:
        layer.set_core(b, a)
    elif "offset" in traits:
        layer.set_offset(a, b)


def _numbers(layer: AdaptedLayer) -> int:
    """The numbers in a layer's factors, trained or not; a buffer that several names have counts once."""
    parts = [layer.module.lora_A["default"], layer.module.lora_B["default"]]
    return sum(t.numel() for part in parts for t in (*part.parameters(), *part.buffers()))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    states: Sequence[Mapping[str, object]] = list(optimizer.state.values())
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
