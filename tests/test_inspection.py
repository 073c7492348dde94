"""What `inspect` says of an adapter, against closed forms, dense SVDs and PEFT's own layers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import SHARED
from trivet.adapter.attach import attach
from trivet.adapter.layers import Change, adapted_layers
from trivet.adapter.resize import resize
from trivet.adapter.save import save_adapter
from trivet.errors import AdapterError, ConfigError
from trivet.inspection import effective_rank, inspect_adapter, stored_layers
from trivet.pictures import place

CLASSES = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForSequenceClassification",
}


def made_elsewhere(kind: str, base: Path, folder: Path, **settings: Any) -> PeftModel:
    """An adapter made and saved by PEFT alone, with random factors."""
    torch.manual_seed(7)
    model = getattr(hf, CLASSES[kind]).from_pretrained(base, dtype=torch.float32)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2"}
    adapted = get_peft_model(model, LoraConfig(**{**defaults, **settings}))
    draw = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            p.data = torch.randn(p.shape, generator=draw) * 0.3
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def by_hand(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """A folder with just these factors, A and B by layer name; its base model is nowhere."""
    folder.mkdir()
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "base_model_name_or_path": "gone"}
    (folder / "adapter_config.json").write_text(json.dumps(known | config), encoding="utf-8")
    return folder


def with_values(values: list[float], out: int, inside: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B whose product has these singular values, split unevenly and turned."""
    draw, r = torch.Generator().manual_seed(3), len(values)
    left, _ = torch.linalg.qr(torch.randn(out, r, generator=draw, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inside, r, generator=draw, dtype=torch.float64))
    turn = torch.randn(r, r, generator=draw, dtype=torch.float64) + 3 * torch.eye(r, dtype=torch.float64)
    a, b = torch.linalg.inv(turn) @ right.T, left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn
    return a.float(), b.float()


def dense(layer: Any) -> torch.Tensor:
    return layer.delta().double()


# -- effective rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 1.0),
        ([2.0, 2.0, 2.0], 3.0),
        ([3.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
        ([3.0, 1.0], 4 / 3**0.75),  # exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
    ],
)
def test_effective_rank_in_closed_form(values: list[float], expected: float) -> None:
    assert effective_rank(values) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_effective_rank_is_between_1_and_the_rank_and_knows_no_scale(values: list[float], scale: float) -> None:
    found = effective_rank(values)
    assert 1 - 1e-9 <= found <= len(values) * (1 + 1e-9)
    assert effective_rank([scale * v for v in values]) == pytest.approx(found, rel=1e-9)


# -- one adapter with known values -------------------------------------------------------------------------------------


def test_known_singular_values(tmp_path: Path) -> None:
    factors = {"h.0.attn.q": with_values([3.0, 1.0], 10, 7), "h.1.attn.q": with_values([2.0, 2.0], 10, 7)}
    found = inspect_adapter(by_hand(tmp_path / "a", factors, lora_alpha=8))  # a scale of 4
    first, second = found.layers
    assert (first.name, first.kind, first.shape, first.rank, first.scale) == ("h.0.attn.q", "q", (10, 7), 2, 4.0)
    assert first.singular_values == pytest.approx([12.0, 4.0], rel=1e-5)
    assert first.effective_rank == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert first.unused == pytest.approx(1 - 2 / 3**0.75, rel=1e-4)
    assert first.norm == pytest.approx(math.hypot(12, 4), rel=1e-5)
    assert first.parameters == 2 * (10 + 7)
    assert second.effective_rank == pytest.approx(2.0, rel=1e-5)
    assert second.unused == pytest.approx(0.0, abs=1e-5)
    total = found.total
    assert (total.layers, total.parameters) == (2, 68)
    assert (total.smallest_rank, total.mean_rank, total.largest_rank) == (2, 2.0, 2)
    assert total.effective_rank == pytest.approx((first.effective_rank + 2) / 2, rel=1e-5)
    assert total.unused == pytest.approx(1 - (first.effective_rank + 2) / 4, rel=1e-4)
    assert total.norm == pytest.approx(math.sqrt(144 + 16 + 64 + 64), rel=1e-5)
    assert found.base_model == "gone"
    assert found.base_parameters is None
    assert found.remarks == []


