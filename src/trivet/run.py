"""One run, from config to result: data -> model -> adapter -> train -> save (proved) -> evaluate -> result.json."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from trivet import processes
from trivet.adapter.save import Proof, save_adapter
from trivet.allocator import keep_freed_memory
from trivet.config import Config
from trivet.configio import dump
from trivet.configio import load as load_config
from trivet.errors import ConfigError, DivergedError, InterruptedRunError, StorageError
from trivet.evaluate.measure import Evaluation, Settings, write_predictions
from trivet.learning_rate import with_rate
from trivet.lock import releasing
from trivet.model import pick_device
from trivet.pictures import rank_map, rank_path
from trivet.prepare import Prepared, prepare, say
from trivet.report import load_run, write_report
from trivet.report.remarks import remarks
from trivet.result import build_result
from trivet.resuming import check_data, check_same
from trivet.runfolder import RunFolder, storage, write_json, write_text
from trivet.session import Session
from trivet.splits import Splits, load_splits
from trivet.train.callback import RunLog
from trivet.train.checkpoint import newest_checkpoint, notes_of, processes_of, step_of, tidy
from trivet.train.interruption import Interruption
from trivet.train.oom import explained_memory
from trivet.train.trainer import Trainer
from trivet.training import make_trainer

log = logging.getLogger("trivet")


@dataclass(frozen=True)
class Outcome:
    """A finished run: the session with its trained adapter, and what result.json holds."""

    session: Session
    result: dict[str, Any]
    evaluation: Evaluation | None


#: How often a run that diverges goes back to its last checkpoint, at half the learning rate each time.
ROLLBACKS = 2


@releasing()
@processes.together()
def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    console: Console | None = None,
    splits: Splits | None = None,
    **datasets: Any,
) -> Outcome:
    """Run `config`; `datasets` (train, validation, test) take the place of the files it names.

    Args:
        splits: the rows, where `load_splits` has read them already.
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
    processes.wait()
    checkpoint = _last(folder) if resume else None
    if resume:
        before = load_config(folder.config)
        config = config.as_decided(before)
        if processes.first():
            then = processes_of(checkpoint) if checkpoint else processes.count()
            check_same(config, before, folder, then, force=force)
    processes.wait()
    ready = prepare(config, splits or load_splits(config, **datasets), console)
    if checkpoint is not None and not force:
        check_data(ready.splits, checkpoint)
    if ready.config.training.learning_rate == "auto":
        with explained_memory():
            ready = with_rate(ready, console)
    elif checkpoint is not None:
        ready = replace(ready, trials=notes_of(checkpoint).get("trials"))
    outcome: Outcome | None = None
    with _place(folder) as place:
        trained = _train(ready, folder, place, console, resume=resume, checkpoint=checkpoint)
        if trained.proof is not None and place is not None:
            outcome = _measure(trained, trained.proof, place, console, began)
    told = processes.from_first(lambda: json.dumps(outcome.result))  # type: ignore[union-attr] # the first has one
    return outcome or Outcome(trained.ready.session, json.loads(told), None)


def _last(folder: RunFolder) -> Path | None:
    """The newest whole checkpoint, the same for every process."""
    found = processes.from_first(lambda: str(newest_checkpoint(folder.checkpoints) or ""))
    return Path(found) if found else None


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


@dataclass(frozen=True)
class _Trained:
    """A training that came to its end; the proof is of the adapter that was saved, where this process saved one."""

    ready: Prepared
    trainer: Trainer
    log: RunLog
    proof: Proof | None


def _train(
    ready: Prepared,
    folder: RunFolder,
    place: RunFolder | None,
    console: Console,
    *,
    resume: bool,
    checkpoint: Path | None,
) -> _Trained:
    """Train and save, from `checkpoint` if there is one; where training diverges, again at half the learning rate."""
    rate, fresh = notes_of(checkpoint)["rate"] if checkpoint else 1.0, not resume
    while True:
        log_callback, proof = RunLog(folder.log, console), None
        try:
            with _writing(folder, log_callback, fresh=fresh):
                trainer = _fit(ready, folder, console, log_callback, resume=resume, checkpoint=checkpoint, rate=rate)
                if place is not None:
                    session = ready.session
                    probe, notes = session.probe(ready.train_rows), session.notes()
                    proof = save_adapter(session.model, place.adapter, probe, tokenizer=session.tokenizer, notes=notes)
        except DivergedError as error:
            if rate <= 0.5**ROLLBACKS:
                raise
            rate, checkpoint, resume = rate / 2, _last(folder), True
            say(console, f"{error}\ngoing back to the last checkpoint, at {rate:g} of the learning rate")
            # ranks may have changed since that checkpoint
            ready = replace(prepare(ready.config, ready.splits, Console(quiet=True)), trials=ready.trials)
            continue
        if proof is not None:
            say(console, f"adapter saved to {folder.adapter}; {proof}")
        return _Trained(ready, trainer, log_callback, proof)


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
    _begin(folder, dump(ready.config), resume=resume)
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
        step = trainer.state.global_step
        then = f"Go on with: trivet train {folder.config} --resume"
        if (folder.checkpoints / f"checkpoint-{step}").is_dir():
            kept = f", which is kept in {folder.checkpoints}. {then}"
        else:
            kept = f"; {trainer.unsaved}. {then}" if trainer.unsaved else ", before anything was learned"
        raise InterruptedRunError(
            f"interrupted by {interruption.name} after step {step}{kept}", signal=interruption.signal
        )
    return trainer


def _begin(folder: RunFolder, config_text: str, *, resume: bool) -> None:
    """Make the run folder, once every process is ready to train.

    Raises:
        ConfigError: a process does not see it.
    """
    processes.wait()
    if processes.first():
        folder.begin(config_text, resume=resume)
        tidy(folder.checkpoints)
    processes.wait()
    if not folder.config.exists():
        raise ConfigError(f"output_dir {folder.path}: must be on a disk that all machines share; process "
                          f"{processes.index()} does not see it")  # fmt: skip


def _measure(trained: _Trained, proof: Proof, folder: RunFolder, console: Console, began: float) -> Outcome:
    """Evaluate base and tuned, and write what was found out.

    Raises:
        StorageError: at the very end, where something on the way could not be written.
    """
    ready, trainer = trained.ready, trained.trainer
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
        trained.log.tokens_per_second,
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
    if processes.first():
        done = load_run(folder.path)
        say(console, f"what was trained and how it went: {write_report(done)}")
        for remark in remarks(done):
            say(console, f"  {remark.title}: {remark.text}")
    lost = [str(problem) for problem in (trained.log.unwritten, trainer.unsaved) if problem]
    if lost:
        raise StorageError(f"run {folder.path}: the adapter and the result are whole, but on the way {'; '.join(lost)}")
    return Outcome(session, result, evaluation)


@contextlib.contextmanager
def _writing(folder: RunFolder, log_callback: RunLog, *, fresh: bool) -> Iterator[None]:
    """Close the log whatever happens; a run that failed before its first checkpoint leaves nothing behind."""
    try:
        with storage(f"run folder {folder.path}"), explained_memory():
            yield
    except BaseException:
        log_callback.close()
        if fresh and processes.first() and not any(folder.checkpoints.glob("checkpoint-*")):
            with contextlib.suppress(OSError):  # the error at hand says more
                folder.clear()
        raise
