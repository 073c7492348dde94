"""Rank policies in real runs of a tiny model: budgets, schedules, and what stays."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from conftest import colour_rows, save_tiny, slow, tiny_model, write_jsonl
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.plan import plan_of
from trivet.configio import load
from trivet.errors import ConfigError
from trivet.parts import PARTS
from trivet.rank.policy import Situation, parameters
from trivet.rank.squeeze import Squeeze
from trivet.run import Outcome, train


@given(st.integers(2, 3000), st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_ends_at_the_target_and_never_rises(total: int, one: float, other: float) -> None:
    policy = Squeeze(8, begin=min(one, other), end=max(one, other), target=100, wide=1000)
    first, last = policy._span(total)
    assert 1 <= first <= last
    allowed = [policy.allowance(step, total) for step in range(total + 1)]
    assert allowed[last:] == [100] * (total + 1 - last)
    assert all(a >= b >= 100 for a, b in itertools.pairwise(allowed)) and allowed[0] <= 1000
    due = [step for step in range(1, total + 1) if policy.due(step, total)]
    assert due[-1] == last and all(first <= step <= last for step in due)
    assert not policy.settled(last - 1, total) and policy.settled(last, total)


def test_begin_after_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="begin"):
        Squeeze(8, begin=0.7, end=0.3)


def run(place: Path, rank: Any, *, rows: Any = None, console: Console | None = None, **settings: Any) -> Outcome:
    values = {
        "model.name": str(place / "llama"),
        "model.lora_rank": 2,
        "data.train": str(write_jsonl(place / "train.jsonl", rows or colour_rows(48))),
        "data.validation": 0.25,
        "output_dir": str(place / "run"),
        "method": {"rank": rank},
        "model.dtype": "float32",
        "model.device": "cpu",
        "training.batch_size": 4,
        "training.learning_rate": 1e-2,
        "training.max_steps": 40,
        "evaluation.generate": False,
        "evaluation.resamples": 10,
    }
    return train(load(values=values | settings), overwrite=True, console=console or Console(quiet=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "llama", initializer_range=0.3)


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "llama").symlink_to(model)
    return tmp_path


PLAIN = 2 * 2 * (4 * 64 + 3 * 96)  # rank 2, 2 blocks, 4 square projections of 32 and 3 of 32 x 64


@pytest.mark.parametrize("name", ["squeeze", "uniform_squeeze", "adalora", "grow"])
def test_the_budget_is_kept_and_the_loss_falls(place: Path, name: str) -> None:
    outcome = run(place, {"name": name, "start_rank": 8})
    result = outcome.result
    assert result["adapter_parameters"] <= PLAIN
    assert result["adapter_parameters"] == sum(
        t.numel() for layer in adapted_layers(outcome.session.model) for t in layer.trained()
    )
    decided = [row for row in result["rank_history"] if "ranks" in row]
    policy = plan_of(outcome.session.model).policy
    assert isinstance(policy, Squeeze)
    for row in decided:
        assert row["parameters"] <= policy.allowance(row["step"], 40)
    assert decided[-1]["ranks"] == {n: decided[-1]["ranks"][n] for n in decided[-1]["ranks"]}
    assert {n: r for n, r in decided[-1]["ranks"].items() if r} == result["ranks"]
    assert result["metrics"]["tuned"]["loss"] < 0.5 * result["metrics"]["base"]["loss"]
    assert result["best_step"] >= decided[-1]["step"]  # an earlier one would be over the budget


def test_squeezing_to_nothing_leaves_one_direction(place: Path) -> None:
    outcome = run(place, {"name": "squeeze", "budget": 1, "start_rank": 4})
    assert list(outcome.result["ranks"].values()) == [1]
    assert (place / "run" / "adapter" / "adapter_model.safetensors").stat().st_size < 2000


def test_a_budget_that_is_not_exceeded_drops_nothing(place: Path) -> None:
    outcome = run(place, {"name": "squeeze", "budget": "r2-equivalent", "start_rank": 2})
    plain = run(place, "fixed")
    assert set(outcome.result["ranks"].values()) == {2}
    assert outcome.result["adapter_parameters"] == plain.result["adapter_parameters"] == PLAIN


def test_a_squeeze_that_drops_nothing_is_no_change() -> None:
    model = attach(
        tiny_model("llama", 64), lora_rank=4, method={"rank": {"name": "squeeze", "metric": "plain", "start_rank": 4}}
    )
    policy = plan_of(model).policy
    assert isinstance(policy, Squeeze)
    layers = adapted_layers(model)
    assert policy.squeeze(Situation(5, 10, layers), parameters(layers)) == {}


def test_planned_spends_its_budget_on_what_the_probe_found(place: Path) -> None:
    outcome = run(place, {"name": "planned", "budget": "r2-equivalent"})
    ranks = outcome.result["ranks"]
    assert 0.95 * PLAIN < outcome.result["adapter_parameters"] <= PLAIN
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert outcome.result["metrics"]["tuned"]["loss"] < outcome.result["metrics"]["base"]["loss"]


def test_a_pattern_is_followed() -> None:
    model = attach(
        tiny_model("llama", 64), lora_rank=3, method={"rank": {"name": "pattern", "ranks": {"q_proj": 5, "mlp": 0}}}
    )
    ranks = {layer.name: layer.rank for layer in adapted_layers(model)}
    assert {r for n, r in ranks.items() if "q_proj" in n} == {5}
    assert {r for n, r in ranks.items() if "q_proj" not in n} == {3} and not any("mlp" in n for n in ranks)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"nothing": 2}, "fits no adapted layer"),
        ({"(": 2}, "no regular expression"),
        ({".": 0}, "nothing would be trained"),
    ],
)
def test_a_pattern_that_makes_no_sense(ranks: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        attach(tiny_model("llama", 64), method={"rank": {"name": "pattern", "ranks": ranks}})


def test_auto_measures_at_most_eight_budgets_when_training_has_ended_and_keeps_the_smallest_good_one(
    place: Path,
) -> None:
    said = io.StringIO()
    outcome = run(place, {"name": "auto", "start_rank": 4, "tolerance": 0.2}, console=Console(file=said))
    (look,) = (row for row in outcome.result["rank_history"] if "tried" in row)
    tried = {int(budget): loss for budget, loss in look["tried"].items()}
    assert look["step"] == 40 and max(tried) == 2 * PLAIN and len(tried) <= 8
    best = min(tried.values())
    assert tried[look["budget"]] - best <= 0.2 * (tried[0] - best)
    assert look["budget"] < 2 * PLAIN
    assert outcome.result["adapter_parameters"] == parameters(adapted_layers(outcome.session.model))
    assert 0.5 * look["budget"] < outcome.result["adapter_parameters"] <= look["budget"]
    assert outcome.result["best_step"]  # the cut is no new start
    assert f"cut from {2 * PLAIN:,} to {outcome.result['adapter_parameters']:,} parameters" in said.getvalue()


def unlearnable() -> list[dict[str, str]]:
    """Answers that can't be known: what is learned of them is soon too much."""
    words = ["red", "blue", "green", "grass", "sky", "house", "cat", "dog", "mat", "one", "two", "three"]
    draw = random.Random(0)
    return [{"prompt": f"{a} {b} ?", "completion": draw.choice(words)} for a, b in itertools.permutations(words, 2)]


