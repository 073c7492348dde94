"""Fifty steps of a real model on real rows: the fast path's losses are those of PEFT's and transformers' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conftest import SHARED
from trivet.adapter.attach import attach
from trivet.adapter.plan import optimizer
from trivet.data.batch import Collator
from trivet.data.dataset import load_dataset
from trivet.data.encode import IGNORE, Encoded, TextEncoder, encode_dataset
from trivet.kernels.compiled import multiplies_tiles
from trivet.kernels.product import multiplies
from trivet.loss import training_loss
from trivet.model import load_base

ROWS = SHARED / "data" / "d2t_e2e_train.jsonl.gz"
STEPS, SIZE = 50, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.demo,
    pytest.mark.skipif(not ROWS.exists(), reason="the E2E rows are not here"),
]


def reference(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """All logits, and their cross-entropy where there are labels."""
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def curve(dtype: str, *, fast: bool, turned: bool = False) -> torch.Tensor:
    """The losses; `turned` puts each step's rows in the opposite order, so that sums are rounded in another."""
    base = load_base("demo", task="causal-lm", data_format="prompt-completion", dtype=dtype, device="cpu")
    encoder = TextEncoder(base.tokenizer, "causal-lm", max_length=256, chat_template="none", loss_on="responses")
    rows: list[Encoded] = encode_dataset(load_dataset(str(ROWS)).take(STEPS * SIZE), encoder)[0]
    model: Any = attach(base.model, lora_rank=8, fast=fast).train()
    step, losses = optimizer(model, learning_rate=3e-4), []
    for start in range(0, STEPS * SIZE, SIZE):
        few = rows[start : start + SIZE]
        batch = Collator(base.tokenizer.pad_token_id)(few[::-1] if turned else few)
        labels = batch.pop("labels")
        loss = training_loss(model, batch, labels, task="causal-lm") if fast else reference(model, batch, labels)
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_in_float32_the_curves_agree() -> None:
    ours, theirs = curve("float32", fast=True), curve("float32", fast=False)
    assert theirs[-10:].mean() < theirs[:10].mean() - 0.3  # something was learned
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.skipif(
    not multiplies(torch.bfloat16), reason="without instructions for bfloat16 a step of the others' code takes a minute"
)
def test_in_bfloat16_they_differ_as_two_runs_of_other_rounding_do() -> None:
    """Or, where an adapter's part is a term of the layer's own sum and not lost in its rounding, follow float32's."""
    ours, theirs = curve("bfloat16", fast=True), curve("bfloat16", fast=False)
    if multiplies_tiles():
        exact = curve("float32", fast=False)
        apart, others = (ours - exact).abs(), (theirs - exact).abs()
        assert apart.mean() <= 0.5 * others.mean()
        assert apart.max() <= 0.5 * others.max()
        return
    rounding = (curve("bfloat16", fast=False, turned=True) - theirs).abs()
    apart = (ours - theirs).abs()
    assert rounding.max() > 0
    assert apart.mean() <= 1.5 * rounding.mean()
    assert apart.max() <= 1.5 * rounding.max()
    assert (ours.mean() - theirs.mean()).abs() <= 2 * rounding.mean()
