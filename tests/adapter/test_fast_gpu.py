"""The adapted layer as GPUs get it: all that holds of the one for CPUs, and the copies that a model makes at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
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
from torch import nn

from conftest import tiny_model
from trivet import attach
from trivet.adapter import fast_gpu
from trivet.adapter.fast import FastLinear, make_fast

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

    def noted(x: torch.Tensor, given: Any, halves: Any, *rest: Any) -> Any:
        seen.extend(halves)
        return adapted(x, given, halves, *rest)

    monkeypatch.setattr(fast_gpu, "adapted", noted)
    with_copies = gradients(made)
    assert len(seen) == len(layers(made)) and all(a.dtype == b.dtype == torch.bfloat16 for a, b in seen)
    seen.clear()
    monkeypatch.setattr(fast_gpu.Halves, "begin", lambda *_: None)
    made.base_model._forward_pre_hooks.clear()
    without = gradients(made)
    assert seen == [None] * len(layers(made))
    for one, other in zip(with_copies, without, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


# -- layers that read the same tensor ----------------------------------------------------------------------


def groups(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers are computed at a time in a pass of the whole model, once it is known which."""
    found, adapted = [], fast_gpu.adapted
    loss(made)
    monkeypatch.setattr(
        fast_gpu, "adapted", lambda x, given, *rest: found.append(len(given)) or adapted(x, given, *rest)
    )
    loss(made)
    monkeypatch.setattr(fast_gpu, "adapted", adapted)
    return found


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama", [3, 1, 2, 1] * 2),  # q, k and v; o; gate and up; down
        ("gpt2", [1] * 8),  # one layer for all three
        (
            "bart",
            [3, 1, 1, 1] * 2 + [3, 1, 1, 2, 1, 1, 1] * 2,
        ),  # across: q reads the decoder's states, k and v the encoder's
    ],
)
def test_which_layers_are_computed_together(kind: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = attach(tiny_model(kind, 64).to(DEVICE), lora_rank=4).train()
    assert groups(made, monkeypatch) == wanted


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_together_as_alone(kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = attach(tiny_model(kind, 64).to(DEVICE), lora_rank=4).eval()
    moved(made)
    made.enable_input_require_grads()
    if checkpointing:
        made.train()
        for dropout in (m for m in made.modules() if isinstance(getattr(m, "dropout", None), float)):
            dropout.dropout = 0.0
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss(made)
    together = gradients(made)
    for layer in layers(made):
        vars(layer).pop("siblings", None)
    for ours, theirs in zip(together, gradients(made), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_together_in_inference_mode() -> None:
    made = attach(tiny_model("llama", 64).to(DEVICE), lora_rank=4).eval()
    moved(made)
    with torch.inference_mode():
        first, together = loss(made), loss(made)
    assert all(layer.siblings.following for layer in layers(made))
    torch.testing.assert_close(first, together, rtol=1e-5, atol=0)


class Two(nn.Module):
    """Two layers, of which the second may read something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.apart = self.first_alone = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return y if self.first_alone else y + self.second(x + 1 if self.apart else x)


@pytest.mark.parametrize("change", ["apart", "first_alone", "in place"])
def test_a_pass_that_goes_otherwise(change: str) -> None:
    torch.manual_seed(0)
    two = Two().to(DEVICE)
    made = get_peft_model(two, LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    make_fast(made)
    x = torch.randn(5, 8, device=DEVICE)
    for _ in range(2):
        made.base_model(x)
    siblings = layers(made)[0].siblings
    assert siblings.following == {two.first: [two.second]}

    def after(*_: Any) -> None:
        x.add_(1)

    if change == "in place":
        two.first.register_forward_hook(after)
    else:
        setattr(two, change, True)
    for _ in range(3):
        found, given = made.base_model(x), x.clone()
        if change == "in place":
            x.sub_(1)
            wanted = lora.Linear.forward(two.first, given - 1) + lora.Linear.forward(two.second, given)
        else:
            wanted = lora.Linear.forward(two.first, given)
            if change == "apart":
                wanted = wanted + lora.Linear.forward(two.second, given + 1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not siblings.following


# -- copies ------------------------------------------------------------------------------------------------


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
