"""An encoder layer as one function: float64's numbers, and those of its parts one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import whole_layers
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer
from whole_layers import ids_and_mask, leaves_out, reads_a_repeated_number, shows_hidden_states, watched

import trivet.fast_encoder as fast_encoder
from trivet.kernels import compiled

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)
KINDS = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig),
}
VOCABULARY = 96


def model_of(kind: Any = "bert", dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0, **settings: Any) -> Any:
    made, configure = KINDS[kind] if isinstance(kind, str) else kind
    config = configure(
        hidden_size=64,
        embedding_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
        num_labels=3,
        **{"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "pad_token_id": 0} | settings,
    )
    torch.manual_seed(0)
    model = made(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.3)
        elif "LayerNorm" in name:
            nn.init.uniform_(weight, 0.5, 2.0)
    return model.bfloat16().to(dtype)


def adapted(model: Any, **settings: Any) -> Any:
    return whole_layers.adapted(model, "classification", **settings)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each layer's pass was one function."""
    return watched(monkeypatch, fast_encoder)


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_encoder, "_together", lambda *_: None)


def padded(rows: int = 4, length: int = 24) -> dict[str, torch.Tensor]:
    return ids_and_mask(rows, length, VOCABULARY) | {"labels": torch.arange(rows) % 3}


def whole_rows() -> dict[str, torch.Tensor]:
    return padded() | {"attention_mask": torch.ones(4, 24, dtype=torch.long)}


def results(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return whole_layers.results(model, batch, "classification")


def of_layer(layer: Any, x: torch.Tensor, mask: torch.Tensor | None, grad: torch.Tensor) -> list[torch.Tensor]:
    """Its result, and the gradients of x and of what learns."""
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], grad)]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("electra", {}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"hidden_act": "silu"}),
    ],
)
def test_it_is_more_exact_than_part_by_part(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any], padding: bool
) -> None:
    """PEFT's layer and transformers' in float64, of the same 16-bit weights, are exact; of some draws."""
    exact_model = adapted(model_of(kind, torch.float64, **settings), fast=False)
    for part in exact_model.modules():
        part.to(torch.float64)
    exact, layer = (
        getattr(m.get_base_model(), kind).encoder.layer[0] for m in (exact_model, adapted(model_of(kind, **settings)))
    )
    mask = torch.ones(4, 1, 24, 24, dtype=torch.bool)
    mask[1, ..., 12:] = False
    generator, mask = torch.Generator().manual_seed(4), mask if padding else None
    drawn = [[torch.randn(4, 24, 64, generator=generator).bfloat16() for _ in range(2)] for _ in range(12)]
    wanted = [of_layer(exact, x.double(), mask, grad.double()) for x, grad in drawn]

    def errors() -> torch.Tensor:
        """(draws, tensors)"""
        found = [of_layer(layer, x, mask, grad) for x, grad in drawn]
        pairs = [zip(ours, true, strict=True) for ours, true in zip(found, wanted, strict=True)]
        return torch.tensor([[float((one.double() - other).norm() / other.norm()) for one, other in p] for p in pairs])

    together.clear()
    ours = errors()
    assert together == [True] * 12
    in_parts(monkeypatch)
    theirs = errors()
    assert ours.shape == (12, 2 + 2 * 6) and float(ours.max()) < 0.02
    assert float(ours.mean()) < float(theirs.mean())  # what is added to the residual stream is not rounded before
    assert bool((ours.mean(0) < 1.1 * theirs.mean(0)).all())


