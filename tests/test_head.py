"""Losses without all logits: the full logits' losses and gradients, for heads of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model

import trivet.head
from conftest import tiny_model
from trivet import attach
from trivet.adapter.layers import adapted_layers
from trivet.data.encode import IGNORE
from trivet.head import supervised_losses
from trivet.kernels.cross_entropy import linear_cross_entropy
from trivet.loss import token_losses, training_loss

VOCABULARY = 64


def further_model(kind: str, **changes: Any) -> Any:
    """A tiny random model of the architectures that `tiny_model` lacks, with a head of its kind."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
        "max_position_embeddings": 128,
    } | changes  # fmt: skip
    if kind == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))
    if kind == "gemma2":  # logits soft-capped
        own = {
            "head_dim": 8,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 8,
        }
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **own))
    if kind == "cohere":
        return hf.CohereForCausalLM(hf.CohereConfig(**sizes, logit_scale=0.25))
    if kind == "granite":
        return hf.GraniteForCausalLM(hf.GraniteConfig(**sizes, logits_scaling=3.0))
    raise ValueError(kind)


FURTHER = ("qwen2", "gemma2", "cohere", "granite")


def language_model(kind: str, **changes: Any) -> Any:
    """A tiny language model whose logits are far from alike, in training mode, without dropout."""
    model = further_model(kind, **changes) if kind in FURTHER else tiny_model(kind, VOCABULARY, **changes)
    model.get_output_embeddings().weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    if kind == "bart":
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(2))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model.train()


