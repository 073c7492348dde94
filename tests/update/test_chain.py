"""Chained transforms, the rank-aware step, and several optimizers as one."""

from __future__ import annotations

import math

import pytest
import torch
from update_toys import Toy

from trivet.update.adamw import adamw, trained
from trivet.update.chain import Joint, chain, rank_step


def test_transforms_run_in_order_before_every_step() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=1.0)

    def double(_: torch.optim.Optimizer) -> None:
        assert p.grad is not None
        p.grad.mul_(2)

    def add(_: torch.optim.Optimizer) -> None:
        assert p.grad is not None
        p.grad.add_(1)

    assert chain(optimizer, double, add) is optimizer
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -6.0))
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("cores", [False, True])
def test_a_step_is_scaled_as_by_a_learning_rate(rule: str, rank: int, cores: bool) -> None:
    scaled, plain = Toy(rank=rank, cores=cores), Toy(rank=rank, cores=cores)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule]
    one = kind([*trained(scaled.layers), *(p for _, p in scaled.rest)], lr=0.01, weight_decay=0.1)
    two = kind(
        [{"params": trained(plain.layers), "lr": 0.01 * math.sqrt(8 / rank)}, {"params": [p for _, p in plain.rest]}],
        lr=0.01,
        weight_decay=0.1,
    )
    assert rank_step(one, scaled.layers) is one
    scaled.train(one, 4)
    plain.train(two, 4)
    for name, p in plain.trained().items():
        torch.testing.assert_close(scaled.trained()[name], p, rtol=1e-5, atol=1e-6)


def test_rank_8_is_left_as_it_is() -> None:
    scaled, plain = Toy(rank=8), Toy(rank=8)
    scaled.train(rank_step(scaled.optimizer("adamw"), scaled.layers), 4)
    plain.train(plain.optimizer("adamw"), 4)
    assert all(torch.equal(p, scaled.trained()[name]) for name, p in plain.trained().items())


def test_ranks_are_read_at_the_step() -> None:
    toy = Toy(rank=8)
    optimizer = rank_step(torch.optim.SGD(trained(toy.layers), lr=0.1), toy.layers)
    layer = toy.layers[0]
    layer.A.data, layer.B.data = layer.A.data[:2], layer.B.data[:, :2].contiguous()
    toy.backward()
    assert layer.B.grad is not None
    wanted = layer.B.detach() - 0.1 * 2 * layer.B.grad
    optimizer.step()
    torch.testing.assert_close(layer.B.detach(), wanted)


def test_joint_optimizers_step_as_each_alone() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    whole = Joint(torch.optim.SGD([ours[0]], lr=0.1), torch.optim.AdamW([ours[1]], lr=0.2))
    parts = (torch.optim.SGD([theirs[0]], lr=0.1), torch.optim.AdamW([theirs[1]], lr=0.2))
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(3, 2)
            q.grad = p.grad.clone()
        whole.step()
        for part in parts:
            part.step()
        if step == 1:  # as accelerate does: groups and state are replaced by copies
            whole.load_state_dict(whole.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert [group["lr"] for group in whole.param_groups] == [0.1, 0.2]
    with pytest.raises(TypeError, match="closure"):
        whole.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("parameter_turned", [False, True])
def test_adamw_whatever_the_layout(parameter_turned: bool) -> None:
    """torch's fused kernel pairs numbers by their place in memory, without a look at strides."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator).T
    start = start if parameter_turned else start.contiguous()
    ours, theirs = (torch.nn.Parameter(start.clone(memory_format=torch.preserve_format)) for _ in range(2))
    assert ours.is_contiguous() is not parameter_turned
    steps = [adamw([{"params": [ours], "weight_decay": 0.1}], 0.1), torch.optim.AdamW([theirs], 0.1, weight_decay=0.1)]
    for turned in (False, True, True):
        gradient = torch.randn(6, 4, generator=generator)
        for p in (ours, theirs):
            p.grad = gradient.T.contiguous().T if turned else gradient.clone()
        for step in steps:
            step.step()
    torch.testing.assert_close(ours, theirs)