def test_a_rank_that_is_not_there_shows(tmp_path: Path) -> None:
    """Rank 6 on paper, 2 in truth; and a layer that never learned."""
    a, b = with_values([3.0, 1.0, 0.0, 0.0, 0.0, 0.0], 12, 9)
    fresh = (torch.ones(6, 9), torch.zeros(12, 6))
    found = inspect_adapter(by_hand(tmp_path / "a", {"h.0.q": (a, b), "h.1.q": fresh}, r=6, lora_alpha=6))
    assert found.layers[0].singular_values[:2] == pytest.approx([3.0, 1.0], rel=1e-5)
    assert max(found.layers[0].singular_values[2:]) < 1e-4
    assert found.layers[0].effective_rank == pytest.approx(4 / 3**0.75, rel=1e-3)
    assert (found.layers[1].effective_rank, found.layers[1].unused, found.layers[1].norm) == (0.0, 1.0, 0.0)


def test_kinds_are_summed_up(tmp_path: Path) -> None:
    factors, ranks = {}, {}
    for i, rank in enumerate((1, 2, 5)):
        factors[f"h.{i}.attn.q"] = with_values([1.0] * rank, 8, 8)
        factors[f"h.{i}.mlp.up"] = with_values([1.0, 0.5], 16, 8)
        ranks[f"h.{i}.attn.q"] = rank
    found = inspect_adapter(by_hand(tmp_path / "a", factors, rank_pattern=ranks))
    queries, up = found.by_kind()
    assert (queries.kind, up.kind) == ("q", "up")
    assert (queries.layers, queries.smallest_rank, queries.largest_rank) == (3, 1, 5)
    assert queries.mean_rank == pytest.approx(8 / 3)
    assert queries.effective_rank == pytest.approx(8 / 3, rel=1e-4)
    assert queries.parameters == (1 + 2 + 5) * 16
    assert queries.parameters + up.parameters == found.total.parameters
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [x["rank"] for x in told["layers"]] == [x.rank for x in found.layers]
    assert [k["kind"] for k in told["kinds"]] == ["q", "up"]
    assert told["layers"][1]["singular_values"] == pytest.approx([1.0, 0.5], rel=1e-4)
    assert told["total"]["parameters"] == found.total.parameters


# -- adapters made by PEFT ---------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {r".*\.0\..*": 6, "LOW": 1}, "alpha_pattern": {"LOW": 3, r".*\.1\..*": 20}},
    "rslora": {"use_rslora": True},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"LOW": 3}},
    "anchored": {"rank_pattern": {r"^(?:NAME)": 5}, "alpha_pattern": {r"^(?:NAME)": 7}},
}
#: A module's name in each model, and a layer's.
LOW = {"gpt2": "c_fc", "llama": "v_proj", "bart": "fc1", "bert": "intermediate.dense"}
NAME = {
    "gpt2": r"transformer\.h\.0\.attn\.c_attn",
    "llama": r"model\.layers\.1\.mlp\.up_proj|model\.layers\.0\.self_attn\.q_proj",
    "bart": r"model\.decoder\.layers\.1\.fc1",
    "bert": r"bert\.encoder\.layer\.0\.output\.dense",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_layer_is_as_peft_has_it(kind: str, settings: Any, tiny: Any, tmp_path: Path) -> None:
    written = json.dumps(settings).replace("LOW", LOW[kind]).replace("NAME", NAME[kind].replace("\\", "\\\\"))
    made_elsewhere(kind, tiny(kind), tmp_path / "a", **json.loads(written))
    found = {x.name: x for x in inspect_adapter(tmp_path / "a").layers}
    # PEFT sorts patterns when it saves, so where two fit a layer only the reloaded adapter tells which one counts.
    model = PeftModel.from_pretrained(getattr(hf, CLASSES[kind]).from_pretrained(tiny(kind)), tmp_path / "a")
    layers = adapted_layers(model)
    assert found.keys() == {layer.name for layer in layers}
    assert (len({x.rank for x in found.values()}) > 1) == ("rank_pattern" in settings)
    for layer in layers:
        seen = found[layer.name]
        assert (seen.rank, seen.shape) == (layer.rank, tuple(layer.weight.shape))
        assert seen.scale == pytest.approx(layer.module.scaling["default"])
        expected = torch.zeros(layer.rank, dtype=torch.float64)
        values = torch.linalg.svdvals(dense(layer))[: layer.rank]
        expected[: len(values)] = values
        assert seen.singular_values == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)
        assert seen.parameters == layer.A.numel() + layer.B.numel()


