"""Loading base models: what is taken, what is refused and how it is said, and what a checkpoint may lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import colour_rows, save_tiny, tiny_model, word_tokenizer
from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.errors import ConfigError, ModelError
from trivet.evaluate.score import head_scores
from trivet.model import check_base, load_base, pick_device, pick_dtype
from trivet.run import train
from trivet.session import reopen

CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}

# -- type and device -----------------------------------------------------------------------------------------


def test_auto_dtype_is_bfloat16_where_the_processor_computes_in_it() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("needs /proc/cpuinfo to know what the processor can do")
    able = any(flag in flags.read_text().split() for flag in ("avx512_bf16", "amx_bf16"))
    assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if able else torch.float32)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_chosen_dtype_is_the_models(tiny: Any, name: str) -> None:
    base = load_base(str(tiny("gpt2")), dtype=name, device="cpu")
    assert base.dtype == base.model.dtype == getattr(torch, name)
    assert name in base.describe() and "causal-lm" in base.describe()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.device cuda: this machine has none"):
        pick_device("cuda")


def test_auto_device_is_the_best_there_is() -> None:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == pick_device("auto").type == best
    assert pick_device("cpu").type == "cpu"


# -- tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data_format", "task", "cls"),
    [
        ("gpt2", "text", "causal-lm", hf.GPT2LMHeadModel),
        ("llama", "messages", "causal-lm", hf.LlamaForCausalLM),
        ("bart", "prompt-completion", "seq2seq", hf.BartForConditionalGeneration),
        ("t5", "references", "seq2seq", hf.T5ForConditionalGeneration),
        ("bert", "classification", "classification", hf.BertForSequenceClassification),
        ("distilbert", "regression", "regression", hf.DistilBertForSequenceClassification),
        ("gpt2", "classification", "classification", hf.GPT2ForSequenceClassification),
        ("bart", "classification", "classification", hf.BartForSequenceClassification),
    ],
)
def test_the_task_follows_the_rows_and_the_architecture(
    tiny: Any, kind: str, data_format: str, task: str, cls: type
) -> None:
    labels = ["a", "b", "c"] if task == "classification" else None
    base = load_base(str(tiny(kind)), data_format=data_format, labels=labels, **CPU)
    assert base.task == task and type(base.model) is cls
    assert base.model.config.use_cache is False
    if task == "classification":
        assert base.labels == ("a", "b", "c") and base.model.config.num_labels == 3
        assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert base.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    if task == "regression":
        assert base.model.config.num_labels == 1 and base.model.config.problem_type == "regression"


def test_an_encoder_writes_no_text_and_the_message_says_what_does(tiny: Any) -> None:
    with pytest.raises(ModelError, match=r"bert.*no causal language model; use rows with text and label"):
        load_base(str(tiny("bert")), data_format="prompt-completion", **CPU)


def test_an_encoder_decoder_is_no_causal_model_and_the_other_way_round(tiny: Any) -> None:
    with pytest.raises(ModelError, match="t5.*use model.task: seq2seq"):
        load_base(str(tiny("t5")), task="causal-lm", **CPU)
    with pytest.raises(ModelError, match="gpt2.*use model.task: causal-lm"):
        load_base(str(tiny("gpt2")), task="seq2seq", **CPU)


def test_the_head_depends_on_the_seed_alone(tiny: Any) -> None:
    def head(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        base = load_base(str(tiny("bert")), task="classification", labels=["a", "b"], seed=seed, **CPU)
        return base.model.classifier.weight

    assert torch.equal(head(1, noise=5), head(1, noise=6))
    assert not torch.equal(head(1, noise=5), head(2, noise=5))


# -- tokenizers ----------------------------------------------------------------------------------------------


def test_a_missing_padding_token_is_stood_in_for(tiny: Any) -> None:
    assert hf.AutoTokenizer.from_pretrained(tiny("gpt2")).pad_token_id is None
    base = load_base(str(tiny("gpt2")), **CPU)
    assert base.tokenizer.pad_token == base.tokenizer.eos_token
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    path = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_token")}
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ModelError, match="no padding, end-of-sequence or unknown token"):
        load_base(str(folder), **CPU)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama", "bart", "t5", "bert", "roberta"):
        options = CPU | ({"task": "classification", "labels": ["a", "b"]} if "bert" in kind else {})
        folder = tmp_path / kind
        tiny_model(kind, 64).save_pretrained(folder)
        with pytest.raises(ModelError, match=f"{kind}.*tokenizer"):
            load_base(str(folder), **options)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    tiny_model("gpt2", 100).save_pretrained(folder)
    with pytest.raises(ModelError, match="tokens but the model embeds only 100"):
        load_base(str(folder), **CPU)


def test_embeddings_may_be_larger_than_the_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    tiny_model("gpt2", 512).save_pretrained(folder)
    assert load_base(str(folder), **CPU).model.config.vocab_size == 512


# -- what can't be loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, ""])
def test_no_name(name: str | None) -> None:
    for refuse in (check_base, load_base):
        with pytest.raises(ConfigError, match="model.name is not set"):
            refuse(name)


@pytest.mark.parametrize("name", ["no/such/folder/here", "/no/such", "./nothing", "../nothing", "nothing.gguf", "a b"])
def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for refuse in (check_base, load_base):
        with pytest.raises(ConfigError, match="no such folder or file"):
            refuse(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_a_hub_model_without_the_hub_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name}: no such local folder.*demo"):
        load_base(name, **CPU)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    for refuse in (check_base, load_base):
        with pytest.raises(ModelError, match="has no config.json"):
            refuse(str(tmp_path))


def test_a_single_file_is_read_only_as_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="only as GGUF"):
        load_base(str(path))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, Any] = {
    "cut weights": lambda d: cut(d / "model.safetensors"),
    "empty weights": lambda d: (d / "model.safetensors").write_bytes(b""),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "text for weights": lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
    "garbled config": lambda d: (d / "config.json").write_text("{"),
    "config that is a list": lambda d: (d / "config.json").write_text("[]"),
    "unknown architecture": lambda d: (d / "config.json").write_text('{"model_type": "no-such-type"}'),
    "no architecture": lambda d: (d / "config.json").write_text("{}"),
    "garbled tokenizer": lambda d: (d / "tokenizer.json").write_text("{"),
    "tokenizer that is a list": lambda d: (d / "tokenizer.json").write_text("[]"),
    "cut GGUF": lambda d: (d / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00"),
    "empty GGUF": lambda d: (d / "model.gguf").write_bytes(b""),
    "no GGUF": lambda d: (d / "model.gguf").write_text("not at all"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_is_a_model_error(tiny: Any, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "llama"))
    BROKEN[what](folder)
    name = str(folder / "model.gguf") if "GGUF" in what else str(folder)
    with pytest.raises(ModelError) as caught:
        load_base(name, **CPU)
    assert str(caught.value).startswith(f"model {name}: ") and "\n" not in str(caught.value)
    assert str(caught.value).count(name) <= 2


@pytest.mark.parametrize("share", [0.05, 0.4, 0.98])
def test_a_gguf_file_that_was_cut_short_is_a_model_error(tiny: Any, tmp_path: Path, share: float) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path,
        hf.LlamaForCausalLM.from_pretrained(tiny("llama")),
        hf.AutoTokenizer.from_pretrained(tiny("llama")),
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match="tiny.gguf: can't be loaded"):
        load_base(str(path), **CPU)


# -- checkpoints that lack weights ---------------------------------------------------------------------------


def without(folder: Path, *parts: str) -> Path:
    """The checkpoint without the weights whose name holds one of `parts`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: t for name, t in tensors.items() if not any(part in name for part in parts)}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_generative_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path, kind: str) -> None:
    lost = {"gpt2": "h.1.mlp.c_fc", "llama": "layers.1.mlp.up_proj", "t5": "decoder.block.1.layer.2"}[kind]
    folder = without(save_tiny(kind, tmp_path / kind), lost)
    with pytest.raises(ModelError, match=rf"lacks weights of .*: \S*{lost}"):
        load_base(str(folder), **CPU)


