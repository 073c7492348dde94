"""The training loss: torch's cross-entropy, transformers' own loss, and a step weighted by its supervised tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from rich.console import Console

from conftest import save_tiny, tiny_model
from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.data.encode import IGNORE
from trivet.loss import token_losses, training_loss
from trivet.prepare import prepare
from trivet.runfolder import RunFolder
from trivet.splits import load_splits
from trivet.train.callback import RunLog
from trivet.training import make_trainer


def some_labels(rows: int, length: int, vocab: int) -> torch.Tensor:
    """Labels of which the first row has few and the last many."""
    labels = torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        labels[row, : length - 2 - row * 3] = IGNORE
    return labels


def some_batch(model: Any, rows: int = 3, length: int = 11) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of a tiny language model and labels."""
    labels = some_labels(rows, length, 64)
    batch = {"input_ids": torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return batch, labels


def spread_model(kind: str, trained: bool = True) -> Any:
    """A tiny language model whose logits are far from alike; its head is frozen where it is not trained."""
    model = tiny_model(kind, 64).eval().requires_grad_(trained)
    model.get_output_embeddings().weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_token_losses_equal_cross_entropy(kind: str, trained: bool) -> None:
    model = spread_model(kind, trained)
    shifted = not model.config.is_encoder_decoder
    batch, labels = some_batch(model)
    losses, right, row = token_losses(model, batch, labels, shifted=shifted)
    logits = model(**batch).logits
    seen, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    expected = F.cross_entropy(seen.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(losses, expected[wanted != IGNORE])
    assert float(losses.detach().std()) > 0.1  # of which no two are alike
    assert right.tolist() == (seen.argmax(-1) == wanted)[wanted != IGNORE].tolist()
    assert row.tolist() == [r for r in range(3) for _ in range(int((wanted[r] != IGNORE).sum()))]


def test_hits_are_told_from_misses() -> None:
    model = spread_model("llama", trained=False)
    batch, labels = some_batch(model)
    likeliest = model(**batch).logits.argmax(-1)
    hits = torch.where(labels == IGNORE, IGNORE, likeliest)
    hits[2, -1] = (hits[2, -1] + 1) % 64
    _, right, _ = token_losses(model, batch, hits, shifted=False)
    assert right.tolist() == [True] * (len(right) - 1) + [False]


@pytest.mark.parametrize("trained", [True, False])
def test_token_losses_of_16_bit_logits_are_summed_in_32_bits(trained: bool) -> None:
    model = spread_model("llama", trained).bfloat16()
    batch, labels = some_batch(model)
    losses, _, _ = token_losses(model, batch, labels, shifted=False)
    assert losses.dtype == torch.float32
    logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-4, atol=1e-4)  # in bfloat16 it would be 4e-3 off
    loss = training_loss(model, batch, labels, task="seq2seq")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_training_loss_equals_the_models_own(kind: str) -> None:
    model = tiny_model(kind, 64).eval()
    task = "seq2seq" if model.config.is_encoder_decoder else "causal-lm"
    batch, labels = some_batch(model)
    outputs = model(input_ids=batch["input_ids"], labels=labels)
    torch.testing.assert_close(training_loss(model, batch, labels, task=task), outputs.loss)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_training_loss_of_heads_equals_the_models_own(task: str) -> None:
    body = tiny_model("bert", 64)
    problem = "regression" if task == "regression" else "single_label_classification"
    body.config.num_labels, body.config.problem_type = (1 if task == "regression" else 3), problem
    model = hf.BertForSequenceClassification(body.config).eval()
    labels = torch.tensor([0.5, -1.0, 2.0]) if task == "regression" else torch.tensor([0, 2, 1])
    batch = {"input_ids": torch.randint(1, 64, (3, 7))}
    outputs = model(**batch, labels=labels)
    torch.testing.assert_close(training_loss(model, batch, labels, task=task), outputs.loss)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("trained", [True, False])
def test_a_steps_micro_batches_add_up_to_the_mean_over_all_its_tokens(trained: bool, z_loss: float) -> None:
    model = spread_model("llama", trained)
    batch, labels = some_batch(model, 4, 15)
    items = int((labels != IGNORE).sum())
    parts = [
        training_loss(
            model, {"input_ids": batch["input_ids"][i : i + 2]}, labels[i : i + 2], items, task="seq2seq", z_loss=z_loss
        )
        for i in (0, 2)
    ]
    logits = model(**batch).logits.flatten(0, 1)
    extra = z_loss * logits[labels.flatten() != IGNORE].logsumexp(-1).square().mean()
    torch.testing.assert_close(sum(parts), F.cross_entropy(logits, labels.flatten()) + extra)


# -- gradients through the real Trainer ----------------------------------------------------------------------

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def uneven_rows(kind: str, task: str) -> list[dict[str, Any]]:
    """Eight rows; the answers are from two words to seventy words long, so micro-batches hold very different counts."""
    lengths = (1, 35, 2, 1, 30, 1, 3, 20)
    if task == "classification":
        return [{"text": "the cat sat " * n, "label": ("blue", "green", "red")[n % 3]} for n in lengths]
    if task == "regression":
        return [{"text": "the dog ran " * n, "label": n / 7} for n in lengths]
    return [{"prompt": "what colour is the sky ?", "completion": "blue green " * n} for n in lengths]


def step_of(folder: Path, rows: list[dict[str, Any]], size: int, accumulate: int) -> tuple[dict[str, Any], Any]:
    """The gradients that the optimizer sees in the first step, and what the log says about that step."""
    name = f"{size}x{accumulate}"
    config = load(
        values={
            "model.name": str(folder),
            "model.dtype": "float32",
            "model.device": "cpu",
            "data.validation": None,
            "training.batch_size": size,
            "training.gradient_accumulation_steps": accumulate,
            "training.max_steps": 1,
            "training.max_grad_norm": 0.0,
            "output_dir": str(folder / name),
        }
    )
    console = Console(quiet=True)
    ready = prepare(config, load_splits(config, train=rows), console)
    draw = torch.Generator().manual_seed(3)
    for layer in adapted_layers(ready.session.model):  # B = 0 would leave A without a gradient
        layer.B.data.normal_(std=0.1, generator=draw)
    run = RunFolder(Path(config.output_dir))
    run.path.mkdir()
    log = RunLog(run.log, console)
    trainer = make_trainer(ready, run, log)
    seen: dict[str, torch.Tensor] = {}

    class Spy(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Spy())
    trainer.train()
    return seen, log.steps[0]


@pytest.mark.parametrize(
    ("kind", "task"),
    [("gpt2", "causal-lm"), ("t5", "seq2seq"), ("bert", "classification"), ("bert", "regression")],
)
def test_accumulation_is_weighted_by_supervised_tokens(tmp_path: Path, kind: str, task: str) -> None:
    folder, rows = save_tiny(kind, tmp_path / kind, **NO_DROPOUT[kind]), uneven_rows(kind, task)
    one, logged = step_of(folder, rows, 8, 1)
    four, logged_four = step_of(folder, rows, 2, 4)
    assert one.keys() == four.keys() and len(one) >= 8
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-4
    for name, gradient in one.items():
        assert float((gradient - four[name]).abs().max()) <= 1e-6 * max(largest, 1.0), name
    assert logged["loss"] == pytest.approx(logged_four["loss"], rel=1e-4)
    assert (logged["tokens"], logged["supervised_tokens"]) == (
        logged_four["tokens"],
        logged_four["supervised_tokens"],
    )


def test_counted_tokens_are_those_of_the_rows(tmp_path: Path) -> None:
    folder, rows = (
        save_tiny("gpt2", tmp_path / "gpt2", **NO_DROPOUT["gpt2"]),
        uneven_rows("gpt2", "causal-lm"),
    )
    _, logged = step_of(folder, rows, 8, 1)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    prompts = [len(tokenizer(row["prompt"] + "\n")["input_ids"]) for row in rows]
    whole = [len(tokenizer(row["prompt"] + "\n" + row["completion"])["input_ids"]) + 1 for row in rows]
    assert logged["tokens"] == sum(whole)
    assert logged["supervised_tokens"] == sum(whole) - sum(prompts)
