"""A base model in 4 bits: which layers, the same results as ordinary layers with its weights, and whole runs on it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import colour_rows
from process import trivet
from trivet import LoRAModel, attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.load import load_adapter
from trivet.adapter.save import logits
from trivet.configio import load
from trivet.data.dataset import load_dataset
from trivet.errors import ConfigError, ModelError
from trivet.four_bit import FourBitLinear, count_parameters, in_four_bit, to_four_bit, to_plain
from trivet.model import Base, load_base
from trivet.run import train
from trivet.session import reopen
from trivet.train.shard import shard
from trivet.verification import verify

CPU = {"dtype": "float32", "device": "cpu"}


def four_bits(folder: Path, **options: Any) -> Base:
    return load_base(str(folder), load_in_4bit=True, **{**CPU, **options})


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def learned(model: Any) -> list[torch.Tensor]:
    """Logits and every gradient of a fixed sum of them."""
    model.eval()  # no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(**inputs(model)).logits
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), trained, allow_unused=True)]


# -- which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "t5", "mixtral"])
def test_linear_layers_of_the_body_and_nothing_else(kind: str, tiny: Any) -> None:
    plain, base = load_base(str(tiny(kind)), **CPU), four_bits(tiny(kind))
    model: Any = base.model
    head = model.get_output_embeddings()
    linear = {name for name, m in plain.model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    found = {name for name, m in model.named_modules() if isinstance(m, FourBitLinear)}
    assert type(head) is nn.Linear
    assert found == linear - {name for name, m in model.named_modules() if m is head}
    assert count_parameters(model) == sum(p.numel() for p in plain.model.parameters())
    assert base.describe().split(",")[1:2] == plain.describe().split(",")[1:2]  # as many parameters
    assert "float32 with weights in 4 bits" in base.describe()
    for name in found:
        old = plain.model.get_submodule(name)
        was = old.weight.T if isinstance(old, Conv1D) else old.weight
        error = (model.get_submodule(name).weight - was).norm() / was.norm()
        assert error < 0.12, name  # normal weights: 0.092


def test_heads_and_new_poolers_stay(tiny: Any) -> None:
    base = four_bits(tiny("bert"), task="classification", labels=["a", "b"])
    assert type(base.model.classifier) is nn.Linear and base.model.classifier.weight.dtype == torch.float32
    assert type(base.model.bert.encoder.layer[0].attention.self.query) is FourBitLinear
    to_four_bit(left := copy.deepcopy(load_base(str(tiny("bert")), task="regression", **CPU).model), ["bert.pooler"])
    assert type(left.bert.pooler.dense) is nn.Linear and type(left.classifier) is FourBitLinear


def test_in_16_bits_heads_and_frequencies_stay_in_float32(tiny: Any) -> None:
    base = four_bits(tiny("bert"), task="classification", labels=["a", "b"], dtype="bfloat16")
    assert base.model.classifier.weight.dtype == torch.float32
    for four in (True, False):
        model: Any = load_base(str(tiny("llama")), load_in_4bit=four, dtype="bfloat16", device="cpu").model
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert model.model.norm.weight.dtype == torch.bfloat16


def test_a_file_in_16_bits_is_computed_in_float32(tiny: Any, tmp_path: Path) -> None:
    load_base(str(tiny("llama")), dtype="bfloat16", device="cpu").model.save_pretrained(tmp_path)
    for file in tiny("llama").glob("token*"):
        shutil.copy(file, tmp_path)
    base = four_bits(tmp_path)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32, torch.uint8, torch.int16}
    assert in_four_bit(base.model)[0].weight.dtype == torch.float32 == base.dtype


def test_a_model_without_linear_layers_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivet.model.to_four_bit", lambda *_: None)
    with pytest.raises(ModelError, match="no linear layers"):
        four_bits(tiny("llama"))


def test_layers_that_share_a_weight_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    to_four_bit(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, FourBitLinear]


def test_its_weight_can_not_be_set_and_follows_the_models_type() -> None:
    layer = FourBitLinear(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), None)
    exact = layer.weight
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(exact)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, exact.bfloat16())
    assert torch.equal(layer.float().weight, exact)
    assert torch.equal(layer.plain().weight, exact) and not layer.plain().weight.requires_grad


# -- the same as ordinary layers with these weights --------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", "half"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "t5", "mixtral"])
def test_results_and_gradients(kind: str, targets: str, fast: bool, tiny: Any) -> None:
    """With other layers adapted and not: both kinds of passes."""
    model: Any = four_bits(tiny(kind)).model
    plain = copy.deepcopy(model)
    to_plain(plain)
    assert not in_four_bit(plain)
    if targets == "half":
        names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, FourBitLinear)}
        targets = sorted(names)[::2]
    results = []
    for each, quick in ((model, fast), (plain, False)):
        adapted = attach(each, target_modules=targets, lora_rank=3, fast=quick, method={"decompose": "orthogonal"})
        for layer in adapted_layers(adapted):
            nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(3))
        assert bool(in_four_bit(adapted)) == (each is model)
        results.append(learned(adapted))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_in_bfloat16_as_exact_as_ordinary_layers(tiny: Any) -> None:
    """Errors of all results together, against float32; the ordinary layers are in PEFT's own passes."""
    results = {}
    for dtype, plain in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model: Any = four_bits(tiny("llama"), dtype=dtype).model
        if plain:
            to_plain(model)
        adapted = attach(model, lora_rank=3, fast=not plain, method={"decompose": "orthogonal"})
        results[dtype, plain] = torch.cat([x.float().flatten() for x in learned(adapted)])
    exact, ours, theirs = results.values()
    assert 0 < (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("decompose", ["principal", "core", "cur", "dora"])
def test_every_form_starts_from_these_weights_and_merges(decompose: str, tiny: Any) -> None:
    model: Any = four_bits(tiny("llama")).model
    adapted = attach(model, lora_rank=2, method={"decompose": decompose})
    for layer in adapted_layers(adapted):
        for p in layer.trained():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    expected = logits(adapted, inputs(model))
    merged = adapted.merge_and_unload()
    assert not in_four_bit(merged.model.layers)
    torch.testing.assert_close(logits(merged, inputs(merged)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_pefts_own_merging_loses_nothing(fast: bool, tiny: Any) -> None:
    """Its code adds to `weight.data`, which here is a copy."""
    adapted = attach(four_bits(tiny("gpt2")).model, fast=fast)
    for layer in adapted_layers(adapted):
        nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(5))
    given = inputs(adapted)
    expected = logits(adapted, given)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted, given), expected, atol=1e-2)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), given), expected, rtol=1e-4, atol=1e-4)


