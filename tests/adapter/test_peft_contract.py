"""What `trivet.adapter` relies on in PEFT, by name: when PEFT changes one of these, this file says which."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict

from conftest import tiny_model


def adapted(**settings: Any) -> PeftModel:
    model = get_peft_model(tiny_model("llama", 64), LoraConfig(target_modules="all-linear", **settings))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model


def layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def test_a_layer_holds_its_factors_in_module_dicts_by_adapter_name() -> None:
    model = adapted(r=3)
    q = layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    assert isinstance(q.lora_A, torch.nn.ModuleDict) and isinstance(q.lora_B, torch.nn.ModuleDict)
    assert "default" in q.lora_A and "other" not in q.lora_A
    assert q.lora_A["default"].weight.shape == (3, 32) and q.lora_B["default"].weight.shape == (32, 3)
    assert isinstance(q.base_layer, torch.nn.Linear)
    assert q.base_layer.weight.requires_grad is False


def test_conv1d_factors_have_the_shapes_of_a_linear_layer() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(tiny_model("gpt2", 64), LoraConfig(r=2, target_modules=["c_attn"]))
    layer = next(iter(layers(model).values()))
    assert isinstance(layer.base_layer, hf.pytorch_utils.Conv1D)
    assert layer.lora_A["default"].weight.shape == (2, 32) and layer.lora_B["default"].weight.shape == (96, 2)
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape == (32, 96)


def test_scaling_and_r_are_dicts_by_adapter_name() -> None:
    for settings, scale in (({}, 12 / 4), ({"use_rslora": True}, 12 / 2)):
        q = next(iter(layers(adapted(r=4, lora_alpha=12, **settings)).values()))
        assert q.scaling == {"default": pytest.approx(scale)} and q.r == {"default": 4}


def test_rank_and_alpha_patterns_name_layers_by_the_end_of_their_path() -> None:
    model = adapted(r=4, lora_alpha=8, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 2})
    found = {name.removeprefix("base_model.model.model."): m for name, m in layers(model).items()}
    assert found["layers.0.self_attn.q_proj"].r["default"] == 2
    assert found["layers.1.self_attn.q_proj"].r["default"] == 4
    assert found["layers.0.self_attn.q_proj"].scaling["default"] == 4.0
    assert {found[f"layers.{i}.self_attn.v_proj"].scaling["default"] for i in (0, 1)} == {0.5}


def test_state_dict_keys_leave_the_adapter_name_out() -> None:
    model = adapted(r=2)
    keys = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    expected = {f"{name}.{factor}.weight" for name in layers(model) for factor in ("lora_A", "lora_B")}
    assert set(keys) == expected
    assert all(key.startswith("base_model.model.") for key in keys)


def test_all_linear_leaves_the_output_head_out() -> None:
    assert not any("lm_head" in name for name in layers(adapted(r=2)))


def test_load_set_and_delete_adapter(tmp_path: Path) -> None:
    model = adapted(r=2)
    live = output(model)
    model.save_pretrained(str(tmp_path), safe_serialization=True, save_embedding_layers=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert model.active_adapter == "default"
    model.load_adapter(str(tmp_path), adapter_name="proof", is_trainable=False)
    assert model.active_adapter == "default"
    model.set_adapter("proof")
    assert model.active_adapter == "proof"
    torch.testing.assert_close(output(model), live)
    model.set_adapter("default")
    model.delete_adapter("proof")
    assert list(model.peft_config) == ["default"]
    assert not any("proof" in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    torch.testing.assert_close(output(model), live)


def test_disable_adapter_gives_the_base_model_within_the_block() -> None:
    base = output(tiny_model("llama", 64))
    model = adapted(r=2)
    tuned = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), tuned) and not torch.equal(tuned, base)


def test_get_base_model_and_merge_and_unload() -> None:
    model = adapted(r=2)
    tuned = output(model)
    assert isinstance(model.get_base_model(), hf.LlamaForCausalLM)
    merged = model.merge_and_unload()
    assert type(merged) is hf.LlamaForCausalLM and not layers(merged)
    torch.testing.assert_close(output(merged), tuned, rtol=1e-4, atol=1e-4)


def test_modules_to_save_keeps_the_original_beside_the_copy() -> None:
    body = tiny_model("bert", 64)
    model = get_peft_model(
        hf.BertForSequenceClassification(body.config),
        LoraConfig(target_modules=["query"], task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"]),
    )
    head = model.get_base_model().classifier
    assert set(head.modules_to_save) == {"default"}
    assert head.modules_to_save["default"].weight.requires_grad
    assert not head.original_module.weight.requires_grad
    keys = get_peft_model_state_dict(model)
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} < set(keys)


def test_exclude_modules_takes_a_regular_expression_over_the_whole_path() -> None:
    model = adapted(r=2, exclude_modules=r"(.*\.)?(mlp)(\..*)?")
    assert layers(model) and not any("mlp" in name for name in layers(model))


def test_config_fields_and_their_file_form(tmp_path: Path) -> None:
    fields = (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "task_type", "modules_to_save",
        "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "inference_mode", "base_model_name_or_path",
    )  # fmt: skip
    assert set(fields) <= set(inspect.signature(LoraConfig).parameters)
    LoraConfig(r=3, lora_alpha=7.5, task_type=TaskType.CAUSAL_LM).save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, LoraConfig) and (again.r, again.lora_alpha) == (3, 7.5)
    assert str(again.task_type).rpartition(".")[2] == "CAUSAL_LM"


def test_an_unfit_target_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nothing_like_it"):
        get_peft_model(tiny_model("llama", 64), LoraConfig(target_modules=["nothing_like_it"]))
