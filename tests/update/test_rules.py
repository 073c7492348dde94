"""What every rule owes: it learns, it comes back from a checkpoint, it takes schedules, cores, resizing and decay."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from update_toys import RULES, Toy, product

from conftest import CORPUS, bpe_tokenizer, tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import Change, adapted_layers
from trivet.adapter.plan import optimizer as make_optimizer
from trivet.adapter.resize import resize
from trivet.errors import ConfigError
from trivet.methods import find_method
from trivet.update.chain import rank_step

each_rule = pytest.mark.parametrize("rule", RULES)


@each_rule
@pytest.mark.parametrize("cores", [False, True])
def test_state_comes_back_bit_for_bit(rule: str, cores: bool) -> None:
    straight = Toy(cores=cores)
    straight.train(straight.optimizer(rule), 10)

    first = Toy(cores=cores)
    optimizer = first.optimizer(rule)
    first.train(optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": first.trained(), "optimizer": optimizer.state_dict(), "draw": first.draw.get_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = Toy(cores=cores)
    restored = second.optimizer(rule)
    second.model.load_state_dict(saved["model"], strict=False)
    restored.load_state_dict(saved["optimizer"])
    second.draw.set_state(saved["draw"])
    second.train(restored, 5)
    wanted, found = straight.trained(), second.trained()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@each_rule
def test_a_low_rank_regression_is_learned(rule: str) -> None:
    toy = Toy()
    losses = toy.train(toy.optimizer(rule, learning_rate=1e-2, weight_decay=0.0), 400)
    assert losses[-1] < losses[0] * (0.3 if rule == "frozen_a" else 0.02)


@each_rule
def test_cores_are_learned_about_as_by_adamw(rule: str) -> None:
    def fall(name: str) -> float:
        toy = Toy(cores=True)
        optimizer = find_method({"update": name}).part("update")(toy.layers, [], learning_rate=3e-2)
        losses = toy.train(optimizer, 200)
        return sum(losses[:5]) / 5 - sum(losses[-40:]) / 40

    plain = fall("adamw")
    assert plain > 0.5
    if rule in ("lora_plus", "frozen_a", "equivariant"):  # cores are AdamW's there
        assert fall(rule) == plain
    else:
        assert fall(rule) > 0.8 * plain


@each_rule
def test_a_shared_core_is_adamw_s(rule: str) -> None:
    def trained(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(r=4, target_modules=["0", "1"])
        )
        layers, core = adapted_layers(model), nn.Parameter(torch.zeros(2, 2, 2))
        left, right = torch.randn(6, 4), torch.randn(4, 6)
        for index, layer in enumerate(layers):
            layer.share_core(left, right, core, index)
        optimizer = rank_step(
            find_method({"update": name}).part("update")(layers, [], learning_rate=1e-2), layers, reference=3
        )
        for _ in range(3):
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 8
        assert core.abs().min() > 0.0
        return core.detach()

    assert torch.equal(trained(rule), trained("adamw"))


@each_rule
def test_training_goes_on_after_a_change_of_rank(rule: str) -> None:
    toy = Toy(dtype=torch.float64)
    optimizer = toy.optimizer(rule, weight_decay=0.0)
    toy.train(optimizer, 5)
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    resize(toy.model, {"0": Change(basis[:, :2], basis[:, :2])}, optimizer)
    losses = toy.train(optimizer, 300)
    assert toy.layers[0].rank == 2 and losses[-1] < 0.5 * losses[0]
    resize(toy.model, {"1": Change(basis[:, :0], basis[:, :0])}, optimizer)
    toy.train(optimizer, 5)
    assert math.isfinite(toy.loss().item())


def test_equivariant_training_does_not_notice_a_change_of_basis() -> None:
    """Moments are transported as the factors are, so that turning them in mid-training changes nothing."""
    straight, turned = Toy(dtype=torch.float64), Toy(dtype=torch.float64)
    one, two = (toy.optimizer("equivariant") for toy in (straight, turned))
    straight.train(one, 20)
    turned.train(two, 10)
    torch.manual_seed(3)
    left = torch.randn(4, 4, dtype=torch.float64)
    resize(turned.model, {"0": Change(left, torch.linalg.inv(left).T)}, two)
    turned.train(two, 10)
    for layer, other in zip(straight.layers, turned.layers, strict=True):
        torch.testing.assert_close(product(layer), product(other), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(straight.layers[0].A, turned.layers[0].A)


@each_rule
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_a_tiny_language_model_learns(rule: str, rate: float) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_model("llama", len(tokenizer), initializer_range=0.3)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = find_method({"update": rule}).part("update")(adapted_layers(model), [], learning_rate=rate)
    ids = torch.tensor([tokenizer(text)["input_ids"][:16] for text in CORPUS])
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    steepest = max(later - earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - (0.3 if rule == "muon" else 1.0) * rate / 1e-3 * 0.5
    assert steepest < 0.2  # it goes down without jumps


@each_rule
def test_zero_gradients_leave_everything_where_it_is(rule: str) -> None:
    """Right at the start A's gradient is 0: nothing is divided by 0."""
    toy = Toy()
    optimizer = toy.optimizer(rule, weight_decay=0.0)
    before = toy.trained()
    for p in toy.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in toy.trained().items())


