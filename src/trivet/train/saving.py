"""The Trainer's checkpoints: found whole or not at all, and enough to go on exactly."""

from __future__ import annotations

import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import ExportableState

from trivet import processes
from trivet.errors import StorageError
from trivet.runfolder import storage
from trivet.train.checkpoint import damage, finish, notes_of, rotate, start, unfinished
from trivet.train.numbers import Watch
from trivet.train.ranks import RankCallback

log = logging.getLogger("trivet")


class CheckpointTrainer(transformers.Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that does without a checkpoint where it can't be written, and goes on with training.

    Before the first step that changed anything there is nothing to keep.
    """

    optimizer: Any
    watch: Watch
    #: Its state is kept beside the Trainer's.
    ranks: RankCallback
    #: Share of the learning rate to train at, also where a checkpoint says another.
    rate: float
    #: What a checkpoint is to say of the run beside its state.
    notes: dict[str, Any]
    #: The last checkpoint that could not be written, and why.
    unsaved: StorageError | None = None
    _best_before: tuple[Any, ...] = (None, None, None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        state = self.state
        if self._nothing_learned() or not math.isfinite(metrics.get("eval_loss", 0.0)):
            return False
        self._best_before = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        return bool(super()._determine_best_metric(metrics, trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is found whole or not at all. Where it can't be written, training goes on without."""
        state, settings = self.state, self.args
        if self._nothing_learned():
            return
        folder = Path(settings.output_dir) / f"checkpoint-{state.global_step}"
        temporary = unfinished(folder)
        if state.best_global_step:
            state.best_model_checkpoint = str(folder.with_name(f"checkpoint-{state.best_global_step}"))
        main = settings.should_save
        for mine, part in (
            (main, partial(start, temporary)),
            (True, partial(self._fill, temporary)),
            (main, partial(finish, temporary, folder, self.notes)),
        ):
            problem = None
            try:
                if mine:
                    with storage(f"checkpoint {folder}"):
                        part()
            except StorageError as error:
                problem = error
            if processes.largest(int(problem is not None)):
                self._go_on_without(folder, problem)
                return
        if main:
            rotate(folder.parent, settings.save_total_limit, state.best_global_step)

    def _nothing_learned(self) -> bool:
        return self.watch.skipped == self.state.global_step

    def _fill(self, folder: Path) -> None:
        """Everything that resuming needs: adapter, optimizer, schedule, random states, ranks, the Trainer's state."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
            self.ranks.save(folder)

    def _go_on_without(self, folder: Path, problem: StorageError | None) -> None:
        """Forget a checkpoint that could not be written; the best one is then the best of those before."""
        shutil.rmtree(unfinished(folder), ignore_errors=True)
        self.unsaved = problem or StorageError(f"checkpoint {folder}: can't be written by another process")
        state = self.state
        if state.best_global_step == state.global_step:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before
        log.warning("%s. Training goes on; checkpoints before it are kept", self.unsaved)

    def _load_best_model(self) -> None:
        """The best checkpoint's adapter, unless the disk has lost it meanwhile."""
        problem = damage(Path(self.state.best_model_checkpoint))
        if problem is None:
            super()._load_best_model()
        else:
            log.warning("the best checkpoint, %s, is damaged (%s): the last state is kept instead",
                        self.state.best_model_checkpoint, problem)  # fmt: skip

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """As it was in the checkpoint; the best one is looked for in this run's folder, which may have been moved."""
        where = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return where

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As they were in the checkpoint, at this run's share of the learning rate."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or (before := notes_of(Path(checkpoint))["rate"]) == self.rate:
            return
        change = self.rate / before
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = group["lr"] * change, group["initial_lr"] * change
        for name in ("base_lrs", "_last_lr"):
            setattr(self.lr_scheduler, name, [rate * change for rate in getattr(self.lr_scheduler, name)])
