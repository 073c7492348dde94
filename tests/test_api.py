"""The few lines of Python that the README promises, in a folder with a model called `gpt2`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

import trivet
from conftest import CORPUS, bpe_tokenizer, colour_rows, save_tiny, tiny_model, write_jsonl
from trivet import LoRAModel, load_dataset
from trivet.adapter.fast import FastLinear
from trivet.errors import AdapterError, ConfigError, ModelError, RunExistsError

#: Enough to learn the colours (see tests/train/test_learning.py).
LEARN: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 120, "lr_scheduler": "linear", "lora_rank": 16}
CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
FEW: dict[str, Any] = {"max_steps": 4, "resamples": 10, **CPU}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny GPT-2 in `gpt2/`, and `train.jsonl`."""
    save_tiny("gpt2", tmp_path / "gpt2", initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    write_jsonl(tmp_path / "train.jsonl", colour_rows(48))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_in_another_process(place: Path) -> None:
    script = """
from trivet import LoRAModel, load_dataset

model = LoRAModel(base_model="gpt2", lora_rank=8)
dataset = load_dataset("train.jsonl")
model.finetune(dataset)
print(repr(model.generate("what colour is the sky ?")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert isinstance(eval(done.stdout), str)
    assert (place / "runs/trivet/result.json").exists()
    assert {p.name for p in place.iterdir()} == {"gpt2", "train.jsonl", "runs"}
    result = json.loads((place / "runs/trivet/result.json").read_text())
    assert result["model"] == "gpt2" and result["steps"] == 18  # 46 rows are 6 batches of 8, three times
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_a_config_file(place: Path) -> None:
    (place / "config.yaml").write_text(
        "model:\n  name: gpt2\n  lora_rank: 8\ntraining:\n  batch_size: 8\n  learning_rate: 3e-4\n  num_epochs: 1\n"
    )
    model = LoRAModel(config="config.yaml", **CPU)
    assert model.config.training.learning_rate == 3e-4 and model.config.model.lora_rank == 8
    result = model.finetune(load_dataset("train.jsonl"), quiet=True)
    assert result["steps"] == 6 and result["model"] == "gpt2"
    log = [json.loads(line) for line in (place / "runs/trivet/log.jsonl").read_text().splitlines()]
    assert max(row["learning_rate"] for row in log if "loss" in row) == pytest.approx(3e-4)


def test_tuned_it_answers_and_so_does_the_saved_and_the_merged_model(place: Path) -> None:
    model = LoRAModel("gpt2", **LEARN, **CPU)
    asked, answers = [r["prompt"] for r in colour_rows(3)], [r["completion"] for r in colour_rows(3)]
    before = model.generate(asked)
    assert before != answers
    result = model.finetune("train.jsonl", quiet=True)
    assert result == json.loads((place / "runs/trivet/result.json").read_text())
    assert model.generate(asked) == answers
    assert model.generate(asked[0]) == answers[0]
    assert model.generate(asked, adapter=False) == before

    proof = model.save("saved")
    assert proof.error <= proof.tolerance
    for source in ("saved", "runs/trivet", "runs/trivet/adapter"):
        again = LoRAModel.load(source, **CPU)
        assert again.generate(asked) == answers
        assert isinstance(again.model, PeftModel) and again.config.model.name == "gpt2"
    for fast in (True, False):
        kinds = {type(module) for module in LoRAModel.load("saved", fast=fast, **CPU).model.modules()}
        assert (FastLinear in kinds) == fast

    measured = model.evaluate(colour_rows(3), resamples=10)
    assert measured["metrics"]["tuned"]["exact_match"] == 1.0 and measured["n"]["exact_match"] == 3
    assert measured["metrics"]["base"]["exact_match"] < 1.0
    assert measured == LoRAModel.load("saved", **CPU).evaluate(colour_rows(3), resamples=10)

    live = model.model
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = live.eval()(ids).logits
    merged = model.merge("merged")
    assert type(merged) is hf.GPT2LMHeadModel
    plain = hf.AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-3, atol=1e-3)
    tokenizer = hf.AutoTokenizer.from_pretrained("merged")
    inputs = tokenizer(asked[0] + "\n", return_tensors="pt")
    written = plain.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answers[0]


def test_merging_uses_the_object_up(place: Path) -> None:
    model = LoRAModel("gpt2", **FEW)
    model.finetune("train.jsonl", quiet=True)
    (place / "taken").mkdir()
    (place / "taken" / "file").write_text("")
    with pytest.raises(ConfigError, match="taken: exists already"):
        model.merge("taken")
    assert model.generate("still there", max_new_tokens=2) is not None
    merged = model.merge()
    assert type(merged) is hf.GPT2LMHeadModel and merged.config.use_cache
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with pytest.raises(ConfigError, match="merged.*load"):
        model.generate("hello")
    model.finetune("train.jsonl", output_dir="runs/second", quiet=True)
    assert isinstance(model.generate("hello", max_new_tokens=2), str)


def test_a_classifier_predicts(place: Path) -> None:
    save_tiny(
        "bert",
        place / "bert",
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    rows = [{"text": r["prompt"], "label": r["completion"].split()[-1]} for r in colour_rows(48)]
    model = LoRAModel("bert", **LEARN | {"learning_rate": 5e-3}, **CPU)
    result = model.finetune(rows, quiet=True)
    assert result["task"] == "classification"
    asked = [row["text"] for row in rows[:3]]
    assert model.predict(asked) == ["blue", "green", "red"]
    assert model.predict(asked[1]) == "green"
    assert LoRAModel.load("runs/trivet", **CPU).predict(asked) == ["blue", "green", "red"]
    assert model.evaluate(rows[:6], resamples=10)["metrics"]["tuned"]["accuracy"] == 1.0
    with pytest.raises(ModelError, match="writes no text; use predict"):
        model.generate("hello")
    with pytest.raises(ConfigError, match="3 texts but 1"):
        model.predict(asked, ["other"])
    assert model.save("saved").error <= 1e-4
    merged = model.merge("merged")
    assert type(merged) is hf.BertForSequenceClassification
    plain = hf.pipeline("text-classification", "merged", device="cpu")
    assert [found["label"] for found in plain(asked)] == ["blue", "green", "red"]


def test_a_regressor_predicts_pairs(place: Path) -> None:
    save_tiny("bert", place / "bert")
    rows = [{"text": "the cat sat", "text_pair": f"the number {i}", "label": i / 7} for i in range(24)]
    model = LoRAModel("bert", **FEW)
    assert model.finetune(rows, quiet=True)["task"] == "regression"
    found = model.predict(["the cat sat"] * 2, ["the number 1", "the number 2"])
    assert len(found) == 2 and all(isinstance(value, float) for value in found)
    assert model.predict("the cat sat", "the number 1") == pytest.approx(found[0], abs=1e-5)
    assert LoRAModel.load("runs/trivet", **CPU).predict("the cat sat", "the number 1") == pytest.approx(
        found[0], abs=1e-5
    )


def test_encoder_decoders_write_save_and_merge(place: Path) -> None:
    for kind in ("t5", "bart"):
        save_tiny(kind, place / kind, **({"pad_token_id": 1} if kind == "bart" else {}))
        model = LoRAModel(kind, **FEW, output_dir=f"runs/{kind}")
        assert model.finetune(colour_rows(24), quiet=True)["task"] == "seq2seq"
        written = model.generate("what colour is the sky ?", max_new_tokens=5)
        assert LoRAModel.load(f"runs/{kind}", **CPU).generate("what colour is the sky ?", max_new_tokens=5) == written
        model.merge(f"merged-{kind}")


def test_bart_classifies_rows_of_any_length(place: Path) -> None:
    """BART's head reads the end-of-sequence token, of which every row must have as many."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = bpe_tokenizer(("</s>", "<pad>"), pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    config = tiny_model("bart", len(tokenizer), pad_token_id=1).config
    config.max_position_embeddings = 512
    hf.BartForConditionalGeneration(config).save_pretrained("bart")
    tokenizer.save_pretrained("bart")
    rows = [{"text": "the cat sat " * (120 if i % 2 else 1), "label": "ab"[i % 2]} for i in range(24)]
    model = LoRAModel("bart", **FEW)
    assert model.finetune(rows, quiet=True)["task"] == "classification"
    assert model.save("saved").error <= 1e-4
    found = model.predict([row["text"] for row in rows[:2]])
    assert LoRAModel.load("saved", **CPU).predict([row["text"] for row in rows[:2]]) == found
    assert type(model.merge("merged")) is hf.BartForSequenceClassification


def test_it_predicts_nothing_where_it_writes(place: Path) -> None:
    with pytest.raises(ModelError, match="has no classes; use generate"):
        LoRAModel("gpt2", **CPU).predict("hello")


def test_what_dataset_forms_are_taken(place: Path) -> None:
    import datasets

    rows = colour_rows(24)
    prints = []
    for index, source in enumerate((rows, datasets.Dataset.from_list(rows), load_dataset(rows))):
        model = LoRAModel("gpt2", **FEW | {"max_steps": 1}, output_dir=f"runs/{index}")
        prints.append(model.finetune(source, test=rows[:2], quiet=True)["data"]["fingerprints"])
    assert prints[0] == prints[1] == prints[2]


def test_mistakes_are_named(place: Path) -> None:
    with pytest.raises(ConfigError, match="lora_rnak.*lora_rank"):
        LoRAModel("gpt2", lora_rnak=8)
    with pytest.raises(ConfigError, match="model.name is not set"):
        LoRAModel()
    with pytest.raises(ConfigError, match="no/such/model: no such folder"):
        LoRAModel("no/such/model")
    with pytest.raises(ConfigError, match="data.train is not set"):
        LoRAModel("gpt2", **CPU).finetune(quiet=True)
    with pytest.raises(ConfigError, match="no such folder"):
        LoRAModel.load("nothing")
    with pytest.raises(AdapterError, match="no adapter_config.json"):
        LoRAModel.load("gpt2")
    model = LoRAModel("gpt2", **FEW)
    model.finetune("train.jsonl", quiet=True)
    with pytest.raises(RunExistsError):
        model.finetune("train.jsonl", quiet=True)
    assert model.finetune("train.jsonl", overwrite=True, max_steps=2, quiet=True)["steps"] == 2


def test_an_adapter_made_by_peft_alone_is_opened(place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = hf.AutoModelForCausalLM.from_pretrained("gpt2")
    made = get_peft_model(base, LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    made.save_pretrained("foreign")
    opened = LoRAModel.load("foreign", **CPU)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened.model.eval()(ids).logits, made.eval()(ids).logits)
    assert opened.session.base.name == "gpt2"
    path = place / "foreign" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="base model"):
        LoRAModel.load("foreign", **CPU)
    assert LoRAModel.load("foreign", base_model="gpt2", **CPU).session.base.task == "causal-lm"


def test_generation_follows_its_settings(place: Path) -> None:
    model = LoRAModel("gpt2", **CPU)
    few, more = (model.generate("what colour", max_new_tokens=n) for n in (3, 12))
    assert 0 < len(few) < len(more)
    torch.manual_seed(0)
    sampled = {model.generate("what colour", max_new_tokens=8, temperature=5.0) for _ in range(3)}
    assert len(sampled) > 1
    assert model.generate("what colour", max_new_tokens=8) == model.generate("what colour", max_new_tokens=8)
    assert model.generate([], max_new_tokens=3) == []


def test_attach_gives_a_model_for_ones_own_trainer(place: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    model = trivet.attach(hf.AutoModelForCausalLM.from_pretrained("gpt2"), lora_rank=4)
    rows = [tokenizer(text) for text in CORPUS * 4]
    arguments = hf.TrainingArguments(
        "own", max_steps=10, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    collator = hf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = hf.Trainer(model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    model.save_pretrained("own-adapter")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found = LoRAModel.load("own-adapter", **CPU).model.eval()(ids).logits
        torch.testing.assert_close(found, model.eval()(ids).logits)