# -- whole runs --------------------------------------------------------------------------------------------------------


def settings(model: Path, out: Path, **more: Any) -> Any:
    return load(
        values={
            "model.name": str(model), "model.load_in_4bit": True, "model.dtype": "float32", "model.device": "cpu",
            "training.max_steps": 6, "training.learning_rate": 1e-2, "evaluation.resamples": 10,
            "evaluation.max_new_tokens": 6, "output_dir": str(out), **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
def test_a_run_is_opened_merged_and_verified_on_the_weights_it_was_trained_on(
    kind: str, tiny: Any, tmp_path: Path
) -> None:
    rows: Any = colour_rows(24)
    if kind == "bert":
        rows = [{"text": row["prompt"], "label": row["completion"]} for row in rows]
    config = settings(tiny(kind), tmp_path / "run")
    outcome = train(config, console=Console(quiet=True), train=load_dataset(rows))
    assert outcome.result["load_in_4bit"] is True
    assert outcome.result["metrics"]["tuned"]["loss"] < outcome.result["metrics"]["base"]["loss"]
    assert json.loads((tmp_path / "run/adapter/trivet.json").read_text())["load_in_4bit"] is True
    session = reopen(tmp_path / "run")
    assert in_four_bit(session.model)
    probe = session.probe()
    torch.testing.assert_close(logits(session.model, probe), logits(outcome.session.model, probe))
    LoRAModel.load(tmp_path / "run").merge(tmp_path / "merged")
    assert verify(tmp_path / "merged", against=tmp_path / "run")
    whole = LoRAModel.load(tmp_path / "run").merge()
    assert not in_four_bit(whole)
    torch.testing.assert_close(logits(whole, probe), logits(session.model, probe), rtol=1e-3, atol=1e-4)


def test_an_adapter_also_goes_on_the_whole_weights(tiny: Any, tmp_path: Path) -> None:
    config = settings(tiny("gpt2"), tmp_path / "run")
    train(config, console=Console(quiet=True), train=load_dataset(colour_rows(24)))
    whole = load_adapter(load_base(str(tiny("gpt2")), **CPU).model, tmp_path / "run/adapter")
    assert not in_four_bit(whole)
    four = reopen(tmp_path / "run").model
    apart = (logits(whole, inputs(whole)) - logits(four, inputs(four))).norm() / logits(four, inputs(four)).norm()
    assert 1e-4 < apart < 0.5  # close, and not the same


def test_squeezing_resumes_to_the_same_bits(tiny: Any, tmp_path: Path) -> None:
    rows = load_dataset(colour_rows(24))
    method = {"decompose": "gradient", "rank": {"name": "squeeze", "budget": "r2-equivalent"}}
    more = {"method": method, "training.max_steps": 12, "training.eval_steps": 4, "training.keep_checkpoints": 5}
    for name in ("whole", "parts"):
        train(settings(tiny("llama"), tmp_path / name, **more), console=Console(quiet=True), train=rows)
    (tmp_path / "parts/result.json").unlink()
    for step in (8, 12):
        for path in (tmp_path / "parts/checkpoints").glob(f"*{step}"):
            shutil.rmtree(path)
    assert list((tmp_path / "parts/checkpoints").iterdir())
    train(settings(tiny("llama"), tmp_path / "parts", **more), console=Console(quiet=True), train=rows, resume=True)
    ours, theirs = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "parts"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_from_the_shell(world: Any) -> None:
    done = trivet(world.cwd, ["train", "config.yaml", "load_in_4bit=true", "output_dir=runs/four"])
    assert done.returncode == 0, done.stderr
    assert "with weights in 4 bits" in done.stdout + done.stderr
    losses = []
    for choice, four in ((), True), (("--no-load-in-4bit",), False):
        done = trivet(world.cwd, ["evaluate", "runs/four", "--data", "train.jsonl", "--no-generate", *choice])
        assert done.returncode == 0, done.stderr
        found = json.loads((world.cwd / "runs/four/result.json").read_text())
        assert found["evaluated_on"]["load_in_4bit"] is four
        losses.append(found["metrics"]["base"]["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.2
    done = trivet(world.cwd, ["merge", "runs/four", "whole", "--no-load-in-4bit"])
    assert done.returncode == 0, done.stderr
    done = trivet(world.cwd, ["verify", "whole", "--against", "runs/four"])
    assert done.returncode == 1 and "compute" in done.stderr  # not what was trained
    done = trivet(world.cwd, ["train", "config.yaml", "load_in_4bit=maybe", "output_dir=runs/five"])
    assert done.returncode == 2 and "load_in_4bit" in done.stderr


def test_fsdp_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="4 bits"):
        shard(attach(four_bits(tiny("gpt2")).model))