@pytest.mark.parametrize("batch", [padded, whole_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_in_a_model_what_the_parts_are(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, kind: str, batch: Callable[[], dict[str, torch.Tensor]]
) -> None:
    model = adapted(model_of(kind))
    together.clear()
    ours = results(model, batch())
    assert together == [True, True]
    in_parts(monkeypatch)
    theirs = results(model, batch())
    assert ours.keys() == theirs.keys() and len([name for name in ours if "lora_" in name]) >= 2 * 2 * 6
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 0.05 * float(gradient.norm()), name


def test_dropout_is_what_the_parts_draw(together: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: with dropout nothing is added before it is rounded, neither here nor there."""
    model = adapted(model_of(dropout=0.2))
    together.clear()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(results(model, padded()))
    assert together == [True] * 6
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["loss"], found[2]["loss"])
    in_parts(monkeypatch)
    torch.manual_seed(1)
    theirs = results(model, padded())
    assert torch.equal(theirs["loss"], found[2]["loss"])
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[2][name], gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_the_same_from_run_to_run_and_with_checkpoints(together: list[bool], checkpointed: bool) -> None:
    model = adapted(model_of(dropout=0.1))
    torch.manual_seed(0)
    whole = results(model, padded())
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    together.clear()
    torch.manual_seed(0)
    again = results(model, padded())
    assert together == [True] * (4 if checkpointed else 2)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_gradient_that_repeats_one_number_is_read_as_such(together: list[bool]) -> None:
    """As that of a sum: it has no memory of its own."""
    layer = adapted(model_of()).get_base_model().bert.encoder.layer[0]
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
    together.clear()
    y = layer(x)
    assert together == [True]
    reads_a_repeated_number(y, x, layer)


@pytest.mark.parametrize(
    "frozen", ["query.lora_A", "value.lora_B", "attention.output.dense.lora_A", "intermediate.dense.lora_B"]
)
def test_what_does_not_learn_has_no_gradient(together: list[bool], frozen: str) -> None:
    leaves_out(frozen, lambda: adapted(model_of()), lambda model: results(model, padded()), together)


def test_an_intermediate_result_is_there_for_who_asks(together: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    shows_hidden_states(adapted(model_of()), padded(), together, lambda: in_parts(monkeypatch))


def hook(layer: Any) -> None:
    layer.attention.self.register_forward_hook(lambda module, given, y: (y[0] * 2, *y[1:]))


def hook_inside(layer: Any) -> None:
    layer.intermediate.dense.register_forward_hook(lambda module, given, y: y * 2)


def hook_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn.register_forward_hook(lambda module, given, y: y * 2)


def replace(layer: Any) -> None:
    own = layer.output.LayerNorm.forward
    layer.output.LayerNorm.forward = lambda x: own(x) * 2


def off(layer: Any) -> None:
    layer.attention.self.key.enable_adapters(enabled=False)


def chunks(layer: Any) -> None:
    layer.chunk_size_feed_forward = 8


def unlike(layer: Any) -> None:
    layer.output.dropout.p = 0.5


def learn(layer: Any) -> None:
    layer.attention.output.LayerNorm.weight.requires_grad_()


@pytest.mark.parametrize("change", [hook, hook_inside, hook_activation, replace, off, chunks, unlike, learn])
def test_what_one_function_does_not_have_is_computed_part_by_part(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    model = adapted(model_of())
    change(model.get_base_model().bert.encoder.layer[0])
    together.clear()
    torch.manual_seed(3)
    changed = results(model, padded())
    assert together == [False, True]
    in_parts(monkeypatch)
    torch.manual_seed(3)
    torch.testing.assert_close(changed["loss"], results(model, padded())["loss"], rtol=0.02, atol=0)


def test_other_masks_no_gradient_dropout_and_other_types_are_left_to_the_parts(together: list[bool]) -> None:
    model = adapted(model_of())
    left = padded()
    left["attention_mask"] = left["attention_mask"].flip(1)
    together.clear()
    results(model, left)
    with torch.no_grad():
        model(**padded())
    assert len(together) == 4 and not any(together)
    others = [
        adapted(model_of(), lora_dropout=0.1),
        adapted(model_of(dtype=torch.float32)),
        adapted(model_of(), target_modules=["query", "value"]),
        adapted(model_of(hidden_act="relu")),
        adapted(model_of(is_decoder=True)),
    ]
    for other in others:
        together.clear()
        results(other, padded())
        assert not any(together)


class ScaledLayer(BertLayer):
    """With a factor that one comparison would not show: it is 1."""

    factor = 1.0

    def feed_forward_chunk(self, attention_output: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(attention_output) * self.factor, attention_output)


class Scaled(hf.BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.bert.encoder.layer:
            layer.__class__ = ScaledLayer


def test_layers_with_another_forward_pass_stay() -> None:
    layers = adapted(model_of((Scaled, hf.BertConfig))).get_base_model().bert.encoder.layer
    assert not any("forward" in vars(layer) for layer in layers)
