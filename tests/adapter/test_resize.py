"""Changing ranks: factors, optimizer state and PEFT's config change together and say the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from conftest import tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import AdaptedLayer, Change, adapted_layers
from trivet.adapter.plan import optimizer
from trivet.adapter.resize import match, resize, set_ranks, tried
from trivet.adapter.save import export, save_adapter

PROBE = {"input_ids": torch.arange(2, 26).reshape(2, 12)}


def adapted(kind: str = "llama", rank: int = 6, **options: Any) -> PeftModel:
    """A tiny adapted model whose update is not zero."""
    model = attach(tiny_model(kind, 64), lora_rank=rank, **options)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model):
        for p in layer.trained():
            with torch.no_grad():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**PROBE).logits


def step(model: PeftModel, made: torch.optim.Optimizer) -> None:
    model.train()
    made.zero_grad()
    model(**PROBE, labels=PROBE["input_ids"]).loss.backward()
    made.step()


def gauge(layer: AdaptedLayer, seed: int = 0) -> Change:
    """A random invertible change of basis that leaves B A as it is."""
    r = layer.factors()[0].shape[0]
    left = torch.eye(r, dtype=torch.float64) + 0.2 * torch.randn(
        r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Change(left, torch.linalg.inv(left).T)


def first(layer: AdaptedLayer, k: int) -> Change:
    pick = torch.eye(layer.factors()[0].shape[0], dtype=torch.float64)[:, :k]
    return Change(pick, pick)


@pytest.mark.parametrize("decompose", ["zero", "principal", "core", "cur"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_change_of_basis_leaves_the_outputs(kind: str, decompose: str) -> None:
    model = adapted(kind, method={"decompose": decompose})
    before = logits(model)
    resize(model, {layer.name: gauge(layer) for layer in adapted_layers(model)})
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_new_directions_leave_the_outputs() -> None:
    model = adapted()
    before = logits(model)
    layers = adapted_layers(model)
    same = torch.eye(6, dtype=torch.float64)
    resize(model, {x.name: Change(same, same, torch.randn(2, x.shape[1])) for x in layers})
    assert {layer.rank for layer in layers} == {8}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_layers_are_views_that_follow() -> None:
    model = adapted()
    layers = adapted_layers(model)
    parameters = [layer.A for layer in layers]
    resize(model, {layer.name: first(layer, 2) for layer in layers})
    assert [layer.rank for layer in layers] == [2] * len(layers)
    assert all(layer.A is p for layer, p in zip(layers, parameters, strict=True))  # the optimizer's Parameter


@pytest.mark.parametrize("update", ["adamw", "lora_plus", "preconditioned", "frozen_a", "pro", "muon", "equivariant"])
def test_training_goes_on_and_the_optimizer_shrinks(update: str) -> None:
    model = adapted(method={"update": update})
    made = optimizer(model, learning_rate=1e-3)
    for _ in range(2):
        step(model, made)
    held = state_size(made)
    layers = adapted_layers(model)
    gone, kept = layers[0], layers[1:]
    resize(model, {gone.name: first(gone, 0)} | {x.name: first(x, 1 + i % 3) for i, x in enumerate(kept)}, made)
    assert state_size(made) < 0.45 * held
    for group in made.param_groups:
        for p in group["params"]:
            assert p.grad is None
            for key, value in made.state[p].items():
                if isinstance(value, torch.Tensor) and value.ndim == 2 and not key.endswith("gram"):
                    assert value.shape == p.shape, key
    before = [layer.B.detach().clone() for layer in kept]
    step(model, made)
    assert all(not torch.equal(b, layer.B) for b, layer in zip(before, kept, strict=True))
    assert gone.name not in {layer.name for layer in adapted_layers(model)}


def state_size(made: torch.optim.Optimizer) -> int:
    return sum(v.numel() for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_moments_are_carried_like_gradients() -> None:
    """The first moment exactly: carried over, it is the average of the gradients as they would have been."""
    model = adapted().double()  # in float32 small gradients differ by the rounding of what they are the sums of
    other = copy.deepcopy(model)
    made = [torch.optim.Adam([p for x in adapted_layers(m) for p in (x.A, x.B)], lr=0.0) for m in (model, other)]
    changes = {layer.name: gauge(layer) for layer in adapted_layers(model)}
    step(model, made[0])
    resize(model, changes, made[0])
    resize(other, changes)
    step(other, made[1])
    for ours, theirs in zip(adapted_layers(model), adapted_layers(other), strict=True):
        for p, q in ((ours.A, theirs.A), (ours.B, theirs.B)):
            torch.testing.assert_close(made[0].state[p]["exp_avg"], made[1].state[q]["exp_avg"], rtol=1e-4, atol=1e-12)
            assert (made[0].state[p]["exp_avg_sq"] >= 0).all()


def test_a_selection_of_directions_selects_both_moments() -> None:
    model = adapted()
    made = optimizer(model, learning_rate=1e-3)
    step(model, made)
    layer = adapted_layers(model)[0]
    old = {side: dict(made.state[p]) for side, p in (("A", layer.A), ("B", layer.B))}
    pick = torch.eye(6, dtype=torch.float64)[:, [4, 1]]
    resize(model, {layer.name: Change(pick, pick)}, made)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(made.state[layer.A][key], old["A"][key][[4, 1]])
        assert torch.equal(made.state[layer.B][key], old["B"][key][:, [4, 1]])


def test_a_gram_is_carried_on_both_sides() -> None:
    model = adapted()
    layer = adapted_layers(model)[0]
    made = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    grads = {"A": torch.randn(layer.A.shape), "B": torch.randn(layer.B.shape)}
    made.state[layer.A]["gram"] = grads["A"] @ grads["A"].T
    made.state[layer.B]["gram"] = grads["B"].T @ grads["B"]
    change = gauge(layer)
    resize(model, {layer.name: change}, made)
    a, b = change.left.float().T @ grads["A"], grads["B"] @ change.right.float()
    torch.testing.assert_close(made.state[layer.A]["gram"], a @ a.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.state[layer.B]["gram"], b.T @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("decompose", ["zero", "principal", "core", "cur", "tensor_cur"])
def test_what_is_saved_loads_in_plain_peft(tmp_path: Path, decompose: str, form: str) -> None:
    base = tiny_model("llama", 64)
    model = adapted(method={"decompose": decompose})
    if decompose != "tensor_cur":
        layers = adapted_layers(model)
        resize(model, {x.name: first(x, i % 4) for i, x in enumerate(layers)})  # every 4th leaves
    export(model, tmp_path / "adapter", form, PROBE)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    if decompose != "tensor_cur":
        count = len(adapted_layers(again))
        assert count == (14 if form == "portable" else 10)  # the departed ones come back as zeros
        keys = get_peft_model_state_dict(again)
        ranks = {v.shape[0] for k, v in keys.items() if "lora_A" in k}
        assert ranks == ({3} if form == "portable" else {1, 2, 3})


def test_scales_stay_whatever_the_rank(tmp_path: Path) -> None:
    model = adapted(lora_alpha=9.0)
    layers = adapted_layers(model)
    resize(model, {x.name: first(x, 1 + i % 5) for i, x in enumerate(layers)})
    save_adapter(model, tmp_path / "adapter", PROBE)
    again = PeftModel.from_pretrained(tiny_model("llama", 64), str(tmp_path / "adapter"))
    assert {layer.scale for layer in adapted_layers(again)} == {1.5}
    assert [x.rank for x in adapted_layers(again)] == [x.rank for x in layers]
    assert len(again.peft_config["default"].rank_pattern) <= 4  # layers of equal rank share a pattern


def test_merging_after_a_resize() -> None:
    model = adapted()
    resize(model, {x.name: first(x, i % 4) for i, x in enumerate(adapted_layers(model))})
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_a_trial_is_taken_back() -> None:
    for decompose in ("zero", "core", "principal"):
        model = adapted(method={"decompose": decompose})
        before = logits(model)
        layers = adapted_layers(model)
        changes = {x.name: first(x, i % 3) for i, x in enumerate(layers)}
        with pytest.raises(KeyError), tried(layers, changes):
            during = logits(model)
            assert not torch.allclose(during, before)
            raise KeyError
        assert torch.equal(logits(model), before)
        copied = copy.deepcopy(model)
        resize(copied, changes)
        torch.testing.assert_close(logits(copied), during, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decompose", ["zero", "principal", "core", "tensor_cur"])
def test_a_fresh_model_takes_the_shapes_of_a_saved_one(decompose: str) -> None:
    model = adapted(method={"decompose": decompose})
    if decompose != "tensor_cur":
        resize(model, {x.name: first(x, i % 4) for i, x in enumerate(adapted_layers(model)[2:])})
    state = get_peft_model_state_dict(model)
    fresh = attach(tiny_model("llama", 64), lora_rank=6, method={"decompose": decompose})
    match(fresh, {key: tuple(value.shape) for key, value in state.items()})
    assert {k: v.shape for k, v in get_peft_model_state_dict(fresh).items()} == {k: v.shape for k, v in state.items()}
    assert [(x.name, x.rank, x.form) for x in adapted_layers(fresh)] == [
        (x.name, x.rank, x.form) for x in adapted_layers(model)
    ]


def test_ranks_are_set_before_the_start() -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4)
    names = [layer.name for layer in adapted_layers(model)]
    set_ranks(model, {names[0]: 0, names[1]: 7})
    assert [layer.rank for layer in adapted_layers(model)] == [7] + [4] * (len(names) - 2)
    assert model.peft_config["default"].r == 4
