"""What goes wrong in the middle of a run: bad numbers, signals, a full disk, no memory. Nothing is lost by it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from short_run import ROWS, configured, furnish, logged, same, weights

import trivet.run
import trivet.train.checkpoint
import trivet.train.trainer
from conftest import save_tiny, slow, write_jsonl
from trivet.configio import dump
from trivet.errors import ConfigError, DivergedError, InterruptedRunError, StorageError
from trivet.run import Outcome, train
from trivet.train.checkpoint import notes_of, step_of
from trivet.train.numbers import Spikes
from trivet.train.sampler import LengthSampler, TokenBudgetSampler, rows_of_step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trouble")
    furnish(folder)
    run(folder, folder / "whole")
    return folder


def run(place: Path, out: Path, *, resume: bool = False, force: bool = False, **settings: Any) -> Outcome:
    config = configured(place, out, **settings)
    return train(config, resume=resume, force=force, console=Console(quiet=True))


# -- bad numbers ---------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, once: bool = False, value: float = math.nan) -> None:
    """Multiply the loss of some steps (counted from 0) by `value`; `once`: of each only the first time it is taken."""
    compute = trivet.train.trainer.Trainer.compute_loss
    left = list(steps)

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step not in left:
            return loss
        if once:
            left.remove(self.state.global_step)
        return loss * value

    monkeypatch.setattr(trivet.train.trainer.Trainer, "compute_loss", spoiled)


@pytest.mark.parametrize("method", ["lora", "lora_pro", {"rank": {"name": "adalora", "start_rank": 16}}])
@pytest.mark.parametrize("value", [math.nan, *slow(math.inf)])
def test_a_step_without_numbers_changes_nothing_and_names_its_rows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, value: float
) -> None:
    spoil(monkeypatch, 4, value=value)
    out = tmp_path / "run"
    run(place, out, method=method, **{"training.eval_steps": 1})
    steps = {row["step"]: row for row in logged(out) if "loss" in row}
    assert len(steps) == 12 and [step for step, row in steps.items() if "skipped" in row] == [5]
    assert steps[5]["loss"] is None and f"loss is {value}" in steps[5]["skipped"]
    assert len(steps[5]["rows"]) == 4 and all("train.jsonl:" in name for name in steps[5]["rows"])
    assert all(math.isfinite(steps[step]["loss"]) for step in steps if step != 5)
    before, after, later = (
        load_file(out / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 5, 6)
    )
    if method in ("lora", "lora_pro"):  # ranks change by schedule, also after a step that was not taken
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, later[name]) for name, tensor in after.items() if name in later)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(out).values())


@pytest.mark.parametrize("packing", [True, False])
def test_the_named_rows_are_those_of_the_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """Rows as they really went through the model, against those that are named for each step."""
    seen: list[list[int]] = []
    count = trivet.train.trainer.Trainer.get_batch_samples

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, items = count(self, *args, **kwargs)
        lengths = [b["cu_seq_lens_q"].diff()[:-1] if packing else b["attention_mask"].sum(1) for b in batches]
        seen.append([int(length) for of_batch in lengths for length in of_batch])
        return batches, items

    monkeypatch.setattr(trivet.train.trainer.Trainer, "get_batch_samples", watched)
    spoil(monkeypatch, 1, 7, 11)
    out = tmp_path / "run"
    more = {"training.gradient_accumulation_steps": 2, "training.batch_size": 2, "training.packing": packing}
    outcome = run(place, out, **more)
    rows = {row["step"]: row["rows"] for row in logged(out) if "skipped" in row}
    assert rows.keys() == {2, 8, 12}
    lines = (place / "train.jsonl").read_text().splitlines()
    for step, names in rows.items():
        texts = [json.loads(lines[int(name.rpartition(":")[2]) - 1]) for name in names]
        tokenizer = outcome.session.tokenizer
        lengths = [len(tokenizer(text["prompt"] + text["completion"])["input_ids"]) for text in texts]
        assert all(abs(a - b) <= 3 for a, b in zip(lengths, seen[step - 1], strict=True)), step


@pytest.mark.parametrize("rows", [10, 11, 12])
def test_every_row_is_in_one_step_of_an_epoch(rows: int) -> None:
    length = LengthSampler(list(range(rows)), 4, seed=3)
    budget = TokenBudgetSampler([1 + i % 3 for i in range(rows)], 6, seed=3)
    for sampler, steps in ((length, -(-rows // 2 // 2)), (budget, -(-len(budget) // 2))):
        for epoch in range(2):
            taken = [rows_of_step(sampler, epoch * steps + i, 2, 2) for i in range(steps)]
            assert sorted(row for step in taken for row in step) == list(range(rows))
        assert sampler.epoch == 0


def test_three_in_a_row_go_back_to_the_checkpoint_at_half_the_rate(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7, 8, once=True)
    out = tmp_path / "run"
    outcome = run(place, out, **{"training.lr_scheduler": "constant", "training.warmup_ratio": 0.0})
    rates = {row["step"]: row["learning_rate"] for row in logged(out) if "loss" in row}
    assert list(rates) == list(range(1, 13))
    assert [rates[step] for step in (1, 6, 7, 12)] == [1e-2, 1e-2, 5e-3, 5e-3]
    assert outcome.result["steps"] == 12
    checkpoints = out / "checkpoints"
    assert [notes_of(checkpoints / f"checkpoint-{step}")["rate"] for step in (3, 6, 9, 12)] == [1.0, 1.0, 0.5, 0.5]


def test_a_run_that_was_slowed_down_is_resumed_at_that_rate(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7, 8, once=True)
    run(place, tmp_path / "slowed")
    monkeypatch.undo()
    spoil(monkeypatch, 6, 7, 8, once=True)
    signalled(monkeypatch, signal.SIGTERM, 11)
    with pytest.raises(InterruptedRunError, match="step 11"):
        run(place, tmp_path / "run")
    monkeypatch.undo()
    run(place, tmp_path / "run", resume=True)
    assert same(tmp_path / "run", tmp_path / "slowed") and not same(tmp_path / "run", place / "whole")


def test_it_gives_up_after_two_rollbacks_and_says_what_to_do(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7, 8)
    out = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        run(place, out)
    message = str(caught.value)
    assert "3 steps in a row up to step 9" in message and "train.jsonl:" in message
    assert "training.learning_rate (now 0.0025)" in message
    assert sorted(step_of(path) for path in (out / "checkpoints").iterdir()) == [3, 6]
    assert not (out / "adapter").exists()


def test_a_run_that_diverges_before_its_first_checkpoint_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 0, 1, 2)
    with pytest.raises(DivergedError):
        run(place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_spikes_are_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (2 + 0.2 * torch.randn(400, generator=generator)).tolist()
    falling = [5 * 0.99**i + n - 2 for i, n in enumerate(noise)]
    for losses in (noise, falling, [0.0] * 50, [1.0] * 60):
        spikes = Spikes()
        assert not any(spikes.found(loss) for loss in losses)
    spikes = Spikes()
    assert [i for i, loss in enumerate([*noise[:100], 9.0, *noise[100:]]) if spikes.found(loss)] == [100]


def test_a_spike_is_logged_with_its_rows(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 25, value=30.0)
    out = tmp_path / "run"
    run(place, out, **{"training.max_steps": 28, "training.eval_steps": 28, "training.learning_rate": 1e-4})
    (spike,) = [row for row in logged(out) if row.get("spike")]
    assert spike["step"] == 26 and len(spike["rows"]) == 4


# -- signals -------------------------------------------------------------------------------------------------


@pytest.fixture
def foreground() -> Iterator[None]:
    """As in a terminal: the tests themselves may run in the background, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_resuming_gives_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    signalled(monkeypatch, number, 5)
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError) as caught:
        run(place, out)
    assert caught.value.exit_code == 128 + number
    message = str(caught.value)
    assert f"interrupted by {number.name} after step 5" in message
    assert f"trivet train {out / 'config.yaml'} --resume" in message
    assert step_of(out / "checkpoints" / "checkpoint-5") == 5 and not (out / "adapter").exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    monkeypatch.undo()
    run(place, out, resume=True)
    assert same(out, place / "whole")
    learned = [[{k: row[k] for k in row.keys() - {"step_seconds", "memory_bytes"}} for row in logged(o)]
               for o in (out, place / "whole")]  # fmt: skip
    assert learned[0] == learned[1]


