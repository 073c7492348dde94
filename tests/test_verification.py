"""`trivet verify`: what is whole passes, what computes the same agrees, and everything else is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trivet.adapter.load import load_adapter
from trivet.adapter.save import export, merge, save_adapter
from trivet.cli.app import main
from trivet.compression import compress_adapter
from trivet.errors import AdapterError, ConfigError, ModelError, ProofError, TrivetError
from trivet.session import reopen
from trivet.verification import check_files, verify

CLASSES = {
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForSequenceClassification",
}


def made(kind: str, base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of unequal ranks with random factors, made by PEFT alone."""
    torch.manual_seed(7)
    options = {"num_labels": 3} if kind == "bert" else {}
    model = getattr(hf, CLASSES[kind]).from_pretrained(base, dtype=torch.float32, **options)
    low = {"gpt2": "c_fc", "t5": "wo", "bert": "query"}[kind]
    task = {"gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}[kind]
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {low: 2}, "task_type": task,
           "fan_in_fan_out": kind == "gpt2", **settings}
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            p.data = torch.randn(p.shape, generator=draw) * (0.1 if kind == "t5" else 0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def forms(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Every form of one adapter, as the verbs write them, by kind of model."""
    known: dict[str, dict[str, Path]] = {}

    def get(kind: str) -> dict[str, Path]:
        if kind not in known:
            place = tmp_path_factory.mktemp(f"forms-{kind}")
            found = {"made": made(kind, tiny(kind), place / "made")}
            for form in ("native", "portable"):
                session = reopen(found["made"], dtype="bfloat16" if form == "portable" else "float32")
                export(session.model, place / form, form, session.probe(), tokenizer=session.tokenizer)
                found[form] = place / form
            for dtype in ("float32", "bfloat16", "float16"):
                session = reopen(found["made"], dtype=dtype)
                merge(session.model, place / dtype, session.probe(), tokenizer=session.tokenizer)
                found[dtype] = place / dtype
            known[kind] = found
        return known[kind]

    return get


@pytest.mark.parametrize("kind", CLASSES)
def test_every_form_agrees_with_the_adapter_it_is_of(forms: Any, kind: str) -> None:
    found = forms(kind)
    for form in ("native", "portable", "float32", "bfloat16", "float16"):
        done = verify(found[form], found["made"])
        assert done.proof is not None and done.proof.error <= done.proof.tolerance == 1e-4, form
        assert bool(done.proof.why) == (form in ("bfloat16", "float16")), form
        assert [x.kind for x in done.artefacts] == ["adapter" if form in ("native", "portable") else "model", "adapter"]
    assert verify(found["made"], found["portable"]).proof is not None


def test_a_merged_model_that_was_rounded_otherwise_agrees_within_its_type_and_says_so(
    forms: Any, tmp_path: Path
) -> None:
    found = forms("gpt2")
    folder = Path(shutil.copytree(found["bfloat16"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    key = "transformer.h.0.mlp.c_fc.weight"
    tensors[key] = tensors[key] * (1 + 2**-7)  # one more step of bfloat16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = verify(folder, found["made"])
    assert done.proof is not None
    assert 1e-4 < done.proof.error <= done.proof.tolerance == 5e-2 and "not those of float32" in done.proof.why
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="does not compute what"):
        verify(folder, found["made"])


def test_two_merged_models_are_compared_in_the_coarser_type(forms: Any) -> None:
    found = forms("gpt2")
    done = verify(found["float32"], found["bfloat16"])
    assert done.proof is not None and done.proof.error <= done.proof.tolerance


def test_a_compressed_adapter_is_sound_and_differs_from_the_whole_one(forms: Any, tmp_path: Path) -> None:
    found = forms("gpt2")
    written = compress_adapter(found["made"], 900, output=tmp_path / "small")
    assert written.proof.error <= written.proof.tolerance == 1e-4
    assert len(verify(tmp_path / "small").artefacts) == 1
    with pytest.raises(ProofError, match=r"relative logit error .* \(tolerance 1e-04\)"):
        verify(tmp_path / "small", found["made"])


def test_dora_merges_and_agrees(tiny: Any, tmp_path: Path) -> None:
    folder = made("gpt2", tiny("gpt2"), tmp_path / "a", use_dora=True)
    session = reopen(folder, dtype="float32")
    merge(session.model, tmp_path / "m", session.probe(), tokenizer=session.tokenizer)
    assert verify(tmp_path / "m", folder).proof is not None


def test_other_models_do_not_agree(forms: Any, tiny: Any) -> None:
    for one, other, says in (
        (forms("gpt2")["made"], tiny("gpt2"), "does not compute"),
        (forms("gpt2")["float32"], forms("bert")["float32"], "vocabulary|shape"),
        (forms("bert")["float32"], forms("gpt2")["float32"], "vocabulary|shape"),
    ):
        with pytest.raises(ProofError, match=says):
            verify(one, other)


def test_the_first_one_s_base_model_serves_both(forms: Any, tiny: Any, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(forms("gpt2")["made"], tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert verify(moved, forms("gpt2")["made"]).proof is not None
    with pytest.raises(AdapterError, match="pass --base-model"):
        verify(moved)
    assert verify(moved, base_model=str(tiny("gpt2"))).proof is None


# -- damage ------------------------------------------------------------------------------------------------------------


def put(file: Path, key: str, value: float) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if key in name)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


def index(folder: Path, **names: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


MODEL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "only pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles, which can run"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors: can't be read, it is damaged",
    ),
    "NaN": (lambda f: put(f / "model.safetensors", "c_fc.weight", float("nan")), "c_fc.weight holds NaN or infinity"),
    "infinity": (lambda f: put(f / "model.safetensors", "wte", float("inf")), "wte.weight holds NaN or infinity"),
    "shards elsewhere": (lambda f: index(f, wte="../../part.safetensors"), "names no files of this folder"),
    "a shard less": (lambda f: index(f, wte="other.safetensors"), "has no other.safetensors"),
    "config twice": (
        lambda f: (f / "config.json").write_text('{"architectures": [], "architectures": []}'), "is given twice",
    ),
    "a tensor less": (
        lambda f: save_file(
            {k: v for k, v in load_file(f / "model.safetensors").items() if "c_fc" not in k},
            f / "model.safetensors", metadata={"format": "pt"},
        ),
        "lacks weights of GPT2LMHeadModel",
    ),
    "custom code": (
        lambda f: (f / "config.json").write_text(
            json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}})
        ),
        "can't be loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MODEL)
def test_a_damaged_model_is_named(forms: Any, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(forms("gpt2")["float32"], tmp_path / "model"))
    damage, says = MODEL[what]
    damage(folder)
    with pytest.raises((AdapterError, ModelError), match=says) as caught:
        verify(folder)
    assert str(folder) in str(caught.value)


ADAPTER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "NaN": (lambda f: put(f / "adapter_model.safetensors", "lora_B", float("nan")), "holds NaN or infinity"),
    "a head of infinity": (
        lambda f: put(f / "adapter_model.safetensors", "classifier", float("inf")), "classifier.*holds NaN or inf",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds neither adapter_config.json nor config.json"),
    "notes of a list": (lambda f: (f / "trivet.json").write_text("[1]"), "no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("what", ADAPTER)
def test_a_damaged_adapter_is_named(forms: Any, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(forms("bert")["made"], tmp_path / "adapter"))
    damage, says = ADAPTER[what]
    damage(folder)
    with pytest.raises(AdapterError, match=says):
        verify(folder)


def test_huge_factors_compute_no_numbers(forms: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forms("gpt2")["made"], tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * 1e30 for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ProofError, match="computes NaN or infinity"):
        verify(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        verify(tmp_path / "nothing")


def test_files_alone_need_no_base_model(forms: Any) -> None:
    found = check_files(forms("gpt2")["native"])
    assert (found.kind, found.types) == ("adapter", {torch.float32})
    assert found.about.startswith("8 layers, ranks 2 to 4, 2 scales, ")


def test_the_verb_prints_the_tolerance_and_ends_with_1_where_they_differ(
    forms: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = forms("gpt2")
    ends = []
    for other in (found["portable"], tiny("gpt2")):
        monkeypatch.setattr("sys.argv", ["trivet", "verify", str(found["made"]), "--against", str(other)])
        with pytest.raises(SystemExit) as end:
            main()
        ends.append((int(end.value.code or 0), *capsys.readouterr()))
    (code, out, _), (other_code, other_out, err) = ends
    assert code == 0 and "both compute the same; relative logit error" in out and "(tolerance 1e-04)" in out
    assert out.count("whole, loads and computes") == 2
    assert other_code == 1 and not other_out and "does not compute what" in err and "tolerance 1e-04" in err


# -- every writer proves what it wrote ---------------------------------------------------------------------------------


def test_every_writer_returns_a_proof_against_the_live_model(tiny: Any, tmp_path: Path) -> None:
    folder = made("gpt2", tiny("gpt2"), tmp_path / "made")
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 5e-2)):
        place = tmp_path / dtype
        session = reopen(folder, dtype=dtype)
        probe = session.probe()
        proofs = {
            "native": (save_adapter(session.model, place / "saved", probe), 1e-4),
            "portable": (export(session.model, place / "portable", "portable", probe), tolerance),
            "merged": (merge(session.model, place / "merged", probe, tokenizer=session.tokenizer)[1], tolerance),
        }
        for name, (proof, allowed) in proofs.items():
            assert proof.error <= proof.tolerance == allowed, name
            assert f"tolerance {allowed:.0e}" in str(proof)
            assert bool(proof.why) == (allowed > 1e-4), name


@pytest.mark.parametrize("writer", ["portable", "merged"])
def test_in_16_bits_a_small_error_in_what_was_written_is_caught_as_well(
    writer: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits' tolerance alone, 5e-2, would let it pass."""
    session = reopen(made("gpt2", tiny("gpt2"), tmp_path / "made"), dtype="bfloat16")
    name = "adapter_model.safetensors" if writer == "portable" else "model.safetensors"
    original = hf.PreTrainedModel.save_pretrained

    def nudge(folder: Path) -> None:
        tensors = load_file(folder / name)
        key = next(k for k in tensors if ("lora_B" in k if writer == "portable" else "c_fc.weight" in k))
        tensors[key] = (tensors[key].float() * 1.01).to(tensors[key].dtype)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    def saving(model: Any, folder: str, **options: Any) -> None:
        original(model, folder, **options)
        nudge(Path(folder))

    from trivet.adapter import save

    write = save._write

    def writing(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        nudge(folder)

    monkeypatch.setattr(save, "_write", writing)
    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", saving)
    with pytest.raises(ProofError, match="is not what was trained|is not in the file as it was merged"):
        if writer == "portable":
            export(session.model, tmp_path / "out", "portable", session.probe())
        else:
            merge(session.model, tmp_path / "out", session.probe(), tokenizer=session.tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_errors_are_of_one_family(forms: Any, tiny: Any) -> None:
    with pytest.raises(TrivetError):
        load_adapter(hf.AutoModelForCausalLM.from_pretrained(tiny("llama")), forms("gpt2")["made"])
