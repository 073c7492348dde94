"""`trivet inspect` and `trivet compress` as a person types them: what is shown, what is written, how errors end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from conftest import colour_rows, write_jsonl
from trivet import LoRAModel
from trivet.adapter.layers import adapted_layers
from trivet.cli.app import build
from trivet.inspection import inspect_adapter
from trivet.session import reopen


def trivet(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(build(), [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    settings = {"max_steps": 30, "learning_rate": 1e-2, "dtype": "float32", "resamples": 10, "method": "lora"}
    model = LoRAModel(str(tiny("gpt2")), 4, output_dir=str(folder), **settings)
    model.finetune(colour_rows(48), quiet=True, **{"evaluation.generate": False})
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to compress or damage."""
    return Path(shutil.copytree(run, tmp_path / "first"))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_shows_a_row_for_each_kind_and_the_sum(run: Path) -> None:
    lines = trivet("inspect", run).stdout.splitlines()
    found = inspect_adapter(run)
    assert lines[0].startswith(f"adapter {run / 'adapter'}, base model ")
    assert lines[2].split()[:2] == ["module", "layers"]
    assert [line.split()[0] for line in lines[3:]] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "all"]
    total = found.total
    assert lines[-1].split() == [
        "all", "8", "4", "4.0", "4", f"{total.effective_rank:.1f}", f"{total.unused:.0%}", f"{total.norm:.3g}", "4,096",
    ]  # fmt: skip


def test_inspect_s_row_for_every_layer(run: Path) -> None:
    said = trivet("inspect", run, "--layers").stdout
    for layer in inspect_adapter(run).layers:
        row = next(line for line in said.splitlines() if line.startswith(f"{layer.name} "))
        out, inside = layer.shape
        assert row.split()[1:5] == [str(out), "x", str(inside), "4"]
        assert f"{layer.singular_values[0]:.3g}" in row.split()


def test_tables_fit_100_columns_however_long_the_names_and_many_the_layers(tmp_path: Path) -> None:
    """32 blocks of 7 modules, of a vision-language model."""
    from safetensors.torch import save_file

    modules = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    tensors = {}
    for i in range(32):
        for module in modules:
            name = f"base_model.model.model.language_model.text_transformer.layers.{i}.{module}"
            tensors |= {f"{name}.lora_A.weight": torch.randn(2, 4096), f"{name}.lora_B.weight": torch.randn(14336, 2)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    whole = trivet("inspect", tmp_path / "a", "--layers").stdout.splitlines()
    assert max(map(len, whole)) <= 100
    rows = [line for line in whole if "14336 x 4096" in line]
    assert len(rows) == 224
    assert len({row.split()[0] for row in rows}) == 224  # what is cut off is the same for all
    assert all(row.startswith("…") for row in rows)
    brief = trivet("inspect", tmp_path / "a").stdout.splitlines()
    assert len(brief) == 3 + 7 + 1
    assert max(map(len, brief)) <= 100


def test_inspect_writes_a_picture_and_json(run: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    image, told = tmp_path / "new" / "ranks.png", tmp_path / "other" / "ranks.json"
    said = trivet("inspect", run, "--image", image, "--json", told).stdout
    assert f"wrote {image}\nwrote {told}\n" in said
    assert imread(image).std() > 0.05
    found = json.loads(told.read_text(encoding="utf-8"))
    assert found["total"]["parameters"] == 4096
    assert len(found["layers"]) == 8
    assert all(len(layer["singular_values"]) == 4 for layer in found["layers"])


def test_inspect_with_the_base_model_says_the_share(run: Path, tiny: Any) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    size = sum(p.numel() for p in base.parameters())
    said = trivet("inspect", run, "--base-model", tiny("gpt2")).stdout
    assert f"{4096 / size:.3%} of the base model's {size:,} parameters" in said


def test_inspect_needs_no_base_model(copy: Path) -> None:
    path = copy / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "nowhere/gone"}))
    (copy / "adapter" / "trivet.json").unlink()
    assert "base model nowhere/gone" in trivet("inspect", copy).stdout


# -- compress ----------------------------------------------------------------------------------------------------------


def rows(said: str) -> dict[str, list[str]]:
    """The table's rows by their first words."""
    lines = [line for line in said.splitlines() if "  " in line]
    return {line.split("  ")[0]: line.split()[len(line.split("  ")[0].split()) :] for line in lines}


def test_compress_by_singular_values(copy: Path) -> None:
    said = trivet("compress", copy, "--budget", "r2-equivalent").stdout
    target = copy.with_name("first-compressed")
    assert "directions priced by singular values" in said
    assert f"wrote {target}; reloaded and compared" in said
    table = rows(said)
    assert [*table] == ["budget", "whole", "1/2", "asked: r2-equivalent", "1/4", "1/8", "1/16"]
    assert table["whole"] == ["4,096", "8", "100.00%"]
    assert table["asked: r2-equivalent"] == table["1/2"]
    held = inspect_adapter(target).total.parameters
    assert table["1/2"][0] == f"{held:,}"
    assert held <= 2048