def signalled(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int) -> None:
    """Send this process a signal in the midst of a step (counted from 1)."""
    compute = trivet.train.trainer.Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            signal.raise_signal(number)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trivet.train.trainer.Trainer, "compute_loss", compute_loss)


@pytest.mark.usefixtures("foreground")
def test_a_second_signal_ends_it_at_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = trivet.train.trainer.Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trivet.train.trainer.Trainer, "compute_loss", compute_loss)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "run")
    assert {step_of(path) for path in (tmp_path / "run" / "checkpoints").iterdir()} == {3, 6}


# -- other data and settings ---------------------------------------------------------------------------------


def test_changed_rows_are_refused_unless_forced(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, signal.SIGTERM, 5)
    out, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    write_jsonl(rows, ROWS)
    with pytest.raises(InterruptedRunError):
        run(place, out, **{"data.train": str(rows)})
    monkeypatch.undo()
    write_jsonl(rows, [*ROWS[:5], {"prompt": "another", "completion": "row"}, *ROWS[6:]])
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(ConfigError, match="other data: the rows of .*train.* checkpoint-5.*--force"):
        run(place, out, resume=True, **{"data.train": str(rows)})
    with pytest.raises(ConfigError, match="batch_size \\(4 then, 2 now\\).*--force"):
        run(place, out, resume=True, **{"data.train": str(rows), "training.batch_size": 2})
    assert sorted(path.name for path in out.rglob("*")) == before
    with pytest.raises(ConfigError, match="lora_rank"):
        run(place, out, resume=True, force=True, **{"data.train": str(rows), "model.lora_rank": 4})
    changed = {"data.train": str(rows), "training.batch_size": 2}
    assert run(place, out, resume=True, force=True, **changed).result["steps"] == 12


