"""Compressing: what is kept against dense SVDs, what is written against plain PEFT, what is measured against rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import SHARED, colour_rows, word_tokenizer, write_jsonl
from trivet.adapter.attach import attach
from trivet.adapter.layers import Change, adapted_layers
from trivet.adapter.load import read_notes
from trivet.adapter.resize import resize
from trivet.adapter.save import logits, save_adapter
from trivet.calibration import halves, mean_loss, statistics_of
from trivet.compression import compress, compress_adapter
from trivet.data.dataset import load_dataset
from trivet.data.encode import encode_dataset
from trivet.errors import AdapterError, ConfigError, DataError
from trivet.inspection import inspect_adapter
from trivet.rank.allocate import allocate
from trivet.rank.policy import parameters
from trivet.session import Session, reopen

CLASSES = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForSequenceClassification",
}
TASKS = {"bart": TaskType.SEQ_2_SEQ_LM, "bert": TaskType.SEQ_CLS}
LABELS = [{"text": f"the {word} number", "label": i % 2} for i, word in enumerate(("zero", "one") * 10)]


def fresh(kind: str, base: Path) -> Any:
    torch.manual_seed(7)  # a classifier's head is not in the folder
    return getattr(hf, CLASSES[kind]).from_pretrained(base, dtype=torch.float32)


def made_elsewhere(kind: str, base: Path, folder: Path, true_rank: int | None = None, **config: Any) -> Path:
    """An adapter made and saved by PEFT alone, with random factors; of a lower rank than it says, if asked for."""
    task = TASKS.get(kind, TaskType.CAUSAL_LM)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2"}
    model = get_peft_model(fresh(kind, base), LoraConfig(task_type=task, **{**defaults, **config}))
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name or ("modules_to_save" in name and p.requires_grad):
            p.data = torch.randn(p.shape, generator=draw) * 0.2
    if true_rank is not None:
        for layer in adapted_layers(model):
            mixed = torch.randn(layer.rank, true_rank, generator=draw) @ torch.randn(
                true_rank, layer.rank, generator=draw
            )
            layer.B.data = layer.B.data @ mixed / layer.rank
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def opened(kind: str, base: Path, folder: Path) -> Session:
    return reopen(folder, base_model=str(base), dtype="float32", device="cpu")


def dense(session: Session) -> dict[str, torch.Tensor]:
    return {layer.name: layer.delta().double() for layer in adapted_layers(session.model)}


def some_inputs(session: Session) -> dict[str, torch.Tensor]:
    return session.probe()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_each_layer_keeps_the_best_approximation_of_its_rank(tiny: Any, tmp_path: Path) -> None:
    """Eckart and Young; and the kept share is Σ kept σ² / Σ σ² by dense SVDs."""
    session = opened("llama", tiny("llama"), made_elsewhere("llama", tiny("llama"), tmp_path / "a"))
    before = dense(session)
    done = compress(session, "r2-equivalent")
    after, whole, kept = dense(session), 0.0, 0.0
    assert done.chosen.ranks.keys() == before.keys()
    assert len(set(done.chosen.ranks.values())) > 1
    for name, delta in before.items():
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        r = done.chosen.ranks[name]
        expected = (u[:, :r] * s[:r]) @ vt[:r]
        torch.testing.assert_close(after.get(name, torch.zeros_like(delta)), expected, atol=1e-5, rtol=1e-4)
        whole, kept = whole + float((s**2).sum()), kept + float((s[:r] ** 2).sum())
    assert done.chosen.kept == pytest.approx(kept / whole, rel=1e-6)
    assert {layer.name: layer.rank for layer in adapted_layers(session.model)} == {
        name: r for name, r in done.chosen.ranks.items() if r
    }


def test_no_other_ranks_of_that_size_keep_more(tiny: Any, tmp_path: Path) -> None:
    """At the price λ each layer's rank maximises worth − λ cost, so nothing of the same size is worth more."""
    session = opened("gpt2", tiny("gpt2"), made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a"))
    values = {n: 0.5 * torch.linalg.svdvals(d)[:4] ** 2 for n, d in dense(session).items()}
    size = {n: sum(d.shape) for n, d in dense(session).items()}
    done = compress(session, 1500)
    for name, worth in values.items():
        gains = [float(worth[:r].sum()) - done.chosen.price * size[name] * r for r in range(5)]
        assert gains[done.chosen.ranks[name]] == pytest.approx(max(gains), abs=1e-6)


@pytest.fixture(scope="module")
def llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_elsewhere("llama", tiny("llama"), tmp_path_factory.mktemp("made") / "a", rank_pattern={"v_proj": 7})


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(budget=st.integers(97, 4735))
def test_the_budget_is_never_exceeded(llama: Path, tiny: Any, budget: int) -> None:
    session = opened("llama", tiny("llama"), llama)
    largest = max(sum(layer.shape) for layer in adapted_layers(session.model))
    done = compress(session, budget)
    held = sum(layer.A.numel() + layer.B.numel() for layer in adapted_layers(session.model))
    assert held == done.chosen.parameters == parameters(adapted_layers(session.model))
    assert budget - largest < held <= budget
    assert all(c.parameters <= c.budget for c in done.choices)


def test_the_table_falls_from_the_whole(llama: Path, tiny: Any) -> None:
    done = compress(opened("llama", tiny("llama"), llama), 3000)
    assert [c.label for c in done.choices] == ["whole", "asked", "1/2", "1/4", "1/8", "1/16"]
    whole = done.choices[0]
    assert whole.budget == whole.parameters
    assert whole.kept == pytest.approx(1.0)
    assert [c.budget for c in done.choices if "/" in c.label] == [whole.budget // n for n in (2, 4, 8, 16)]
    assert [c.kept for c in done.choices] == sorted((c.kept for c in done.choices), reverse=True)
    assert done.choices[1] == done.chosen
    assert (done.probed, done.measured, done.chosen.loss) == (0, 0, None)


@pytest.mark.parametrize("budget", ["r2-equivalent", 2 * (4 * 64 + 3 * 96) * 2])
def test_what_was_of_lower_rank_than_it_says_loses_nothing(budget: Any, tiny: Any, tmp_path: Path) -> None:
    folder = made_elsewhere("llama", tiny("llama"), tmp_path / "a", true_rank=2, r=8)
    session = opened("llama", tiny("llama"), folder)
    before = logits(session.model, some_inputs(session))
    done = compress(session, budget)
    assert set(done.chosen.ranks.values()) == {2}
    assert done.chosen.kept == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(logits(session.model, some_inputs(session)), before, atol=1e-4, rtol=1e-4)


def test_r_equivalent_counts_layers_that_have_left(tiny: Any, tmp_path: Path) -> None:
    """It is what plain LoRA of that rank holds on all target layers, as it was in training."""
    model = attach(fresh("gpt2", tiny("gpt2")), lora_rank=4)
    draw = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model):
        layer.B.data = torch.randn(layer.B.shape, generator=draw)
    all_layers = sum(sum(layer.shape) for layer in adapted_layers(model))
    resize(model, {"transformer.h.0.mlp.c_fc": Change(torch.zeros(4, 0), torch.zeros(4, 0))})
    save_adapter(model, tmp_path / "a", {"input_ids": torch.tensor([[1, 2, 3]])})
    done = compress(opened("gpt2", tiny("gpt2"), tmp_path / "a"), "r2-equivalent")
    assert done.chosen.budget == 2 * all_layers


def test_a_share_is_of_the_base_model_without_its_adapter_and_copied_head(tiny: Any, tmp_path: Path) -> None:
    session = opened("bert", tiny("bert"), made_elsewhere("bert", tiny("bert"), tmp_path / "a"))
    base = sum(p.numel() for p in fresh("bert", tiny("bert")).parameters())
    assert compress(session, "2.5%").chosen.budget == int(0.025 * base)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_output_loads_in_plain_peft_and_computes_the_same(kind: str, tiny: Any, tmp_path: Path) -> None:
    pattern = {"gpt2": "c_fc", "llama": "v_proj", "bart": "fc1", "bert": "query"}[kind]
    made = made_elsewhere(
        kind, tiny(kind), tmp_path / "a", use_rslora=True, rank_pattern={pattern: 7}, alpha_pattern={pattern: 3}
    )
    done = compress_adapter(made, "r0.4-equivalent", base_model=str(tiny(kind)))
    assert done.folder == tmp_path / "a-compressed"
    assert 0 in done.compression.chosen.ranks.values()  # some layers have left
    assert done.proof.error <= done.proof.tolerance
    session = opened(kind, tiny(kind), made)
    compress(session, "r0.4-equivalent")
    plain = PeftModel.from_pretrained(fresh(kind, tiny(kind)), done.folder).eval()
    torch.testing.assert_close(
        logits(plain, some_inputs(session)), logits(session.model, some_inputs(session)), atol=1e-5, rtol=1e-4
    )
    whole = PeftModel.from_pretrained(fresh(kind, tiny(kind)), made).eval()
    assert not torch.allclose(logits(whole, some_inputs(session)), logits(plain, some_inputs(session)), atol=1e-3)
    seen = inspect_adapter(done.folder)
    assert {x.name: x.rank for x in seen.layers} == {n: r for n, r in done.compression.chosen.ranks.items() if r}
    assert seen.total.parameters == done.compression.chosen.parameters


def test_a_layer_may_leave_where_modules_are_excluded_by_name(tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("llama", tiny("llama"), tmp_path / "a", exclude_modules=["k_proj", "lm_head"])
    assert isinstance(json.loads((made / "adapter_config.json").read_text())["exclude_modules"], list)
    done = compress_adapter(made, 500, base_model=str(tiny("llama")))
    assert 0 in done.compression.chosen.ranks.values()
    plain = PeftModel.from_pretrained(fresh("llama", tiny("llama")), done.folder)
    names = {layer.name for layer in adapted_layers(plain)}
    assert names == {n for n, r in done.compression.chosen.ranks.items() if r}


def test_heads_are_kept_as_they_are_and_not_counted(tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("bert", tiny("bert"), tmp_path / "a", exclude_modules=r"classifier")
    done = compress_adapter(made, "r2-equivalent", base_model=str(tiny("bert")))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (made, done.folder))
    head = [key for key in before if "lora_" not in key]
    assert head
    for key in head:
        assert torch.equal(before[key], after[key])
    factors = sum(t.numel() for key, t in after.items() if "lora_" in key)
    assert (
        factors
        == done.compression.chosen.parameters
        <= 2 * sum(t.numel() for k, t in before.items() if "lora_" in k) / 4
    )


def test_tokenizer_and_notes_are_the_original_s(tiny: Any, tmp_path: Path) -> None:
    model = attach(fresh("gpt2", tiny("gpt2")), lora_rank=4)
    for layer in adapted_layers(model):
        layer.B.data.normal_(generator=torch.Generator().manual_seed(2))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny("gpt2"))
    tokenizer.chat_template = "{{ messages[0].content }}!"
    notes = {"base_model": str(tiny("gpt2")), "task": "causal-lm", "labels": None, "mine": 7,
             "data": {"max_length": 77, "chat_template": "none", "loss_on": "all"}}  # fmt: skip
    run = tmp_path / "run"
    save_adapter(model, run / "adapter", {"input_ids": torch.tensor([[1, 2]])}, tokenizer=tokenizer, notes=notes)
    (run / "adapter" / "optimizer.pt").write_bytes(b"not a tokenizer's")
    done = compress_adapter(run, 900, output=tmp_path / "new" / "small")
    assert done.folder == tmp_path / "new" / "small"
    for path in (run / "adapter").iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            assert (done.folder / path.name).read_bytes() == path.read_bytes()
    assert (done.folder / "tokenizer.json").exists()
    assert not (done.folder / "optimizer.pt").exists()
    written = read_notes(done.folder)
    assert {k: written[k] for k in notes} == notes
    assert written["compressed"] == {
        "budget": 900, "parameters": done.compression.chosen.parameters, "parameters_before": 4096,
    }  # fmt: skip
    assert reopen(done.folder).encoder.max_length == 77


def test_the_default_output_stands_beside_a_folder_named_by_a_dot(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a")
    monkeypatch.chdir(made)
    assert compress_adapter(".", 900, base_model=str(tiny("gpt2"))).folder == tmp_path / "a-compressed"


def test_the_real_loralib_checkpoint_squeezed(tmp_path: Path) -> None:
    """The LoRA paper's adapter (three of its layers, with its head) on a small-vocabulary roberta of the same width."""
    source = SHARED / "models" / "loralib_roberta_base_mnli" / "roberta_base_lora_mnli.bin"
    if not source.exists():
        pytest.skip("needs the loralib checkpoint, which is not on this machine")
    state = torch.load(source, map_location="cpu", weights_only=True)
    tokenizer = word_tokenizer()
    config = hf.RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=3, intermediate_size=64, num_labels=3, pad_token_id=0,
        max_position_embeddings=130,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tensors = {}
    for key, tensor in state.items():
        if key.endswith(("lora_A", "lora_B")) and int(key.split(".")[3]) < 3:
            tensors[f"base_model.model.{key}.weight"] = tensor.float().contiguous()
        elif key.startswith("classifier"):
            tensors[f"base_model.model.{key}"] = tensor.float().contiguous()
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    ).save_pretrained(tmp_path / "a")
    done = compress_adapter(tmp_path / "a", "r2-equivalent", base_model=str(tmp_path / "base"))
    chosen = done.compression.chosen
    assert chosen.parameters <= 2 * 6 * 1536
    spectra = {}
    for i in range(3):
        for side in ("query", "value"):
            name = f"roberta.encoder.layer.{i}.attention.self.{side}"
            a, b = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()
            spectra[name] = torch.linalg.svdvals(2 * b @ a)[:8] ** 2
    best = torch.cat(list(spectra.values())).sort(descending=True).values
    assert chosen.kept == pytest.approx(float(best[:12].sum() / best.sum()), rel=1e-4)
    after = load_file(done.folder / "adapter_model.safetensors")
    assert torch.equal(after["base_model.model.classifier.dense.weight"], state["classifier.dense.weight"].float())


# -- what rows say -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deadened(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A GPT-2 one of whose MLP units is always 0, and an adapter with a huge direction that reads that unit alone."""
    model = fresh("gpt2", tiny("gpt2"))
    model.transformer.h[0].mlp.c_fc.bias.data[0] = -100.0  # GELU(-100 + ...) = 0
    model.save_pretrained(tmp_path / "base")
    hf.AutoTokenizer.from_pretrained(tiny("gpt2")).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=2, target_modules=["mlp.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    draw = torch.Generator().manual_seed(0)
    for layer in adapted_layers(adapted):
        layer.A.data = torch.randn(layer.A.shape, generator=draw) * 0.3
        layer.B.data = torch.randn(layer.B.shape, generator=draw) * 0.3
    first = adapted_layers(adapted)[0]
    first.A.data[0] = 0.0
    first.A.data[0, 0] = 50.0
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "a"


def test_rows_tell_what_singular_values_can_t(deadened: Any) -> None:
    """Of 4 directions the largest does nothing. Priced by rows it goes, at no loss; by singular values it stays."""
    base, folder = deadened
    rows = load_dataset(colour_rows(24))
    blind, seeing = opened("gpt2", base, folder), opened("gpt2", base, folder)
    before = logits(seeing.model, some_inputs(seeing))
    compress(blind, 3 * 160)
    done = compress(seeing, 3 * 160, rows)
    torch.testing.assert_close(logits(seeing.model, some_inputs(seeing)), before, atol=1e-4, rtol=1e-4)
    losses = {c.label: c.loss for c in done.choices}
    assert losses["asked"] == pytest.approx(losses["whole"], abs=1e-5)
    assert (logits(blind.model, some_inputs(blind)) - before).abs().max() > 1e-2
    kept = next(x for x in adapted_layers(blind.model) if x.name == "transformer.h.0.mlp.c_proj").delta()
    assert float(kept[:, 0].norm()) > 0.99 * float(kept.norm()) > 10  # what does nothing is what it kept
    _, held = halves(rows, blind, 0)
    encoded = encode_dataset(held, blind.encoder)[0]
    whole = mean_loss(opened("gpt2", base, folder), encoded, batch_size=8)
    near, far = (abs(mean_loss(x, encoded, batch_size=8) - whole) for x in (seeing, blind))
    assert near < 1e-5 < far


def reference_loss(session: Session, rows: Any) -> float:
    """The model's own loss, row by row, weighted by the items that it is the mean of."""
    total = count = 0.0
    for row in encode_dataset(rows, session.encoder)[0]:
        batch = session.collator([row])
        labels = batch["labels"]
        with torch.no_grad():
            loss = session.model.eval()(**batch).loss
        items = 1 if labels.ndim == 1 else int((labels != -100).sum())
        total, count = total + float(loss) * items, count + items
    return total / count


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_losses_are_of_the_held_out_half(kind: str, tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere(kind, tiny(kind), tmp_path / "a")
    rows = load_dataset(LABELS if kind == "bert" else colour_rows(21))
    session = opened(kind, tiny(kind), made)
    pricing, held = halves(rows, session, 0)
    assert len(pricing) + len(held) == len(rows)
    assert len(held) == len(rows) // 2
    assert not {e.origin for e in pricing} & {e.origin for e in held}
    before = reference_loss(session, held)
    with session.model.disable_adapter():
        base = reference_loss(session, held)
    done = compress(session, "r1-equivalent", rows)
    losses = {c.label: c.loss for c in done.choices}
    assert (done.probed, done.measured) == (len(pricing), len(held))
    assert [c.label for c in done.choices][-1] == "none"
    assert losses["whole"] == pytest.approx(before, rel=1e-4)
    assert losses["asked"] == pytest.approx(reference_loss(session, held), rel=1e-4)
    if kind != "bert":  # disable_adapter takes the trained head away as well
        assert losses["none"] == pytest.approx(base, rel=1e-4)


def test_directions_are_priced_on_the_other_half(tiny: Any, tmp_path: Path) -> None:
    """Ranks by hand: worth ½ σ² of S^½ ΔW C^½ by dense SVDs, from the pricing rows' moments."""
    made = made_elsewhere("llama", tiny("llama"), tmp_path / "a")
    rows, session = load_dataset(colour_rows(20)), opened("llama", tiny("llama"), made)
    pricing, _ = halves(rows, session, 0)
    layers = adapted_layers(session.model)
    encoded = encode_dataset(pricing, session.encoder)[0]
    moments = statistics_of(session, layers, encoded, batch_size=8, seed=0)
    worth = []
    for layer in layers:
        c, s = moments[layer.name].inputs.double(), moments[layer.name].outputs.double()
        whitened = s.sqrt()[:, None] * layer.delta().double() * c.sqrt()
        worth.append((0.5 * torch.linalg.svdvals(whitened)[:4] ** 2).tolist())
    cost = [[float(sum(layer.shape))] * 4 for layer in layers]
    expected, price = allocate(worth, cost, 2000)
    done = compress(session, 2000, rows)
    assert list(done.chosen.ranks.values()) == expected
    assert done.chosen.price == pytest.approx(price, rel=1e-3)
    assert done.chosen.ranks != compress(opened("llama", tiny("llama"), made), 2000).chosen.ranks


def test_measuring_leaves_no_trace(tiny: Any, tmp_path: Path) -> None:
    session = opened("gpt2", tiny("gpt2"), made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a"))
    hooked = [name for name, m in session.model.named_modules() if m._forward_hooks]
    compress(session, 900, load_dataset(colour_rows(8)))
    assert not [name for name, p in session.model.named_parameters() if p.requires_grad or p.grad is not None]
    assert [name for name, m in session.model.named_modules() if m._forward_hooks] == hooked


def test_rows_are_drawn_at_random_and_no_more_than_asked_for(tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a")
    data = write_jsonl(tmp_path / "rows.jsonl", colour_rows(30))
    done = compress_adapter(made, 900, data=str(data), base_model=str(tiny("gpt2")), max_rows=9)
    assert (done.compression.probed, done.compression.measured) == (5, 4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (4096, "allows 4,096 parameters, and the adapter holds 4,096: there is nothing to compress"),
        ("1m", "allows 1,000,000 parameters"),
        ("r4-equivalent", "holds 4,096"),
        ("r4-equivalent ", "holds 4,096"),
        (10, "allows 10 parameters, and the first direction to be kept takes 64; name a larger budget"),
        ("half", "budget 'half' can't be read: a budget is a number, 500k"),
        (0, "above 0"),
        (True, "can't be read"),
    ],
)
def test_budgets_that_make_no_sense(budget: Any, says: str, tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a")
    if budget == 10:  # the most valuable direction per parameter is of the smallest layer
        tensors = load_file(made / "adapter_model.safetensors")
        key = "base_model.model.transformer.h.1.attn.c_proj.lora_B.weight"
        save_file(tensors | {key: 100 * tensors[key]}, made / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=says):
        compress_adapter(made, budget, base_model=str(tiny("gpt2")))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "a DoRA adapter can't be compressed"),
        ({"lora_bias": True}, "has trained biases"),
        ({"bias": "lora_only"}, "has trained biases"),
    ],
)
def test_adapters_that_are_no_sum_of_directions(config: Any, says: str, tiny: Any, tmp_path: Path) -> None:
    kind = "bart" if "use_dora" not in config else "llama"
    made = made_elsewhere(kind, tiny(kind), tmp_path / "a", **config)
    with pytest.raises(ConfigError, match=says):
        compress_adapter(made, 500, base_model=str(tiny(kind)))
    with pytest.raises(ConfigError, match=says):
        compress(opened(kind, tiny(kind), made), 500)


def test_a_part_that_would_be_lost(tiny: Any, tmp_path: Path) -> None:
    """PEFT saves whole embeddings with an adapter that added tokens; the copy would lack them without a word."""
    made = made_elsewhere("llama", tiny("llama"), tmp_path / "a")
    tensors = load_file(made / "adapter_model.safetensors")
    extra = {"base_model.model.model.embed_tokens.weight": fresh("llama", tiny("llama")).model.embed_tokens.weight.data}
    save_file(tensors | extra, made / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds model.embed_tokens.weight whole"):
        compress_adapter(made, 500, base_model=str(tiny("llama")))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_core_is_saved_first(tiny: Any) -> None:
    model = attach(fresh("gpt2", tiny("gpt2")), lora_rank=4, method="lora_xs")
    session = Session(None, model, None, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="its factors are no plain matrices; save the adapter and reopen it"):
        compress(session, 4)


def test_what_is_there_is_not_replaced(tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a")
    (tmp_path / "a-compressed").mkdir()
    (tmp_path / "a-compressed" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in (None, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already; name another folder with --output"):
            compress_adapter(made, 900, output=output, base_model=str(tiny("gpt2")))
    assert [p.name for p in (tmp_path / "a-compressed").iterdir()] == ["mine.txt"]


def test_rows_that_do_not_suit(tiny: Any, tmp_path: Path) -> None:
    session = opened("gpt2", tiny("gpt2"), made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a"))
    with pytest.raises(DataError, match="one row; at least two are needed"):
        compress(session, 900, load_dataset(colour_rows(1)))
    with pytest.raises(DataError, match="does not suit task causal-lm"):
        compress(session, 900, load_dataset(LABELS))


def test_an_adapter_that_does_not_name_its_base(tiny: Any, tmp_path: Path) -> None:
    made = made_elsewhere("gpt2", tiny("gpt2"), tmp_path / "a")
    path = made / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="pass --base-model"):
        compress_adapter(made, 900)


def test_a_classifier_made_elsewhere_has_as_many_classes_as_its_head_outputs(tiny: Any, tmp_path: Path) -> None:
    two = opened("bert", tiny("bert"), made_elsewhere("bert", tiny("bert"), tmp_path / "two"))
    assert (two.base.task, two.base.labels) == ("classification", ("0", "1"))
    torch.manual_seed(7)
    base = hf.AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=1)
    get_peft_model(base, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "one")
    one = opened("bert", tiny("bert"), tmp_path / "one")
    assert (one.base.task, one.base.labels) == ("regression", None)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    headless = {key: tensor for key, tensor in tensors.items() if "lora_" in key}
    save_file(headless, tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="neither holds its head nor names its classes"):
        opened("bert", tiny("bert"), tmp_path / "one")
