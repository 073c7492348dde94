"""Sweeps: what is run, what is not run again, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from conftest import colour_rows, write_jsonl
from trivet.configio import dump, load
from trivet.errors import ConfigError
from trivet.run import train
from trivet.sweep.jobs import command
from trivet.sweep.plan import plan
from trivet.sweep.report import Mean
from trivet.sweep.sweep import sweep


@pytest.fixture
def config(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(tmp_path / "train.jsonl", colour_rows(24))
    values = {
        "model.name": str(tiny("gpt2")), "model.dtype": "float32", "model.device": "cpu", "data.train": "train.jsonl",
        "data.validation": 0.25, "training.max_steps": 4, "training.batch_size": 4, "evaluation.generate": False,
        "evaluation.resamples": 10, "output_dir": "swept",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump(load(values=values)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Path("config.yaml")


# -- what is run ---------------------------------------------------------------------------------------------


def test_every_combination_with_every_seed(config: Path) -> None:
    folder, runs = plan(
        config, ["lr=1e-4,3e-4", "training.max_steps=2", "model.target_modules=all-linear,[c_attn, c_fc]"], 2
    )
    assert folder == Path("swept")
    rates, layers = ("1e-4", "3e-4"), ("all-linear", "[c_attn, c_fc]")
    settings = [f"learning_rate={rate}, target_modules={names}" for rate in rates for names in layers]
    assert [run.setting for run in runs[::2]] == settings
    assert [run.seed for run in runs] == [42, 43] * 4 == [run.config.training.seed for run in runs]
    assert {run.config.training.learning_rate for run in runs} == {1e-4, 3e-4}
    assert runs[2].config.model.target_modules == ["c_attn", "c_fc"]
    assert all(run.config.training.max_steps == 2 for run in runs)
    assert len({run.folder.path for run in runs}) == 8
    assert all(run.folder.path.is_relative_to(folder) and "=" not in str(run.config_file) for run in runs)


def test_without_a_choice_it_is_the_configured_setting(config: Path) -> None:
    _, runs = plan(config, [], 3)
    assert [run.setting for run in runs] == ["as configured"] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learnin_rate=1,2"], "did you mean training.learning_rate"),
        (["training.learning_rate=1e-4,fast"], "is a number or auto, not 'fast'"),
        (["training.learning_rate=1e-4", "lr=3e-4"], "is given twice"),
        (["output_dir=a,b"], "output_dir: can't be swept"),
        (["seed=1,2"], "use --seeds"),
        (["data.validation=null"], "chooses by the validation loss"),
        (["lr=1e-4,1e-4"], "are they the same"),
        (["lr=[1"], "not valid YAML"),
        (["lr"], "write key=value"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_is_written(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(config, overrides)
    assert not Path("swept").exists()


def test_ray_that_is_not_there_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"pip install 'trivet\[ray\]', or unset it"):
        sweep(config, ["lr=1e-4,3e-4"])
    assert not Path("swept").exists()


def test_folders_that_hold_something_else_are_left_alone(config: Path) -> None:
    Path("swept").mkdir()
    Path("swept/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no sweep"):
        sweep(config, ["lr=1e-4,3e-4"])
    assert [path.name for path in Path("swept").iterdir()] == ["notes.txt"]


# -- what came out -------------------------------------------------------------------------------------------


def test_a_mean_has_students_interval() -> None:
    values = [2.0, 2.5, 2.2, 3.1]
    found = Mean.of(values)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert found.mean == pytest.approx(2.45) and found.interval == pytest.approx((low, high))
    assert Mean.of([2.0]) == Mean(2.0, None)
    assert Mean.of([1.0, 1.0]).text(".1f") == "1.0 [1.0, 1.0]"


def test_finished_runs_are_kept_failed_ones_named_and_the_others_compared(config: Path) -> None:
    write_jsonl(Path("other.jsonl"), [{**row, "completion": row["completion"] + " !"} for row in colour_rows(24)])
    overrides = ["data.train=train.jsonl,other.jsonl,absent.jsonl"]
    folder, runs = plan(config, overrides, 2)
    for run in runs[:4]:
        train(run.config, console=Console(quiet=True))
    (folder / "sweep.json").write_text("{}")  # as an interrupted sweep left it
    before = [run.folder.result.read_bytes() for run in runs[:4]]
    said: list[str] = []
    outcome = sweep(config, overrides, seeds=2, jobs=2, say=said.append)
    assert said[0] == "4 of 6 runs are finished already" and len(said) == 3
    assert [run.folder.result.read_bytes() for run in runs[:4]] == before
    assert {(run.setting, run.seed) for run in outcome.failed} == {("train=absent.jsonl", seed) for seed in (42, 43)}
    assert all("absent.jsonl: no such file" in reason and ".log" in reason for reason in outcome.failed.values())

    losses = [json.loads(text)["best_validation_loss"] for text in before]
    best, other = ("train", "other") if sum(losses[:2]) < sum(losses[2:]) else ("other", "train")
    summary = json.loads((folder / "sweep.json").read_text())
    found = {
        setting["setting"].removeprefix("train=").removesuffix(".jsonl"): setting for setting in summary["settings"]
    }
    assert summary["chosen"] == f"train={best}.jsonl"
    assert found["train"]["validation_loss"]["mean"] == pytest.approx(np.mean(losses[:2]))
    assert found["absent"]["validation_loss"] is None and "no such file" in found["absent"]["runs"][0]["failed"]
    above = abs((losses[0] + losses[1] - losses[2] - losses[3]) / 2)
    assert found[other]["above_chosen"]["mean"] == pytest.approx(above) and "above_chosen" not in found[best]
    assert [row[0] for row in outcome.table[1:]] == [f"train={name}.jsonl" for name in (best, other, "absent")]
    assert outcome.table[-1][1:3] == ("0 of 2", "-")
    page = (folder / "sweep.md").read_text()
    assert f"| train={best}.jsonl | 2 |" in page and "token_accuracy" in page


def test_an_unfinished_run_is_resumed_and_other_settings_are_refused(config: Path) -> None:
    _, (run,) = plan(config, [], 1)
    assert "--resume" not in command(run)
    run.folder.path.mkdir(parents=True)
    run.folder.config.write_text(dump(run.config))
    assert command(run)[-1] == "--resume"
    Path("swept/sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="was made with other settings"):
        sweep(config, ["training.max_steps=5"])


@pytest.mark.slow
def test_from_the_shell(config: Path) -> None:
    words = [sys.executable, "-m", "trivet", "sweep", str(config), "lr=1e-2,1e-4", "--seeds", "2", "--jobs", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "best on the validation rows: learning_rate=1e-2" in done.stdout and done.stderr.count("validation loss") == 4
    )
    _, runs = plan(config, ["lr=1e-2,1e-4"], 2)
    alone = train(load(config, ["lr=1e-2", "training.seed=43", "output_dir=alone"]), console=Console(quiet=True))
    assert runs[1].folder.read_result()["best_validation_loss"] == alone.result["best_validation_loss"]
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "4 of 4 runs are finished already" in again.stderr
    assert again.stdout == done.stdout
