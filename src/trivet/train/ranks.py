"""Carries out a rank policy during training, in any `transformers.Trainer` (TRL's too)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trivet import processes
from trivet.adapter.layers import AdaptedLayer, Change, adapted_layers
from trivet.adapter.plan import plan_of
from trivet.adapter.resize import match, resize, tried
from trivet.errors import AdapterError, ConfigError
from trivet.probe import Collector
from trivet.rank.policy import Situation, parameters
from trivet.runfolder import write_json

#: Beside a checkpoint's adapter while ranks still change: the policy's decisions, and its measurements.
STATE, MOMENTS = "rank_state.json", "rank_state.safetensors"


class RankCallback(TrainerCallback):  # type: ignore[misc]
    """Measures, decides and resizes; does nothing where the ranks are fixed.

    >>> trainer = SFTTrainer(model=model, callbacks=[trivet.callback(model)], optimizers=(optimizer, None), ...)

    A change of rank makes earlier validations incomparable, so the best checkpoint is looked for anew after it.

    Of several processes each decides for itself, from sums over all of them, which are the same to the bit in each.
    """

    def __init__(
        self,
        model: Any,
        *,
        validation: Callable[[], torch.Tensor] | None = None,
        items: Callable[[], int] | None = None,
        finished: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            model: what `trivet.attach` returned.
            validation: the loss of each validation row as the model is now, (n,); rank `auto` chooses by it.
            items: supervised items of the step under way; default: positions that have a gradient.
            finished: whether training that ends has come to its end, and was not interrupted.
        """
        self.model, self.policy = model, plan_of(model).policy
        self.validation, self.items, self.finished = validation, items, finished
        self.collector: Collector | None = None
        #: Seconds spent on measuring, deciding and resizing, known once the ranks are settled.
        self.seconds = 0.0
        self._layers: list[AdaptedLayer] | None = None
        self._parameters: int | None = None
        self._restored: Mapping[str, torch.Tensor] | None = None
        #: Whether the step under way is measured: hooks on the layers see its passes, which no replay would call.
        self.measuring = False
        self._skipped = False

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The adapted layers; the model is walked once after each change of rank, not in every step."""
        if self._layers is None:
            self._layers = adapted_layers(self.model)
        return self._layers

    @property
    def parameters(self) -> int:
        """The numbers that the adapter's factors hold now."""
        if self._parameters is None:
            self._parameters = parameters(self.layers)
        return self._parameters

    def _changed(self) -> None:
        self._layers = self._parameters = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if processes.count() > 1 and self.policy.moving and self.items is None:
            raise ConfigError("in several processes only trivet's own training can change ranks; others wrap the model")
        if self.policy.validates and self.validation is None:
            raise ConfigError("rank auto chooses on validation rows; pass validation= to trivet.callback")
        self._agree(optimizer)
        if not self.policy.settled(state.global_step, state.max_steps):
            reduce = processes.total if processes.count() > 1 else None
            self.collector = Collector(
                self.layers, sketch=self.policy.sketch, seed=args.seed, decay=0.95, reduce=reduce
            )
            if self._restored:
                self.collector.load_state_dict(self._restored)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._skipped = False
        if self.collector is not None and self.policy.measures(state.global_step, state.max_steps):
            self.collector.on()
            self.measuring = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.collector is not None and not self._skipped:
            began = time.perf_counter()
            if self.measuring:
                self.collector.off()
                self.collector.fold(None if self.items is None else self.items())
                self.measuring = False
            self.policy.observe(self.layers)
            self.seconds += time.perf_counter() - began

    def skip(self) -> None:
        """Learn nothing from this step, in any process: its gradients are no numbers."""
        if self.collector is not None and self.measuring:
            self.collector.off()
            self.collector.discard()
            self.measuring = False
        self._skipped = True

    def give_up(self) -> None:
        """Measure nothing in this step: a backward pass broke off in it, in this process at least."""
        if self.collector is not None and self.measuring:
            self.collector.off()
            self.collector.spoil()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.collector is None:
            return
        began = time.perf_counter()
        if self.policy.due(state.global_step, state.max_steps) and self._decide(state, state.max_steps, optimizer):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.policy.settled(state.global_step, state.max_steps):
            self._stop()
        self.seconds += time.perf_counter() - began

    def _decide(self, state: Any, total: int, optimizer: Any) -> bool:
        """Ask the policy, for training of `total` steps, and carry out what it says; whether that changed any rank."""
        assert self.collector is not None  # noqa: S101
        now = Situation(
            step=state.global_step,
            total=total,
            layers=self.layers,
            statistics=self.collector.statistics(),
            validation=None if self.validation is None else self._after,
        )
        changes = self.policy.decide(now)
        if changes:
            resize(self.model, changes, optimizer)
            self._changed()
            self.collector.drop([name for name, change in changes.items() if change.rank == 0])
        self._agree(optimizer)
        return bool(changes)

    def _agree(self, optimizer: Any) -> None:
        """Give every process the first one's adapter and optimizer state: processors may differ in their last bits."""
        if processes.count() == 1 or self.items is None:  # other Trainers do what they do
            return
        processes.check_same("ranks", json.dumps({layer.name: layer.rank for layer in self.layers}))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kept = [t for p in trained for t in getattr(optimizer, "state", {}).get(p, {}).values() if torch.is_tensor(t)]
        processes.copy_from_first([*trained, *(t for layer in self.layers for t in layer.tensors()), *kept])

    def _after(self, changes: Mapping[str, Change]) -> torch.Tensor:
        """The validation losses as they would be after `changes`."""
        assert self.validation is not None  # noqa: S101 - else nobody was given this method
        with tried(self.layers, changes):
            return self.validation()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (folder / STATE).exists():  # trivet's own has it
            self.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.collector is not None and self.finished():  # ranks are not settled; the best checkpoint is in place
            began = time.perf_counter()
            self._decide(state, state.global_step, optimizer)
            self.seconds += time.perf_counter() - began
        self._stop()

    def _stop(self) -> None:
        if self.collector is not None:
            self.collector.remove()
            self.seconds += self.collector.seconds
            self.collector = None

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Put the policy's state beside a checkpoint's adapter, if it has one."""
        if not self.policy.moving:
            return
        state = self.policy.state_dict()
        tensors = {f"policy/{k}": v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
        if self.collector is not None:
            tensors |= {f"moments/{k}": v.contiguous() for k, v in self.collector.state_dict().items()}
        save_file(tensors, checkpoint / MOMENTS)
        write_json(checkpoint / STATE, {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)})

    def resume(self, checkpoint: str | Path) -> None:
        """Give model and policy the shapes and state of a checkpoint; call it before `trainer.train(resume_…)`."""
        checkpoint = Path(checkpoint)
        try:
            with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            match(self.model, shapes)
            self._changed()
            if (checkpoint / STATE).exists():
                tensors = load_file(checkpoint / MOMENTS)
                state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
                state |= {k.removeprefix("policy/"): v for k, v in tensors.items() if k.startswith("policy/")}
                self.policy.load_state_dict(state)
                self._restored = {k.removeprefix("moments/"): v for k, v in tensors.items() if k.startswith("moments/")}
        except (OSError, ValueError, KeyError) as error:
            raise AdapterError(f"checkpoint {checkpoint}: its ranks can't be read: {error}") from error


#: `trivet.callback(model)`: for any Trainer.
callback = RankCallback