@each_rule
def test_decay_is_decoupled_and_spares_vectors(rule: str) -> None:
    toy = Toy(b=1.0)
    optimizer = toy.optimizer(rule, weight_decay=0.5, learning_rate=0.1)
    before = toy.trained()
    for p in toy.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in toy.trained().items():
        rate = 0.1 * 16 if rule == "lora_plus" and "lora_B" in name else 0.1
        torch.testing.assert_close(p, before[name] * (1 if p.ndim == 1 else 1 - rate * 0.5))


@each_rule
def test_schedules_reach_every_group(rule: str) -> None:
    toy = Toy()
    optimizer = toy.optimizer(rule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    toy.train(optimizer, 1)
    schedule.step()
    before = toy.trained()
    toy.train(optimizer, 2)
    assert all(torch.equal(before[name], p) for name, p in toy.trained().items())


@each_rule
def test_layers_without_gradient_or_rank_are_left_alone(rule: str) -> None:
    toy = Toy()
    optimizer = toy.optimizer(rule)
    toy.train(optimizer, 2)
    gone, kept = toy.layers
    a, b = gone.A.detach().clone(), gone.B.detach().clone()
    toy.backward()
    gone.A.grad = gone.B.grad = None
    optimizer.step()
    assert torch.equal(gone.A, a) and torch.equal(gone.B, b)
    gone.A.data, gone.B.data = a[:0], b[:, :0]
    for factor in (gone.A, gone.B):
        for key, value in optimizer.state.get(factor, {}).items():
            if value.ndim == 2:
                optimizer.state[factor][key] = value[:0, :0] if key == "gram" else torch.zeros_like(factor)
    before = kept.B.detach().clone()
    toy.train(optimizer, 2)
    assert math.isfinite(toy.loss().item()) and not torch.equal(kept.B, before)


@each_rule
def test_a_lost_gradient_shows_in_the_parameters_not_as_an_error(rule: str) -> None:
    """Training's own check of the loss reports it."""
    toy = Toy()
    optimizer = toy.optimizer(rule)
    toy.backward()
    grad = toy.layers[0].B.grad
    assert grad is not None
    grad.fill_(torch.nan)
    optimizer.step()
    assert not torch.isfinite(toy.layers[0].B).any()


def sizes(state: Any) -> set[str]:
    return {key for values in state.values() for key in values}


def test_what_is_remembered_has_names_that_resizing_knows() -> None:
    known = {"step", "exp_avg", "exp_avg_sq", "gram", "momentum_buffer"}
    for rule in RULES:
        toy = Toy()
        optimizer = toy.optimizer(rule)
        toy.train(optimizer, 2)
        for p, values in optimizer.state.items():
            for key, value in values.items():
                assert key in known
                rank = min(p.shape)
                shape = {"step": (), "gram": (rank, rank)}.get(key, tuple(p.shape))
                assert tuple(value.shape) == shape
        assert sizes(optimizer.state) <= known


@each_rule
def test_a_head_learns_at_its_own_rate(rule: str) -> None:
    ids, labels = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])

    def after_a_step(**rates: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        base = hf.BertForSequenceClassification(tiny_model("bert", 64, num_labels=3).config).eval()
        model = attach(base, lora_rank=4, method={"update": rule})
        made = make_optimizer(model, weight_decay=0.0, **rates)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        model(input_ids=ids, labels=labels).loss.backward()
        made.step()
        moved = {name: p.detach() - before[name] for name, p in trained.items()}
        heads = {name: d for name, d in moved.items() if "classifier" in name}
        return heads, {name: d for name, d in moved.items() if name not in heads}

    heads, rest = after_a_step(learning_rate=1e-3, head_learning_rate=0.25)
    _, alone = after_a_step(learning_rate=1e-3)
    assert len(heads) == 2 and all(float(d.abs().max()) == pytest.approx(0.25, rel=1e-3) for d in heads.values())
    assert all(torch.equal(d, alone[name]) for name, d in rest.items())


def test_a_heads_rate_without_a_head_is_refused() -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4)
    with pytest.raises(ConfigError, match="head_learning_rate is 0.1, but this model has no head"):
        make_optimizer(model, learning_rate=1e-3, head_learning_rate=0.1)
