"""The grid: every decomposition x rank policy x update rule trains, is saved, and loads in plain PEFT.

A tiny model learns four short rows. What can't be combined says why. `make test` takes a few of them, in which every
two choices meet; `make test-slow` takes the others.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from conftest import tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.plan import optimizer, plan_of
from trivet.adapter.save import save_adapter
from trivet.errors import ConfigError
from trivet.methods import find_method
from trivet.parts import PARTS
from trivet.rank.policy import parameters
from trivet.train.ranks import RankCallback

STEPS = 10
BATCH = {
    "input_ids": torch.arange(2, 42).reshape(4, 10) % 23 + 2,
    "labels": torch.arange(2, 42).reshape(4, 10) % 23 + 2,
}

#: Options that make a short run move: policies that shrink start at rank 6 and end at what rank 2 holds.
OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": {"ranks": {"q_proj": 4, "down_proj": 0}},
    "squeeze": {"start_rank": 6},
    "uniform_squeeze": {"start_rank": 6},
    "adalora": {"start_rank": 6},
    "grow": {"start_rank": 6, "hysteresis": 0.1},
    "auto": {"start_rank": 6},
}
#: Rates at which each rule learns this task in so few steps.
RATES = {"muon": 0.1, "adamw": 0.03, "lora_plus": 0.005}
CORES = ("core", "cur", "tensor_cur")
LEGS = (PARTS["decompose"], PARTS["rank"], PARTS["update"])
COMBINATIONS = list(itertools.product(*LEGS))


@functools.cache
def base() -> dict[str, torch.Tensor]:
    return tiny_model("llama", 64, initializer_range=0.2).state_dict()


def fresh() -> Any:
    model = tiny_model("llama", 64, initializer_range=0.2)
    model.load_state_dict(base())
    return model


def allowed(combination: tuple[str, ...]) -> bool:
    try:
        find_method(method_of(*combination))
    except ConfigError:
        return False
    return True


def pairs(combination: tuple[str, ...]) -> set[Any]:
    """Every two choices of three, each with its leg."""
    return set(itertools.combinations(enumerate(combination), 2))


def covering(combinations: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A few combinations in which every two choices meet that meet in any: each the one with the most new pairs."""
    chosen, left = [], set().union(*map(pairs, combinations))
    while left:
        chosen.append(max(combinations, key=lambda c: len(pairs(c) & left)))
        left -= pairs(chosen[-1])
    return chosen


def method_of(decompose: str, rank: str, update: str) -> dict[str, Any]:
    return {"decompose": decompose, "rank": {"name": rank, **OPTIONS.get(rank, {})}, "update": update}


#: What `make test` takes: also every two choices that are refused, once.
QUICK = covering([c for c in COMBINATIONS if allowed(c)])
QUICK += [c for c in COMBINATIONS if not allowed(c) and c[2] == "adamw"]


@torch.no_grad()
def row_losses(model: Any) -> torch.Tensor:
    logits = model(BATCH["input_ids"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, BATCH["labels"][:, 1:], reduction="none")
    return losses.mean(1)


def train(model: Any, rate: float) -> None:
    """The training loop that a Trainer would run, without the Trainer."""
    made = optimizer(model, learning_rate=rate)
    ranks = RankCallback(model, validation=lambda: row_losses(model))
    state = SimpleNamespace(global_step=0, max_steps=STEPS, is_world_process_zero=True)
    args = SimpleNamespace(seed=0)
    ranks.on_train_begin(args, state, None)
    for _ in range(STEPS):
        ranks.on_step_begin(args, state, None)
        model(**BATCH).loss.backward()
        ranks.on_pre_optimizer_step(args, state, None)
        made.step()
        made.zero_grad()
        state.global_step += 1
        ranks.on_step_end(args, state, None, optimizer=made)
    ranks.on_train_end(args, state, None)


@pytest.mark.parametrize(
    ("decompose", "rank", "update"),
    [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in COMBINATIONS],
)
def test_every_combination(decompose: str, rank: str, update: str, tmp_path: Path) -> None:
    method = method_of(decompose, rank, update)
    try:
        find_method(method)
    except ConfigError as error:
        assert "can't be combined" in str(error) and str(error).count(":") >= 2  # and says why
        with pytest.raises(ConfigError, match="can't be combined"):
            attach(fresh(), method=method, batches=[BATCH])
        return
    model = attach(fresh(), lora_rank=2, method=method, batches=[BATCH])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, fresh()(**BATCH).logits, rtol=1e-5, atol=1e-5)
    before = float(row_losses(model).mean())
    train(model, RATES.get(update, 0.02) * (3 if decompose in CORES else 1))
    assert float(row_losses(model).mean()) < before - 0.05
    if plan_of(model).policy.moving and decompose not in CORES:
        assert parameters(adapted_layers(model)) <= 2 * 2 * (4 * 64 + 3 * 96) * (3 if rank == "auto" else 1)
    save_adapter(model, tmp_path / "adapter", {"input_ids": BATCH["input_ids"]})
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter"))
    again.eval()
    with torch.no_grad():
        expected = model(**BATCH).logits
        torch.testing.assert_close(again(**BATCH).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_two_choices_meet_in_make_test() -> None:
    possible = {pair for c in COMBINATIONS if allowed(c) for pair in pairs(c)}
    trained = [c for c in QUICK if allowed(c)]
    assert {pair for c in trained for pair in pairs(c)} == possible and len(trained) < 80


def test_what_can_not_be_combined_is_what_we_think() -> None:
    refused = {(decompose, rank) for decompose, rank, update in COMBINATIONS if not allowed((decompose, rank, update))}
    moving = {"planned", "squeeze", "grow", "auto", "uniform_squeeze", "adalora"}
    assert refused == (
        {("dora", rank) for rank in moving}
        | {("tensor_cur", rank) for rank in moving | {"pattern"}}
        | {(core, rank) for core in ("core", "cur") for rank in ("grow", "adalora")}
        | {("principal", "adalora")}
    )