# -- a full disk ---------------------------------------------------------------------------------------------


def test_a_checkpoint_that_finds_no_room_is_done_without(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flush = trivet.train.checkpoint._flush

    def full(path: Path) -> None:
        if ".checkpoint-6" in str(path) or ".checkpoint-9" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(trivet.train.checkpoint, "_flush", full)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "trivet"), pytest.raises(StorageError) as caught:
        run(place, out)
    assert "adapter and the result are whole" in str(caught.value) and "checkpoint-9" in str(caught.value)
    assert "Training goes on" in caplog.text
    assert {step_of(path) for path in (out / "checkpoints").iterdir()} == {3, 12}
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 12 and result["best_step"] in (3, 12)
    kept = load_file(out / "checkpoints" / f"checkpoint-{result['best_step']}" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(out).items())


# -- out of memory -------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import psutil
from rich.console import Console
from trivet.configio import load
import trivet.run as run
from trivet.train.trainer import Trainer

room, step = int(sys.argv[2]), Trainer.training_step
def training_step(self, *args, **kwargs):
    if room and self.state.global_step == 3:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, -1))
    return step(self, *args, **kwargs)
Trainer.training_step = training_step
run.train(load(sys.argv[1]), console=Console(quiet=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by RLIMIT_AS")
def test_a_run_that_memory_has_no_room_for_goes_on_in_halves_with_equal_losses(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "gpt2")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "the cat sat on the mat and the dog ran " * 50}] * 200)
    (tmp_path / "limited.py").write_text(LIMITED)
    # Freed tensors go back to the system at once: glibc would keep as many as the limit takes away.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    losses = {}
    for room in (0, 16 * 2**20):
        out = tmp_path / f"run{room}"
        settings = {
            "data.train": str(tmp_path / "train.jsonl"),
            "data.max_length": 512,
            "training.batch_size": 64,
            "training.max_steps": 6,
            "training.keep_freed_memory": False,
        }
        (tmp_path / "config.yaml").write_text(dump(configured(tmp_path, out, **settings)))
        done = subprocess.run(
            [sys.executable, "limited.py", "config.yaml", str(room)],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("half as many at a time" in done.stderr) is bool(room)
        losses[room] = [row["loss"] for row in logged(out) if "loss" in row]
    first, second = losses.values()
    assert first == pytest.approx(second, rel=1e-5)