def batch_of(model: Any, lengths: tuple[int, ...] = (12, 7, 10), side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded, with labels on the second half of each."""
    generator, longest = torch.Generator().manual_seed(3), max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    labels = torch.full_like(ids, IGNORE)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else longest - length
        ids[row, start : start + length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, start : start + length] = 1
        labels[row, start + length // 2 : start + length] = ids[row, start + length // 2 : start + length]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return batch


def split(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


def by_full_logits(
    model: Any, batch: dict[str, torch.Tensor], z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every supervised token's loss and hit, from the model's own logits at all positions."""
    inputs, labels = split(batch)
    logits = model(**inputs).logits.float()
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * torch.logsumexp(logits, -1) ** 2
    return losses, logits.argmax(-1) == labels


def ours(model: Any, batch: dict[str, torch.Tensor], z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = split(batch)
    losses, right, _ = token_losses(model, inputs, labels, shifted=not model.config.is_encoder_decoder, z_loss=z_loss)
    return losses, right


def adapted(kind: str, **settings: Any) -> Any:
    """The model with PEFT's own LoRA, whose factors are not zero."""
    model = get_peft_model(language_model(kind), LoraConfig(r=2, target_modules="all-linear", **settings))
    for layer in adapted_layers(model):
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return model


def gradients(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum, in which every token counts differently."""
    model.zero_grad()
    (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model: Any, batch: dict[str, torch.Tensor], z_loss: float = 0.0) -> dict[str, torch.Tensor]:
    """Our losses and gradients against full logits'; the gradients."""
    (losses, right), (wanted, wanted_right) = ours(model, batch, z_loss), by_full_logits(model, batch, z_loss)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(right, wanted_right)
    found, theirs = gradients(model, losses), gradients(model, wanted)
    assert found.keys() == theirs.keys() and found
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    return found


def read_head(model: Any) -> Any:
    """The head as it goes into `linear_cross_entropy`; None where it is left to the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return trivet.head._head(base, base.get_output_embeddings(), split(batch_of(model))[0])


KINDS = ("llama", "gpt2", "bart", "t5", *FURTHER)


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_all_logits(kind: str, z_loss: float) -> None:
    model = adapted(kind)
    agree(model, batch_of(model), z_loss)
    assert read_head(model) is not None  # by chunks, and not by the model's own head


@pytest.mark.parametrize(
    ("kind", "told"),
    [("bart", {"bias": True}), ("gemma2", {"cap": 2.0}), ("cohere", {"scale": 0.25}), ("granite", {"scale": 1 / 3})],
)
def test_the_heads_arithmetic_is_read_off_the_model(kind: str, told: dict[str, Any]) -> None:
    model = adapted(kind)
    head = read_head(model)
    found = {"bias": head.bias is not None, "scale": head.scale, "cap": head.cap}
    assert found == {"bias": False, "scale": 1.0, "cap": None} | told


@pytest.mark.parametrize(("kind", "settings"), [("t5", {"tie_word_embeddings": False}), ("llama", {"tie": False})])
def test_heads_that_are_not_tied(kind: str, settings: dict[str, Any]) -> None:
    """T5 scales what a tied head reads, and that alone."""
    model = get_peft_model(language_model(kind, **settings), LoraConfig(r=2, target_modules="all-linear"))
    for layer in adapted_layers(model):
        layer.B.data.normal_(std=0.2)
    agree(model, batch_of(model))
    assert read_head(model) is not None


def test_no_more_positions_than_asked_for_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted("llama"), []
    batch = batch_of(model)
    ours(model, batch)
    monkeypatch.setattr(
        trivet.head,
        "linear_cross_entropy",
        lambda hidden, *rest, **options: seen.append(hidden.shape) or linear_cross_entropy(hidden, *rest, **options),
    )
    losses, _ = ours(model, batch)
    assert seen == [(len(losses), 32)] and len(losses) == 6 + 4 + 5


# -- heads that are left to the model ----------------------------------------------------------------------


def test_an_adapted_head_is_the_models_own() -> None:
    model = get_peft_model(language_model("llama", tie=False), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for layer in adapted_layers(model):
        layer.B.data.normal_(std=0.2)
    found = agree(model, batch_of(model), z_loss=0.05)
    assert any("lm_head.lora_B" in name and gradient.any() for name, gradient in found.items())
    assert read_head(model) is None


def test_a_head_saved_with_the_adapter_is_the_models_own() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(language_model("llama", tie=False), config)
    found = agree(model, batch_of(model))
    assert any("lm_head.modules_to_save" in name and gradient.any() for name, gradient in found.items())


def test_a_trained_head_is_the_models_own() -> None:
    model = language_model("llama", tie=False)
    assert agree(model, batch_of(model))["lm_head.weight"].any()


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_that_is_trained_only_later(part: str) -> None:
    model = language_model("llama", tie=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    batch = batch_of(model)
    agree(model, batch)
    assert read_head(model) is not None
    getattr(model.lm_head, part).requires_grad_(True)
    assert agree(model, batch)[f"lm_head.{part}"].any()
    model.lm_head.requires_grad_(False)
    agree(model, batch)
    assert read_head(model) is not None


def test_a_head_whose_weight_was_changed_or_exchanged() -> None:
    model = adapted("bart")
    base, batch = model.get_base_model(), batch_of(model)
    agree(model, batch)
    base.final_logits_bias.mul_(-3)
    base.lm_head.weight.data.mul_(2)
    agree(model, batch)
    base.lm_head.weight = torch.nn.Parameter(-base.lm_head.weight.detach(), requires_grad=False)
    agree(model, batch)
    head = read_head(model)
    assert head is not None and head.bias is not None
    base.final_logits_bias.zero_()  # as BART's is
    agree(model, batch)
    head = read_head(model)
    assert head is not None and head.bias is None


def test_a_head_with_arithmetic_of_its_own_is_the_models_own() -> None:
    model = adapted("llama")
    own = model.get_base_model().lm_head
    own.register_forward_hook(lambda module, inputs, output: output**3 + 1)
    agree(model, batch_of(model))
    assert read_head(model) is None


def test_scores_of_a_config_that_are_not_applied_are_noticed() -> None:
    model = adapted("llama")
    model.config.logit_scale = 7.0
    agree(model, batch_of(model))
    assert read_head(model) is None


# -- what is left as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_the_heads_forward_pass_is_put_back_even_if_the_model_raises(tie: bool) -> None:
    model = adapted("llama") if tie else language_model("llama", tie=False)
    inputs, labels = split(batch_of(model))
    layer = model.get_output_embeddings()
    ours(model, inputs | {"labels": labels})
    wrong = inputs | {"input_ids": torch.full_like(labels, VOCABULARY)}  # there is no such token
    for first in (False, True):  # while the head is read off the model, too
        if first:
            trivet.head._known.clear()
        with pytest.raises(IndexError):
            supervised_losses(model, wrong, (labels != IGNORE).flatten().nonzero()[:, 0], labels[labels != IGNORE])
        assert "forward" not in layer.__dict__
    assert model(**inputs).logits.shape == (*labels.shape, VOCABULARY)


def test_a_forward_pass_of_the_callers_own_is_put_back() -> None:
    model = language_model("llama", tie=False)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    mine = model.lm_head.forward
    agree(model, batch_of(model))
    assert model.lm_head.forward is mine


def test_padding_on_the_right_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted("llama"), []
    batch = batch_of(model)
    own = model.get_base_model().forward
    monkeypatch.setattr(
        model.get_base_model(), "forward", lambda *a, **k: seen.append(k.get("attention_mask")) or own(*a, **k)
    )
    found, _ = ours(model, batch)
    assert seen[-1] is None
    with_mask, _ = by_full_logits(model, batch)
    torch.testing.assert_close(found, with_mask)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_keeps_its_mask(kind: str) -> None:
    model = adapted(kind)
    batch = batch_of(model, side="left")
    agree(model, batch)
    without, _ = by_full_logits(model, {k: v for k, v in batch.items() if k != "attention_mask"})
    assert not torch.allclose(by_full_logits(model, batch)[0], without, atol=1e-3)


def test_a_first_row_that_begins_with_much_padding() -> None:
    """The few tokens that the head is read off are all padding there."""
    model = adapted("llama")
    batch = batch_of(model, lengths=(3, 40), side="left")
    agree(model, batch)


def test_a_gap_in_the_mask_keeps_it() -> None:
    model = adapted("llama")
    batch = batch_of(model)
    batch["attention_mask"][:, 2] = 0
    agree(model, batch)


def test_an_encoder_keeps_its_mask() -> None:
    model = adapted("t5")
    batch = batch_of(model)
    agree(model, batch)
    without, _ = by_full_logits(model, batch | {"attention_mask": torch.ones_like(batch["attention_mask"])})
    assert not torch.allclose(by_full_logits(model, batch)[0], without, atol=1e-3)


def test_no_random_number_is_drawn_for_the_comparison() -> None:
    model = attach(language_model("gpt2"), lora_dropout=0.5).train()
    for layer in adapted_layers(model):
        layer.B.data.normal_(std=0.2)
    batch = batch_of(model)

    def seeded() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(6)
        return ours(model, batch)[0], torch.get_rng_state()

    (first, state), (second, later) = seeded(), seeded()  # only the first compares
    assert torch.equal(first, second) and torch.equal(state, later)
    assert not torch.equal(ours(model, batch)[0], second)  # dropout was on
    quiet = adapted("gpt2")
    before = torch.get_rng_state()
    ours(quiet, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_supervised() -> None:
    model = adapted("llama")
    inputs, labels = split(batch_of(model))
    loss = training_loss(model, inputs, torch.full_like(labels, IGNORE), 5, task="causal-lm")
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_wrapped_model_is_seen_through() -> None:
    model = adapted("llama")
    wrapped = torch.nn.Module()
    wrapped.module = model
    wrapped.forward = model.forward
    inputs, labels = split(batch_of(model))
    found, _, _ = token_losses(wrapped, inputs, labels, shifted=True)
    torch.testing.assert_close(found, by_full_logits(model, inputs | {"labels": labels})[0])


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_16_bits(kind: str) -> None:
    model = adapted(kind).bfloat16()
    batch = batch_of(model)
    found, wanted = ours(model, batch)[0], by_full_logits(model, batch)[0]
    assert found.dtype == torch.float32 and read_head(model) is not None
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
