"""`learning_rate: auto`: trials find a rate that is near the best one, and leave nothing else behind."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from short_run import configured, furnish, logged, same

import trivet.training
from conftest import save_tiny, slow, write_jsonl
from trivet import processes
from trivet.configio import load
from trivet.errors import ConfigError, DivergedError
from trivet.learning_rate import COARSE, HIGHEST, LOWEST, STEPS, search, with_rate
from trivet.prepare import Prepared, prepare
from trivet.run import train
from trivet.splits import load_splits
from trivet.train.numbers import Watch

QUIET = Console(quiet=True)
AUTO: dict[str, Any] = {"training.learning_rate": "auto"}
#: A run, and so each of its trials, of few steps.
SHORT: dict[str, Any] = {"training.max_steps": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its data, and a run that found its rate."""
    folder = tmp_path_factory.mktemp("rate")
    furnish(folder)
    train(configured(folder, folder / "found", **AUTO, **{"model.lora_dropout": 0.1}), console=QUIET)
    return folder


def ready_of(place: Path, **settings: Any) -> Prepared:
    config = configured(place, place / "none", **{**AUTO, **settings})
    return prepare(config, load_splits(config), QUIET)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Trainer of every trial, from before it trains."""
    made: list[Any] = []
    make = trivet.training.make_trainer

    def making(*arguments: Any, **options: Any) -> Any:
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(trivet.training, "make_trainer", making)
    return made


# -- the search --------------------------------------------------------------------------------------------------


@given(best=st.floats(-2.5, 2.5), slope=st.floats(0.1, 10), cliff=st.booleans())
def test_the_search_ends_within_half_a_step_of_the_lowest(best: float, slope: float, cliff: bool) -> None:
    def loss(rate: float) -> float:
        power = math.log(rate / 2e-3, COARSE)
        return math.inf if cliff and power > best + 0.5 else slope * abs(power - best)

    tried = search(loss, 2e-3)
    found = math.log(min(tried, key=lambda rate: tried[rate]) / 2e-3, COARSE)
    assert abs(found - best) < 0.3  # a quarter of a step, and what is rounded off
    assert len(tried) <= 9


@pytest.mark.parametrize(("sign", "end"), [(1, LOWEST), (-1, HIGHEST)])
def test_the_search_ends_at_its_bounds(sign: int, end: int) -> None:
    tried = search(lambda rate: sign * rate, 2e-3)
    assert min(tried, key=lambda rate: tried[rate]) == pytest.approx(2e-3 * COARSE**end, rel=0.05)


def test_where_nothing_differs_the_search_stays_where_it_began() -> None:
    assert sorted(search(lambda rate: 1.0, 2e-3)) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def test_where_all_diverge_lower_rates_are_tried() -> None:
    assert min(search(lambda rate: math.inf, 2e-3)) == pytest.approx(2e-3 * COARSE**LOWEST, rel=0.05)


# -- a run -------------------------------------------------------------------------------------------------------


def test_the_run_is_the_one_with_that_number_to_the_bit(place: Path) -> None:
    config = load(place / "found" / "config.yaml")
    rate = config.training.learning_rate
    trials = json.loads((place / "found" / "result.json").read_text())["learning_rate_trials"]
    assert rate == min(trials, key=lambda trial: trial["loss"])["learning_rate"]
    assert len(trials) >= 5 and {trial["learning_rate"] for trial in trials} >= {2e-3, 5e-4, 8e-3}
    settings = {"training.learning_rate": rate, "model.lora_dropout": 0.1}
    train(configured(place, place / "given", **settings), console=QUIET)
    assert same(place / "found", place / "given")
    assert json.loads((place / "given" / "result.json").read_text())["learning_rate_trials"] is None
    losses = [[row["loss"] for row in logged(place / name) if "loss" in row] for name in ("found", "given")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "method", ["trivet", {"rank": {"name": "adalora", "start_rank": 8}}, "lora_xs", *slow("lora_fa", "pissa")]
)
def test_trials_leave_adapter_ranks_and_method_as_they_were(place: Path, method: Any) -> None:
    ready = ready_of(place, method=method, **SHORT)
    plan, model = ready.session.model.trivet, ready.session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = with_rate(ready, QUIET)
    after = model.state_dict()
    assert model.trivet is plan and not plan.policy.history
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert found.trials is not None and found.config.training.learning_rate in [
        t["learning_rate"] for t in found.trials
    ]
    assert {**vars(found.config.training), "learning_rate": "auto"} == vars(ready.config.training)


def test_it_is_near_the_best_rate_of_whole_runs(tmp_path: Path) -> None:
    """Of a problem with one: the run at the rate that was found ends within a tenth of the best of a wide sweep."""
    save_tiny("llama", tmp_path / "llama", initializer_range=0.3)
    rows = [
        {"prompt": f"the {a} cat {b}", "completion": f"ran to the {b} house {a}"}
        for a in "abcdefgh"
        for b in "ijklmnop"
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)

    def best_loss(rate: Any) -> float:
        values = {
            "model.name": str(tmp_path / "llama"), "model.dtype": "float32", "data.validation": 0.2,
            "data.train": str(tmp_path / "train.jsonl"), "training.learning_rate": rate, "training.max_steps": STEPS,
            "evaluation.generate": False, "evaluation.resamples": 10, "output_dir": str(tmp_path / str(rate)),
        }  # fmt: skip
        return float(train(load(values=values), console=QUIET).result["best_validation_loss"])

    sweep = [best_loss(rate) for rate in (3e-4, 3e-3, 1e-2, 3e-2, 1e-1)]
    found = best_loss("auto")
    assert found - min(sweep) < 0.1 * (max(sweep) - min(sweep))


def test_a_resumed_run_keeps_the_rate_and_the_trials(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(configured(place, out, **AUTO, **SHORT), console=QUIET)
    first = json.loads((out / "result.json").read_text())
    (out / "result.json").unlink()
    said = Console(record=True, file=io.StringIO())
    train(configured(place, out, **AUTO, **SHORT), resume=True, console=said)
    again = json.loads((out / "result.json").read_text())
    assert again["learning_rate_trials"] == first["learning_rate_trials"]
    assert "trials of" not in said.export_text()


# -- what can go wrong ---------------------------------------------------------------------------------------------


def test_rates_that_diverge_are_passed_over(place: Path, trainers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps above a rate are no numbers here, as they may be in float16."""
    ready, whole = ready_of(place, **SHORT), Watch.step

    def step(self: Watch, loss: float, norm: float) -> bool:
        return whole(self, loss if trainers[-1].args.learning_rate < 1e-3 else math.nan, norm)

    monkeypatch.setattr(Watch, "step", step)
    found = with_rate(ready, QUIET)
    assert found.config.training.learning_rate < 1e-3
    assert {t["learning_rate"]: t["loss"] for t in found.trials or ()}[2e-3] is None
    monkeypatch.setattr(Watch, "step", lambda self, loss, norm: whole(self, math.nan, norm))
    with pytest.raises(
        DivergedError, match=r"auto tried rates from 3.1e-05 to 0.008, and training diverged at every one"
    ):
        with_rate(ready, QUIET)


def test_a_shared_out_base_model_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_sharded", True)
    with pytest.raises(ConfigError, match="auto needs the whole base model in every process; write a number"):
        ready_of(place)


@pytest.mark.parametrize("written", ["automatic", "Auto", "[auto]"])
def test_other_words_are_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="training.learning_rate is a number or auto, not"):
        load(None, [f"learning_rate={written}"])


def test_a_trial_is_no_longer_than_the_run(place: Path, trainers: list[Any]) -> None:
    with_rate(ready_of(place, **{"training.max_steps": 3}), QUIET)
    assert {trainer.args.max_steps for trainer in trainers} == {3} and STEPS > 3
    found = with_rate(ready_of(place, **{"training.max_steps": 1}), QUIET)  # whose loss is there before any step
    assert found.config.training.learning_rate == 2e-3
