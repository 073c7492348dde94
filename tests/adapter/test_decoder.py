"""A decoder layer as one function: float64's numbers, and those of its parts one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import whole_layers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from whole_layers import ids_and_mask, leaves_out, reads_a_repeated_number, shows_hidden_states, watched

import trivet.fast_decoder as fast_decoder
from trivet.data.batch import Collator
from trivet.data.encode import Encoded
from trivet.kernels import compiled

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),  # q, k and v have biases
}
VOCABULARY = 96


def model_of(kind: Any = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    made, configure = KINDS[kind] if isinstance(kind, str) else kind
    config = configure(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        use_cache=False,
        initializer_range=0.1,
        **{"pad_token_id": 0} | settings,
    )
    torch.manual_seed(0)
    model = made(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
        elif "norm" in name:
            nn.init.uniform_(weight, 0.5, 2.0)
    return model.bfloat16().to(dtype)


def adapted(model: Any, **settings: Any) -> Any:
    return whole_layers.adapted(model, "causal-lm", **settings)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each layer's pass was one function; without gradient it is looked at whether packed rows stay apart."""
    return watched(monkeypatch, fast_decoder, torch.is_grad_enabled)


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_decoder, "_together", lambda *_: None)


def padded(rows: int = 3, length: int = 45) -> dict[str, torch.Tensor]:
    batch = ids_and_mask(rows, length, VOCABULARY)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def packed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (31, 7, 40)]
    return dict(Collator(0, packed=True)([Encoded(input_ids=row, labels=row) for row in rows]))


def results(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return whole_layers.results(model, batch, "causal-lm")


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("batch", [padded, packed])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_exact_as_part_by_part(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, kind: str, batch: Callable[[], dict[str, torch.Tensor]]
) -> None:
    """PEFT's layers and transformers' in float64, of the same 16-bit weights, are exact."""
    exact_model = adapted(model_of(kind, torch.float64), fast=False)
    for part in exact_model.modules():
        part.to(torch.float64)
    exact = results(exact_model, batch())
    model = adapted(model_of(kind))
    together.clear()
    ours = errors(results(model, batch()), exact)
    assert together == [True, True]
    in_parts(monkeypatch)
    theirs = errors(results(model, batch()), exact)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7 + 1
    for name, error in ours.items():
        assert error < 0.04 and error <= 1.2 * theirs[name] + 0.004, name
    assert sum(ours.values()) <= sum(theirs.values())  # what is added to the residual stream is not rounded before


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_the_same_from_run_to_run_and_with_checkpoints(together: list[bool], checkpointed: bool) -> None:
    model = adapted(model_of())
    whole = results(model, padded())
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    together.clear()
    again = results(model, padded())
    assert together == [True] * (4 if checkpointed else 2)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_attention_dropout_is_drawn_again(together: list[bool]) -> None:
    model = adapted(model_of(attention_dropout=0.3))
    together.clear()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(results(model, padded()))
    assert together == [True] * 6
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["loss"], found[2]["loss"])


def test_a_gradient_that_repeats_one_number_is_read_as_such(together: list[bool]) -> None:
    """As that of a sum: it has no memory of its own."""
    model = adapted(model_of()).get_base_model().model
    x = model(input_ids=padded()["input_ids"]).last_hidden_state.detach().requires_grad_()
    together.clear()
    y = model.layers[0](x, position_embeddings=model.rotary_emb(x, torch.arange(45)[None]))
    assert together == [True]
    reads_a_repeated_number(y, x, model.layers[0])


@pytest.mark.parametrize("frozen", ["q_proj.lora_A", "v_proj.lora_B", "o_proj.lora_A", "up_proj.lora_B"])
def test_what_does_not_learn_has_no_gradient(together: list[bool], frozen: str) -> None:
    leaves_out(frozen, lambda: adapted(model_of()), lambda model: results(model, padded()), together)


def test_an_intermediate_result_is_there_for_who_asks(together: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    shows_hidden_states(adapted(model_of()), padded(), together, lambda: in_parts(monkeypatch))


def hook(layer: Any) -> None:
    layer.self_attn.register_forward_hook(lambda module, given, y: (y[0] * 2, *y[1:]))


def hook_inside(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda module, given, y: y * 2)


def replace(layer: Any) -> None:
    own = layer.input_layernorm.forward
    layer.input_layernorm.forward = lambda x: own(x) * 2


def off(layer: Any) -> None:
    layer.self_attn.k_proj.enable_adapters(enabled=False)


def look_ahead(layer: Any) -> None:
    layer.self_attn.is_causal = False


def learn(layer: Any) -> None:
    layer.post_attention_layernorm.weight.requires_grad_()


@pytest.mark.parametrize("change", [hook, hook_inside, replace, off, look_ahead, learn])
def test_what_one_function_does_not_have_is_computed_part_by_part(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    model = adapted(model_of())
    before = results(model, padded())["loss"]
    change(model.get_base_model().model.layers[0])
    together.clear()
    changed = results(model, padded())
    assert together == [False, True]
    in_parts(monkeypatch)
    theirs = results(model, padded())["loss"]
    torch.testing.assert_close(changed["loss"], theirs, rtol=0.01, atol=0)
    assert change is learn or abs(float(before - theirs)) > 5 * abs(float(changed["loss"] - theirs))


def test_a_cache_no_gradient_dropout_and_other_types_are_left_to_the_parts(together: list[bool]) -> None:
    model = adapted(model_of())
    inputs = {name: each for name, each in padded().items() if name != "labels"}
    together.clear()
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 45
    with torch.no_grad():
        model(**inputs)
    assert not any(together)
    others = [
        adapted(model_of(), lora_dropout=0.1),
        adapted(model_of(dtype=torch.float32)),
        adapted(model_of(), target_modules=["q_proj", "v_proj"]),
    ]
    for other in others:
        together.clear()
        results(other, padded())
        assert not any(together)


class ScaledLayer(LlamaDecoderLayer):
    """With a factor that one comparison would not show: it is 1."""

    factor = 1.0

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = residual + hidden_states * self.factor
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.factor


class Scaled(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = ScaledLayer


@pytest.mark.parametrize("kind", [(Scaled, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)])
def test_layers_with_another_forward_pass_stay(kind: Any) -> None:
    layers = adapted(model_of(kind)).get_base_model().model.layers
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_copy_of_a_model_has_its_own_layers(together: list[bool]) -> None:
    model = adapted(model_of())
    other = copy.deepcopy(model)
    for factor in other.parameters():
        factor.data *= 2
    whole = results(model, padded())["loss"]
    together.clear()
    assert not torch.equal(results(other, padded())["loss"], whole)
    assert together == [True, True]
    assert torch.equal(results(model, padded())["loss"], whole)
