"""Several processes train what one process would: real ones, started as a person starts them, over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import colour_rows, save_tiny, write_jsonl
from trivet.configio import dump, load
from trivet.errors import ConfigError
from trivet.run import train
from trivet.train.sampler import LengthSampler, Share, TokenBudgetSampler

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "model.lora_rank": 2,
    "training.learning_rate": 1e-2,
    "training.max_steps": 12,  # 19 rows, 4 a step: the last step of a pass has 3, and one process a row less
    "training.eval_steps": 4,
    "training.keep_checkpoints": 9,
    "evaluation.generate": False,
    "evaluation.resamples": 10,
}
SQUEEZE = {"rank": {"name": "squeeze", "start_rank": 8}}

#: Each is run by one process with twice the rows a step, and by two.
CASES: dict[str, dict[str, Any]] = {
    "accumulated": {"training.batch_size": 1, "training.gradient_accumulation_steps": 2},
    "squeeze": {"method": SQUEEZE},
}
MORE: dict[str, dict[str, Any]] = {
    "fixed": {},
    "auto": {"method": {"rank": {"name": "auto", "start_rank": 4}}},
    "probed": {"method": {"decompose": "gradient", "rank": "planned"}},
    "adalora": {"method": {"rank": {"name": "adalora", "start_rank": 8}}},
    "core": {"method": {"decompose": "core", "rank": {"name": "squeeze", "start_rank": 8, "budget": 200}}},
    "principal": {"method": {"decompose": "principal", "rank": "squeeze", "update": "muon"}},
    "classes": {"model": "bert", "data.train": "classes.jsonl"},
    "sequences": {"model": "bart"},
    "packed": {"model": "llama", "training.packing": True},
    "shared": {"model": "llama", "training.share_prefix": True, "data.train": "headed.jsonl"},
    "budget": {"training.max_tokens_per_batch": 96},
    "rate": {"training.learning_rate": "auto"},
}

MANY = """
import json, sys
from rich.console import Console
from trivet.configio import load
from trivet.errors import ConfigError
from trivet.run import train

