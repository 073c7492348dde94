"""`trivet plan`: its counts against a real step of a real model, its sums against closed forms, what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from conftest import tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.plan import optimizer
from trivet.cli.app import build as command
from trivet.config import Config
from trivet.configio import load
from trivet.errors import ConfigError
from trivet.loss import training_loss
from trivet.methods import METHODS, find_method
from trivet.scale.adapter import AdapterSize, adapter_size, state_bytes
from trivet.scale.engines import Cost, Setting, best, cost, traffic
from trivet.scale.engines import settings as offered
from trivet.scale.machines import GPUS
from trivet.scale.plan import plan, task_of
from trivet.scale.shapes import PUBLIC, public_shape
from trivet.scale.trace import Kept, Trace, build, flop_counter, trace

H100 = GPUS["h100-80gb"]
#: As the models' authors publish them, in billions.
PUBLISHED = {
    "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213, "llama-3-8b": 8.030, "llama-3-70b": 70.554, "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554, "llama-3.1-405b": 405.853, "mistral-7b-v0.3": 7.248, "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616, "qwen2.5-14b": 14.770, "qwen2.5-32b": 32.764, "qwen2.5-72b": 72.706,
}  # fmt: skip


def trivet(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(command(), [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_public_shapes_have_as_many_parameters_as_published(name: str) -> None:
    model = build(public_shape(name), "causal-lm", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=6e-4)


def test_a_hub_id_finds_its_shape() -> None:
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B", "llama-3-8b"):
        assert public_shape(name).num_hidden_layers == 32
    assert public_shape("someone/Llama-3.1-9B") is None


def test_the_task_follows_the_architecture() -> None:
    assert task_of(hf.LlamaConfig(), "auto", "auto") == "causal-lm"
    assert task_of(hf.BertConfig(architectures=["BertForMaskedLM"]), "auto", "auto") == "classification"
    assert task_of(hf.BartConfig(), "auto", "auto") == "seq2seq"
    assert task_of(hf.LlamaConfig(), "auto", "regression") == "regression"


# -- counts against a real step ----------------------------------------------------------------------------------------


def counted(model: Any, task: str, rows: int, length: int) -> tuple[int, int]:
    """(FLOPs, bytes kept) of a real step in float32 on the CPU."""
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 2 if task == "classification" else ids.clone()
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if task == "seq2seq" else {})
    counter, kept = flop_counter(), Kept(model)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            loss = training_loss(model.train(), inputs, labels, None, task=task)
        loss.backward()
    return int(counter.get_total_flops()), kept.bytes


@pytest.mark.parametrize(
    ("kind", "task", "off"),
    [
        ("bert", "classification", 1e-9),
        ("distilbert", "classification", 1e-9),
        # a decoder's blocks on the diagonal are computed whole, and half of one is a lot where attention is all
        ("llama", "causal-lm", 0.16),
        ("gpt2", "causal-lm", 0.16),
        ("bart", "seq2seq", 0.1),
    ],
)
def test_products_and_kept_bytes_are_a_real_steps(
    kind: str, task: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(kind, 64)
    if task == "classification":
        base = hf.AutoModelForSequenceClassification.from_config(base.config)
    config = base.config
    model = attach(base, lora_rank=4, task=task)
    _, kept_by_c = counted(model, task, 4, 32)
    monkeypatch.setattr("trivet.kernels.attention.serves", lambda *_: False)  # torch counts its own products alone
    flops, kept = counted(model, task, 4, 32)
    found = trace(
        build(config, task, torch.float32), find_method("lora"), task=task, rows=4, length=32, cpu=True, lora_rank=4
    )
    assert found.kept == pytest.approx(kept, rel=1e-3)
    assert found.kept == pytest.approx(kept_by_c, rel=1e-3)
    assert flops * (1 - off) <= found.flops(False) <= flops * (1 + 1e-9)


def llama(**changes: int) -> Trace:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.LlamaConfig(**(sizes | changes), num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False)
    base = build(config, "causal-lm", torch.bfloat16)
    return trace(base, find_method("lora"), task="causal-lm", rows=2, length=64, lora_rank=8)


def test_a_llamas_products_have_a_closed_form() -> None:
    """Forward 2 N + 2 P a token, and 4 s d for attention; backward without the frozen weights' gradients."""
    found = llama()
    tokens, width, length, layers = 128, 64, 64, 3
    linear = layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    adapter = sum(8 * sum(x.shape) for x in found.adapted)
    head, attention = 64 * 512, layers * 4 * width * length / 2  # half of the keys are seen
    told = tokens - 2  # of each of two rows all but the first
    assert found.forward == 2 * (tokens * (linear + adapter) + told * head) + tokens * attention
    first = 64 * 64 + 2 * 64 * 32  # nothing before the first block's q, k and v wants a gradient
    unread = 8 * 3 * 64  # their A's, likewise
    products = linear - first + 2 * adapter - unread
    assert found.backward == 2 * (tokens * products + told * head) + tokens * 2.5 * attention
    assert found.recomputed == found.forward - 2 * told * head


