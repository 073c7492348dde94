"""A sped-up model: the losses, gradients, logits, tokens and files of the model as transformers and PEFT have it."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import trivet.fast
import trivet.fast_attention
from conftest import losses_of, tiny_model
from test_head import batch_of, language_model, split
from trivet import attach
from trivet.adapter.fast import FastLinear
from trivet.adapter.layers import adapted_layers
from trivet.data.batch import Collator
from trivet.fast import speed_up
from trivet.fast_attention import ATTENTION
from trivet.kernels.dropout import dropout
from trivet.loss import token_losses, training_loss

LANGUAGE = ("llama", "gpt2", "bart", "t5", "qwen2", "gemma2")
KINDS = (*LANGUAGE, "bert")


def base(kind: str) -> Any:
    """A tiny model without dropout, with norms that are not all ones (or zeros)."""
    if kind == "bert":
        config = tiny_model("bert", 64).config
        config.num_labels, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 3, 0.0, 0.0
        torch.manual_seed(0)
        model = hf.BertForSequenceClassification(config)
    else:
        model = language_model(kind)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.train()


def pair(kind: str, **settings: Any) -> tuple[Any, Any]:
    """(fast, as PEFT has it): the same model with the same adapter, whose factors are not zero."""
    models = []
    for fast in (True, False):
        model = attach(base(kind), lora_rank=4, fast=fast, **settings).train()
        for index, layer in enumerate(adapted_layers(model)):
            layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
        models.append(model)
    return models[0], models[1]


def data(model: Any, lengths: tuple[int, ...] = (12, 7, 10)) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch, labels = split(batch_of(model, lengths))
    return (
        (batch, torch.tensor([0, 2, 1]))
        if "Classification" in type(model.get_base_model()).__name__
        else (batch, labels)
    )


def task(kind: str) -> str:
    return {"bert": "classification", "bart": "seq2seq", "t5": "seq2seq"}.get(kind, "causal-lm")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_loss_and_gradients(kind: str) -> None:
    fast, plain = pair(kind)
    batch, labels = data(plain)
    ours, theirs = (training_loss(model, batch, labels, task=task(kind)) for model in (fast, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    same_gradients(gradients(fast, ours), gradients(plain, theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_any_loss_of_the_whole_output_with_its_mask(kind: str) -> None:
    """As a plain Trainer has it."""
    fast, plain = pair(kind)
    batch, _ = data(plain)
    ours, theirs = (model(**batch).logits for model in (fast, plain))
    seen = batch["attention_mask"].bool() if ours.shape[:2] == batch["attention_mask"].shape else slice(None)
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-5, atol=1e-5)
    same_gradients(gradients(fast, ours[seen].square().mean()), gradients(plain, theirs[seen].square().mean()))


def test_rows_of_several_blocks() -> None:
    fast, plain = pair("llama")
    batch, labels = data(plain, lengths=(150, 90))
    ours, theirs = (training_loss(model, batch, labels, task="causal-lm") for model in (fast, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    same_gradients(gradients(fast, ours), gradients(plain, theirs))


@pytest.mark.parametrize("kind", LANGUAGE)
def test_the_faster_parts_are_in_use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparisons above would say nothing."""
    fast, plain = pair(kind)
    calls = dict.fromkeys(("attention", "rms_norm", "layer_norm", "activate", "silu_gate", "rotate"), 0)

    def counted(place: Any, name: str) -> Any:
        own = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return own(*args, **kwargs)

        return call

    for name in calls:
        place = trivet.fast_attention if name == "attention" else trivet.fast
        monkeypatch.setattr(place, name, counted(place, name))
    for model in (plain, fast):
        batch, labels = data(model)
        training_loss(model, batch, labels, task=task(kind))
        if model is plain:
            assert not any(calls.values())
    assert all(type(layer.module) is FastLinear for layer in adapted_layers(fast))
    # T5 adds a bias to its scores, which is left to torch; Gemma 2 knows no attention but its own
    assert calls["attention"] == {"bart": 6, "t5": 0, "gemma2": 0}.get(kind, 2)
    assert (calls["rms_norm"] > 0) == (kind in ("llama", "qwen2"))  # Gemma multiplies by 1 + weight
    assert (calls["layer_norm"] > 0) == (kind in ("gpt2", "bart"))
    assert (calls["activate"] > 0) == (kind in ("gpt2", "bart", "gemma2"))  # T5's is a ReLU
    assert (calls["silu_gate"] > 0) == (kind in ("llama", "qwen2"))  # Gemma's gate is a GELU
    assert (calls["rotate"] > 0) == (kind in ("llama", "qwen2", "gemma2"))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_same_to_the_bit_before_training(kind: str) -> None:
    fast, plain = pair(kind)
    for model in (fast, plain):
        for layer in adapted_layers(model):
            layer.B.data.zero_()
    batch, _ = data(plain)
    with torch.no_grad():
        assert torch.equal(fast.eval()(**batch).logits, plain.eval()(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind: str) -> None:
    fast, plain = pair(kind)
    batch, _ = data(plain)
    with torch.no_grad():
        ours, theirs = fast.eval()(**batch).logits, plain.eval()(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_generation_writes_the_same_tokens(kind: str) -> None:
    fast, plain = pair(kind)
    batch = split(batch_of(plain, side="left"))[0]
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch.pop("decoder_input_ids", None)
    ours, theirs = (model.eval().generate(**batch, **options) for model in (fast, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_names_no_attention_of_ours(kind: str, tmp_path: Path) -> None:
    fast, plain = pair(kind)
    fast.save_pretrained(tmp_path / "adapter")
    merged = fast.merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    assert merged.config._attn_implementation == (ATTENTION if kind != "gemma2" else "eager")
    for file in tmp_path.rglob("*.json"):
        assert f'"{ATTENTION}"' not in file.read_text(), file
    assert "_attn_implementation" not in json.loads((tmp_path / "model/config.json").read_text())
    again = type(merged).from_pretrained(tmp_path / "model").eval()
    assert again.config._attn_implementation == plain.config._attn_implementation
    batch, _ = data(plain)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, plain.eval()(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_deep_copy_is_independent() -> None:
    fast, _ = pair("llama")
    batch, labels = data(fast)
    before = training_loss(fast, batch, labels, task="causal-lm").detach()
    twin = copy.deepcopy(fast)
    for parameter in twin.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(training_loss(fast, batch, labels, task="causal-lm"), before)
    assert not torch.allclose(training_loss(twin, batch, labels, task="causal-lm"), before)


def test_dropout_of_attention_is_reproducible_and_for_training_alone() -> None:
    model = base("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    fast = attach(model).train()
    batch, labels = data(fast)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return training_loss(fast, batch, labels, task="causal-lm").detach()

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    fast.eval()
    assert torch.equal(seeded(1), seeded(2))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(dropout: float) -> None:
    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        fast, _ = pair("llama", lora_dropout=dropout)
        for layer in fast.get_base_model().model.layers:
            layer.self_attn.attention_dropout = dropout
        if checkpointing:
            fast.gradient_checkpointing_enable({"use_reentrant": False})
        batch, labels = data(fast)
        torch.manual_seed(4)
        return gradients(fast, training_loss(fast, batch, labels, task="causal-lm"))

    same_gradients(run(True), run(False))


def dropping(kind: str, p: float = 0.3, fast: bool = True) -> Any:
    """A model with dropout everywhere its architecture has it but in the attention."""
    names = ("dropout", "activation_dropout", "hidden_dropout_prob", "dropout_rate", "resid_pdrop", "embd_pdrop")
    model = language_model(kind) if kind in LANGUAGE else base(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        for name in names:
            if isinstance(getattr(module, name, None), float) and "Attention" not in type(module).__name__:
                setattr(module, name, p)
    adapted = attach(model.train(), lora_rank=4, fast=fast)
    for index, layer in enumerate(adapted_layers(adapted)):
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
    return adapted.train()


@pytest.fixture
def drops(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shares that the faster dropout was called with."""
    calls: list[float] = []

    def counted(x: torch.Tensor, p: float) -> torch.Tensor:
        calls.append(p)
        return dropout(x, p)

    monkeypatch.setattr("trivet.fast_dropout.drop", counted)
    return calls


@pytest.mark.parametrize("kind", ["bert", "bart", "gpt2", "t5"])
def test_dropout_of_layers_is_the_fast_one_while_training(
    kind: str, drops: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dropping(kind)
    batch, labels = data(model)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return training_loss(model, batch, labels, task=task(kind)).detach()

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "_VF", None)  # nothing is left to torch's own
        first = seeded(1)
    assert len(drops) >= 4 and set(drops) == {0.3}
    assert torch.equal(first, seeded(1)) and not torch.equal(first, seeded(2))
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.manual_seed(1)
    assert torch.equal(training_loss(twin, batch, labels, task=task(kind)).detach(), first)
    drops.clear()
    model.eval()
    assert torch.equal(seeded(1), seeded(2)) and not drops


def checkpointed_gradients(model: Any, kind: str) -> dict[str, torch.Tensor]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, labels = data(model)
    torch.manual_seed(4)
    return gradients(model, training_loss(model, batch, labels, task=task(kind)))


def test_dropout_layers_draw_the_same_again_under_gradient_checkpointing() -> None:
    found, model = checkpointed_gradients(dropping("bert"), "bert"), dropping("bert")
    batch, labels = data(model)
    torch.manual_seed(4)
    same_gradients(found, gradients(model, training_loss(model, batch, labels, task="classification")))


def test_called_dropout_is_torchs_own_under_gradient_checkpointing(drops: list[float]) -> None:
    found = checkpointed_gradients(dropping("bart"), "bart")
    assert not drops
    same_gradients(found, checkpointed_gradients(dropping("bart", fast=False), "bart"))


def test_generation_still_reads_the_signature_of_what_was_replaced() -> None:
    model = dropping("bart").eval()
    encoder = model.get_base_model().model.encoder
    assert "forward" in vars(encoder)
    assert inspect.signature(encoder.forward) == inspect.signature(type(encoder).forward.__get__(encoder))
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def heads(queries: int, keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (1, 4, queries, 8), (1, 4, keys, 8), (1, 4, keys, 8)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_attention_as_transformers_calls_it(queries: int, keys: int, causal: bool, scaling: float | None) -> None:
    """With keys from a cache, too, where causal means something else."""
    qkv, options = heads(queries, keys), {"scaling": scaling, "is_causal": causal}
    found, _ = trivet.fast_attention._attend(torch.nn.Module(), *qkv, None, **options)
    wanted, _ = sdpa_attention_forward(torch.nn.Module(), *qkv, None, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_packed_attention_is_that_of_each_row() -> None:
    qkv, borders = heads(9, 9), torch.tensor([0, 4, 9, 9])
    found, _ = trivet.fast_attention._attend(torch.nn.Module(), *qkv, None, scaling=0.2, cu_seq_lens_q=borders)
    rows = [[t[:, :, i:j] for t in qkv] for i, j in ((0, 4), (4, 9))]
    wanted = [sdpa_attention_forward(torch.nn.Module(), *row, None, scaling=0.2, is_causal=True)[0] for row in rows]
    torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-5, atol=1e-6)


# -- norms and attentions that are left alone ----------------------------------------------------------------


def test_a_norm_that_is_trained_is_the_models_own() -> None:
    model = base("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    speed_up(model)
    assert "forward" not in vars(model.model.norm) and "forward" in vars(model.model.layers[0].input_layernorm)


def test_a_norm_that_is_trained_only_later_gets_its_gradient() -> None:
    fast, plain = pair("llama")
    for model in (fast, plain):
        model.get_base_model().model.norm.weight.requires_grad_()
    batch, labels = data(plain)
    ours, theirs = (gradients(m, training_loss(m, batch, labels, task="causal-lm")) for m in (fast, plain))
    assert any(name.endswith("model.norm.weight") for name in theirs)
    same_gradients(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    fast, plain = (model.to(dtype) for model in pair("qwen2"))
    speed_up(fast.get_base_model())
    batch, labels = data(plain)
    ours, theirs = (training_loss(model, batch, labels, task="causal-lm") for model in (fast, plain))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert gradients(fast, ours).keys() == gradients(plain, theirs).keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_can_be_attached_to(dtype: torch.dtype) -> None:
    model = attach(base("llama").to(dtype))
    batch, labels = data(model)
    assert bool(training_loss(model, batch, labels, task="causal-lm").isfinite())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_computes_the_same() -> None:
    """By torch.compile's tracer; what it makes of what it traces is torch's."""
    fast, _ = pair("llama")
    batch, labels = data(fast)

    def learned(model: Any) -> dict[str, torch.Tensor]:
        return gradients(fast, model(**batch, labels=labels).loss)

    same_gradients(learned(torch.compile(fast, backend="eager")), learned(fast))


def test_eager_attention_stays() -> None:
    model = base("llama")
    model.set_attn_implementation("eager")
    assert attach(model).config._attn_implementation == "eager"


# -- training ------------------------------------------------------------------------------------------------


def test_fifty_steps_follow_each_other() -> None:
    losses = []
    for model in pair("llama"):
        batch, labels = data(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses.append(losses_of(model, optimizer, batch, labels, 50))
    ours, theirs = losses
    assert theirs[-1] < 0.5 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_rows_do_not_see_each_other(kind: str) -> None:
    fast, plain = pair(kind)
    generator = torch.Generator().manual_seed(6)
    rows: list[Any] = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in (12, 5, 70)]
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]
    found = []
    for model, packed in ((fast, True), (plain, False)):
        batch = Collator(pad_id=0, packed=packed)(rows)
        labels = batch.pop("labels")
        losses, _, _ = token_losses(model, batch, labels, shifted=True)
        found.append((losses.detach(), gradients(model, losses.mean())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    same_gradients(found[0][1], found[1][1])


# -- gated layers and rotations that are left alone ----------------------------------------------------------


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(max=10.0))


class Dropped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


class Several(LlamaMLP):
    """As experts have it: no function of one tensor."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        return super().forward(x), batch * length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.nn.GELU(), Clamped, Dropped, Several])
def test_what_computes_otherwise_stays(other: Any, dtype: torch.dtype) -> None:
    model = tiny_model("llama", 64).to(dtype)
    mlp = model.model.layers[0].mlp
    if isinstance(other, torch.nn.Module):
        mlp.act_fn = other
    else:
        mlp.__class__ = other
    attach(model, lora_rank=4)

    def is_gated(module: Any) -> bool:
        return getattr(vars(module).get("forward"), "__func__", None) is trivet.fast._gated

    assert [is_gated(layer.mlp) for layer in model.model.layers] == [False, True]


def test_a_rotation_of_another_kind_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss's takes angles of half a head."""
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as halves

    model = tiny_model("llama", 64)
    monkeypatch.setitem(LlamaAttention.forward.__globals__, "apply_rotary_pos_emb", halves)
    attach(model, lora_rank=4)
    assert "forward" not in vars(model.model.layers[0].self_attn)
