"""What is checked of a stranger's adapter changes nothing of a sound one: it computes what plain PEFT computes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.utils.other import get_pattern_key

from trivet.adapter import schema
from trivet.adapter.layers import adapted_layers
from trivet.adapter.load import load_adapter, read_config
from trivet.adapter.save import export, logits, save_adapter
from trivet.adapter.validate import read_header
from trivet.errors import AdapterError

CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["c_attn", "c_fc"]},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.h\.\d+\.(attn|mlp)\.c_(attn|fc)"},
    "a pattern and exclusions": {"target_modules": r".*(c_attn|c_fc)", "exclude_modules": r".*\.h\.1\.mlp.*"},
    "names and excluded names": {"target_modules": ["c_attn", "c_fc"], "exclude_modules": ["h.1.mlp.c_fc"]},
    "some blocks": {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    "ranks by ends of names": {
        "target_modules": "all-linear", "rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 6}, "alpha_pattern": {"c_fc": 3},
    },
    "ranks by patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"^transformer\.h\.0.*": 1, r"h\.(0|1)\.mlp\.c_.*": 5},
        "alpha_pattern": {r".*attn.*": 7.5, "nothing": 100},
    },
    "stabilised ranks": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True, "rank_pattern": {"c_fc": 2}},
    "stabilised": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True},
    "normalised": {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "rank_pattern": {"c_fc": 2}},
    "biases": {"target_modules": ["c_attn"], "bias": "all"},
    "an embedding": {"target_modules": ["wpe", "c_fc"], "rank_pattern": {"wpe": 3}},
    "a Gaussian start": {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
    "a task": {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "revision": "main"},
    "trained tokens": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1, 5, 9]}},
}  # fmt: skip


def base(tiny: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)


def made(tiny: Any, folder: Path, **settings: Any) -> Path:
    model = get_peft_model(base(tiny), LoraConfig(**{"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, **settings}))
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data = p.data + torch.randn(p.shape, generator=draw) * 0.3
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", CONFIGS)
def test_a_sound_adapter_computes_what_plain_peft_computes(what: str, tiny: Any, tmp_path: Path) -> None:
    folder = made(tiny, tmp_path / "a", **CONFIGS[what])
    probe = {"input_ids": torch.arange(1, 17)[None]}
    expected = logits(PeftModel.from_pretrained(base(tiny), folder), probe)
    ours = load_adapter(base(tiny), folder)
    torch.testing.assert_close(logits(ours, probe), expected, rtol=1e-5, atol=1e-6)
    plain = logits(base(tiny), probe)
    assert float((plain - expected).abs().max()) > 1e-3
    assert read_header(folder).layers.keys() == {layer.name for layer in adapted_layers(ours)}
    if "trained" not in what and "biases" not in what:  # those are no part of B A
        save_adapter(ours, tmp_path / "b", probe)
        torch.testing.assert_close(
            logits(load_adapter(base(tiny), tmp_path / "b"), probe), expected, atol=1e-5, rtol=1e-4
        )
    if what not in ("normalised", "trained tokens", "biases"):
        export(ours, tmp_path / "c", "portable", probe)


def test_every_field_of_peft_s_config_has_been_looked_at() -> None:
    """A field that is new in PEFT is refused where it is set, until somebody has thought about it."""
    refused = {
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
        "monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
    }  # fmt: skip
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields == {*schema._KNOWN, *schema._LEFT_OUT, *refused}
    plain = LoraConfig(target_modules=["q"]).to_dict()
    assert not any(plain[name] for name in refused)


def test_peft_s_rules_are_the_ones_that_are_anticipated() -> None:
    source = inspect.getsource(get_pattern_key)
    assert 're.match(rf"(.*\\.)?({key})$", key_to_match)' in source
    targets = inspect.getsource(tuners_utils.check_target_module_exists)
    assert "re.fullmatch(config.exclude_modules, key)" in targets
    assert "re.fullmatch" in inspect.getsource(tuners_utils.match_target_against_key)
    config = LoraConfig(target_modules=["a"], exclude_modules="x\\.a")
    assert tuners_utils.check_target_module_exists(config, "y.a")
    assert not tuners_utils.check_target_module_exists(config, "x.a")
    assert tuners_utils._get_in_out_features(torch.nn.Linear(2, 3)) == (2, 3)
    assert tuners_utils._get_in_out_features(hf.pytorch_utils.Conv1D(3, 2)) == (2, 3)
    assert tuners_utils._get_in_out_features(torch.nn.Embedding(5, 3)) == (5, 3)


def test_no_room_is_made_before_shapes_are_compared(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target pattern covers layers that the file lacks: PEFT would make them all."""
    import json

    folder = made(tiny, tmp_path / "a", target_modules=["c_attn"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("PEFT was asked to make room"))
    with pytest.raises(AdapterError, match=re.escape("its file lacks base_model.model.transformer.h.0.attn.c_proj")):
        load_adapter(base(tiny), folder)
    read_config(folder)