def test_counts_grow_with_what_they_are_of() -> None:
    few, many = llama(), llama(num_hidden_layers=6)
    assert many.blocks == 2 * few.blocks
    assert many.recomputed == 2 * few.recomputed
    assert many.kept_with_checkpointing - few.kept_with_checkpointing == 3 * 128 * 64 * 2  # three blocks' inputs
    assert few.weights == few.outer_weights + 3 * few.block_weights
    assert few.kept_with_checkpointing < few.kept


def test_fewer_learned_tokens_are_less_work_for_the_head_alone() -> None:
    config = hf.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    whole, half = (
        trace(
            build(config, "causal-lm", torch.bfloat16),
            find_method("lora"),
            task="causal-lm",
            rows=1,
            length=64,
            learned=share,
        )
        for share in (1.0, 0.5)
    )
    assert whole.flops(False) - half.flops(False) == 2 * 2 * 31 * 64 * config.vocab_size  # 63 of 64, and 32
    assert whole.kept - half.kept == 31 * (64 * 2 + 8)


# -- the adapter against the real one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tcurlora"])
def test_an_adapters_bytes_are_the_real_ones(name: str) -> None:
    method = find_method(name)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    model = attach(tiny_model("llama", 64, tie=False), lora_rank=4, method=name, batches=batches)
    layers = adapted_layers(model)
    shapes, ranks = [x.shape for x in layers], [x.rank for x in layers]
    found = adapter_size(method, shapes, ranks)
    real = optimizer(model, learning_rate=1e-3)
    training_loss(model, {"input_ids": ids}, ids, None, task="causal-lm").backward()
    real.step()
    assert found.trained == sum(p.numel() for group in real.param_groups for p in group["params"])
    assert found.optimizer == state_bytes(real)
    held = {id(t): t.numel() for k, t in model.named_buffers() if "lora_" in k} | {
        id(p): p.numel() for k, p in model.named_parameters() if "lora_" in k
    }
    assert found.factors == 4 * sum(held.values())


def test_a_shared_core_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared by a stack"):
        adapter_size(find_method("tcurlora"), [(8, 8)], [2])


# -- what is sent ------------------------------------------------------------------------------------------------------


def sent(gpus: int, sharded: bool = False, accumulation: int = 1) -> dict[str, int]:
    counts: Any = SimpleNamespace(weights=1_000_000, outer_weights=200_000, blocks=4)
    return traffic(Setting(gpus, sharded, False), counts, AdapterSize(100, 0, 800, 100), accumulation)


def test_data_parallel_sends_the_adapters_gradients_once_whatever_the_accumulation() -> None:
    assert sent(1) == {}
    assert sent(4) == sent(4, accumulation=8) == {"gradients": 600}  # 2 (4 - 1) / 4 of 400 bytes


def test_fsdp_gathers_the_blocks_twice_a_micro_step_and_sums_the_adapter_alone() -> None:
    assert sent(4, True) == {"weights": 2 * 3 * 800_000 // 4, "gradients": 600}
    assert sent(4, True, 3)["weights"] == 3 * sent(4, True)["weights"]


def test_what_is_offered_is_what_trivet_does() -> None:
    assert [(s.name, s.checkpointing) for s in offered(1)] == [("one GPU", False), ("one GPU", True)]
    assert [s.name for s in offered(16)] == ["data parallel", "FSDP2"] * 2


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.booleans())
def test_more_gpus_hold_less_of_the_weights_and_as_much_of_the_rest(power: int, checkpointing: bool) -> None:
    counts = llama()
    adapter = AdapterSize(1000, 0, 8000, 1000)

    def of(gpus: int) -> Cost:
        setting = Setting(gpus, True, checkpointing)
        return cost(setting, counts, adapter, H100, rows=2, accumulation=1, mfu=0.4)

    few, many = of(2**power), of(2 ** (power + 1))
    assert few.held["weights"] > many.held["weights"] >= counts.outer_weights
    assert few.held | {"weights": 0} == many.held | {"weights": 0}
    assert few.compute == many.compute
    assert few.tokens * 2 == many.tokens
    assert few.step <= few.longest


