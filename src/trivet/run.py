"""One run, from config to result: data -> model -> adapter -> train -> save (proved) -> evaluate -> result.json."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments

from trivet import processes
from trivet.adapter.attach import trainable_parameters
from trivet.adapter.plan import optimizer
from trivet.adapter.save import save_adapter
from trivet.allocator import keep_freed_memory
from trivet.config import Config
from trivet.configio import dump
from trivet.configio import load as load_config
from trivet.data.dataset import Dataset
from trivet.data.encode import Encoded, Summary, encode_dataset
from trivet.errors import ConfigError, TrivetError
from trivet.evaluate.measure import Evaluation, Settings, write_predictions
from trivet.model import check_base, pick_device
from trivet.pictures import rank_map, rank_path
from trivet.result import build_result
from trivet.runfolder import RunFolder, storage, write_json, write_text
from trivet.schedule import STEP_KEYS, planned_steps, step_size, token_batches
from trivet.session import Session, begin, check_format, check_packing
from trivet.splits import Splits, load_splits
from trivet.train.callback import RunLog
from trivet.train.checkpoint import newest_checkpoint, processes_of, step_of
from trivet.train.trainer import Trainer

log = logging.getLogger("trivet")


@dataclass(frozen=True)
class Prepared:
    """Everything checked and encoded, nothing written yet."""

    config: Config
    splits: Splits
    session: Session
    train_rows: list[Encoded]
    validation_rows: list[Encoded] | None
    summary: Summary


def prepare(config: Config, console: Console, **datasets: Any) -> Prepared:
    """Read the data, load the model, attach the adapter, encode the rows; says what it found."""
    splits = load_splits(config, **datasets)
    if config.training.early_stopping_patience is not None and splits.validation is None:
        raise ConfigError("training.early_stopping_patience needs validation rows; set data.validation")
    for package in config.training.report_to:
        if find_spec(package) is None:
            raise ConfigError(f"training.report_to: {package} is not installed here; pip install {package}")
    for name in ("train", "validation", "test"):
        part: Dataset | None = getattr(splits, name)
        if part is not None:
            _say(console, f"{name}: {len(part):,} rows of format {part.format} from {part.source}")
            if part.skipped:
                _say(console, f"  skipped {len(part.skipped):,} bad rows, the first: {part.skipped[0]}")
    processes.check_same("data", json.dumps(splits.fingerprints()))
    if processes.first_here():
        check_base(config.model.name, fetch=True)
    processes.wait()
    session = begin(config, splits.train)
    _say(console, f"model {session.base.describe()}")
    train_rows, summary = encode_dataset(splits.train, session.encoder)
    for line in summary.lines():
        _say(console, f"  {line}")
    validation_rows = None
    if splits.validation is not None:
        check_format(splits.validation, session.base.task)
        validation_rows, _ = encode_dataset(splits.validation, session.encoder)
    if splits.test is not None:
        session.evaluator(splits.test)  # what is wrong with it should show now, not after the training
    _say(
        console,
        f"method {config.method}: {trainable_parameters(session.model):,} trainable parameters",
    )
    return Prepared(config, splits, session, train_rows, validation_rows, summary)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Outcome:
    """A finished run: the session with its trained adapter, and what result.json holds."""

    session: Session
    result: dict[str, Any]
    evaluation: Evaluation | None


@processes.together()
def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **datasets: Any,
) -> Outcome:
    """Run `config`; `datasets` (train, validation, test) take the place of the files it names.

    Raises:
        ConfigError, DataError, ModelError: before anything is written.
        StorageError, ProofError: the run folder keeps its last good checkpoint.
    """
    began = time.perf_counter()
    processes.join(pick_device(config.model.device))
    if not processes.first():
        console = Console(quiet=True)
    console = console or Console(stderr=True)
    if config.training.keep_freed_memory:
        keep_freed_memory()
    folder = RunFolder(Path(config.output_dir))
    if processes.first():
        folder.check_free(resume=resume, overwrite=overwrite)
        if resume:
            last = newest_checkpoint(folder.checkpoints)
            _check_same(config, load_config(folder.config), folder, processes_of(last) if last else processes.count())
    processes.wait()
    ready = prepare(config, console, **datasets)
    session = ready.session
    log_callback = RunLog(folder.log, console)
    with _writing(folder, log_callback, fresh=not resume):
        _begin(folder, dump(config), resume=resume)
        trainer = make_trainer(ready, folder, log_callback)
        ranks = trainer.ranks
        found = processes.from_first(lambda: str(newest_checkpoint(folder.checkpoints, ranks.files) or ""))
        checkpoint = Path(found) if resume and found else None
        if resume:
            where = f"step {step_of(checkpoint)}" if checkpoint else "the beginning: no whole checkpoint was left"
            _say(console, f"resuming from {where}")
        if checkpoint:
            ranks.resume(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    outcome: Outcome | None = None
    with _place(folder) as place:
        if place is not None:
            outcome = _finish(ready, place, console, trainer, log_callback, began)
    told = processes.from_first(lambda: json.dumps(outcome.result))  # type: ignore[union-attr] # the first has one
    return outcome or Outcome(session, json.loads(told), None)


def _begin(folder: RunFolder, config_text: str, *, resume: bool) -> None:
    """Make the run folder, once every process is ready to train.

    Raises:
        ConfigError: a process does not see it.
    """
    processes.wait()
    if processes.first():
        folder.begin(config_text, resume=resume)
    processes.wait()
    if not folder.config.exists():
        raise ConfigError(f"output_dir {folder.path}: must be on a disk that all machines share; process "
                          f"{processes.index()} does not see it")  # fmt: skip


@contextlib.contextmanager
def _place(folder: RunFolder) -> Iterator[RunFolder | None]:
    """Where this process puts what is made of a trained adapter; None where it has no part in that.

    A base model that is shared out runs in all processes or in none, so all go through the same, for nothing.
    """
    if processes.first():
        yield folder
    elif processes.sharded():
        with tempfile.TemporaryDirectory() as scratch:
            yield RunFolder(Path(scratch))
    else:
        yield None


def _finish(
    ready: Prepared, folder: RunFolder, console: Console, trainer: Trainer, log_callback: RunLog, began: float
) -> Outcome:
    """Save the adapter, evaluate base and tuned, and write what was found out."""
    session, ranks = ready.session, trainer.ranks
    proof = save_adapter(
        session.model,
        folder.adapter,
        session.probe(ready.train_rows),
        tokenizer=session.tokenizer,
        notes=session.notes(),
    )
    _say(console, f"adapter saved to {folder.adapter}; {proof}")
    which = "test" if ready.splits.test is not None else "validation"
    evaluation = None
    rows = ready.splits.test if ready.splits.test is not None else ready.splits.validation
    if rows is not None:
        _say(console, f"evaluating base and tuned on {len(rows):,} {which} rows")
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
        _say(console, f"ranks and their path drawn in {folder.rank_map} and {folder.rank_path.name}")
    write_json(folder.result, result)
    return Outcome(session, result, evaluation)


def make_trainer(ready: Prepared, folder: RunFolder, log_callback: RunLog) -> Trainer:
    """The Trainer for a prepared run."""
    settings, session = ready.config.training, ready.session
    held = ready.validation_rows
    steps = planned_steps(ready.config, ready.train_rows)
    if settings.packing:
        check_packing(session, ready.train_rows)
    every = settings.eval_steps or max(1, -(-steps // 5))
    callbacks: list[Any] = [log_callback]
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
        optimizer=optimizer,
        callbacks=callbacks,
        tokenizer=session.tokenizer,
        z_loss=settings.z_loss,
        batches=token_batches(ready.config, ready.train_rows),
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
        if fresh and processes.first() and not any(folder.checkpoints.glob("checkpoint-*")):
            with contextlib.suppress(OSError):  # the error at hand says more
                folder.clear()
        if isinstance(error, torch.OutOfMemoryError):
            raise TrivetError(
                "out of GPU memory; lower training.batch_size (and raise gradient_accumulation_steps), or set "
                "training.gradient_checkpointing: true"
            ) from error
        raise


def _check_same(config: Config, before: Config, folder: RunFolder, processes_before: int) -> None:
    """A resumed run must be the same run: other settings would give something that was never asked for.

    With the number of processes, batch_size and gradient_accumulation_steps may change, if a step's rows do not.
    """
    changed, shared_out = [], STEP_KEYS if processes.count() != processes_before else ()
    for section in ("model", "data", "training"):
        ours, theirs = getattr(config, section), getattr(before, section)
        changed += [
            f"{section}.{name} ({getattr(theirs, name)} then, {getattr(ours, name)} now)"
            for name in type(ours).__dataclass_fields__
            if getattr(ours, name) != getattr(theirs, name) and name not in shared_out
        ]
    now, then = step_size(config, processes.count()), step_size(before, processes_before)
    if shared_out and now != then:
        changed.append(f"batch_size x gradient_accumulation_steps x processes ({then} then, {now} now)")
    if config.method != before.method:
        changed.append(f"method ({before.method} then, {config.method} now)")
    if changed:
        raise ConfigError(f"run {folder.path}: can't be resumed with other settings: {'; '.join(changed)}")
