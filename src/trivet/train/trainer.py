"""`transformers.Trainer` with our loss, our optimizer factory and a token-weighted validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from accelerate.data_loader import prepare_data_loader

from trivet import processes
from trivet.data.batch import Collator, tokens_in
from trivet.data.encode import IGNORE, Encoded
from trivet.errors import DivergedError
from trivet.evaluate.score import row_scores
from trivet.graphs import Recorder
from trivet.head import directly
from trivet.loss import training_loss
from trivet.train.gradients import cleared_fast, sum_over_processes
from trivet.train.numbers import LIMIT, Watch, listed
from trivet.train.oom import Halver
from trivet.train.ranks import RankCallback
from trivet.train.sampler import LengthSampler, Share, TokenBudgetSampler, rows_of_step
from trivet.train.saving import CheckpointTrainer
from trivet.train.shard import shard

#: The update rule: model, learning_rate=, weight_decay= -> optimizer.
OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Trainer(CheckpointTrainer):
    """Trains an adapted model.

    A step's loss is the mean over all supervised tokens of all its micro-batches on all devices, whatever the
    architecture; validation likewise is the mean over tokens, not over batches. A step whose loss or gradient is not
    finite changes nothing. A checkpoint that can't be written is done without. Processes sum their gradients once a
    step: of an adapter these are few, and a change of rank needs no new wrapper.

    Raises (from `train`):
        DivergedError: three steps in a row without finite numbers, or no other step before the end.
    """

    loss_is_scaled_for_ga = True
    control: Any

    def __init__(
        self,
        model: Any,
        *,
        args: transformers.TrainingArguments,
        task: str,
        train_rows: list[Encoded],
        validation_rows: list[Encoded] | None,
        collator: Collator,
        optimizer: OptimizerFactory,
        callbacks: list[transformers.TrainerCallback],
        tokenizer: Any,
        z_loss: float = 0.0,
        records: bool = False,
        batches: TokenBudgetSampler | None = None,
        origins: Sequence[str] = (),
        notes: dict[str, Any] | None = None,
        rate: float = 1.0,
    ) -> None:
        """
        Args:
            collator: makes the training's batches.
            records: whether a GPU's passes may be recorded (`trivet.graphs`).
            batches: which rows go together, else batch_size of them.
            origins: where each training row comes from (file:line), for messages about it.
            notes: what a checkpoint is to say of the run beside its state.
            rate: share of `args.learning_rate` to train at, also where a checkpoint says another.
        """
        self.z_loss, self.batches, self.origins, self.rate = z_loss, batches, origins, rate
        self.notes = {**(notes or {}), "rate": rate}
        self.watch = Watch()
        self.task, self.collator, self.optimizer_factory = task, collator, optimizer
        self.ranks = RankCallback(
            model,
            validation=self.row_losses if validation_rows else None,
            items=lambda: self.step_supervised,
            finished=lambda: self.finished,
        )
        self.recorder = Recorder(self._trained, on=records)
        self.halver = Halver(self._trained, self._give_up)
        #: Tokens of the step under way, without padding; and those of them that are learned.
        self.step_tokens = self.step_supervised = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,  # type: ignore[arg-type]
            eval_dataset=validation_rows,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=[self.ranks, *callbacks],
            processing_class=tokenizer,
        )
        if self.args.process_index:  # transformers seeds all alike: they would drop out the same entries of other rows
            torch.manual_seed(self.args.seed + self.args.process_index)
        if processes.sharded():
            shard(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, every part of the model in training mode (one that was just loaded is not)."""
        self.model.train()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.recorder.clear()  # their memory is for what comes after

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A pass over the rows; none where the checkpoint that is resumed from was the training's end."""
        if self.finished:
            self.control.should_training_stop = True
            return
        with cleared_fast(self.model, self._trained):
            super()._run_epoch(*args, **kwargs)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or early stopping has run out of patience."""
        patient = [c for c in self.callback_handler.callbacks if isinstance(c, transformers.EarlyStoppingCallback)]
        out_of_patience = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in patient)
        return self.state.global_step >= self.state.max_steps or out_of_patience

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator, which leaves the model as it is: the gradients are summed here."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = [len(row["input_ids"]) for row in rows]
        return LengthSampler(lengths, step, self.args.seed, packed=self.collator.packed)

    def get_train_dataloader(self) -> Any:
        """Batches of this process's share of the training rows."""
        sampler, size = self.batches or self._get_train_sampler(), None if self.batches else self.args.train_batch_size
        loader = torch.utils.data.DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=Share(sampler, size, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        alone: dict[str, Any] = {"num_processes": 1, "process_index": 0, "put_on_device": True}  # shared out already
        return prepare_data_loader(loader, self.accelerator.device, **alone)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step and the number of supervised items in them, over all devices."""
        batches = []
        for _, batch in zip(range(num_batches), epoch_iterator, strict=False):
            batches.append(batch)
        if not batches:
            return batches, None
        filled = [batch for batch in batches if batch]
        if self.task in ("classification", "regression"):  # where -100 may be a label
            items = sum(batch["labels"].numel() for batch in filled)
        else:  # labels of first tokens are -100 already, so causal and aligned labels are counted alike
            items = sum((batch["labels"] != IGNORE).sum() for batch in filled)
        tokens = sum(tokens_in(batch) for batch in filled)
        if self.task == "seq2seq":
            tokens = tokens + items
        counts = processes.total(torch.stack([torch.as_tensor(count, device=device) for count in (items, tokens)]))
        self.step_supervised, self.step_tokens = (int(c) for c in counts)
        return batches, counts[0]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, in halves where memory has no room for it."""
        step = self._pass
        if not inputs:  # at the end of a pass, where other processes have the last rows
            loss = torch.zeros((), device=self.args.device)
            if processes.sharded():  # they need this one's part of the weights: of this row nothing is learned
                loss = step(model, self.collator(self.train_dataset[:1]), math.inf)  # type: ignore[index]
        elif processes.sharded():  # shared weights are read by all at once
            loss = step(model, inputs, num_items_in_batch)
        else:
            loss = self.halver.run(lambda batch: step(model, batch, num_items_in_batch), inputs)
        loss = self.watch.loss(loss)
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            sum_over_processes(self._trained(), self.args.device)
        return loss * self.args.world_size  # transformers logs the mean over processes

    def _pass(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward pass. transformers' own walks through the model in every step."""
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip what is trained; the model would be walked through to find it."""
        return self.accelerator.clip_grad_norm_(self._trained(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm; where it or the loss is not finite, the step is not taken, in any process."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.watch.step(float(processes.total(self.watch.total())), float(norm)):
            # accelerate's own switch: its optimizer waits for the gradients of a step that is not complete
            self.accelerator.gradient_state._set_sync_gradients(False)
            self.ranks.skip()
        return norm

    def step_rows(self) -> list[str]:
        """Where the rows of the step that was just counted come from."""
        size = self.args.gradient_accumulation_steps * self.args.world_size
        sampler = self.batches or self._get_train_sampler()
        rows = rows_of_step(sampler, self.state.global_step - 1, size, self.args.per_device_train_batch_size)
        return [self.origins[row] if self.origins else f"row {row + 1}" for row in rows]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand `logs` to all loggers, then stop where training has diverged."""
        if "loss" in logs and self.watch.reason:
            logs["loss"] = math.nan
        super().log(logs, start_time)
        skipped, last = self.watch.skipped, self.state.global_step == self.state.max_steps
        if skipped >= LIMIT or (last and skipped == self.watch.steps > 0):
            raise DivergedError(
                f"training diverged: {skipped} steps in a row up to step {self.state.global_step} could not be taken, "
                f"the last because {self.watch.reason}; its rows: {listed(self.step_rows())}. Lower "
                f"training.learning_rate (now {self.args.learning_rate * self.rate:g}), or set model.dtype to float32 "
                "or bfloat16"
            )

    def _trained(self) -> list[torch.nn.Parameter]:
        """What the optimizer steps (asking the model would walk through all of it in every step)."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _give_up(self) -> None:
        """A backward pass broke off, for want of memory: it is tried again with fewer rows, and without recordings."""
        self.ranks.give_up()
        self.recorder.stop()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The training loss of a micro-batch: its share of the step's mean."""
        labels = inputs.pop("labels")
        call = directly if self.ranks.measuring else self.recorder
        loss = training_loss(model, inputs, labels, num_items_in_batch, task=self.task, z_loss=self.z_loss, call=call)
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk through the model in every step, and what a run says of its speed is tokens."""
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The method's update rule over everything that is trained."""
        if self.optimizer is None:
            self.optimizer = self.optimizer_factory(
                self.accelerator.unwrap_model(self.model if model is None else model),
                learning_rate=self.args.learning_rate * self.rate,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Token-weighted loss and accuracy on the validation rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        sums = self._score(rows).sum(1)
        loss, right_share = (sums[:2] / sums[2]).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss}
        if self.task != "regression":
            metrics[f"{metric_key_prefix}_accuracy"] = right_share
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def row_losses(self) -> torch.Tensor:
        """The loss of each of some validation rows, (n,), scaled so that their mean is the loss on them.

        Always the same rows: as many as eight such passes can see in a fifth of the training's time, but at least 64 (a
        forward pass being a third of a training step).
        """
        affordable = max(64, int(0.2 * 3 / 8 * self.state.max_steps * self.args.train_batch_size
                                 * self.args.gradient_accumulation_steps * self.args.world_size))  # fmt: skip
        order = torch.randperm(len(self.eval_dataset), generator=torch.Generator().manual_seed(self.args.seed))  # type: ignore[arg-type]
        rows = [self.eval_dataset[i] for i in order[:affordable].tolist()]  # type: ignore[index]
        losses, _, weight = self._score(rows)
        return losses / weight.mean()

    def _score(self, rows: Any) -> torch.Tensor:
        """Per row: summed loss, right answers, and items; (3, rows) float64. Each process scores its share of them."""
        model, size = self.accelerator.unwrap_model(self.model), self.args.per_device_eval_batch_size
        score = partial(row_scores, model, collator=self.collator.padded(), task=self.task, batch_size=size)
        index, count = self.args.process_index, self.args.world_size
        if count == 1 or processes.sharded():  # with shared weights all go through the same forward passes
            return score(rows)
        scores = torch.zeros(3, len(rows), dtype=torch.float64)
        if mine := rows[index::count]:
            scores[:, index::count] = score(mine)
        return processes.total(scores)
