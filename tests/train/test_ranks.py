"""Ranks that change during training: resume, other people's Trainers, and what a checkpoint must hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

import trivet
from conftest import colour_rows, save_tiny, slow, write_jsonl
from trivet.adapter.layers import adapted_layers
from trivet.adapter.save import save_adapter
from trivet.configio import dump, load
from trivet.errors import ConfigError
from trivet.rank.policy import parameters
from trivet.run import Outcome, train
from trivet.train.checkpoint import newest_checkpoint, step_of

SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "model.lora_rank": 2,
    "model.lora_dropout": 0.1,
    "training.batch_size": 4,
    "training.learning_rate": 1e-2,
    "training.max_steps": 20,
    "training.eval_steps": 4,
    "training.keep_checkpoints": 9,
    "evaluation.generate": False,
    "evaluation.resamples": 10,
}
METHODS: dict[str, Any] = {
    "squeeze": {"rank": {"name": "squeeze", "start_rank": 8}},
    "adalora": {"rank": {"name": "adalora", "start_rank": 8}},
    "auto": {"rank": {"name": "auto", "start_rank": 4, "tolerance": 0.3}},
    "grow-equivariant": {"rank": {"name": "grow", "start_rank": 8, "hysteresis": 0}, "update": "equivariant"},
    "squeeze-principal": {"decompose": "principal", "rank": {"name": "squeeze", "start_rank": 4}, "update": "muon"},
    "squeeze-core": {"decompose": "core", "rank": {"name": "squeeze", "start_rank": 8, "budget": 200}},
}
ROWS = [{"prompt": "the cat " * (1 + i % 7), "completion": "ran to the red house " * (1 + i % 5)} for i in range(24)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny("llama", folder / "llama", initializer_range=0.3)
    write_jsonl(folder / "train.jsonl", ROWS)
    return folder


def run(place: Path, out: Path, method: Any, *, resume: bool = False) -> Outcome:
    values = {
        "model.name": str(place / "llama"),
        "data.train": str(place / "train.jsonl"),
        "data.validation": 0.2,
        "output_dir": str(out),
        "method": method,
        **SETTINGS,
    }
    return train(load(values=values), resume=resume, console=Console(quiet=True))


def interrupted(whole: Path, out: Path, step: int) -> Path:
    """A copy of a whole run as it was after the checkpoint of `step`."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "adapter")
    (out / "result.json").unlink()
    for checkpoint in (out / "checkpoints").iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    (out / "config.yaml").write_text(dump(load(out / "config.yaml", values={"output_dir": str(out)})))
    return out


@pytest.mark.parametrize(
    "name", ["adalora", "auto", "squeeze-principal", *slow("squeeze", "squeeze-core", "grow-equivariant")]
)
def test_a_run_interrupted_while_ranks_change_ends_bit_for_bit_the_same(place: Path, tmp_path: Path, name: str) -> None:
    whole = run(place, tmp_path / "whole", METHODS[name])
    after = name == "auto"  # it cuts when training has ended; the others squeeze up to step 12
    assert len(whole.result["rank_history"]) >= (2 if after else 3)
    for step in (8, 20) if after else (4, 8):
        out = interrupted(tmp_path / "whole", tmp_path / f"run{step}", step)
        outcome = run(place, out, METHODS[name], resume=True)
        first, second = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (tmp_path / "whole", out))
        assert first.keys() == second.keys() and all(torch.equal(t, second[k]) for k, t in first.items())
        for key in ("rank_history", "ranks", "metrics", "best_step", "best_validation_loss"):
            assert outcome.result[key] == json.loads(json.dumps(whole.result[key])), key


def test_auto_in_another_trainer_asks_for_validation_before_training(place: Path) -> None:
    state = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=True)
    with pytest.raises(ConfigError, match="pass validation="):
        trivet.callback(causal(place, METHODS["auto"])).on_train_begin(SimpleNamespace(seed=0), state, None)


@pytest.mark.parametrize("finished", [False, True])
def test_only_training_that_has_come_to_its_end_is_followed_by_a_cut(place: Path, finished: bool) -> None:
    model = causal(place, METHODS["auto"])
    start = parameters(adapted_layers(model))
    ranks = trivet.callback(model, validation=lambda: torch.ones(8), finished=lambda: finished)
    state = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=True)
    args = SimpleNamespace(seed=0)
    ranks.on_train_begin(args, state, None)
    ranks.on_step_begin(args, state, None)
    model(**{k: torch.tensor([v]) for k, v in TOKENS[0].items()}).loss.backward()
    ranks.on_pre_optimizer_step(args, state, None)
    state.global_step = 1
    ranks.on_step_end(args, state, None)
    ranks.on_train_end(args, state, None)
    assert (parameters(adapted_layers(model)) < start) is finished


