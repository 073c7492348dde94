"""The adapted layer as GPUs get it: all that holds of the one for CPUs, and the copies that a model makes at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fast import (  # noqa: F401 - run again here
    moved,
    one_layer,
    test_a_factor_that_is_not_trained,
    test_an_input_that_is_a_view_and_one_that_wants_no_gradient,
    test_every_form_of_factors,
    test_gradient_checkpointing_changes_no_gradient,
    test_merging,
    test_output_and_gradients,
    test_pefts_own_pass,
    test_plain_peft_reads_what_is_saved,
    test_the_output_may_be_changed_in_place,
)

from conftest import tiny_model
from trivet import attach
from trivet.adapter import fast_gpu
from trivet.adapter.fast import FastLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_gpu, "wanted", lambda x: True)


def model(dropout: float = 0.0) -> Any:
    """A model in bfloat16 with factors in float32, none of them zero."""
    made = attach(tiny_model("llama", 64).to(DEVICE, torch.bfloat16), lora_rank=4, lora_dropout=dropout).train()
    moved(made)
    return made


def loss(made: Any) -> torch.Tensor:
    torch.manual_seed(8)
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return made(input_ids=ids, labels=ids).loss


def gradients(made: Any) -> list[torch.Tensor]:
    made.zero_grad()
    loss(made).backward()
    return [p.grad for p in made.parameters() if p.requires_grad]


def layers(made: Any) -> list[FastLinear]:
    return [module for module in made.modules() if isinstance(module, FastLinear)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_copies_made_at_once_change_nothing(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = model(dropout), []
    adapted = fast_gpu.adapted
    monkeypatch.setattr(fast_gpu, "adapted", lambda *given: seen.append(given[3]) or adapted(*given))
    with_copies = gradients(made)
    assert len(seen) == len(layers(made)) and all(a.dtype == b.dtype == torch.bfloat16 for a, b in seen)
    seen.clear()
    monkeypatch.setattr(fast_gpu.Halves, "begin", lambda *_: None)
    made.base_model._forward_pre_hooks.clear()
    without = gradients(made)
    assert seen == [None] * len(layers(made))
    for one, other in zip(with_copies, without, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_factors_that_were_changed_meanwhile_are_cast_anew() -> None:
    made = model()
    before = loss(made).detach()
    for layer in layers(made):
        layer.lora_B["default"].weight.data.zero_()  # leaves no trace in the parameter's version
    after = loss(made).detach()
    assert abs(float(before - after)) > 0.01
    with made.disable_adapter():  # PEFT's code, and so perhaps another kernel for the same product
        torch.testing.assert_close(loss(made).detach(), after, rtol=2e-3, atol=0)


def test_no_copy_stays_behind() -> None:
    made = model()
    loss(made)
    assert not any("halves" in vars(layer) for layer in layers(made))
    with pytest.raises(ValueError, match="input_ids"):
        made(input_ids=None)
    assert not any("halves" in vars(layer) for layer in layers(made))


def test_a_step_on_rows_that_lie_otherwise() -> None:
    """Gradients of the factors lie as the factors do, whatever the input's strides."""
    layer = one_layer(dtype=torch.bfloat16)
    x = torch.randn(3, 12, 4).bfloat16().transpose(1, 2).requires_grad_()
    layer(x).sum().backward()
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        assert factor.grad.is_contiguous() and factor.grad.dtype == factor.dtype
