"""The fused adapted layer: PEFT's own forward pass, for every form of factors, and PEFT itself wherever it must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import tiny_model
from trivet import attach
from trivet.adapter.fast import FastLinear, make_fast
from trivet.adapter.layers import AdaptedLayer, adapted_layers

FUSED = "_AdaptedLinearBackward"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_layer(
    features: int = 12, out: int = 10, bias: bool = True, dtype: torch.dtype = torch.float32, conv: bool = False,
    **config: Any,
) -> FastLinear:  # fmt: skip
    """A layer with a random adapter of rank 4, with factors in float32."""
    torch.manual_seed(0)
    base = Conv1D(out, features) if conv else nn.Linear(features, out, bias=bias)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "fan_in_fan_out": conv} | config
    model = get_peft_model(nn.Sequential(base).to(dtype), LoraConfig(**options))
    make_fast(model)
    layer = model.base_model.model[0]
    assert type(layer) is FastLinear
    for name in layer.lora_B:
        nn.init.normal_(layer.lora_B[name].weight, std=0.3)
    if conv:
        nn.init.normal_(layer.get_base_layer().bias)
    return layer


def results(forward: Callable[..., torch.Tensor], x: torch.Tensor, trained: list[Any]) -> list[torch.Tensor]:
    """(output, gradient in x, gradients in what is trained) for a fixed gradient of the output."""
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], draw(*y.shape, seed=9, dtype=y.dtype))]


def pefts(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: lora.Linear.forward(layer, x)


def factors(layer: Any, name: str = "default") -> list[Any]:
    return [layer.lora_A[name].weight, layer.lora_B[name].weight]


def agree(layer: Any, x: torch.Tensor, trained: list[Any]) -> None:
    found, wanted = results(layer, x, trained), results(pefts(layer), x, trained)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -- the same as PEFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 2, 3, 12), (0, 12)])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"conv": True}, {"use_rslora": True}])
def test_output_and_gradients(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer, x = one_layer(**settings), draw(*shape, seed=1).requires_grad_()
    assert layer(x).grad_fn.name() == FUSED
    agree(layer, x, factors(layer))


def test_an_input_that_is_a_view_and_one_that_wants_no_gradient() -> None:
    layer = one_layer()
    agree(layer, draw(3, 12, 4, seed=1).transpose(1, 2).requires_grad_(), factors(layer))
    x, (a, b) = draw(5, 12, seed=1), factors(layer)
    for ours, theirs in zip(torch.autograd.grad(layer(x).sum(), [a, b]),
                            torch.autograd.grad(pefts(layer)(x).sum(), [a, b]), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_factor_that_is_not_trained(frozen: int) -> None:
    layer = one_layer()
    pair = factors(layer)
    pair[frozen].requires_grad_(False)
    agree(layer, draw(5, 12, seed=1).requires_grad_(), [pair[1 - frozen]])


@pytest.mark.parametrize("rows", [3, 2000])  # small results are torch's tensors, large ones the heap's
def test_the_output_may_be_changed_in_place(rows: int) -> None:
    """As Longformer's and LED's attention does."""
    layer, x = one_layer(), (draw(2, rows, 12, seed=1) / rows).requires_grad_()
    assert layer(x).nbytes < 2**18 or rows == 2000

    def changed(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: forward(x).mul_(2).add_(1)

    found = results(changed(layer), x, factors(layer))
    for ours, theirs in zip(found, results(changed(pefts(layer)), x, factors(layer)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": ids, "labels": ids}]


def moved(model: Any) -> list[AdaptedLayer]:
    """The adapted layers after a random step of all that is trained, so that no factor is zero."""
    torch.manual_seed(5)
    layers = adapted_layers(model)
    for parameter in {id(p): p for layer in layers for p in layer.trained()}.values():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return layers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("method", ["lora", "lora_fa", "lora_xs", "pissa", "curlora", "tcurlora"])
def test_every_form_of_factors(kind: str, method: str) -> None:
    model = attach(tiny_model(kind, 64), lora_rank=4, method=method, batches=batches())
    layers = moved(model)
    assert {layer.form for layer in layers} <= {"plain", "core", "tensor-core", "offset"}
    for layer in layers:
        assert type(layer.module) is FastLinear
        x = draw(3, 5, layer.shape[1], seed=1).requires_grad_()
        trained = layer.trained()
        assert trained and layer.module(x).grad_fn.name() == FUSED
        agree(layer.module, x, trained)


def test_the_forms_that_were_tried_are_all_there_are() -> None:
    found = set()
    for method in ("lora", "lora_xs", "pissa", "tcurlora"):
        model = attach(tiny_model("llama", 64), lora_rank=4, method=method, batches=batches())
        found |= {layer.form for layer in adapted_layers(model)}
    assert found == {"plain", "core", "offset", "tensor-core"}


@pytest.mark.parametrize("conv", [False, True])
def test_the_error_of_16_bits_is_pefts_and_half_a_unit_in_the_last_place(conv: bool) -> None:
    """PEFT computes the adapter in float32 and rounds once; here A, B, A x and gᵀ B are rounded on the way.

    x and g come in 16 bits either way. Found: errors 1.1 to 1.3 times PEFT's in y and the gradient in x, 1.7 to 1.9
    times in A and B (0.0034 to 0.0018), that is, up to half a unit in the last place (2^-9) more.
    """
    layer = one_layer(256, 192, dtype=torch.bfloat16, conv=conv)
    x = draw(300, 256, seed=1, dtype=torch.bfloat16).requires_grad_()
    wide = copy.deepcopy(layer).double()
    exact = results(pefts(wide), x.detach().double().requires_grad_(), factors(wide))
    found, theirs = results(layer, x, factors(layer)), results(pefts(layer), x, factors(layer))
    for ours, other, w, dtype in zip(found, theirs, exact, [torch.bfloat16] * 2 + [torch.float32] * 2, strict=True):
        assert ours.dtype == other.dtype == dtype
        error, their_error = (float((t.double() - w).norm() / w.norm()) for t in (ours, other))
        assert error <= their_error + 2**-9


# -- dropout -----------------------------------------------------------------------------------------------


def mask_of(seed: int, rows: int, p: float) -> torch.Tensor:
    """1 where an entry is kept, told by a layer that shows it: x of ones, W = 0, B A the identity."""
    layer = one_layer(6, 6, bias=False, r=6, lora_alpha=6, lora_dropout=p)
    layer.get_base_layer().weight.data.zero_()
    for factor in factors(layer):
        factor.data.copy_(torch.eye(6))
    torch.manual_seed(seed)
    return (layer(torch.ones(rows, 6)).detach() * (1 - p)).round()


def test_dropout_is_that_of_one_mask_forward_and_backward() -> None:
    layer, p = one_layer(6, 10, lora_dropout=0.3), 0.3
    x, mask = draw(40, 6, seed=1).requires_grad_(), mask_of(7, 40, p)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    base, (a, b) = layer.get_base_layer(), factors(layer)

    def written_out(x: torch.Tensor) -> torch.Tensor:
        return base(x) + 1.5 * (x * mask / (1 - p)) @ a.T @ b.T

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return layer(x)

    assert seeded(x).grad_fn.name() == FUSED
    for ours, theirs in zip(results(seeded, x, [a, b]), results(written_out, x, [a, b]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_follows_torchs_seed_and_drops_its_share() -> None:
    assert torch.equal(mask_of(1, 50, 0.5), mask_of(1, 50, 0.5))
    assert not torch.equal(mask_of(1, 50, 0.5), mask_of(2, 50, 0.5))
    assert 1 - mask_of(3, 5000, 0.2).mean().item() == pytest.approx(0.2, abs=0.01)


def test_dropout_is_for_training_alone() -> None:
    layer, x = one_layer(lora_dropout=0.5), draw(5, 12, seed=1)
    before = torch.get_rng_state()
    torch.testing.assert_close(layer.eval()(x), pefts(layer)(x), rtol=1e-5, atol=1e-5)
    one_without = one_layer()
    before = torch.get_rng_state()
    one_without(x)
    assert torch.equal(torch.get_rng_state(), before)  # nor is anything drawn where p = 0


# -- where PEFT's own pass is taken ------------------------------------------------------------------------


def second_adapter(layer: FastLinear) -> FastLinear:
    layer.update_layer("other", 3, lora_alpha=6, config=LoraConfig(r=3, lora_alpha=6))
    nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    return layer


def both(layer: FastLinear) -> None:
    second_adapter(layer).set_adapter(["default", "other"])


def none_of_them(layer: FastLinear) -> None:
    layer._active_adapter = ["absent"]


def doubled(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def halved(module: nn.Module, inputs: Any) -> torch.Tensor:
    return inputs[0] / 2


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "disabled": ({}, lambda layer: layer.enable_adapters(False)),
    "merged": ({}, lambda layer: layer.merge()),
    "two adapters": ({}, both),
    "no active adapter": ({}, none_of_them),
    "DoRA": ({"use_dora": True}, lambda layer: None),
    "LoRA with a bias": ({"lora_bias": True}, lambda layer: layer.lora_B["default"].bias.data.normal_()),
    "a trained base weight": ({}, lambda layer: layer.get_base_layer().weight.requires_grad_()),
    "a trained base bias": ({}, lambda layer: layer.get_base_layer().bias.requires_grad_()),
    "a hook on the base layer": ({}, lambda layer: layer.get_base_layer().register_forward_hook(doubled)),
    "a hook before the base layer": ({}, lambda layer: layer.get_base_layer().register_forward_pre_hook(halved)),
    "another forward pass": ({}, lambda layer: setattr(layer.get_base_layer(), "forward", lambda x: x[..., :10])),
}


@pytest.mark.parametrize("case", CASES)
def test_pefts_own_pass(case: str) -> None:
    config, change = CASES[case]
    layer = one_layer(**config)
    change(layer)
    x = draw(5, 12, seed=1).requires_grad_()
    y = layer(x)
    assert y.grad_fn.name() != FUSED
    trained = [p for p in layer.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(f(x).sum(), [x, *trained], allow_unused=True) for f in (layer, pefts(layer)))
    assert torch.equal(y, pefts(layer)(x))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))


def test_pefts_own_pass_under_autocast() -> None:
    layer, x = one_layer(), draw(5, 12, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and y.grad_fn.name() != FUSED
        assert torch.equal(y, pefts(layer)(x))


def test_the_fused_pass_under_an_autocast_to_the_models_own_type() -> None:
    layer, x = one_layer().to(torch.bfloat16), draw(5, 12, seed=1).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.grad_fn.name() == FUSED
    assert torch.equal(y, layer(x))


def test_pefts_own_pass_for_a_batch_of_several_adapters() -> None:
    layer = second_adapter(one_layer()).eval()
    x, names = draw(4, 12, seed=1), ["default", "other", "__base__", "other"]
    expected = lora.Linear.forward(layer, x, adapter_names=names)
    assert torch.equal(layer(x, adapter_names=names), expected)
    assert not torch.equal(expected[2], expected[3])


def test_one_of_two_adapters_is_the_one_that_is_on() -> None:
    layer, x = second_adapter(one_layer()), draw(5, 12, seed=1).requires_grad_()
    layer.set_adapter(["other"])
    assert layer(x).grad_fn.name() == FUSED
    agree(layer, x, factors(layer, "other"))


def test_only_plain_layers_are_changed() -> None:
    model = get_peft_model(tiny_model("llama", 64), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    make_fast(model)
    types = {type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)}
    assert types == {FastLinear, lora.Embedding}


# -- a whole model -----------------------------------------------------------------------------------------


def trained_model(kind: str = "llama") -> Any:
    model = attach(tiny_model(kind, 64), lora_rank=4)
    moved(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batches()[0]["input_ids"]).logits


def test_a_deep_copy_is_independent_and_computes_the_same() -> None:
    model = trained_model()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), before)
    assert not logits(twin).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging(kind: str) -> None:
    model = trained_model(kind)
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, lora.LoraLayer) for m in merged.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_peft_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = trained_model(kind)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(kind, 64), tmp_path)
    assert not any(isinstance(m, FastLinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = attach(tiny_model("llama", 64), lora_rank=4, lora_dropout=dropout)
        layers = moved(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.get_base_model().model.layers[0].gradient_checkpointing
        torch.manual_seed(8)
        model(**batches()[0]).loss.backward()
        return [p.grad for layer in layers for p in layer.trained()]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert float(theirs.norm()) > 0
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