def test_auto_cuts_the_best_checkpoint_where_training_stopped_early(place: Path) -> None:
    rows = unlearnable()
    patient = {"training.eval_steps": 5, "training.early_stopping_patience": 2, "training.max_steps": 200}
    outcome = run(place, {"name": "auto", "start_rank": 4, "tolerance": 0.2}, rows=rows, **patient)
    stopped = outcome.result["best_step"] + 10
    (look,) = (row for row in outcome.result["rank_history"] if "tried" in row)
    assert look["step"] == stopped < 200
    assert look["budget"] < 2 * PLAIN and outcome.result["adapter_parameters"] <= look["budget"]
    log = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_loss"] for row in log if "validation_loss" in row}
    assert look["tried"][str(2 * PLAIN)] == pytest.approx(losses[stopped - 10])
    assert losses[stopped] > losses[stopped - 10]


@pytest.mark.parametrize("name", ["squeeze", *slow("uniform_squeeze", "adalora", "grow"), "auto"])
@pytest.mark.parametrize("every", [1, 8])
def test_the_budget_is_kept_where_training_stopped_before_the_ranks_were_settled(
    place: Path, name: str, every: int
) -> None:
    """Long before the first squeeze, at step 40; one step was measured, or a few."""
    patient = {"training.eval_steps": every, "training.early_stopping_patience": 1, "training.max_steps": 400}
    patient["training.learning_rate"] = 0.5  # the loss rises from the first validation on
    outcome = run(place, {"name": name, "start_rank": 8}, rows=unlearnable(), **patient)
    steps = [json.loads(line)["step"] for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    assert max(steps) < 100
    assert outcome.result["adapter_parameters"] <= (4 * PLAIN if name == "auto" else PLAIN)  # auto has no budget


def test_auto_needs_validation_rows(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.validation"):
        run(place, "auto", **{"data.validation": None})
    assert not (place / "run").exists()


def test_rank_aware_steps_are_on_with_varying_ranks_and_can_be_switched_off() -> None:
    for rank, on in (
        ("fixed", False),
        ({"name": "fixed", "rank_aware_step": True}, True),
        ({"name": "pattern", "ranks": {"q_proj": 3}}, False),
        ({"name": "pattern", "ranks": {"q_proj": 3}, "rank_aware_step": True}, True),
        ("squeeze", True),
        ("planned", True),
        ({"name": "squeeze", "rank_aware_step": False}, False),
    ):
        batch = {"input_ids": torch.arange(2, 14).reshape(1, 12), "labels": torch.arange(2, 14).reshape(1, 12)}
        model = attach(tiny_model("llama", 64), method={"rank": rank}, batches=[batch])
        assert plan_of(model).policy.rank_aware_step is on


@pytest.mark.parametrize("rank", [2, *slow(8)])
def test_a_rank_aware_step_is_plain_loras_at_another_rate(place: Path, rank: int) -> None:
    """Twice the rate at r = 2, where √(8 / r) is 2; the same at r = 8."""
    common = {"model.lora_rank": rank, "training.max_steps": 10}
    aware = run(place, {"name": "fixed", "rank_aware_step": True}, **common)
    weights = load_file(place / "run" / "adapter" / "adapter_model.safetensors")
    plain = run(place, "fixed", **common, **{"training.learning_rate": 1e-2 * (8 / rank) ** 0.5})
    for name, tensor in load_file(place / "run" / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    assert aware.result["metrics"]["tuned"]["loss"] == pytest.approx(plain.result["metrics"]["tuned"]["loss"], rel=1e-5)


def budget_of_auto(losses_at: Callable[[float], torch.Tensor]) -> tuple[int, int]:
    """The budget that `auto` chooses and the whole; `losses_at` gives the rows' losses at a share of the parameters."""
    model = attach(
        tiny_model("llama", 64), lora_rank=4, method={"rank": {"name": "auto", "start_rank": 4, "metric": "plain"}}
    )
    layers = adapted_layers(model)
    whole = parameters(layers)
    policy = plan_of(model).policy

    def validation(changes: Any) -> torch.Tensor:
        left = sum(sum(x.shape) * (changes[x.name].rank if x.name in changes else x.rank) for x in layers)
        return losses_at(left / whole)

    policy.decide(Situation(10, 10, layers, validation=validation))
    return policy.history[0]["budget"], whole


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({1.0: 1.0, 0.5: 1.0, 0.25: 1.0, 0.0: 1.0}, 0.0),  # nothing was gained: nothing stays
        ({1.0: 1.0, 0.5: 1.001, 0.25: 1.5, 0.0: 2.0}, 0.5),  # within half a percent of the gain of 1
        ({1.0: 1.0, 0.5: 1.1, 0.25: 1.0, 0.0: 2.0}, 1.0),  # the first step down costs too much
        ({1.0: 1.0, 0.5: 0.8, 0.25: 0.9, 0.0: 2.0}, 0.5),  # the best is not the largest
        ({1.0: 1.0, 0.5: 0.9, 0.25: 0.95, 0.0: 0.2}, 0.0),  # the update does harm, and so does half of it
    ],
)
def test_auto_goes_down_while_that_is_as_good_as_the_best(losses: dict[float, float], chosen: float) -> None:
    def losses_at(left: float) -> torch.Tensor:
        near = min((share for share in losses if share), key=lambda share: abs(share - left)) if left else 0.0
        return torch.full((50,), losses[near], dtype=torch.float64)

    budget, whole = budget_of_auto(losses_at)
    assert budget == max(1, int(chosen * whole))


@pytest.mark.parametrize(("noise", "chosen"), [(0.03, 0.5), (0.05, 1.0)])
def test_auto_cuts_only_what_is_as_good_beyond_its_standard_error(noise: float, chosen: float) -> None:
    """Half of the budget costs nothing in the mean, a quarter everything; the error is a seventh of the noise."""
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(25)

    def losses_at(left: float) -> torch.Tensor:
        return 1 + noise * sign if 0.3 < left < 0.7 else torch.full_like(sign, 1.0 if left >= 0.7 else 2.0)

    budget, whole = budget_of_auto(losses_at)
    assert budget == int(chosen * whole)


@pytest.mark.parametrize("name", PARTS["rank"])
def test_the_table_and_the_policy_have_the_same_defaults(name: str) -> None:
    policy = PARTS["rank"][name].load()(8)
    for option in PARTS["rank"][name].options:
        assert getattr(policy, option.name) == option.default, option.name