ORDERS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bart": ["encoder q_proj", "encoder k_proj", "encoder v_proj", "encoder out_proj", "encoder fc1", "encoder fc2"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


@pytest.mark.parametrize("kind", CLASSES)
def test_layers_come_in_the_order_of_their_work(kind: str, tiny: Any, tmp_path: Path) -> None:
    made_elsewhere(kind, tiny(kind), tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    assert [s.kind for s in found.by_kind()][: len(ORDERS[kind])] == ORDERS[kind]
    assert [place(x.name).block for x in found.layers[: 2 * len(ORDERS[kind])]] == sorted([0, 1] * len(ORDERS[kind]))


def test_embeddings_and_layers_outside_of_blocks(tiny: Any, tmp_path: Path) -> None:
    model = made_elsewhere(
        "gpt2", tiny("gpt2"), tmp_path / "a", target_modules=["wpe", "c_attn"], rank_pattern={"wpe": 3}
    )
    found = inspect_adapter(tmp_path / "a")
    wpe = next(layer for layer in adapted_layers(model) if layer.embedding)
    seen = next(x for x in found.layers if x.name == wpe.name)
    assert (seen.kind, seen.shape, seen.rank) == ("transformer.wpe", (32, 128), 3)
    assert seen.singular_values == pytest.approx(torch.linalg.svdvals(dense(wpe))[:3].tolist(), rel=1e-4)


def test_a_dora_adapter_shows_its_direction_s_update_and_says_so(tiny: Any, tmp_path: Path) -> None:
    model = made_elsewhere("llama", tiny("llama"), tmp_path / "a", use_dora=True)
    found = inspect_adapter(tmp_path / "a")
    first = next(layer for layer in adapted_layers(model) if layer.name == found.layers[0].name)
    assert found.layers[0].singular_values == pytest.approx(torch.linalg.svdvals(dense(first))[:4].tolist(), rel=1e-4)
    assert "DoRA" in found.remarks[0]
    assert "magnitudes (" in found.remarks[1]
    assert found.kept_whole == sum(layer.shape[0] for layer in adapted_layers(model))


def test_a_head_is_named_and_not_counted(tiny: Any, tmp_path: Path) -> None:
    model = made_elsewhere("bert", tiny("bert"), tmp_path / "a", task_type=TaskType.SEQ_CLS)
    found = inspect_adapter(tmp_path / "a")
    assert found.kept_whole == 2 * 32 + 2
    assert found.remarks == ["saved whole beside the updates: classifier (66 numbers)"]
    assert found.total.parameters == sum(p.numel() for layer in adapted_layers(model) for p in layer.trained())


def test_the_real_loralib_checkpoint(tmp_path: Path) -> None:
    """The LoRA paper's roberta-base on MNLI, put into PEFT's form: 24 layers of rank 8, alpha 16."""
    source = SHARED / "models" / "loralib_roberta_base_mnli" / "roberta_base_lora_mnli.bin"
    if not source.exists():
        pytest.skip("needs the loralib checkpoint, which is not on this machine")
    state = torch.load(source, map_location="cpu", weights_only=True)
    names = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    factors = {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}
    found = inspect_adapter(by_hand(tmp_path / "a", factors, r=8, lora_alpha=16, target_modules=["query", "value"]))
    assert len(found.layers) == 24
    assert [s.kind for s in found.by_kind()] == ["query", "value"]
    assert found.total.parameters == 24 * 8 * (768 + 768)
    for layer in found.layers:
        a, b = (f.double() for f in factors[layer.name])
        expected = torch.linalg.svdvals(2 * b @ a)[:8]
        assert layer.singular_values == pytest.approx(expected.tolist(), rel=1e-4)
        assert 1 < layer.effective_rank < 8


# -- with the base model -----------------------------------------------------------------------------------------------


@pytest.fixture
def departed(tiny: Any, tmp_path: Path) -> Path:
    """A saved adapter of a tiny GPT-2 whose first c_fc has left."""
    base = hf.AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)
    model = attach(base, lora_rank=2)
    gone = Change(torch.zeros(2, 0), torch.zeros(2, 0))
    resize(model, {"transformer.h.0.mlp.c_fc": gone})
    save_adapter(model, tmp_path / "a", {"input_ids": torch.tensor([[1, 2, 3]])})
    return tmp_path / "a"


