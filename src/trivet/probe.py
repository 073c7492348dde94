"""Statistics of adapted layers, gathered while a model trains (`Collector`) or in a pass of its own (`probe`).

For a layer y = W x and g, the gradient of the mean loss at y, they are sums over positions of x², x, g² and of small
random projections of x xᵀ and g xᵀ: nothing as large as W is ever formed. Positions whose g is zero in every entry
(padding, and whatever else the loss does not depend on) count for nothing.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics, LayerSums, Reading
from trivet.data.encode import IGNORE
from trivet.errors import TrivetError

#: (model, batch) -> (mean loss, the number of items it is the mean of)
Loss = Callable[[Any, Mapping[str, Any]], "tuple[torch.Tensor, int | torch.Tensor]"]


class _Tap(torch.autograd.Function):
    """The identity on a layer's output y; its backward pass shows x and g to `record`.

    Autograd keeps x as it keeps any activation, so it is freed with the graph, and under activation checkpointing it is
    recomputed, not stored. A recomputed forward pass is never differentiated through, so nothing counts twice.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, record: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        ctx.mark_dirty(y)  # as a view of y, it could not be changed in place by the model
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        ctx.record(*ctx.saved_tensors, g)
        return g, None, None


class Collector:
    """Gathers `LayerStatistics` from the forward and backward passes that happen while it is on.

    A measurement is one optimizer step, of one or several micro-batches, each with its share of the step's mean loss:
    `on()`, forward and backward passes, `fold(items)`, `off()`. Passes without gradient leave no trace, and nothing is
    kept of an activation beyond its graph. Switch between steps, not between a forward pass and its backward pass.

    Args:
        layers: the adapted layers, of distinct names.
        sketch: k, the width of the random test matrices; 0 gathers the moments alone, at a fraction of the cost.
        seed: of the test matrices, which depend on it and on the layer's name alone.
        decay: how much earlier measurements weigh at each new one, 0 to 1: an exponential moving average, weighted by
            items (tokens for the inputs' statistics), its early values unbiased. None is 1, the mean over all.
        reduce: sums a tensor over processes, in data-parallel training; called at `fold`, alike in each process.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        *,
        sketch: int = 0,
        seed: int = 0,
        decay: float | None = None,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._modules: dict[str, nn.Module] = {layer.name: layer.module for layer in layers}
        self._sums = {layer.name: LayerSums(layer, sketch, seed) for layer in layers}
        self._sketch, self._seed, self._decay, self._reduce = sketch, seed, 1.0 if decay is None else decay, reduce
        #: Seconds that were spent on recording; where a GPU does the work, on asking it to.
        self.seconds = 0.0
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._latest: tuple[Callable[[], Any], int, Reading] = (lambda: None, 0, Reading())

    def on(self) -> None:
        """Record from now on."""
        for name, module in self._modules.items():
            if name not in self._hooks:
                self._hooks[name] = module.register_forward_hook(partial(self._tap, self._sums[name]))

    def _tap(
        self, sums: LayerSums, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not output.requires_grad:
            return None
        x = args[0]
        return _Tap.apply(output, x.detach(), partial(self._record, sums, self._reading(x)))

    def _record(self, sums: LayerSums, reading: Reading, x: torch.Tensor, g: torch.Tensor) -> None:
        began = time.perf_counter()
        sums.add(x, g, reading)
        self.seconds += time.perf_counter() - began

    def _reading(self, x: torch.Tensor) -> Reading:
        """The one of all layers that read x directly after each other; x itself is not kept."""
        known, version, reading = self._latest
        if known() is not x or version != x._version:
            reading = Reading()
            self._latest = weakref.ref(x), x._version, reading
        return reading

    def off(self) -> None:
        """Record nothing: no hook is left on the model. What was recorded stays."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def remove(self) -> None:
        """Take every hook away, for good."""
        self.off()

    def drop(self, names: Iterable[str]) -> None:
        """Forget layers that left the model; names it does not know are ignored."""
        for name in names:
            if name in self._hooks:
                self._hooks.pop(name).remove()
            self._modules.pop(name, None)
            self._sums.pop(name, None)

    def fold(self, items: int | torch.Tensor | None = None, *, loss_scale: float = 1.0) -> bool:
        """End one measurement.

        Args:
            items: what the loss was the mean of: the supervised tokens (or rows) of the whole step, over all processes.
                None takes, layer by layer, the positions that a gradient reached: too many where prompts are not
                learned.
            loss_scale: what that mean was multiplied by before the backward pass: a gradient scaler's factor, or the
                number of processes where their gradients are averaged afterwards.

        Returns:
            Whether it counts. It does not where no gradient arrived, or where one was not finite (as in the steps that
            a gradient scaler skips).
        """
        measured = list(self._sums.values())
        if self._reduce is not None:
            _reduce_all([sums.now.flat for sums in measured], self._reduce)
        counts = bool(measured) and _whole(measured)
        if counts:
            for sums in measured:
                sums.fold(None if items is None else float(items), loss_scale, self._decay)
        self.discard()
        return counts

    def spoil(self) -> None:
        """Make the next `fold` count nothing, in no process: this one's record is not whole."""
        for sums in self._sums.values():
            sums.now.named["tokens"].fill_(torch.nan)

    def discard(self) -> None:
        """Forget what was recorded since the last `fold`."""
        for sums in self._sums.values():
            sums.now.flat.zero_()

    def statistics(self) -> dict[str, LayerStatistics]:
        """What the folded measurements say, by layer name; zeros for a layer that no gradient reached."""
        return {name: sums.statistics() for name, sums in self._sums.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The folded sums as `layer name.field`, and `seed` and `sketch`, from which the test matrices follow."""
        state = {f"{name}.{f}": t.clone() for name, sums in self._sums.items() for f, t in sums.total.named.items()}
        return state | {"seed": torch.tensor(self._seed), "sketch": torch.tensor(self._sketch)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the sums of a collector of the same layers, sketch and seed.

        Raises:
            TrivetError: it was another one.
        """
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        wrong = wrong or [key for key in ("seed", "sketch") if int(own[key]) != int(state[key])]
        if wrong:
            raise TrivetError(
                f"cannot resume the layers' statistics: the saved ones differ in {', '.join(wrong[:3])}"
                f"{' and more' if wrong[3:] else ''}; resume with the adapter and the settings they were saved with"
            )
        for name, sums in self._sums.items():
            for f, total in sums.total.named.items():
                total.copy_(state[f"{name}.{f}"])


def _whole(measured: Sequence[LayerSums]) -> bool:
    """Whether something was measured, and all of it is finite: asked of the device once."""
    device = measured[0].now.flat.device
    said = [torch.stack([sums.now.named["tokens"], sums.now.flat.sum()]).to(device) for sums in measured]
    tokens, checks = torch.stack(said).unbind(1)
    return bool(tokens.any() & checks.isfinite().all())


def _reduce_all(sums: Sequence[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sum over processes, in one call for each device."""
    for device in dict.fromkeys(t.device for t in sums):
        here = [t for t in sums if t.device == device]
        for t, part in zip(here, reduce(torch.cat(here)).split([t.numel() for t in here]), strict=True):
            t.copy_(part)


def probe(
    model: nn.Module,
    layers: Sequence[AdaptedLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    sketch: int,
    seed: int = 0,
    loss: Loss | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, LayerStatistics]:
    """The statistics of `layers` over a few batches, in one forward and backward pass each; the model is left as found.

    Dropout is off, so the same batches give the same statistics. (Transformer blocks that recompute activations ask for
    training mode; dropout that such a block applies itself stays on, with `seed`.)

    Args:
        model: with adapted layers whose adapters are trainable.
        batches: keyword arguments of the model, with labels; tensors are moved to the model's device.
        sketch: k, see `Collector`; about four times the rank that is wanted of the gradient.
        seed: of the test matrices, and of torch while the probe runs.
        loss: gives the mean loss of a batch and the number of items it is the mean of. By default the model's own, and
            the labels that are not -100, or the rows where there is one label each. (A causal model learns no first
            token: its label must be -100, or it counts for an item too many.)
        reduce: see `Collector`; each process then has its own share of every batch, which may be empty.

    Raises:
        TrivetError: a loss is not finite, no gradient reached a layer, or there are no batches.
    """
    collector, done = Collector(layers, sketch=sketch, seed=seed, reduce=reduce), 0
    with _as_found(model, seed):
        collector.on()
        try:
            for done, batch in enumerate(batches, 1):
                _measure(collector, model, batch, loss or _own_loss, reduce, f"batch {done}")
        finally:
            collector.off()
    if not done:
        raise TrivetError("probing the model: there are no batches; give it at least one with labels")
    return collector.statistics()


def _measure(
    collector: Collector, model: nn.Module, batch: Mapping[str, Any], loss: Loss,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None, where: str,
) -> None:  # fmt: skip
    device = next(model.parameters()).device
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    value, items = loss(model, batch) if batch else (torch.zeros(()), 0)
    if reduce is not None:  # its share of the mean over all processes
        every = reduce(torch.tensor(float(items)))
        value, items = value * (items / every), every
    if not bool(torch.isfinite(value)):
        raise TrivetError(
            f"probing the model: its loss on {where} is {value.item()}; a batch needs at least one label that is not "
            f"{IGNORE}, and a model in float16 may overflow: load it in float32 or bfloat16"
        )
    if value.requires_grad:
        value.backward()
    if not collector.fold(items):
        raise TrivetError(
            f"probing the model: on {where} no adapted layer received a finite gradient, though the loss is "
            f"{value.item():.4g}; check that the adapter's parameters are trainable (requires_grad) and that the "
            "loss depends on the adapted layers"
        )


def _own_loss(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | int]:
    labels = batch.get("labels")
    if labels is None:
        raise TrivetError(f"probing the model: a batch has no labels, only {', '.join(batch)}; add them, or pass loss=")
    items = labels.numel() if labels.dim() == 1 else (labels != IGNORE).sum()
    return model(**batch).loss, items


@contextlib.contextmanager
def _as_found(model: nn.Module, seed: int) -> Iterator[None]:
    """In evaluation mode and with torch seeded; gradients, modes and random state are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        for module, _ in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        for p, _ in gradients:
            p.grad = None
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for p, gradient in gradients:
                p.grad = gradient
