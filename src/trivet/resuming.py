"""Whether a run that is resumed is still the same run."""

from __future__ import annotations

from pathlib import Path

from trivet import processes
from trivet.config import Config
from trivet.errors import ConfigError
from trivet.runfolder import RunFolder
from trivet.schedule import STEP_KEYS, step_size
from trivet.splits import Splits
from trivet.train.checkpoint import notes_of


def check_same(config: Config, before: Config, folder: RunFolder, processes_before: int, *, force: bool) -> None:
    """A resumed run must be the same run: other settings would give something that was never asked for.

    With the number of processes, batch_size and gradient_accumulation_steps may change, if a step's rows do not. With
    `force` settings of data and training may differ; another model or method has no use for the checkpoint.
    """
    changed, shared_out = [], STEP_KEYS if processes.count() != processes_before else ()
    for section in ("model",) if force else ("model", "data", "training"):
        ours, theirs = getattr(config, section), getattr(before, section)
        changed += [
            f"{section}.{name} ({getattr(theirs, name)} then, {getattr(ours, name)} now)"
            for name in type(ours).__dataclass_fields__
            if getattr(ours, name) != getattr(theirs, name) and name not in shared_out
        ]
    now, then = step_size(config, processes.count()), step_size(before, processes_before)
    if shared_out and now != then and not force:
        changed.append(f"batch_size x gradient_accumulation_steps x processes ({then} then, {now} now)")
    if config.method != before.method:
        changed.append(f"method ({before.method} then, {config.method} now)")
    if changed:
        raise ConfigError(
            f"run {folder.path}: can't be resumed with other settings: {'; '.join(changed)}"
            + ("" if force else ". Those of data and training may differ with --resume --force")
        )


def check_data(splits: Splits, checkpoint: Path) -> None:
    """Refuse rows that are not those which the run was at."""
    ours, theirs = splits.fingerprints(), notes_of(checkpoint)["data"]
    changed = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if changed:
        raise ConfigError(
            f"run {checkpoint.parents[1]}: can't be resumed with other data: the rows of {' and '.join(changed)} are "
            f"not those of {checkpoint.name}. Put the old ones back, start anew with --overwrite, or go on regardless "
            "with --resume --force"
        )
