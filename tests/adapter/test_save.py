"""Saved forms: another program, without trivet, gets the same logits from each of them; damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import save_tiny
from trivet.adapter import save
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.load import load_adapter, read_config, read_notes
from trivet.adapter.save import (
    compare_logits,
    export,
    logits,
    merge,
    portable,
    prove_adapter,
    save_adapter,
)  # fmt: skip
from trivet.errors import AdapterError, ConfigError, ProofError
from trivet.runfolder import new_folder

CLASSES = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bart": "AutoModelForSeq2SeqLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForSequenceClassification",
}
#: Layers of each model whose rank and scale differ from the others'.
UNEVEN = {
    "gpt2": ("h.0.attn.c_attn", "c_fc"),
    "llama": ("layers.0.self_attn.q_proj", "down_proj"),
    "bart": ("encoder.layers.0.self_attn.q_proj", "fc1"),
    "t5": ("decoder.block.0.layer.0.SelfAttention.q", "wo"),
    "bert": ("encoder.layer.0.attention.self.query", "intermediate.dense"),
}
KINDS = list(CLASSES)


def base_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(7)  # a classifier's head is not in the folder
    return getattr(hf, CLASSES[kind]).from_pretrained(folder, dtype=dtype)


def some_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Two rows, the second padded."""
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"decoder_input_ids": ids[:, :5].contiguous()} if kind in ("bart", "t5") else {})


def scramble(model: PeftModel) -> PeftModel:
    """Random factors (and head), so that every layer's update shows in the output."""
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data = torch.randn(p.shape, generator=draw).mul_(0.3).to(p.dtype)
    return model.eval()


def uneven(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """An adapter of unequal ranks and scales, made by PEFT alone."""
    low, other = UNEVEN[kind]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={low: 2, other: 6},
        alpha_pattern={low: 10, other: 3},
        task_type=TaskType.SEQ_CLS if kind == "bert" else None,
        fan_in_fan_out=kind == "gpt2",
        **settings,
    )
    return scramble(get_peft_model(base_model(kind, folder, dtype), config))


# -- every form, read back by a program that knows nothing of trivet -----------------------------------------

