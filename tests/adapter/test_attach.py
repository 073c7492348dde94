"""Attaching: no output changes, only the adapter and the head are trained, the seed decides the factors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console

from conftest import bpe_tokenizer, colour_rows, save_tiny, tiny_model, word_tokenizer
from trivet import attach
from trivet.adapter.attach import head_names, leaves_experts, task_of, trainable_parameters
from trivet.adapter.layers import adapted_layers
from trivet.adapter.save import export
from trivet.configio import load
from trivet.errors import AdapterError, ConfigError
from trivet.run import train

BODIES = {
    "gpt2": hf.GPT2ForSequenceClassification,
    "bart": hf.BartForSequenceClassification,
    "bert": hf.BertForSequenceClassification,
    "roberta": hf.RobertaForSequenceClassification,
    "distilbert": hf.DistilBertForSequenceClassification,
}
HEADS = {
    "gpt2": {"score"},
    "bart": {"classification_head"},
    "bert": {"classifier"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
}


def with_head(kind: str, task: str = "classification") -> Any:
    """A tiny classifier with three classes, or a regressor."""
    config = tiny_model(kind, 64).config
    config.num_labels = 1 if task == "regression" else 3
    config.problem_type = "regression" if task == "regression" else "single_label_classification"
    torch.manual_seed(0)
    return BODIES[kind](config)


def some_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two rows of token ids, each with one end-of-sequence token (which BART's classifier looks for)."""
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[:, -1] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        batch["decoder_input_ids"] = ids[:, :5]
    return batch


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**some_inputs(model.get_base_model() if isinstance(model, PeftModel) else model)).logits


MODELS = [
    *((kind, "auto") for kind in ("gpt2", "llama", "bart", "t5")),
    *((kind, task) for kind in BODIES for task in ("classification", "regression")),
]


def make(kind: str, task: str) -> Any:
    return tiny_model(kind, 64) if task == "auto" else with_head(kind, task)


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_attaching_changes_no_output_bit(kind: str, task: str) -> None:
    model = make(kind, task)
    before = output(model)
    adapted = attach(model, lora_rank=4)
    assert isinstance(adapted, PeftModel)
    assert torch.equal(output(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(output(adapted), before)


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_only_the_adapter_and_the_head_are_trained(kind: str, task: str) -> None:
    model = make(kind, task)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, hf.pytorch_utils.Conv1D))
        and module is not model.get_output_embeddings()
    }
    heads = head_names(model, task)
    assert set(heads) == (HEADS[kind] if task != "auto" else set())
    adapted = attach(model, lora_rank=4)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n or "modules_to_save" in n for n in trained)
    for head in heads:
        assert any(f".{head}.modules_to_save.default." in f".{name}" for name in trained)
    expected = {n for n in linear if not any(n == head or n.startswith(f"{head}.") for head in heads)}
    assert {layer.name for layer in adapted_layers(adapted)} == expected
    assert trainable_parameters(adapted) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    head_size = sum(
        p.numel() for head in heads for p in getattr(adapted.get_base_model(), head).original_module.parameters()
    )
    factors = sum(layer.A.numel() + layer.B.numel() for layer in adapted_layers(adapted))
    assert trainable_parameters(adapted) == head_size + factors


