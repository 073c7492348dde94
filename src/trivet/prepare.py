"""What a run needs before it begins: model loaded, adapter attached, rows encoded; nothing is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from trivet import processes
from trivet.adapter.attach import leaves_experts, trainable_parameters
from trivet.config import Config
from trivet.data.dataset import Dataset
from trivet.data.encode import Encoded, Summary, encode_dataset
from trivet.errors import ConfigError
from trivet.kernels import compiled
from trivet.memory import Estimate, estimate, free_memory
from trivet.model import check_base
from trivet.packing import why_not_packed, why_not_shared, worth_sharing
from trivet.session import Session, begin, check_format
from trivet.splits import Splits


@dataclass(frozen=True)
class Prepared:
    """Everything checked and encoded, nothing written yet; `config` says whether rows are packed.

    `trials` are learning rates that were tried, with their losses, where the rate was left open.
    """

    config: Config
    splits: Splits
    session: Session
    train_rows: list[Encoded]
    validation_rows: list[Encoded] | None
    summary: Summary
    trials: list[dict[str, Any]] | None = None


def prepare(config: Config, splits: Splits, console: Console) -> Prepared:
    """Load the model, attach the adapter, encode the rows; says what it found."""
    if processes.sharded() and config.training.learning_rate == "auto":
        raise ConfigError("training.learning_rate: auto needs the whole base model in every process; write a number")
    for package in config.training.report_to:
        if find_spec(package) is None:
            raise ConfigError(f"training.report_to: {package} is not installed here; pip install {package}")
    for name in ("train", "validation", "test"):
        part: Dataset | None = getattr(splits, name)
        if part is not None:
            say(console, f"{name}: {len(part):,} rows of format {part.format} from {part.source}")
            if part.skipped:
                say(console, f"  skipped {len(part.skipped):,} bad rows, the first: {part.skipped[0]}")
    processes.check_same("data", json.dumps(splits.fingerprints()))
    if processes.first_here():
        check_base(config.model.name, fetch=True)
    processes.wait()
    session = begin(config, splits.train)
    say(console, f"model {session.base.describe()}")
    if config.training.fast and session.base.device.type == "cpu" and (reason := compiled.missing()):
        say(console, f"  steps take longer than they need to: {reason}")
    train_rows, summary = encode_dataset(splits.train, session.encoder)
    for line in summary.lines():
        say(console, f"  {line}")
    packing = _packs(config, session, train_rows, console)
    sharing = _shares(config, session, train_rows, summary.longest, packing, console)
    config = replace(config, training=replace(config.training, packing=packing, share_prefix=sharing))
    validation_rows = None
    if splits.validation is not None:
        check_format(splits.validation, session.base.task)
        validation_rows, _ = encode_dataset(splits.validation, session.encoder)
    if splits.test is not None:
        session.evaluator(splits.test)  # what is wrong with it should show now, not after the training
    say(
        console,
        f"method {config.method}: {trainable_parameters(session.model):,} trainable parameters",
    )
    if leaves_experts(session.model):
        say(console, "  its experts stay as they are: what is around them is adapted")
    ready = Prepared(config, splits, session, train_rows, validation_rows, summary)
    needed, free = memory_needed(ready), free_memory(session.base.device)
    more = needed.total - needed.weights  # which are there already
    if more > free:
        say(
            console,
            f"  memory may not suffice: the longest rows need about {more / 2**30:.1f} GiB more, of which "
            f"{free / 2**30:.1f} are free. Lower training.batch_size or data.max_length, or set "
            "training.gradient_checkpointing: true",
        )
    return ready


def _packs(config: Config, session: Session, rows: list[Encoded], console: Console) -> bool:
    """Whether a batch's rows are put behind each other. Where that is left open: if it costs nothing, as on CPUs."""
    wanted = config.training.packing
    free = session.base.task == "causal-lm" and session.base.device.type == "cpu"
    if not (free if wanted is None else wanted):
        return False
    reason = why_not_packed(session, rows)
    if reason and wanted:
        raise ConfigError(f"training.packing: {reason}; set it to false")
    if reason:
        say(console, f"  rows are padded, not packed: {reason}")
    return reason is None


def _shares(
    config: Config, session: Session, rows: list[Encoded], longest: int, packing: bool, console: Console
) -> bool:
    """Whether what all rows begin with is computed once for a batch."""
    settings = config.training
    if settings.share_prefix and not packing:
        raise ConfigError("training.share_prefix: is for packed rows, and these are padded; set it to false")
    shared = worth_sharing(rows) if packing and settings.share_prefix is not False else 0
    if not shared:
        return False
    reason = why_not_shared(session, rows, shared, settings.max_tokens_per_batch or settings.batch_size * longest)
    if reason and settings.share_prefix:
        raise ConfigError(f"training.share_prefix: {reason}; set it to false")
    once = f"not computed once a batch: {reason}" if reason else "computed once a batch"
    say(console, f"  all rows begin with the same {shared} tokens, {once}")
    return reason is None


def memory_needed(ready: Prepared) -> Estimate:
    """What a micro-step of the longest rows will hold, roughly."""
    settings, longest = ready.config.training, ready.summary.longest
    tokens = max(settings.max_tokens_per_batch, longest) if settings.max_tokens_per_batch else None
    return estimate(
        ready.session.model,
        rows=1 if tokens else settings.batch_size,
        length=tokens or longest,
        checkpointing=settings.gradient_checkpointing,
    )


def say(console: Console, line: str) -> None:
    """A line for the person."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
