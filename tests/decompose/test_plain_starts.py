"""Decompositions with plain factors: zero, orthogonal, gradient, activation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig
from started import Observed, adapted, begin, observe, same_span, token_ids
from torch import nn

from conftest import tiny_model
from trivet.adapter.layers import adapted_layers
from trivet.decompose import gradient
from trivet.decompose.bases import complete


def test_zero_is_pefts_own_start() -> None:
    layer = begin("zero", adapted("llama"), seed=9)[0]
    expected = torch.empty(4, 32)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(9))
    assert torch.equal(layer.A, expected)


@pytest.mark.parametrize("name", ["orthogonal", "gradient", "activation"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_has_the_size_of_zeros(name: str, kind: str) -> None:
    for layer in begin(name, adapted(kind, rank=8)):
        draws = [
            nn.init.kaiming_uniform_(torch.empty(layer.A.shape), a=math.sqrt(5)).square().sum() for _ in range(300)
        ]
        assert layer.A.square().sum().item() == pytest.approx(torch.stack(draws).mean().item(), rel=0.03)


@pytest.mark.parametrize("rank", [4, 40])
def test_orthogonal_rows(rank: int) -> None:
    for layer in begin("orthogonal", adapted("gpt2", rank=rank)):
        a = layer.A.detach()
        gram = a @ a.T if rank <= a.shape[1] else a.T @ a
        torch.testing.assert_close(gram, torch.eye(len(gram)) * rank / 3 / len(gram), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_spans_the_whitened_gradients_directions(kind: str) -> None:
    """Of four tokens, so that four directions are all there are and the sketch is exact."""
    model = adapted(kind)
    seen = {name: Observed(probe.x[:4], probe.g[:4]) for name, probe in observe(model).items()}
    layers = adapted_layers(model)
    statistics = {name: probe.statistics for name, probe in seen.items()}
    gradient.start(layers, torch.Generator(), statistics)
    for layer in layers:
        x, g = (t.double() for t in (seen[layer.name].x, seen[layer.name].g))
        c = x.square().mean(0)
        raw = g.T @ x
        rank = int(torch.linalg.matrix_rank(raw, rtol=1e-4))
        expected = torch.linalg.svd(raw / c.sqrt()).Vh[:rank] / c.sqrt()
        assert rank >= 3, layer.name
        assert same_span(layer.A[:rank], expected) > 1 - 1e-4, layer.name
        assert same_span(layer.A[:rank], torch.linalg.svd(raw).Vh[:rank]) < 0.999, layer.name  # whitening matters


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_lowers_the_loss_more_than_zero(kind: str) -> None:
    """One gradient step of equal length in the whitened norm: the directions are chosen for that."""
    gains = {}
    for name in ("zero", "gradient"):
        model = adapted(kind)
        seen, gain = observe(model), 0.0
        for layer in begin(name, model):
            x, g = seen[layer.name].x, seen[layer.name].g
            c, s = x.square().mean(0), g.square().sum(0)
            whitened = (g.T @ x) / s.sqrt()[:, None] / c.sqrt()
            rows = torch.linalg.qr((layer.A.detach() * c.sqrt()).T).Q
            gain += (whitened @ rows).square().sum().item()
        gains[name] = gain
    assert gains["gradient"] > 2 * gains["zero"]


def test_gradient_fills_up_with_random_orthogonal_rows() -> None:
    model = adapted("llama", rank=8)
    layers = adapted_layers(model)
    probe = observe(model)[layers[0].name]
    two = Observed(probe.x[:2], probe.g[:2])  # two tokens: a gradient of rank 2
    gradient.start(layers[:1], torch.Generator().manual_seed(0), {layers[0].name: two.statistics})
    a = layers[0].A.detach()
    unit = a / a.norm(dim=1, keepdim=True)
    gram = unit @ unit.T
    assert torch.linalg.matrix_rank(a) == 8
    assert gram[:2, 2:].abs().max() < 1e-5
    torch.testing.assert_close(gram[2:, 2:], torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_complete_keeps_the_rows_and_their_size(k: int) -> None:
    rows = 5 * torch.linalg.qr(torch.randn(12, 3)).Q.T[:k]
    full = complete(rows, 6, torch.Generator().manual_seed(0))
    assert torch.equal(full[:k], rows)
    torch.testing.assert_close(full @ full.T, torch.eye(6) * (25.0 if k else 1.0), rtol=0, atol=1e-4)
    assert complete(rows, 20, torch.Generator().manual_seed(0)).shape == (20, 12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_spans_what_pefts_eva_does(kind: str) -> None:
    eva = EvaConfig(rho=1.0, tau=0.999)
    config: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(
            tiny_model(kind, 64), LoraConfig(**config, init_lora_weights="eva", eva_config=eva), low_cpu_mem_usage=True
        )
        batches = [{"input_ids": token_ids()}] * 20
        initialize_lora_eva_weights(theirs.eval(), batches, show_progress_bar=False)
    expected = {layer.name: layer.A for layer in adapted_layers(theirs)}
    model = adapted(kind)
    seen = observe(model)
    mine = begin("activation", model)
    assert {layer.name for layer in mine} == set(expected)
    for layer in mine:
        assert same_span(layer.A, expected[layer.name]) > 0.95, layer.name  # theirs is a randomised, running estimate
        centred = seen[layer.name].x - seen[layer.name].x.mean(0)
        ours, eva_s = (
            (centred @ torch.linalg.qr(a.detach().T).Q).square().sum() for a in (layer.A, expected[layer.name])
        )
        best = torch.linalg.svdvals(centred)[:4].square().sum()
        assert ours > 0.9999 * best and ours > 0.9999 * eva_s, layer.name
        torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(4) / 3, rtol=0, atol=1e-5)
