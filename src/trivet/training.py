"""The Trainer of a prepared run: the config's words as transformers' arguments."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from trivet import processes
from trivet.adapter.plan import optimizer
from trivet.config import Config
from trivet.errors import ConfigError
from trivet.prepare import Prepared
from trivet.runfolder import RunFolder
from trivet.schedule import planned_steps, token_batches
from trivet.train.callback import RunLog
from trivet.train.trainer import Trainer


def make_trainer(ready: Prepared, folder: RunFolder, log_callback: RunLog, *further: Any, rate: float = 1.0) -> Trainer:
    """The Trainer for a prepared run, at a share `rate` of its learning rate; `further` are more callbacks."""
    settings, session = ready.config.training, ready.session
    assert settings.learning_rate != "auto"  # noqa: S101 - decided by now
    held = ready.validation_rows
    steps = planned_steps(ready.config, ready.train_rows)
    every = settings.eval_steps or max(1, -(-steps // 5))
    callbacks: list[Any] = [log_callback, *further]
    if settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    with _explained_arguments():
        arguments = TrainingArguments(
            output_dir=str(folder.checkpoints),
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=ready.config.evaluation.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.num_epochs,
            max_steps=settings.max_steps or -1,
            warmup_steps=settings.warmup_ratio,
            lr_scheduler_type=settings.lr_scheduler,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            # The newer name, activation_checkpointing, is unknown to the transformers of Python 3.10.
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
            eval_strategy="steps" if held else "no",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=settings.keep_checkpoints,
            load_best_model_at_end=bool(held),
            restore_callback_states_from_checkpoint=True,  # how patient early stopping still is
            metric_for_best_model="eval_loss" if held else None,
            greater_is_better=False if held else None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            seed=settings.seed,
            data_seed=settings.seed,
            dataloader_num_workers=settings.num_workers,
            dataloader_pin_memory=session.base.device.type == "cuda",
            remove_unused_columns=False,
            report_to=settings.report_to or "none",
            disable_tqdm=True,
            use_cpu=session.base.device.type == "cpu",
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # torch's DataParallel would split batches behind our loss
    trainer = Trainer(
        session.model,
        args=arguments,
        task=session.base.task,
        train_rows=ready.train_rows,
        validation_rows=held,
        collator=replace(session.collator, packed=bool(settings.packing), share=bool(settings.share_prefix)),
        optimizer=partial(optimizer, head_learning_rate=settings.head_learning_rate),
        callbacks=callbacks,
        tokenizer=session.tokenizer,
        z_loss=settings.z_loss,
        records=_records(ready.config),
        batches=token_batches(ready.config, ready.train_rows),
        origins=ready.summary.origins,
        notes={"data": ready.splits.fingerprints(), "trials": ready.trials},
        rate=rate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    log_callback.bind(trainer)
    return trainer


def _records(config: Config) -> bool:
    """Whether passes may be recorded: what is computed again, or drawn from a number in Python, would not be new."""
    settings = config.training
    anew = settings.gradient_checkpointing or config.model.lora_dropout > 0
    return settings.cuda_graphs and not anew and processes.count() == 1


@contextlib.contextmanager
def passing_trainer(ready: Prepared, *further: Any) -> Iterator[Trainer]:
    """A Trainer that validates and saves nothing on the way, and leaves nothing behind."""
    with tempfile.TemporaryDirectory() as place:
        log = RunLog(Path(place) / "log.jsonl", Console(quiet=True))
        trainer = make_trainer(ready, RunFolder(Path(place)), log, *further)
        trainer.args.eval_strategy = trainer.args.save_strategy = IntervalStrategy.NO
        trainer.args.load_best_model_at_end = False
        try:
            yield trainer
        finally:
            log.close()


@contextlib.contextmanager
def _explained_arguments() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old name above
            yield
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: these settings can't be used together or here: {error}") from error