for values in json.load(open(sys.argv[1])):
    outcome = train(load(values=values), console=Console(quiet=True))
    assert outcome.result["steps"] == 12 and "loss" in outcome.result["metrics"]["tuned"]  # in every process
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are compared have: several threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    save_tiny("gpt2", folder / "gpt2", **still)
    save_tiny("llama", folder / "llama", initializer_range=0.3)
    save_tiny("bart", folder / "bart", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    save_tiny("bert", folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [
        {"prompt": "the cat " * (1 + i % 7), "completion": "ran to the red house " * (1 + i % 5)} for i in range(24)
    ]
    write_jsonl(folder / "train.jsonl", rows)
    headed = [row | {"prompt": "the red cat ran to the house and the dog " + row["prompt"]} for row in rows]
    write_jsonl(folder / "headed.jsonl", headed)
    classes = [{"text": row["prompt"], "label": row["completion"].split()[-1]} for row in colour_rows(24)]
    write_jsonl(folder / "classes.jsonl", classes)
    (folder / "many.py").write_text(MANY)
    return folder


def values_of(place: Path, out: Path, case: dict[str, Any], processes: int) -> dict[str, Any]:
    """The settings of a case for so many processes, with the same rows in a step."""
    values = {"data.train": "train.jsonl", "data.validation": 0.2, "training.batch_size": 2, "model": "gpt2"}
    values |= SETTINGS | case
    values["data.train"] = str(place / values["data.train"])
    values["model.name"] = str(place / values.pop("model"))
    share = "training.batch_size"
    if "training.max_tokens_per_batch" in case:
        share = "training.gradient_accumulation_steps"
    values[share] = values.get(share, 1) * 2 // processes
    return {**values, "output_dir": str(out)}


def port() -> int:
    """One that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    place: Path, *command: str, processes: int = 2, patience: float = 0.1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun` with its words; it looks every so many seconds whether a process has failed, and then ends all."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port()}"]
    return start_and_wait(place, [*run, f"--monitor_interval={patience}", *command], **environment)


def start_and_wait(place: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Under a time limit: nothing may hang."""
    return subprocess.run(
        words,
        cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def run_many(place: Path, runs: Iterable[dict[str, Any]], **environment: str) -> None:
    """Run configs one after the other in one pair of processes."""
    (place / "runs.json").write_text(json.dumps(list(runs)))
    done = launch(place, "many.py", "runs.json", **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def run_one(values: dict[str, Any], **options: bool) -> None:
    train(load(values=values), console=Console(quiet=True), **options)


def with_updates(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors, and the product of each pair of factors."""
    pairs = {name: name.replace(".lora_A.", ".lora_B.") for name in adapter if ".lora_A." in name}
    return adapter | {f"{a} and B": adapter[b] @ adapter[a] for a, b in pairs.items()}


def check_alike(one: Path, other: Path, weights: float = 1e-5) -> None:
    """The same ranks and losses, within 1e-5, and weights and updates within `weights` of the largest."""
    first, second = (with_updates(load_file(out / "adapter" / "adapter_model.safetensors")) for out in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape, name
        assert float((tensor - second[name]).abs().max()) <= weights * float(tensor.abs().max()), name
    first_result, second_result = (json.loads((out / "result.json").read_text()) for out in (one, other))
    assert first_result["ranks"] == second_result["ranks"]
    assert first_result["best_step"] == second_result["best_step"]
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, other)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.get("tokens") == theirs.get("tokens")
        for name in ("loss", "validation_loss", "grad_norm"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4 if name == "grad_norm" else 1e-5), name


def check_all(place: Path, cases: dict[str, dict[str, Any]], folder: str, **environment: str) -> None:
    run_many(place, [values_of(place, place / folder / n, c, 2) for n, c in cases.items()], **environment)
    for name, case in cases.items():
        run_one(values_of(place, place / folder / f"{name}-alone", case, 1))
        # Adam takes steps of full size where a gradient is mere rounding, as some of the tiny encoder's are.
        check_alike(place / folder / f"{name}-alone", place / folder / name, 1e-3 if name == "classes" else 1e-5)


# -- the same result -----------------------------------------------------------------------------------------


def test_two_processes_train_what_one_does(place: Path) -> None:
    check_all(place, CASES, "ddp")
    result = json.loads((place / "ddp" / "squeeze" / "result.json").read_text())
    assert len(result["rank_history"]) >= 3 and len(set(result["ranks"].values())) > 1


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_every_kind_of_part(place: Path) -> None:
    check_all(place, MORE, "more")


@pytest.mark.slow
def test_a_shared_out_base_model_trains_the_same(place: Path) -> None:
    """FSDP2: the blocks of the base model are in parts, the adapter is whole; ranks change too."""
    chosen = ("fixed", "squeeze", "auto", "classes", "sequences", "packed")
    cases = {name: case for name, case in {**CASES, **MORE}.items() if name in chosen}
    check_all(place, cases, "fsdp", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


SHARED = """
import sys
import trivet.run as run
from trivet.cli import main

make = run.make_trainer

def make_trainer(*args, **options):
    trainer = make(*args, **options)
    blocks = [p for p in trainer.model.transformer.h.parameters()]
    frozen = [p for p in blocks if not p.requires_grad]
    assert sum(p.to_local().numel() for p in frozen) == sum(p.numel() for p in frozen) // 2
    assert not any(hasattr(p, "to_local") for p in blocks if p.requires_grad)
    return trainer

run.make_trainer = make_trainer
main()
"""


@pytest.mark.slow
def test_accelerates_launcher(place: Path, tmp_path: Path) -> None:
    """With its own words for FSDP; each process holds half of every block."""
    path = config(place, tmp_path / "run", {"method": SQUEEZE})
    (place / "shared.py").write_text(SHARED)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", f"--main_process_port={port()}"]
    for kind in (["--multi_gpu", "-m", "trivet"], ["--use_fsdp", "--fsdp_version=2", "shared.py"]):
        done = start_and_wait(place, [*start, *kind, "train", str(path), "--overwrite"])
        assert done.returncode == 0, done.stderr
        run_one(values_of(place, tmp_path / "alone", {"method": SQUEEZE}, 1), overwrite=True)
        check_alike(tmp_path / "alone", tmp_path / "run")
    done = start_and_wait(
        place, [*start, "--use_fsdp", "--fsdp_version=1", "shared.py", "train", str(path), "--overwrite"]
    )
    assert "only its version 2 is supported" in errors(done)[0] and len(errors(done)) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_shares_are_the_rows_of_one_process(rows: int, count: int) -> None:
    """Over all processes a step has the rows that one process would take; all have as many steps."""
    lengths = [5 + i % 9 for i in range(rows)]
    for sampler, size in ((LengthSampler(lengths, 4 * count, 3), 4), (TokenBudgetSampler(lengths, 40, 3), None)):
        for epoch in (0, 1):
            shares = [Share(sampler, size, i, count) for i in range(count)]
            for share in shares:
                share.set_epoch(epoch)
            steps = list(zip(*shares, strict=True))
            assert len(steps) == len(shares[0])
            alone = list(sampler) if size else [row for batch in sampler for row in batch]
            assert sorted(row for step in steps for mine in step for row in mine) == list(range(rows))
            taken = 0
            for step in steps:
                together = sorted(row for mine in step for row in mine)
                assert together == sorted(alone[taken : taken + len(together)])
                taken += len(together)
                if size:
                    assert all(len(mine) <= size for mine in step)


# -- failing as one ------------------------------------------------------------------------------------------


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]


def config(place: Path, out: Path, case: dict[str, Any] | None = None) -> Path:
    path = place / "config.yaml"
    path.write_text(dump(load(values=values_of(place, out, case or {}, 2))))
    return path


def test_a_wrong_config_is_said_once(place: Path, tmp_path: Path) -> None:
    done = launch(place, "-m", "trivet", "train", str(config(place, tmp_path / "run")), "training.learnin_rate=1")
    assert done.returncode == 1 and len(errors(done)) == 1, done.stderr
    assert "did you mean training.learning_rate" in errors(done)[0] and "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_only_the_first_process_speaks_and_what_is_there_is_kept(place: Path, tmp_path: Path) -> None:
    path, out = config(place, tmp_path / "run"), tmp_path / "run"
    done = launch(place, "-m", "trivet", "train", str(path), "training.max_steps=4")
    assert done.returncode == 0 and not errors(done), done.stderr
    assert done.stderr.count("step 4: validation loss") == 1 and done.stdout.count("run folder") == 1
    files = {path.name for path in (out / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files
    done = launch(place, "-m", "trivet", "train", str(path))
    assert done.returncode == 1 and len(errors(done)) == 1, done.stderr
    assert "holds a finished run" in errors(done)[0]


FAULT = """
import os, signal, sys
from transformers import TrainerCallback
import trivet.run as run
from trivet.cli import main

rank, step, fault = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)

class Fault(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == step and args.process_index == rank:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a fault of this test")

make = run.make_trainer

def make_trainer(*args, **options):
    trainer = make(*args, **options)
    trainer.add_callback(Fault())
    return trainer

run.make_trainer = make_trainer
main()
"""


def with_fault(place: Path, rank: int, step: int, fault: str, *words: str) -> str:
    """The error that is shown when process `rank` of two is killed, or raises, after `step`."""
    (place / "fault.py").write_text(FAULT)
    # the other process is given time to say what it saw
    done = launch(place, "fault.py", str(rank), str(step), fault, "train", *words, patience=3)
    assert done.returncode == 1 and len(errors(done)) == 1, done.stderr
    return errors(done)[0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_ends_all_and_one_process_goes_on_with_the_run(place: Path, tmp_path: Path) -> None:
    case, out = {"method": SQUEEZE}, tmp_path / "run"
    message = with_fault(place, 1, 6, "kill", str(config(place, out, case)))
    assert "another of the run's 2 processes has ended" in message and "--resume" in message
    assert (out / "checkpoints" / "checkpoint-4").is_dir() and not (out / "result.json").exists()
    with pytest.raises(ConfigError, match=r"processes \(4 rows a step then, 2 rows a step now\)"):
        run_one(values_of(place, out, case, 2), resume=True)
    run_one(values_of(place, out, case, 1), resume=True)
    run_one(values_of(place, tmp_path / "alone", case, 1))
    check_alike(tmp_path / "alone", out)


@pytest.mark.slow
def test_two_processes_then_one_then_two(place: Path, tmp_path: Path) -> None:
    case, out = {"method": SQUEEZE}, tmp_path / "run"
    assert "a fault of this test" in with_fault(place, 1, 5, "raise", str(config(place, out, case)))
    path = place / "one.yaml"
    path.write_text(dump(load(values=values_of(place, out, case, 1))))
    (place / "fault.py").write_text(FAULT)
    words = [sys.executable, "fault.py", "0", "9", "kill", "train", str(path), "--resume"]
    assert start_and_wait(place, words).returncode == -signal.SIGKILL
    assert (out / "checkpoints" / "checkpoint-8" / "rng_state.pth").exists()
    done = launch(place, "-m", "trivet", "train", str(config(place, out, case)), "--resume")
    assert done.returncode == 0 and "resuming from step 8" in done.stderr, done.stderr
    run_one(values_of(place, tmp_path / "alone", case, 1))
    check_alike(tmp_path / "alone", out)


FULL = """
import sys
import trivet.train.trainer as trainer
from trivet import processes
from trivet.cli import main
from trivet.data.batch import rows_in

loss = trainer.training_loss

def no_room(model, inputs, *rest, **options):
    if processes.index() == 1 and rows_in(inputs) > 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return loss(model, inputs, *rest, **options)

trainer.training_loss = no_room
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", [{}, {"method": SQUEEZE}], ids=["fixed", "squeeze"])
def test_where_one_process_runs_out_of_memory_the_others_go_on_with_it(
    place: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    (place / "full.py").write_text(FULL)
    done = launch(place, "full.py", "train", str(config(place, tmp_path / "run", case)))
    assert done.returncode == 0 and "out of memory at 2 rows" in done.stderr, done.stderr
    if not case:  # a measurement that one process had to break off is dropped by all, so prices differ
        run_one(values_of(place, tmp_path / "alone", case, 1))
        check_alike(tmp_path / "alone", tmp_path / "run")


@pytest.mark.slow
def test_the_end_of_the_first_process_ends_all(place: Path, tmp_path: Path) -> None:
    message = with_fault(place, 0, 6, "kill", str(config(place, tmp_path / "run")))
    assert "another of the run's 2 processes has ended" in message