READER = """
import json, sys
import peft, torch, transformers
from safetensors.torch import load_file, save_file
for job in json.load(open(sys.argv[1])):
    torch.manual_seed(7)
    model = getattr(transformers, job["class"]).from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    if job["adapter"]:
        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        found = model.eval()(**load_file(job["inputs"])).logits.float().contiguous()
    save_file({"logits": found}, job["output"])
assert not [name for name in sys.modules if name.split(".")[0] == "trivet"], "the reader must not import trivet"
"""


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each saved form of each model: the live logits, and those that the other program computed."""
    place = tmp_path_factory.mktemp("forms")
    live: dict[str, torch.Tensor] = {}
    jobs: list[dict[str, Any]] = []

    def job(name: str, kind: str, model: PeftModel, base: Path, adapter: Path | None, dtype: str = "float32") -> None:
        live[name] = logits(model, some_inputs(kind))
        inputs = place / f"{kind}.safetensors"
        save_file(some_inputs(kind), inputs)
        jobs.append(
            {"class": CLASSES[kind], "base": str(base), "adapter": str(adapter) if adapter else None, "dtype": dtype,
             "inputs": str(inputs), "output": str(place / f"{name}.out")}
        )  # fmt: skip

    for kind in KINDS:
        base, probe = save_tiny(kind, place / kind), some_inputs(kind)
        attached = attach(base_model(kind, base), task="classification" if kind == "bert" else "auto")
        save_adapter(scramble(attached), place / f"{kind}-saved", probe, notes={"base_model": kind})
        job(f"{kind}-saved", kind, attached, base, place / f"{kind}-saved")
        for form in ("native", "portable"):
            model = uneven(kind, base)
            export(model, place / f"{kind}-{form}", form, probe)
            job(f"{kind}-{form}", kind, model, base, place / f"{kind}-{form}")
        model = uneven(kind, base)
        job(f"{kind}-merged", kind, model, place / f"{kind}-merged", None)
        merge(model, place / f"{kind}-merged", probe, tokenizer=None)
    model = uneven("llama", place / "llama", use_rslora=True)
    export(model, place / "llama-rslora", "portable", some_inputs("llama"))
    job("llama-rslora", "llama", model, place / "llama", place / "llama-rslora")
    model = uneven("llama", place / "llama", torch.bfloat16)
    job("llama-bfloat16", "llama", model, place / "llama-bfloat16", None, "bfloat16")
    merge(model, place / "llama-bfloat16", some_inputs("llama"), tokenizer=None)

    (place / "jobs.json").write_text(json.dumps(jobs))
    (place / "reader.py").write_text(READER)
    done = subprocess.run(
        [sys.executable, "reader.py", "jobs.json"], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (expected, load_file(place / f"{name}.out")["logits"]) for name, expected in live.items()}


@pytest.mark.parametrize("form", ["saved", "native", "portable", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_program_gets_the_same_logits(read_back: dict[str, Any], kind: str, form: str) -> None:
    expected, found = read_back[f"{kind}-{form}"]
    assert float((expected - found).abs().max() / expected.abs().max()) <= 1e-4


def test_another_program_gets_the_same_logits_from_rslora(read_back: dict[str, Any]) -> None:
    expected, found = read_back["llama-rslora"]
    assert float((expected - found).abs().max() / expected.abs().max()) <= 1e-4


def test_another_program_gets_the_same_logits_within_rounding_from_16_bits(read_back: dict[str, Any]) -> None:
    expected, found = read_back["llama-bfloat16"]
    error = float((expected - found).abs().max() / expected.abs().max())
    assert 0 < error <= 5e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_matters_to_the_logits_that_are_compared(tmp_path: Path, kind: str) -> None:
    model = uneven(kind, save_tiny(kind, tmp_path / kind))
    tuned = logits(model, some_inputs(kind))
    with model.disable_adapter():
        base = logits(model, some_inputs(kind))
    assert float((tuned - base).abs().max() / tuned.abs().max()) > 0.05


# -- the portable form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_portable_has_one_rank_one_alpha_and_every_layer(tmp_path: Path, kind: str, rslora: bool) -> None:
    model = uneven(kind, save_tiny(kind, tmp_path / kind), use_rslora=rslora)
    layers = adapted_layers(model)
    assert {layer.rank for layer in layers} == {2, 4, 6} and len({round(layer.scale, 6) for layer in layers}) == 3
    config, tensors = portable(model)
    assert config.r == 6 and not config.rank_pattern and not config.alpha_pattern and not config.use_rslora
    scale = config.lora_alpha / config.r
    for layer in layers:
        a = tensors[f"base_model.model.{layer.name}.lora_A.weight"]
        b = tensors[f"base_model.model.{layer.name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 6
        torch.testing.assert_close(scale * b @ a, layer.delta(), rtol=1e-4, atol=1e-5)
        assert not a[layer.rank :].any() and not b[:, layer.rank :].any()
    assert sum(".lora_A." in key for key in tensors) == len(layers)
    untouched = logits(model, some_inputs(kind))
    assert {layer.rank for layer in adapted_layers(model)} == {2, 4, 6}
    assert model.peft_config["default"].rank_pattern
    assert torch.equal(logits(model, some_inputs(kind)), untouched)


def test_dora_has_no_portable_form(tmp_path: Path) -> None:
    model = uneven("llama", save_tiny("llama", tmp_path / "llama"), use_dora=True)
    with pytest.raises(ConfigError, match="DoRA"):
        export(model, tmp_path / "out", "portable", some_inputs("llama"))
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    export(model, tmp_path / "out", "native", some_inputs("llama"))


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    model = uneven("llama", save_tiny("llama", tmp_path / "llama"))
    with pytest.raises(ConfigError, match="native, portable"):
        export(model, tmp_path / "out", "gguf", some_inputs("llama"))


# -- merging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_tied_embeddings_stay_tied_and_are_stored_once(tmp_path: Path, kind: str) -> None:
    model = uneven(kind, save_tiny(kind, tmp_path / kind))
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    merged, proof = merge(model, tmp_path / "out", some_inputs(kind), tokenizer=None)
    assert proof.error <= 1e-4
    again = getattr(hf, CLASSES[kind]).from_pretrained(tmp_path / "out")
    for each in (merged, again):
        assert each.get_input_embeddings().weight is each.get_output_embeddings().weight
        assert torch.equal(each.get_input_embeddings().weight, before)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not {"lm_head.weight"} & set(file.keys())
    assert again.config.use_cache


def test_merging_rounds_once_to_the_type_asked_for(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    exact, _ = merge(uneven("llama", folder), tmp_path / "exact", some_inputs("llama"), tokenizer=None)
    rounded, proof = merge(
        uneven("llama", folder), tmp_path / "out", some_inputs("llama"), tokenizer=None, dtype=torch.bfloat16
    )
    assert rounded.dtype == torch.bfloat16 and proof.tolerance == 5e-2
    for (name, p), (_, q) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q), name
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_tokenizer_is_saved_with_the_model(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    merge(uneven("gpt2", folder), tmp_path / "out", some_inputs("gpt2"), tokenizer=tokenizer)
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("what colour")["input_ids"] == tokenizer("what colour")["input_ids"]


# -- proof ---------------------------------------------------------------------------------------------------


def test_a_save_that_is_corrupted_on_disk_is_caught_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = uneven("llama", save_tiny("llama", tmp_path / "llama"))
    prove = save.prove_adapter

    def corrupt_then_prove(model: Any, folder: Path, *rest: Any) -> Any:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(n for n in tensors if "lora_B" in n)
        save_file({**tensors, name: tensors[name] * 1.5}, path)
        return prove(model, folder, *rest)

    monkeypatch.setattr(save, "prove_adapter", corrupt_then_prove)
    with pytest.raises(ProofError, match="does not compute what was trained"):
        save_adapter(model, tmp_path / "out", some_inputs("llama"))
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    assert list(model.peft_config) == ["default"]


def test_a_file_that_lacks_a_layer_fails_the_proof(tmp_path: Path) -> None:
    model = uneven("llama", save_tiny("llama", tmp_path / "llama"))
    save_adapter(model, tmp_path / "out", some_inputs("llama"))
    drop_layer(tmp_path / "out")
    with pytest.raises(ProofError):
        prove_adapter(model, tmp_path / "out", some_inputs("llama"))


def test_nan_is_no_proof() -> None:
    good, bad = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(ProofError):
            compare_logits(*pair, "adapter", 1e-4)


def test_the_error_is_relative_to_the_largest_logit() -> None:
    assert compare_logits(torch.tensor([0.0, 50.0]), torch.tensor([0.1, 50.0]), "a", 1e-2).error == pytest.approx(2e-3)


def test_proving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = base_model("bert", save_tiny("bert", tmp_path / "bert"))
    model = scramble(attach(base, task="classification")).train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    save_adapter(model, tmp_path / "out", some_inputs("bert"))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, p in after.items():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1], name
    assert model.training and model.active_adapter == "default"


# -- files ---------------------------------------------------------------------------------------------------


def test_a_saved_folder_is_readable_by_others_and_holds_nothing_but_what_is_needed(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    model, probe = uneven("gpt2", folder), some_inputs("gpt2")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    save_adapter(model, tmp_path / "saved", probe, tokenizer=tokenizer, notes={"task": "causal-lm"})
    export(model, tmp_path / "portable", "portable", probe)
    merge(model, tmp_path / "merged", probe, tokenizer=None)
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in (tmp_path / "saved").iterdir()} == weights | {
        "trivet.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "portable").iterdir()} == weights
    for name in ("saved", "portable", "merged"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o755
        for path in (tmp_path / name).iterdir():
            assert path.stat().st_mode & 0o777 == 0o644, path
    digest = hashlib.sha256((tmp_path / "saved" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (
        read_notes(tmp_path / "saved") == {"task": "causal-lm", "weights_sha256": digest}
        and read_notes(tmp_path / "portable") == {}
    )


def test_new_folder_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="on purpose"), new_folder(target, "thing") as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError("on purpose")
    assert list((tmp_path / "deep").iterdir()) == []
    for text in ("first", "second"):
        with new_folder(target, "thing") as temporary:
            (temporary / text).write_text(text)
        assert [p.name for p in target.iterdir()] == [text]
    with pytest.raises(KeyboardInterrupt), new_folder(target, "thing") as temporary:
        (temporary / "third").write_text("")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


# -- damaged and foreign adapters ----------------------------------------------------------------------------


def drop_layer(folder: Path) -> None:
    (folder / "trivet.json").unlink(missing_ok=True)  # with its checksum
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "lora_B" in name).rpartition(".lora_B")[0]
    save_file({name: t for name, t in tensors.items() if not name.startswith(gone)}, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    model = uneven("llama", save_tiny("llama", place / "llama"))
    save_adapter(model, place / "adapter", some_inputs("llama"), notes={"task": "causal-lm"})
    return place


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "garbled config": (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "config that is a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "adapter_config.json"),
    "config of bytes": (
        lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "adapter_config.json",
    ),
    "no type": (lambda d: change_config(d, peft_type=None), "adapter_config.json|not LoRA"),
    "another type": (lambda d: change_config(d, peft_type="IA3"), "not LoRA|adapter_config.json"),
    "unknown type": (lambda d: change_config(d, peft_type="NO_SUCH"), "adapter_config.json"),
    "rank as text": (lambda d: change_config(d, r="four"), "does not fit|adapter_config.json"),
    "rank 0": (lambda d: change_config(d, r=0), "does not fit|adapter_config.json"),
    "other rank": (lambda d: change_config(d, rank_pattern={}), "do not belong together"),
    "no such layer": (lambda d: change_config(d, target_modules=["nothing"]), "does not fit"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickled weights": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        "pickles.*convert",
    ),
    "cut weights": (lambda d: truncate(d / "adapter_model.safetensors"), "damaged"),
    "empty weights": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "damaged"),
    "a layer less": (drop_layer, "its file lacks .*lora_A"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_adapter_is_an_adapter_error(saved: Path, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(AdapterError, match=f"(?s){message}") as caught:
        load_adapter(base_model("llama", saved / "llama"), folder)
    assert str(folder) in str(caught.value)


def test_an_adapter_of_a_wider_or_deeper_model_does_not_fit(saved: Path, tmp_path: Path) -> None:
    for changes in ({"hidden_size": 64, "intermediate_size": 128}, {"num_hidden_layers": 4}):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        other = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **{**sizes, **changes}))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        scramble(get_peft_model(other, LoraConfig(r=4, target_modules="all-linear"))).save_pretrained(folder)
        with pytest.raises(AdapterError, match="does not fit"):
            load_adapter(base_model("llama", saved / "llama"), folder)


def test_a_whole_adapter_loads(saved: Path) -> None:
    model = load_adapter(base_model("llama", saved / "llama"), saved / "adapter")
    assert {layer.rank for layer in adapted_layers(model)} == {2, 4, 6}
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in load_adapter(model.unload(), saved / "adapter", trainable=True).parameters())


def test_no_folder_at_all_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_config(tmp_path / "nothing")


def test_garbled_notes_are_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
    (folder / "trivet.json").write_text("{")
    with pytest.raises(AdapterError, match="trivet.json"):
        read_notes(folder)