def test_compress_by_rows(copy: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", colour_rows(24))
    said = trivet("compress", copy, "--budget", "800", "--data", data, "--output", tmp_path / "small").stdout
    assert "directions priced by the loss on 12 rows of --data; losses are of the 12 others" in said
    table = rows(said)
    assert [*table][-1] == "none (base)"
    whole, asked, none = (float(table[name][2]) for name in ("whole", "asked: 800", "none (base)"))
    assert whole < asked < none
    assert float(table["asked: 800"][3]) == pytest.approx(asked - whole, abs=2e-4)
    assert inspect_adapter(tmp_path / "small").total.parameters <= 800
    again = reopen(tmp_path / "small")  # its notes name the base model
    assert len(adapted_layers(again.model)) == int(table["asked: 800"][1])


def test_a_compressed_adapter_is_an_adapter_like_any_other(copy: Path, tmp_path: Path) -> None:
    trivet("compress", copy, "--budget", "r2-equivalent", "--output", tmp_path / "half")
    trivet("compress", tmp_path / "half", "--budget", "r1-equivalent", "--output", tmp_path / "quarter")
    trivet("inspect", tmp_path / "quarter")
    trivet("export", tmp_path / "quarter", tmp_path / "exported")
    assert trivet("generate", tmp_path / "quarter", "-p", "what colour is the sky ?", "--max-new-tokens", "2").stdout


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(folder: Path, *arguments: str | Path, code: int, says: str) -> None:
    """One `error:` that names what is wrong, and nothing written."""
    before = files(folder)
    done = trivet(*arguments, code=code)
    assert done.stderr.count("error: ") == 1
    assert says in done.stderr
    assert "unexpected" not in done.stderr
    assert files(folder) == before


def cut(run: Path, name: str) -> None:
    path = run / "adapter" / name
    path.write_bytes(path.read_bytes()[:80])


@pytest.mark.parametrize("verb", [["inspect"], ["compress", "--budget", "800"]], ids=["inspect", "compress"])
def test_folders_that_are_no_adapter(verb: list[str], copy: Path) -> None:
    refused(copy.parent, *verb, "nowhere", code=2, says="adapter nowhere: no such folder")
    (copy / "empty").mkdir()
    refused(copy.parent, *verb, copy / "empty", code=1, says="has no adapter_config.json, so it is no saved adapter")
    cut(copy, "adapter_model.safetensors")
    refused(copy.parent, *verb, copy, code=1, says="adapter_model.safetensors can't be read")
    cut(copy, "adapter_config.json")
    refused(copy.parent, *verb, copy, code=1, says="adapter_config.json: can't be read")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "r4-equivalent"], "the adapter holds 4,096: there is nothing to compress"),
        (["--budget", "1m"], "the adapter holds 4,096"),
        (["--budget", "12"], "name a larger budget"),
        (["--budget", "some"], "budget 'some' can't be read: a budget is a number, 500k, 0.5%"),
        (["--budget", "-5"], "budget '-5' can't be read"),
        (["--budget", "800", "--output", "FILE"], "exists already; name another folder with --output"),
        (["--budget", "800", "--data", "none.jsonl"], "none.jsonl"),
        (["--budget", "800", "--base-model", "./no-model"], "no-model"),
    ],
)
def test_compress_refuses(arguments: list[str], says: str, copy: Path) -> None:
    (copy / "FILE").write_text("mine")
    words = [str(copy / a) if a == "FILE" else a for a in arguments]
    refused(copy.parent, "compress", copy, *words, code=2, says=says)


def test_compress_asks_for_the_base_model(tiny: Any, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    refused(tmp_path, "compress", tmp_path / "a", "--budget", "100", code=1, says="pass --base-model")


def test_a_dora_adapter_is_shown_and_not_compressed(tiny: Any, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    assert "a DoRA adapter: the figures are of its direction's update" in trivet("inspect", tmp_path / "a").stdout
    refused(tmp_path, "compress", tmp_path / "a", "--budget", "100", code=2, says="a DoRA adapter can't be compressed")


def test_inspect_refuses_what_it_can_t_write_before_it_reads(copy: Path) -> None:
    refused(
        copy.parent, "inspect", copy, "--image", "a.jpg", code=2, says="--image a.jpg: name a file that ends in .png"
    )
    refused(copy.parent, "inspect", copy, "--json", copy, code=2, says="is a folder; name a file")
    (copy / "file").write_text("")
    refused(copy.parent, "inspect", copy, "--image", copy / "file" / "a.png", code=1, says="can't be written")
