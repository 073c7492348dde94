"""An interrupted run that is resumed is the run that was not interrupted, bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from short_run import ROWS, SETTINGS, configured, furnish, logged, same, weights

from conftest import colour_rows, save_tiny, write_jsonl
from trivet.adapter.layers import adapted_layers
from trivet.configio import dump, load
from trivet.errors import ConfigError, RunExistsError
from trivet.run import Outcome, train
from trivet.train.checkpoint import damage, newest_checkpoint, step_of
from trivet.train.trainer import LengthSampler

#: The random state has to come back too.
DROPOUT = {"model.lora_dropout": 0.1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its data, and a whole run of it."""
    folder = tmp_path_factory.mktemp("resume")
    furnish(folder)
    run(folder, folder / "whole")
    return folder


def run(place: Path, out: Path, *, resume: bool = False, overwrite: bool = False, **settings: Any) -> Outcome:
    config = configured(place, out, **DROPOUT, **settings)
    return train(config, resume=resume, overwrite=overwrite, console=Console(quiet=True))


def what_was_learned(out: Path) -> list[Any]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "memory_bytes")} for row in logged(out)]


def interrupted(place: Path, out: Path, step: int) -> Path:
    """A copy of the whole run as it was after the checkpoint of `step`, with a few more steps in the log."""
    shutil.copytree(place / "whole", out)
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    for checkpoint in (out / "checkpoints").iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    kept = [line for line in (out / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step + 2]
    (out / "log.jsonl").write_text("\n".join([*kept, '{"step": 99, "lo']))
    # The settings are those of the copy.
    config = load(out / "config.yaml", values={"output_dir": str(out)})
    (out / "config.yaml").write_text(dump(config))
    return out


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(place: Path, tmp_path: Path, step: int) -> None:
    """Step 3 lies in the first pass over the rows, 6 and 9 in the second."""
    out = interrupted(place, tmp_path / "run", step)
    outcome = run(place, out, resume=True)
    assert same(out, place / "whole")
    assert what_was_learned(out) == what_was_learned(place / "whole")
    whole = json.loads((place / "whole" / "result.json").read_text())
    for key in ("metrics", "intervals", "best_validation_loss", "best_step", "steps"):
        assert outcome.result[key] == whole[key], key


def test_a_run_that_was_killed_while_it_measured_trains_no_further(tmp_path: Path) -> None:
    """Its 11 steps end within a pass over the rows."""
    settings = {"training.max_steps": 11, "training.eval_steps": 11}
    furnish(tmp_path)
    whole = run(tmp_path, tmp_path / "run", **settings)
    learned = what_was_learned(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").unlink()
    again = run(tmp_path, tmp_path / "run", resume=True, **settings)
    assert again.result["steps"] == whole.result["steps"] == 11
    assert again.result["metrics"] == whole.result["metrics"]
    assert what_was_learned(tmp_path / "run") == learned


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_killed_process_was_writing_is_removed(place: Path, tmp_path: Path, resume: bool) -> None:
    out = interrupted(place, tmp_path / "run", 9)
    (out / ".adapter.x1").mkdir()
    left = [".adapter.x1/adapter_model.safetensors", ".result.json.abc", ".predictions.jsonl.q_7", ".config.yaml.t0"]
    others = [".notes", ".result.jsonl", "result.json.backup"]
    for name in (*left, *others):
        (out / name).write_text("half")
    run(place, out, resume=resume, overwrite=not resume)
    assert same(out, place / "whole")
    assert sorted(path.name for path in out.glob(".*")) == [".notes", ".result.jsonl"]
    assert (out / "result.json.backup").exists()


def test_each_step_is_logged_once(place: Path) -> None:
    rows = logged(place / "whole")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 9, 12]


KILLING = Path(__file__).parent / "kill.py"


def killed(folder: Path, times: int) -> list[dict[str, Any]]:
    """What tests/train/kill.py says of killing a short run with squeeze active so many times."""
    save_tiny("llama", folder / "llama", initializer_range=0.3)
    write_jsonl(folder / "train.jsonl", ROWS)
    values = {
        "model.name": str(folder / "llama"),
        "model.lora_rank": 2,
        "data.train": str(folder / "train.jsonl"),
        "data.validation": 0.2,
        "method": {"rank": {"name": "squeeze", "start_rank": 8}},
    }
    often = {"training.max_steps": 20, "training.eval_steps": 2, "training.keep_checkpoints": 2}
    (folder / "config.yaml").write_text(dump(load(values={**values, **SETTINGS, **DROPOUT, **often})))
    done = subprocess.run(
        [sys.executable, str(KILLING), str(folder / "config.yaml"), "--times", str(times)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("times", [3, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_killed_run_is_resumed_bit_for_bit(tmp_path: Path, times: int) -> None:
    kills = killed(tmp_path, times)
    assert len(kills) == times and all(kill["same"] for kill in kills)
    assert {kill["kind"] for kill in kills if kill["killed"]} >= ({"writing", "resizing"} if times > 3 else set())
    assert not any(kill["left"] for kill in kills if not kill["ended"])  # no half checkpoint, no temporary file


def test_a_run_that_only_lacks_its_evaluation_is_finished_without_a_further_step(place: Path, tmp_path: Path) -> None:
    out = interrupted(place, tmp_path / "run", 12)
    outcome = run(place, out, resume=True)
    assert same(out, place / "whole") and outcome.result["steps"] == 12
    assert what_was_learned(out) == what_was_learned(place / "whole")


# -- damaged checkpoints -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "cut adapter": ("adapter_model.safetensors", cut),
    "no adapter": ("adapter_model.safetensors", Path.unlink),
    "cut optimizer": ("optimizer.pt", cut),
    "empty optimizer": ("optimizer.pt", lambda p: p.write_bytes(b"")),
    "cut scheduler": ("scheduler.pt", cut),
    "no random state": ("rng_state.pth", Path.unlink),
    "cut state": ("trainer_state.json", cut),
    "no state": ("trainer_state.json", Path.unlink),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = Path(shutil.copytree(place / "whole" / "checkpoints", tmp_path / "checkpoints"))
    assert damage(folder / "checkpoint-12") is None
    name, harm = DAMAGE[what]
    harm(folder / "checkpoint-12" / name)
    with caplog.at_level(logging.WARNING, "trivet"):
        assert newest_checkpoint(folder) == folder / "checkpoint-9"
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "checkpoint-12 is damaged" in message and "passed over" in message


def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = interrupted(place, tmp_path / "run", 9)
    cut(out / "checkpoints" / "checkpoint-9" / "optimizer.pt")
    with caplog.at_level(logging.WARNING, "trivet"):
        run(place, out, resume=True)
    assert "checkpoint-9" in caplog.text
    assert same(out, place / "whole")


def test_without_a_whole_checkpoint_it_begins_again(place: Path, tmp_path: Path) -> None:
    out = interrupted(place, tmp_path / "run", 3)
    (out / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    run(place, out, resume=True)
    assert same(out, place / "whole")
    assert what_was_learned(out) == what_was_learned(place / "whole")


# -- refusals ------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    out = interrupted(place, tmp_path / "run", 6)
    with pytest.raises(ConfigError) as caught:
        run(place, out, resume=True, **{"training.learning_rate": 3e-3, "model.lora_rank": 4})
    message = str(caught.value)
    assert "training.learning_rate (0.01 then, 0.003 now)" in message
    assert "model.lora_rank (8 then, 4 now)" in message and "max_steps" not in message


def test_what_is_measured_afterwards_may_change(place: Path, tmp_path: Path) -> None:
    out = interrupted(place, tmp_path / "run", 9)
    run(place, out, resume=True, **{"evaluation.resamples": 20})
    assert same(out, place / "whole")


def test_nothing_to_resume(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        run(place, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_finished_run_is_not_resumed(place: Path) -> None:
    with pytest.raises(ConfigError, match="already finished"):
        run(place, place / "whole", resume=True)


def test_an_unfinished_run_is_not_begun_anew_unasked(place: Path, tmp_path: Path) -> None:
    out = interrupted(place, tmp_path / "run", 6)
    with pytest.raises(RunExistsError, match="unfinished run.*--resume"):
        run(place, out)
    with pytest.raises(ConfigError, match="one of them"):
        run(place, out, resume=True, overwrite=True)


# -- seeds ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    torch.rand(7)
    run(place, tmp_path / "again")
    assert same(tmp_path / "again", place / "whole")
    assert what_was_learned(tmp_path / "again") == what_was_learned(place / "whole")
    run(place, tmp_path / "other", **{"training.seed": 43})
    assert not same(tmp_path / "other", place / "whole")


def test_every_pass_goes_through_every_row_once_in_another_order() -> None:
    lengths = [len(row["prompt"]) for row in ROWS]
    sampler = LengthSampler(lengths, 4, seed=5)
    passes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert list(sampler) == order
        assert sorted(order) == list(range(len(ROWS)))
        passes.append(order)
    assert passes[0] != passes[1] != passes[2]
    assert len(sampler) == len(ROWS)
    assert list(LengthSampler(lengths, 4, seed=6)) != passes[0]


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = [1 + i % 50 for i in range(800)]
    order = list(LengthSampler(lengths, 8, seed=0))
    spread = [max(b) - min(b) for b in ([lengths[i] for i in order[k : k + 8]] for k in range(0, 800, 8))]
    assert sum(spread) / len(spread) < 10  # of 49; unsorted it would be about 39


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [800, 805, 43, 3])
def test_the_longest_row_comes_first_and_steps_come_in_no_order_of_length(rows: int, packed: bool) -> None:
    lengths = [1 + i % 50 for i in range(rows - 1)] + [51]
    sampler = LengthSampler(lengths, 8, seed=0, packed=packed)
    order = list(sampler)
    assert order[0] == rows - 1
    sampler.set_epoch(1)
    later = list(sampler)
    for steps in (order[8:], later):
        means = [sum(lengths[i] for i in steps[k : k + 8]) / 8 for k in range(0, len(steps) - 7, 8)]
        falls = [a > b for a, b in itertools.pairwise(means)]
        assert len(falls) < 10 or 0.3 < sum(falls) / len(falls) < 0.7  # sorted, nearly all would


# -- the best checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation rows that share their words with the training rows, but not the answers: better first, then worse."""
    folder = tmp_path_factory.mktemp("contrary")
    save_tiny("gpt2", folder / "gpt2", initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    rows = colour_rows(24)
    write_jsonl(folder / "train.jsonl", rows)
    answers = [rows[1]["completion"], rows[2]["completion"], rows[0]["completion"]]
    write_jsonl(folder / "other.jsonl", [{**row, "completion": a} for row, a in zip(rows[:3], answers, strict=True)])
    return folder


def contrary_settings(folder: Path) -> dict[str, Any]:
    return {
        "data.validation": str(folder / "other.jsonl"),
        "training.max_steps": 60,
        "training.eval_steps": 3,
        "training.lr_scheduler": "constant",
        "training.keep_checkpoints": 30,
    }


def validations(out: Path) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in logged(out) if "validation_loss" in row}


def test_the_best_checkpoint_is_what_is_saved(contrary: Path, tmp_path: Path) -> None:
    outcome = run(contrary, tmp_path / "run", **contrary_settings(contrary))
    losses = validations(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    assert 3 < best < 60 and losses[60] > losses[best] + 0.1 and losses[3] > losses[best] + 0.1
    assert outcome.result["best_step"] == best
    assert outcome.result["best_validation_loss"] == losses[best]
    assert outcome.result["metrics"]["tuned"]["loss"] == pytest.approx(losses[best], rel=1e-4)
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(t, kept[name]) for name, t in weights(tmp_path / "run").items())
    layer = adapted_layers(outcome.session.model)[0]
    assert torch.equal(layer.B, kept[f"base_model.model.{layer.name}.lora_B.weight"])


def test_the_best_head_is_what_is_saved(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [{"text": row["prompt"], "label": row["completion"].split()[-1]} for row in colour_rows(24)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    labels = [rows[1]["label"], rows[2]["label"], rows[0]["label"]]
    write_jsonl(tmp_path / "other.jsonl", [{**row, "label": x} for row, x in zip(rows[:3], labels, strict=True)])
    outcome = run(tmp_path, tmp_path / "run", **contrary_settings(tmp_path), **{"model.name": str(tmp_path / "bert")})
    best = outcome.result["best_step"]
    assert best < 60
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-60" / "adapter_model.safetensors")
    head = "base_model.model.classifier.weight"
    assert torch.equal(weights(tmp_path / "run")[head], kept[head])
    assert torch.equal(outcome.session.model.get_base_model().classifier.modules_to_save["default"].weight, kept[head])
    assert not torch.equal(kept[head], last[head])


@pytest.mark.parametrize("keep", [1, 2])
def test_only_so_many_checkpoints_are_kept_and_the_best_among_them(contrary: Path, tmp_path: Path, keep: int) -> None:
    settings = contrary_settings(contrary) | {"training.keep_checkpoints": keep}
    outcome = run(contrary, tmp_path / "run", **settings)
    kept = {step_of(path) for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")}
    best = outcome.result["best_step"]
    assert best < 60 and kept == ({best} if keep == 1 else {best, 60})


def test_early_stopping_stops(contrary: Path, tmp_path: Path) -> None:
    settings = contrary_settings(contrary) | {"training.early_stopping_patience": 2}
    outcome = run(contrary, tmp_path / "run", **settings)
    losses = validations(tmp_path / "run")
    assert outcome.result["steps"] == max(losses) == outcome.result["best_step"] + 6 < 60
    assert min(losses, key=losses.__getitem__) == outcome.result["best_step"]


@pytest.mark.parametrize("last_is_left", [False, True])
def test_a_resumed_run_keeps_its_patience(contrary: Path, tmp_path: Path, last_is_left: bool) -> None:
    settings = contrary_settings(contrary) | {"training.early_stopping_patience": 2}
    out = tmp_path / "run"
    outcome = run(contrary, out, **settings)
    last, learned = outcome.result["steps"], what_was_learned(out)
    saved = weights(out)
    if not last_is_left:
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{last}")
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    again = run(contrary, out, resume=True, **settings)
    assert again.result["steps"] == last and what_was_learned(out) == learned
    assert all(torch.equal(t, saved[name]) for name, t in weights(out).items())


def test_early_stopping_needs_validation_rows(place: Path, tmp_path: Path) -> None:
    settings = {"training.early_stopping_patience": 2, "data.validation": None}
    with pytest.raises(ConfigError, match="early_stopping_patience needs validation rows"):
        run(place, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