def test_the_same_seed_gives_the_same_factors_whatever_torch_drew_before() -> None:
    def factors(seed: int, noise: int) -> list[torch.Tensor]:
        model = tiny_model("gpt2", 64)
        torch.manual_seed(noise)
        torch.rand(noise)
        return [layer.A.detach().clone() for layer in adapted_layers(attach(model, seed=seed))]

    first, second, other = factors(1, noise=3), factors(1, noise=8), factors(2, noise=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_is_kaiming_uniform_and_b_zero() -> None:
    for layer in adapted_layers(attach(tiny_model("llama", 64), lora_rank=16)):
        bound = layer.A.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(fan_in)
        assert float(layer.A.abs().max()) <= bound
        assert float(layer.A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not layer.B.any()


def test_the_global_random_state_is_left_alone_by_the_factors() -> None:
    states = []
    for seed in (1, 2):
        model = tiny_model("gpt2", 64)
        torch.manual_seed(11)
        attach(model, seed=seed)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_head_is_saved_and_comes_back(tmp_path: Path, task: str) -> None:
    adapted = attach(with_head("bert", task))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.ones_like(p)) if "lora" not in name else p.normal_(std=0.05)
    adapted.save_pretrained(tmp_path)
    fresh = with_head("bert", task)
    torch.nn.init.zeros_(fresh.classifier.weight)
    again = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(output(again), output(adapted))


def test_parts_named_in_modules_to_save_are_trained_whole() -> None:
    adapted = attach(with_head("bert"), modules_to_save=["bert.pooler.dense"])
    pooler = adapted.get_base_model().bert.pooler.dense.modules_to_save["default"]
    assert all(p.requires_grad for p in pooler.parameters())
    assert not any("pooler" in layer.name for layer in adapted_layers(adapted))


def test_alpha_is_twice_the_rank_unless_given() -> None:
    for rank, alpha, scale in ((8, None, 2.0), (3, None, 2.0), (4, 4, 1.0), (4, 10.0, 2.5)):
        adapted = attach(tiny_model("gpt2", 64), lora_rank=rank, lora_alpha=alpha)
        assert {layer.scale for layer in adapted_layers(adapted)} == {scale}
        assert {layer.rank for layer in adapted_layers(adapted)} == {rank}
        assert adapted.peft_config["default"].lora_alpha == (2 * rank if alpha is None else alpha)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_delta_equals_pefts(kind: str) -> None:
    adapted = attach(tiny_model(kind, 64), lora_rank=4, lora_alpha=12)
    conv = kind == "gpt2"
    for layer in adapted_layers(adapted):
        torch.nn.init.normal_(layer.B)
        expected = layer.module.get_delta_weight("default")  # type: ignore[operator]
        torch.testing.assert_close(layer.delta(), expected.T if conv else expected)
    assert len(adapted_layers(adapted)) == (8 if conv else 14)


def test_layer_names_are_paths_in_the_base_model() -> None:
    adapted = attach(tiny_model("llama", 64))
    base = adapted.get_base_model()
    for layer in adapted_layers(adapted):
        assert base.get_submodule(layer.name) is layer.module


def test_chosen_targets_only() -> None:
    adapted = attach(tiny_model("llama", 64), target_modules=["q_proj", "v_proj"])
    assert {layer.name.rpartition(".")[2] for layer in adapted_layers(adapted)} == {"q_proj", "v_proj"}


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no_such_proj"):
        attach(tiny_model("llama", 64), target_modules=["no_such_proj"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "phimoe", "llama4"])
def test_of_mixtures_of_experts_all_but_the_experts_is_adapted(kind: str, tmp_path: Path) -> None:
    """PEFT takes experts and their router for layers, too; its reloaded adapter must compute the same."""
    base, expected = tiny_model(kind, 64), output(tiny_model(kind, 64))
    adapted = attach(base, lora_rank=2)
    assert torch.equal(output(adapted), expected) and leaves_experts(adapted)
    names = {layer.name.rpartition(".")[2] for layer in adapted_layers(adapted)}
    assert names >= {"q_proj", "k_proj", "v_proj", "o_proj"} and not names & {"gate", "router", "experts", "base_layer"}
    adapted.train()(**some_inputs(base)).logits.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    for layer in adapted_layers(adapted):
        torch.nn.init.normal_(layer.B)
    for form in ("native", "portable"):
        export(adapted, tmp_path / form, form, some_inputs(base))
        again = PeftModel.from_pretrained(tiny_model(kind, 64), tmp_path / form)
        torch.testing.assert_close(output(again), output(adapted), rtol=1e-4, atol=1e-5)


def test_a_pattern_chooses_among_a_mixtures_layers(tmp_path: Path) -> None:
    adapted = attach(tiny_model("llama4", 64), target_modules=r".*\.(q_proj|router)")
    assert {layer.name.rpartition(".")[2] for layer in adapted_layers(adapted)} == {"q_proj"}
    export(adapted, tmp_path / "portable", "portable", some_inputs(adapted))  # reloads and compares


def test_experts_are_no_targets() -> None:
    with pytest.raises(ConfigError, match=r"q_proj, w1.*a mixtral.*all-linear, or choose from q_proj$"):
        attach(tiny_model("mixtral", 64), target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.raises(ConfigError, match=r"w1.*fused"):
        attach(tiny_model("mixtral", 64), target_modules=["q_proj", "w1"])


def test_a_run_says_that_experts_stay(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    values = {"model.name": str(tmp_path / "model"), "model.device": "cpu", "data.validation": None}
    values |= {"training.max_steps": 1, "evaluation.generate": False, "output_dir": str(tmp_path / "run")}
    console = Console(file=io.StringIO(), width=999)
    train(load(values=values), train=[{"text": "the cat ran to the red house"}] * 8, console=console)
    assert "its experts stay as they are" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_embedding_is_no_target(target: str) -> None:
    model = tiny_model("llama", 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(AdapterError, match=f"{target}.*tied"):
        attach(model, target_modules=["q_proj", target])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_rank": 1.5}, "lora_rank"),
        ({"lora_rank": True}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"method": "loar"}, "lora"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        attach(tiny_model("gpt2", 64), **settings)


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="already has an adapter"):
        attach(attach(tiny_model("gpt2", 64)))
    with pytest.raises(ConfigError, match="already has an adapter"):
        attach(get_peft_model(tiny_model("gpt2", 64), LoraConfig()))


def test_the_task_is_read_off_the_class() -> None:
    assert task_of(tiny_model("gpt2", 64)) == "causal-lm"
    assert task_of(tiny_model("llama", 64)) == "causal-lm"
    assert task_of(tiny_model("t5", 64)) == task_of(tiny_model("bart", 64)) == "seq2seq"
    assert task_of(with_head("bart")) == "classification"
    assert task_of(with_head("bert", "regression")) == "regression"
    with pytest.raises(ConfigError, match="pass task="):
        task_of(tiny_model("bert", 64))


def test_a_plain_transformers_trainer_trains_it(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    adapted = attach(tiny_model("gpt2", len(tokenizer)), lora_rank=4)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    rows = [tokenizer(row["prompt"] + " " + row["completion"]) for row in colour_rows(16)]
    tokenizer.pad_token = tokenizer.eos_token
    trainer = hf.Trainer(
        adapted,
        args=hf.TrainingArguments(
            str(tmp_path), max_steps=8, learning_rate=1e-2, report_to="none", logging_steps=1, use_cpu=True,
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8,
        ),
        train_dataset=rows,
        data_collator=hf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


def test_a_plain_transformers_trainer_trains_a_classifier(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    folder = save_tiny("bert", tmp_path / "bert")
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    adapted = attach(model, lora_rank=4)
    head = adapted.get_base_model().classifier
    before = head.modules_to_save["default"].weight.detach().clone()
    texts = ["the cat sat", "the dog ran"] * 8
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)]
    arguments = hf.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    hf.Trainer(adapted, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, before)
