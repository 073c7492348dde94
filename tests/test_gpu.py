"""On a CUDA device: losses and gradients are those of PEFT's and transformers' own code, and runs learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import colour_rows, losses_of, tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.plan import optimizer
from trivet.configio import load
from trivet.data.encode import IGNORE
from trivet.loss import training_loss
from trivet.run import train

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def batch_of(vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (4, 24), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, :5] = IGNORE
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}, labels.cuda()


def gradients(kind: str, dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
    model: Any = attach(tiny_model(kind, 64).to("cuda", dtype), lora_rank=4, fast=fast).eval()
    for layer in adapted_layers(model):
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        layer.A.data.copy_(torch.randn(layer.A.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    batch, labels = batch_of(64)
    loss = training_loss(model, batch, labels, task="causal-lm") if fast else model(**batch, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_in_float32(kind: str) -> None:
    for ours, theirs in zip(*(gradients(kind, torch.float32, fast) for fast in (True, False)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_in_bfloat16(kind: str) -> None:
    exact = gradients(kind, torch.float32, fast=False)
    ours, theirs = (gradients(kind, torch.bfloat16, fast) for fast in (True, False))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        wrong = [float((t.float() - true).norm() / true.norm()) for t in (mine, other)]
        assert wrong[0] <= 2 * wrong[1] + 2**-7


def test_steps_cut_the_loss() -> None:
    model: Any = attach(tiny_model("llama", 64).to("cuda", torch.bfloat16), lora_rank=4, method="lora").train()
    losses = losses_of(model, optimizer(model, learning_rate=1e-2), *batch_of(64), 30)
    assert losses[-1] < losses[0] - 0.3


ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": f"the {word} is here", "label": word} for word in ("sky", "house") * 12],
    "regression": [
        {"text": f"the {word} is here", "label": 0.5 + 3.2 * (word == "sky")} for word in ("sky", "house") * 12
    ],
    "writing": colour_rows(24),
}


@pytest.mark.parametrize("method", ["trivet", "auto"])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("bert", "classification"),
        ("bert", "regression"),
        ("llama", "writing"),
        ("gpt2", "writing"),
        ("bart", "writing"),
    ],
)
def test_a_run_learns(kind: str, rows: str, method: str, tmp_path: Path, tiny: Any) -> None:
    settings = {"training.max_steps": 20, "training.learning_rate": 1e-2, "training.batch_size": 8, "method": method}
    settings |= {"evaluation.resamples": 10, "evaluation.max_new_tokens": 4, "output_dir": str(tmp_path / "run")}
    config = load(values={"model.name": str(tiny(kind)), "model.device": DEVICE, **settings})
    split = {"train": ROWS[rows][:16], "validation": ROWS[rows][16:], "test": ROWS[rows][16:]}
    metrics = train(config, console=Console(quiet=True), **split).result["metrics"]
    name = "mse" if rows == "regression" else "loss"
    assert metrics["tuned"][name] < metrics["base"][name]


@pytest.mark.parametrize(
    "settings",
    [
        {"model.load_in_4bit": True},
        {"training.learning_rate": "auto"},
        {"training.packing": True},
        {"training.gradient_checkpointing": True},
        {"model.lora_dropout": 0.1},
    ],
)
def test_a_run_with_other_settings_learns(settings: dict[str, Any], tmp_path: Path, tiny: Any) -> None:
    settings = {"training.max_steps": 20, "training.learning_rate": 1e-2, "training.batch_size": 8} | settings
    settings |= {"evaluation.resamples": 10, "evaluation.max_new_tokens": 4, "output_dir": str(tmp_path / "run")}
    config = load(values={"model.name": str(tiny("llama")), "model.device": DEVICE, **settings})
    rows = ROWS["writing"]
    split = {"train": rows[:16], "validation": rows[16:], "test": rows[16:]}
    metrics = train(config, console=Console(quiet=True), **split).result["metrics"]
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