def test_a_checkpoint_without_the_policys_state_is_passed_over(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "whole", METHODS["squeeze"])
    folder = tmp_path / "whole" / "checkpoints"
    assert newest_checkpoint(folder) == folder / "checkpoint-20"
    (folder / "checkpoint-20" / "rank_state.json").unlink()
    cut = folder / "checkpoint-16" / "rank_state.safetensors"
    cut.write_bytes(b"")
    assert newest_checkpoint(folder) == folder / "checkpoint-12"


def test_checkpoints_shrink(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "run", METHODS["squeeze"])
    folder = tmp_path / "run" / "checkpoints"
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        sizes = [(folder / f"checkpoint-{step}" / name).stat().st_size for step in (4, 8, 12, 16)]
        assert sizes[0] > sizes[1] > sizes[2] and sizes[3] == pytest.approx(sizes[2], rel=0.02), name


# -- other people's Trainers ---------------------------------------------------------------------------------


def causal(place: Path, method: Any) -> Any:
    torch.manual_seed(0)
    return trivet.attach(hf.AutoModelForCausalLM.from_pretrained(place / "llama"), lora_rank=2, method=method)


def test_in_several_processes_other_trainers_are_refused_a_change_of_rank(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever wraps the model there would go on with the old sizes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    several = SimpleNamespace(seed=0)
    state = SimpleNamespace(global_step=0, max_steps=20)
    with pytest.raises(ConfigError, match="only trivet's own training can change ranks"):
        trivet.callback(causal(place, METHODS["squeeze"])).on_train_begin(several, state, None)
    trivet.callback(causal(place, "lora")).on_train_begin(several, state, None)


def ours(model: Any) -> dict[str, Any]:
    """What a Trainer is given of trivet."""
    return {
        "callbacks": [trivet.callback(model)],
        "optimizers": (trivet.optimizer(model, learning_rate=1e-2), None),
    }


def check_trained(model: Any, trainer: Any, place: Path, folder: Path, start: int) -> None:
    """The budget is kept, the file loads in plain PEFT, and computes what was trained."""
    layers = adapted_layers(model)
    budget = parameters(layers)
    plain = trivet.attach(hf.AutoModelForCausalLM.from_pretrained(place / "llama"), lora_rank=2)
    assert budget <= parameters(adapted_layers(plain)) < start
    probe = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    save_adapter(model, folder / "adapter", probe)
    again = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(place / "llama"), str(folder / "adapter"))
    model.eval()
    again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**probe).logits, model(**probe).logits, rtol=1e-4, atol=1e-4)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


TOKENS = [{"input_ids": [2 + i % 5, 7, 8, 9, 3 + i % 4], "labels": [2 + i % 5, 7, 8, 9, 3 + i % 4]} for i in range(40)]
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "logging_steps": 5,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.mark.parametrize("decompose", ["zero", "principal"])
def test_in_the_plain_trainer(place: Path, tmp_path: Path, decompose: str) -> None:
    model = causal(place, {"decompose": decompose, "rank": {"name": "squeeze", "start_rank": 8}})
    start = parameters(adapted_layers(model))
    trainer = hf.Trainer(
        model,
        args=hf.TrainingArguments(str(tmp_path / "out"), save_strategy="no", **ARGUMENTS),
        train_dataset=TOKENS,
        **ours(model),
    )
    trainer.train()
    check_trained(model, trainer, place, tmp_path, start)


def test_in_trls_sft_trainer(place: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = causal(place, {"rank": {"name": "squeeze", "start_rank": 8}})
    start = parameters(adapted_layers(model))
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(tmp_path / "out"), save_strategy="no", max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(colour_rows(48)),
        processing_class=hf.AutoTokenizer.from_pretrained(place / "llama", pad_token="<|endoftext|>"),
        **ours(model),
    )
    trainer.train()
    check_trained(model, trainer, place, tmp_path, start)


def test_in_trls_dpo_trainer(place: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = causal(place, {"rank": {"name": "squeeze", "start_rank": 8}})
    start = parameters(adapted_layers(model))
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "the cat sat on the mat"}
        for row in colour_rows(48)
    ]
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path / "out"), save_strategy="no", max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(pairs),
        processing_class=hf.AutoTokenizer.from_pretrained(place / "llama", pad_token="<|endoftext|>"),
        **ours(model),
    )
    trainer.train()
    check_trained(model, trainer, place, tmp_path, start)


def test_a_trainer_with_gradient_checkpointing_and_accumulation(place: Path, tmp_path: Path) -> None:
    model = causal(place, {"rank": {"name": "squeeze", "start_rank": 8}})
    start = parameters(adapted_layers(model))
    trainer = hf.Trainer(
        model,
        args=hf.TrainingArguments(
            str(tmp_path / "out"),
            save_strategy="no",
            gradient_accumulation_steps=2,
            **{**ARGUMENTS, "gradient_checkpointing": True},
            gradient_checkpointing_kwargs={"use_reentrant": False},
        ),
        train_dataset=TOKENS,
        **ours(model),
    )
    trainer.train()
    check_trained(model, trainer, place, tmp_path, start)
