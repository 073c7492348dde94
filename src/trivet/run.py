"""One run, from config to result: data -> model -> adapter -> train -> save (proved) -> evaluate -> result.json."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments

from trivet.adapter.plan import optimizer
from trivet.adapter.save import Proof, save_adapter
from trivet.allocator import keep_freed_memory
from trivet.config import Config
from trivet.configio import dump
from trivet.configio import load as load_config
from trivet.errors import ConfigError, DivergedError, InterruptedRunError, StorageError, TrivetError
from trivet.evaluate.measure import Evaluation, Settings, write_predictions
from trivet.lock import releasing
from trivet.pictures import rank_map, rank_path
from trivet.prepare import Prepared, prepare, say
from trivet.report import write_report
from trivet.result import build_result
from trivet.resuming import check_data, check_same
from trivet.runfolder import RunFolder, storage, write_json, write_text
from trivet.schedule import planned_steps, token_batches
from trivet.session import Session, check_packing
from trivet.train.callback import RunLog
from trivet.train.checkpoint import newest_checkpoint, notes_of, step_of, tidy
from trivet.train.interruption import Interruption
from trivet.train.trainer import Trainer

log = logging.getLogger("trivet")


@dataclass(frozen=True)
class Outcome:
    """A finished run: the session with its trained adapter, and what result.json holds."""

    session: Session
    result: dict[str, Any]
    evaluation: Evaluation | None


#: How often a run that diverges goes back to its last checkpoint, at half the learning rate each time.
ROLLBACKS = 2


@releasing
def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    console: Console | None = None,
    **datasets: Any,
) -> Outcome:
    """Run `config`; `datasets` (train, validation, test) take the place of the files it names.

    Args:
        resume: go on with the run in the output folder.
        overwrite: begin anew where a run is.
        force: resume although data or settings are not the run's own.
        console: where to say what happens; standard error by default.

    Raises:
        ConfigError, DataError, ModelError: before anything is written.
        StorageError, ProofError: the run folder keeps its last good checkpoint.
        InterruptedRunError: by SIGINT or SIGTERM; the step under way was finished and a checkpoint kept.
        DivergedError: losses or gradients are no numbers, at a quarter of the learning rate too.
    """
    console = console or Console(stderr=True)
    began = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("trivet trains in one process so far; start it without torchrun or accelerate launch")
    if config.training.keep_freed_memory:
        keep_freed_memory()
    folder = RunFolder(Path(config.output_dir))
    folder.check_free(resume=resume, overwrite=overwrite)
    if resume:
        check_same(config, load_config(folder.config), folder, force=force)
    ready, fresh = prepare(config, console, **datasets), not resume
    checkpoint = newest_checkpoint(folder.checkpoints) if resume else None
    if checkpoint is not None and not force:
        check_data(ready.splits, checkpoint)
    rate = notes_of(checkpoint)["rate"] if checkpoint else 1.0
    while True:
        log_callback = RunLog(folder.log, console)
        try:
            with _writing(folder, log_callback, fresh=fresh):
                trainer = _fit(ready, folder, console, log_callback, resume=resume, checkpoint=checkpoint, rate=rate)
                proof = save_adapter(
                    ready.session.model,
                    folder.adapter,
                    ready.session.probe(ready.train_rows),
                    tokenizer=ready.session.tokenizer,
                    notes=ready.session.notes(),
                )
        except DivergedError as error:
            if rate <= 0.5**ROLLBACKS:
                raise
            rate, checkpoint, resume = rate / 2, newest_checkpoint(folder.checkpoints), True
            say(console, f"{error}\ngoing back to the last checkpoint, at {rate:g} of the learning rate")
            ready = prepare(config, Console(quiet=True), **datasets)  # ranks may have changed since that checkpoint
            continue
        say(console, f"adapter saved to {folder.adapter}; {proof}")
        return _measure(ready, folder, console, trainer, log_callback, proof, began)


def _fit(
    ready: Prepared,
    folder: RunFolder,
    console: Console,
    log_callback: RunLog,
    *,
    resume: bool,
    checkpoint: Path | None,
    rate: float,
) -> Trainer:
    """Train to the end, from `checkpoint` if there is one. Raises `InterruptedRunError` where a signal ended it."""
    folder.begin(dump(ready.config), resume=resume)
    tidy(folder.checkpoints)
    interruption = Interruption(console)
    trainer = make_trainer(ready, folder, log_callback, interruption, rate=rate)
    if resume:
        where = f"step {step_of(checkpoint)}" if checkpoint else "the beginning: no whole checkpoint was left"
        say(console, f"resuming from {where}")
    if checkpoint:
        trainer.ranks.resume(checkpoint)
    with interruption.watching():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interruption.signal:
        raise InterruptedRunError(
            f"interrupted by {signal.Signals(interruption.signal).name} after step {trainer.state.global_step}"
            + (f"; {trainer.unsaved}" if trainer.unsaved else f", which is kept in {folder.checkpoints}")
            + f". Go on with: trivet train {folder.config} --resume",
            signal=interruption.signal,
        )
    return trainer


def _measure(
    ready: Prepared,
    folder: RunFolder,
    console: Console,
    trainer: Trainer,
    log_callback: RunLog,
    proof: Proof,
    began: float,
) -> Outcome:
    """Evaluate base and tuned, and write what was found out.

    Raises:
        StorageError: at the very end, where something on the way could not be written.
    """
    session, ranks = ready.session, trainer.ranks
    which = "test" if ready.splits.test is not None else "validation"
    evaluation = None
    rows = ready.splits.test if ready.splits.test is not None else ready.splits.validation
    if rows is not None:
        say(console, f"evaluating base and tuned on {len(rows):,} {which} rows")
        settings = Settings.of(ready.config.evaluation)
        evaluation = session.evaluator(rows, settings).side_by_side(session.model)
    result = build_result(
        ready,
        trainer.state,
        ranks,
        log_callback.tokens_per_second,
        proof,
        evaluation,
        which,
        time.perf_counter() - began,
    )
    if evaluation is not None and evaluation.predictions:
        write_text(folder.predictions, write_predictions(evaluation.predictions))
    if ranks.policy.moving:
        seen = [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]
        rank_map(result["ranks"], folder.rank_map)
        rank_path(result["rank_history"], seen, folder.rank_path)
        say(console, f"ranks and their path drawn in {folder.rank_map} and {folder.rank_path.name}")
    write_json(folder.result, result)
    say(console, f"what was trained and how it went: {write_report(folder.path)}")
    lost = [str(problem) for problem in (log_callback.unwritten, trainer.unsaved) if problem]
    if lost:
        raise StorageError(f"run {folder.path}: the adapter and the result are whole, but on the way {'; '.join(lost)}")
    return Outcome(session, result, evaluation)


def make_trainer(ready: Prepared, folder: RunFolder, log_callback: RunLog, *further: Any, rate: float = 1.0) -> Trainer:
    """The Trainer for a prepared run, at a share `rate` of its learning rate; `further` are more callbacks."""
    settings, session = ready.config.training, ready.session
    held = ready.validation_rows
    steps = planned_steps(ready.config, ready.train_rows)
    if settings.packing:
        check_packing(session, ready.train_rows)
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
        collator=replace(session.collator, packed=settings.packing),
        optimizer=partial(optimizer, head_learning_rate=settings.head_learning_rate),
        callbacks=callbacks,
        tokenizer=session.tokenizer,
        z_loss=settings.z_loss,
        batches=token_batches(ready.config, ready.train_rows),
        origins=ready.summary.origins,
        notes={"data": ready.splits.fingerprints()},
        rate=rate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    log_callback.bind(trainer)
    return trainer


@contextlib.contextmanager
def _explained_arguments() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old name above
            yield
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: these settings can't be used together or here: {error}") from error


@contextlib.contextmanager
def _writing(folder: RunFolder, log_callback: RunLog, *, fresh: bool) -> Iterator[None]:
    """Close the log whatever happens; a run that failed before its first checkpoint leaves nothing behind."""
    try:
        with storage(f"run folder {folder.path}"):
            yield
    except BaseException as error:
        log_callback.close()
        if fresh and not any(folder.checkpoints.glob("checkpoint-*")):
            with contextlib.suppress(OSError):  # the error at hand says more
                folder.clear()
        if isinstance(error, torch.OutOfMemoryError):
            raise TrivetError(
                "out of GPU memory; lower training.batch_size (and raise gradient_accumulation_steps), or set "
                "training.gradient_checkpointing: true"
            ) from error
        raise