def test_the_base_model_adds_its_size_and_what_has_left(departed: Path, tiny: Any) -> None:
    alone, both = inspect_adapter(departed), inspect_adapter(departed, base_model=str(tiny("gpt2")))
    gone = [x for x in both.layers if not x.rank]
    assert [(x.name, x.kind, x.shape, x.parameters) for x in gone] == [
        ("transformer.h.0.mlp.c_fc", "c_fc", (128, 32), 0)
    ]
    assert [x.name for x in alone.layers] == [x.name for x in both.layers if x.rank]
    assert next(s for s in both.by_kind() if s.kind == "c_fc").smallest_rank == 0
    base = hf.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    assert both.base_parameters == sum(p.numel() for p in base.parameters())
    assert both.base_model == str(tiny("gpt2"))


def test_a_base_model_that_does_not_fit(departed: Path, tiny: Any) -> None:
    with pytest.raises(AdapterError, match="does not fit the base model"):
        inspect_adapter(departed, base_model=str(tiny("llama")))


def test_a_run_folder_is_its_adapter(departed: Path, tmp_path: Path) -> None:
    shutil.copytree(departed, tmp_path / "run" / "adapter")
    assert inspect_adapter(tmp_path / "run").layers == inspect_adapter(departed).layers


# -- what is wrong -----------------------------------------------------------------------------------------------------


def change(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def retensor(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


KEY = "base_model.model.h.0.q.lora_A.weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:100]),
        r"adapter_model\.safetensors can't be read",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "not LoRA": (lambda f: change(f, peft_type="IA3"), "is of type .*IA3, not LoRA"),
    "another rank": (lambda f: change(f, r=3), "layer h.0.q has rank 2 in .* but 3 by adapter_config.json"),
    "half a layer": (lambda f: retensor(f, lambda t: t.pop(KEY)), "layer h.0.q holds nothing and 6x2"),
    "NaN": (lambda f: retensor(f, lambda t: t[KEY].fill_(math.nan)), "layer h.0.q holds NaN or infinity"),
    "a convolution": (
        lambda f: retensor(f, lambda t: t.update({KEY: torch.zeros(2, 5, 3, 3)})), "layer h.0.q holds 2x5x3x3 and 6x2",
    ),
    "no factors": (lambda f: save_file({"x": torch.ones(1)}, f / "adapter_model.safetensors"), "no LoRA factors"),
    "parameters": (lambda f: change(f, target_parameters=["experts.up"]), "`target_parameters` is .*which trivet"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage: Any, says: str, tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a", {"h.0.q": with_values([1.0, 0.5], 6, 5)})
    inspect_adapter(folder)
    damage(folder)
    with pytest.raises(AdapterError, match=says) as error:
        inspect_adapter(folder)
    assert str(folder) in str(error.value)


def test_a_checkpoint_s_inner_factors_are_no_adapter(tiny: Any, tmp_path: Path) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)
    model = attach(base, lora_rank=2, method="lora_xs")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(AdapterError, match="no plain factor; a checkpoint of a run is no saved adapter"):
        stored_layers(tmp_path / "checkpoint")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        inspect_adapter(tmp_path / "nowhere")
