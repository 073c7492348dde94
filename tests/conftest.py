"""Fixtures: tiny models from configs with real tokenizer classes, real models where they are at hand."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no model hub, and must not wait for one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU Triton, where it is installed, interprets its kernels; read when it is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", derandomize=True)  # the same examples every time; fuzz.py draws others
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What the imports made stays, so no search for garbage need go through it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Neither through what a test has imported: Trainers search for garbage several times a run."""
    if len(gc.get_objects()) > 50_000:
        gc.collect()
        gc.freeze()


#: Real data and tokenizers beside the checkout; tests that need them skip where they are absent.
SHARED = Path(__file__).resolve().parents[2] / "shared"

#: Text that the tiny tokenizers are trained on.
CORPUS = [
    "the cat sat on the mat and the dog ran to the red house",
    "what colour is the sky ? the sky is blue . what colour is the grass ? the grass is green .",
    "zero one two three four five six seven eight nine ten plus minus equals is a number",
    "Hello! How are you? I am fine, thanks. User: Assistant: System: ### \n\n name : The Vaults | Type : pub",
    "def add(a, b): return a + b # 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz",
]


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that only `make test-slow` takes."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data; skips the test where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the shared task data, which is not on this machine")
    return SHARED


def bpe_tokenizer(special: tuple[str, ...] = ("<|endoftext|>",), **names: str) -> Any:
    """A small byte-level BPE tokenizer, of GPT-2's kind; every string round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet)
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[0], **names)


def word_tokenizer() -> Any:
    """A small lower-casing WordPiece tokenizer with [CLS] and [SEP], of BERT's kind: the corpus's words and letters.

    It is not trained: another vocabulary would come out each time, and with its size other weights of tiny models.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in CORPUS for word, _ in split.pre_tokenize_str(text.lower())})
    letters = sorted(set("".join(words)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = split
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_model(kind: str, vocab: int, **changes: Any) -> Any:
    """A tiny random model of an architecture: gpt2, llama, bart, t5, a mixture of experts (mixtral, qwen3_moe, phimoe,
    llama4), or the body of bert, roberta or distilbert."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0} | changes
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common))
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tie = common.pop("tie", True)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=tie, **common))
    if kind == "bart":
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
        return hf.BartForConditionalGeneration(
            hf.BartConfig(d_model=32, **sizes, **heads, decoder_start_token_id=0, forced_eos_token_id=None, **common)
        )
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **common))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**sizes, max_position_embeddings=128, **common))
    if kind == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**sizes, max_position_embeddings=130, **common))
    if kind == "distilbert":
        return hf.DistilBertModel(hf.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, **common))
    mixtures: dict[str, tuple[Any, Any]] = {
        "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM),
        "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM),
        "phimoe": (hf.PhimoeConfig, hf.PhimoeForCausalLM),
        "llama4": (hf.Llama4TextConfig, hf.Llama4ForCausalLM),
    }
    if kind in mixtures:
        config, model = mixtures[kind]
        sizes |= {"num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size_mlp": 64}
        experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 1}
        return model(config(**sizes, **experts, **common))
    raise ValueError(kind)


def save_tiny(kind: str, folder: Path, **changes: Any) -> Path:
    """A tiny model with its tokenizer, saved as a transformers folder."""
    tokenizer = word_tokenizer() if kind in ("bert", "roberta", "distilbert") else bpe_tokenizer()
    tiny_model(kind, len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny("gpt2")` is the folder of a tiny model of that kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind) / kind)
        return made[kind]

    return get


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operations, which stay where no C compiler is."""
    monkeypatch.setattr("trivet.kernels.compiled.serves", lambda x: False)


def losses_of(model: Any, optimizer: Any, batch: Any, labels: Any, steps: int) -> list[float]:
    """Train a causal model on one batch; the loss before each step."""
    from trivet.loss import training_loss

    losses = []
    for _ in range(steps):
        loss = training_loss(model, batch, labels, task="causal-lm")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


#: A closed-form task that a tiny model learns in a few dozen steps: the answer names the colour that was asked for.
COLOURS = {"sky": "blue", "grass": "green", "house": "red"}


def colour_rows(n: int = 48) -> list[dict[str, Any]]:
    """`n` prompt/completion rows of the closed-form task."""
    names = list(COLOURS)
    return [
        {
            "prompt": f"what colour is the {names[i % 3]} ?",
            "completion": f"the {names[i % 3]} is {COLOURS[names[i % 3]]}",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the real command line; copy it before damaging it."""
    from process import trivet
    from world import CONFIG

    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "config.yaml").write_text(CONFIG.format(model=tiny("gpt2")), encoding="utf-8")
    write_jsonl(cwd / "train.jsonl", colour_rows(24))
    done = trivet(cwd, ["train", "config.yaml", "training.max_steps=2"])
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "a"


@pytest.fixture
def world(tmp_path: Path, tiny: Any, finished: Path) -> Any:
    """A working folder with a config, its data, and a finished run to point at."""
    from world import World

    made = World(tmp_path, tiny, finished)
    made.config()
    write_jsonl(tmp_path / "train.jsonl", colour_rows(24))
    return made