def test_the_fastest_that_fits_is_chosen_and_of_equals_the_simplest() -> None:
    def of(gpus: int, seconds: float, fits: bool) -> Cost:
        return Cost(Setting(gpus, True, False), {}, {}, seconds, 0.0, 0.0, fits, tokens=100, room=1)

    slow, fast, near, faster = of(1, 3.0, True), of(2, 1.0, True), of(4, 0.99, True), of(8, 0.1, False)
    assert best([slow, fast, near, faster]) is fast
    assert best([faster]) is None


# -- the whole ---------------------------------------------------------------------------------------------------------


def config_of(model: str, **values: Any) -> Config:
    return load(values={"model.name": model, "data.max_length": 512, "training.batch_size": 2, **values})


def test_what_fits_one_gpu_is_run_on_one(tiny: Any) -> None:
    found = plan(config_of(str(tiny("llama"))))
    assert found.chosen is not None
    assert found.chosen.setting == Setting(1, False, False)
    assert found.ranks is None
    real = attach(tiny_model("llama", 420), lora_rank=8)
    assert found.adapter.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.chosen.room > 1000


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a model of 27B parameters in few layers, 54 GB in 16 bits; there are no weights."""
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 8, "num_attention_heads": 128}
    folder = tmp_path_factory.mktemp("wide")
    hf.LlamaConfig(**sizes, num_key_value_heads=8, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def test_a_model_that_is_too_large_for_a_gpu_is_sharded(wide: Path) -> None:
    copies, shards = (plan(config_of(str(wide)), gpus=8, gpu=gpu).chosen for gpu in ("h100-80gb", "a100-40gb"))
    assert copies is not None
    assert copies.setting == Setting(8, False, False)
    assert shards is not None
    assert shards.setting == Setting(8, True, False)
    assert shards.total < copies.total


def test_squeezing_shrinks_what_is_sent(tiny: Any) -> None:
    values = {"method": "trivet", "model.lora_rank": 1, "training.max_steps": 200}
    found = plan(config_of(str(tiny("llama")), **values), gpus=8)
    ranks = found.ranks
    assert ranks is not None
    shapes = [x.shape for x in found.trace.adapted]
    assert ranks.start == found.adapter.trained == 4 * sum(map(sum, shapes))  # four times the budget's rank
    assert ranks.end == sum(map(sum, shapes))
    assert ranks.mean is not None
    assert ranks.end < ranks.mean < ranks.start
    assert 0 < ranks.resizes < 200
    assert ranks.moments == 4 * sum(1 + out + 2 * inside for out, inside in shapes)


# -- the command -------------------------------------------------------------------------------------------------------


def test_it_says_what_to_use(tiny: Any) -> None:
    out = trivet("plan", f"model.name={tiny('llama')}", "method=trivet", "--gpus", "16").stdout
    assert "Use data parallel (a copy on each GPU) with training.gradient_checkpointing: false" in out
    assert "FSDP2" in out
    assert "Ranks change at most" in out


def test_it_says_what_would_do_where_nothing_fits(wide: Path) -> None:
    arguments = ["plan", f"model.name={wide}", "data.max_length=512", "training.batch_size=2", "--gpu", "a100-40gb"]
    out = trivet(*arguments).stdout
    assert "Nothing fits" in out
    assert "4 GPUs would do." in out
    assert "Use FSDP2 (4 GPUs share one copy of the weights)" in trivet(*arguments, "--gpus", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.name=llama-3-8b", "--gpu", "h100"], "did you mean h100-80gb?"),
        (["model.name=llama-3-8b", "--mfu", "40"], "above 0 and at most 1"),
        (["model.name=./llama-3-9b"], "Shapes that need no files: llama-3.2-1b"),
        (["model.lora_rank=8"], "model.name is not set"),
        (["model.name=llama-3.2-1b", "model.target_modules=[nowhere]"], "nowhere"),
    ],
)
def test_wrong_words_are_answered_and_end_with_2(arguments: list[str], words: str) -> None:
    assert words in trivet("plan", *arguments, code=2).stderr