def test_a_language_model_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    config = hf.LlamaConfig.from_pretrained(folder, tie_word_embeddings=False)
    hf.LlamaModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="lm_head.weight"):
        load_base(str(folder), **CPU)


def test_a_classifier_may_lack_its_head_but_not_its_body(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    options = {"task": "classification", "labels": ["a", "b"], **CPU}
    assert load_base(str(folder), **options).fresh == ()
    without(folder, "layer.1.attention.self.query")
    with pytest.raises(ModelError, match="lacks weights.*layer.1.attention.self.query"):
        load_base(str(folder), **options)


def test_a_body_of_another_shape_is_not_silently_replaced(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 48}))
    with pytest.raises(ModelError, match="another shape.*intermediate"):
        load_base(str(folder), task="classification", labels=["a", "b"], **CPU)


def test_a_head_for_another_number_of_classes_is_replaced(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    config = hf.BertConfig.from_pretrained(folder, num_labels=5)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    base = load_base(str(folder), task="classification", labels=["a", "b"], **CPU)
    assert base.model.classifier.weight.shape == (2, 32) and base.fresh == ()


def masked_lm(folder: Path) -> Path:
    """A BERT as it is pretrained: with a masked-language-model head and without a pooler."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved(tmp_path: Path) -> None:
    """It starts at random: frozen and unsaved, the reopened model would have another pooler than the trained one."""
    folder = masked_lm(tmp_path / "bert")
    assert load_base(str(folder), task="classification", labels=["a", "b"], **CPU).fresh == ("bert.pooler.dense",)
    rows = [{"text": row["prompt"], "label": row["completion"].split()[-1]} for row in colour_rows(24)]
    config = load(
        values={
            "model.name": str(folder), "model.dtype": "float32", "model.device": "cpu", "training.max_steps": 4,
            "training.learning_rate": 1e-2, "training.seed": 9, "data.validation": None,
            "output_dir": str(tmp_path / "run"),
        }
    )  # fmt: skip
    session = train(config, train=rows, console=Console(quiet=True)).session
    assert not any("pooler" in layer.name for layer in adapted_layers(session.model))
    assert "base_model.model.bert.pooler.dense.weight" in load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    inputs = [session.encoder.inputs(row["text"]) for row in rows]  # type: ignore[union-attr]
    again = reopen(tmp_path / "run", dtype="float32", device="cpu")
    before, after = (head_scores(s.model, inputs, s.collator, batch_size=8) for s in (session, again))
    np.testing.assert_allclose(after, before, atol=1e-5)
    pooler = session.model.get_base_model().bert.pooler.dense
    assert not torch.equal(pooler.modules_to_save["default"].weight, pooler.original_module.weight)


# -- GGUF ----------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "q_proj": "attn_q",
    "post_attention_layernorm": "ffn_norm", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """The Llama model as llama.cpp's converter writes it: matrices in Q8_0; `model` gets the rounded weights."""
    config, out = model.config, gguf.GGUFWriter(path, "llama")
    heads, kind = config.num_attention_heads, gguf.GGMLQuantizationType.Q8_0
    out.add_context_length(128)
    out.add_vocab_size(config.vocab_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.hidden_size // heads)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    out.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    for key, weight in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "lm_head":
            continue  # tied
        name = _GGUF_NAMES[parts[-2]] + ".weight"
        name = f"blk.{parts[2]}.{name}" if "layers" in parts else name
        values = weight.numpy()
        if values.ndim == 1:
            out.add_tensor(name, values.copy())
            continue
        weight.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)))
        if parts[-2] in ("q_proj", "k_proj"):  # rotary pairs lie side by side in GGUF
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_model_is_dequantised_trained_saved_and_merged(tiny: Any, tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM.from_pretrained(tiny("llama")).eval()
    tokenizer, path = hf.AutoTokenizer.from_pretrained(tiny("llama")), tmp_path / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    base = load_base(str(path), **CPU)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    text = "what colour is the sky ? 0123\n"
    assert base.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert not hasattr(base.model.config, "quantization_config")
    base.model.save_pretrained(tmp_path / "plain")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)

    from trivet import LoRAModel

    tuned = LoRAModel(str(path), 4, dtype="float32", device="cpu", max_steps=4, learning_rate=1e-2, resamples=10,
                      output_dir=str(tmp_path / "run"), **{"evaluation.generate": False})  # fmt: skip
    tuned.finetune(colour_rows(24), quiet=True)
    written = tuned.generate("what colour is the sky ?", max_new_tokens=8)
    reopened = LoRAModel.load(tmp_path / "run", dtype="float32", device="cpu")
    assert reopened.generate("what colour is the sky ?", max_new_tokens=8) == written
    reopened.merge(tmp_path / "merged")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.use_cache
