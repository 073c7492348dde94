"""Evaluating an adapter after its run: which rows, and where the figures go."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trivet.configio import load as load_config
from trivet.data.dataset import Dataset, load_dataset
from trivet.errors import ConfigError
from trivet.evaluate.measure import Evaluation, Settings, write_predictions
from trivet.report import load_run, write_report
from trivet.runfolder import RunFolder, storage, write_json, write_text
from trivet.session import LABELLED, Session, reopen
from trivet.splits import load_splits


def evaluate_adapter(
    path: Path,
    *,
    data: str | None = None,
    max_rows: int | None = None,
    settings: Settings | None = None,
    base_model: str | None = None,
    load_in_4bit: bool | None = None,
    output: Path | None = None,
) -> tuple[Evaluation, list[Path]]:
    """Base and tuned on `data`, or on the run's own test (else validation) rows.

    In a run folder, `metrics`, `intervals`, `n` and `evaluated_on` of result.json become this evaluation's, and what
    they were is kept under `earlier_evaluations`; predictions.jsonl is replaced.

    `load_in_4bit` None takes the base model's weights that it was trained on.

    Returns:
        The evaluation, and the files that were written.
    """
    settings = settings or Settings()
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; name a file")
    if output is not None and not next(p for p in output.absolute().parents if p.exists()).is_dir():
        raise ConfigError(f"--output {output}: lies under a file; name a file in a folder")
    folder = RunFolder(path)
    finished = folder.result.exists()
    before = folder.read_result() if finished else {}
    session = reopen(path, base_model=base_model, load_in_4bit=load_in_4bit)
    rows, split = rows_of(path, session, data)
    evaluation = session.evaluator(rows.take(max_rows), settings).side_by_side(session.model)
    report: dict[str, Any] = {
        **evaluation.to_dict(),
        "evaluated_on": {
            "split": split,
            "source": rows.source,
            "load_in_4bit": session.base.load_in_4bit,
            **asdict(settings),
        },
    }
    written = []
    if finished:
        names = ("evaluated_on", "metrics", "intervals", "n")
        earlier = [*before.pop("earlier_evaluations", []), {name: before.get(name) for name in names}]
        write_json(
            folder.result,
            {**report, **{k: v for k, v in before.items() if k not in names}, "earlier_evaluations": earlier},
        )
        written.append(folder.result)
        if evaluation.predictions:
            write_text(folder.predictions, write_predictions(evaluation.predictions))
            written.append(folder.predictions)
        written.append(write_report(load_run(path)))
    if output is not None:
        with storage(f"--output {output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
        written.append(output)
    return evaluation, written


def rows_of(path: Path, session: Session, data: str | None) -> tuple[Dataset, str]:
    """The rows of `data`, else the test or validation rows of the run at `path`, and which these are.

    Raises:
        ConfigError: none were given, and the folder names none.
    """
    folder, task = RunFolder(path), session.base.task
    if data is not None:
        return load_dataset(data, split="test", format=task if task in LABELLED else "auto"), "given"
    if not folder.config.exists():
        raise ConfigError(f"{path}: an adapter folder does not name its data; pass --data FILE")
    splits = load_splits(load_config(folder.config))
    if splits.test is not None:
        return splits.test, "test"
    if splits.validation is not None:
        return splits.validation, "validation"
    raise ConfigError(f"run {path}: has neither test nor validation rows; pass --data FILE")
