"""The verbs as a person types them, each a process of its own, one after the other in one working folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import process
from conftest import colour_rows, write_jsonl
from trivet import LoRAModel
from trivet.configio import load

PROMPTS = ["what colour is the sky ?", "what colour is the house ?"]
OVERRIDES = [
    "model.lora_rank=2",
    "model.dtype=float32",
    "training.max_steps=40",
    "training.learning_rate=1e-2",
    "training.batch_size=12",
    "training.eval_steps=20",
    "evaluation.max_new_tokens=12",
    "evaluation.resamples=20",
    "data.test=test.jsonl",
]


def command(cwd: Path, *arguments: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "trivet", *arguments],
        "cwd": cwd,
        "env": {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "text": True,
    }


def trivet(cwd: Path, *arguments: str, said: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """`trivet ARGUMENTS` in `cwd`, with `said` on its standard input."""
    done = process.trivet(cwd, list(arguments), said=said)
    assert done.returncode == code, done.stderr
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def shop(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where `init` and `train` have run; the run is runs/first."""
    cwd = tmp_path_factory.mktemp("shop")
    write_jsonl(cwd / "train.jsonl", colour_rows(48))
    write_jsonl(cwd / "test.jsonl", colour_rows(6))
    trivet(cwd, "init", "--model", str(tiny("gpt2")), "--train", "train.jsonl")
    done = subprocess.run(**command(cwd, "train", "config.yaml", *OVERRIDES), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (cwd / "train.out").write_text(done.stdout, encoding="utf-8")
    (cwd / "train.err").write_text(done.stderr, encoding="utf-8")
    return cwd


@pytest.fixture(scope="module")
def classifier(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier, made in this process."""
    cwd = tmp_path_factory.mktemp("classifier")
    rows = [{"text": f"the {w} number", "label": w} for w in ("zero", "one") * 20]
    model = LoRAModel(str(tiny("bert")), 2, output_dir=str(cwd / "run"), max_steps=2, dtype="float32", resamples=10)
    model.finetune(rows, quiet=True)
    return cwd / "run"


def run_of(shop: Path, to: Path) -> Path:
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(shop / "runs" / "first", to / "run"))


# -- init, validate, train -----------------------------------------------------------------------------------------


def test_init_writes_a_config_that_says_what_was_asked_for(shop: Path, tiny: Any) -> None:
    config = load(shop / "config.yaml")
    assert (config.model.name, config.data.train, config.output_dir) == (str(tiny("gpt2")), "train.jsonl", "runs/first")
    assert load(values={"name": config.model.name, "train": "train.jsonl", "output_dir": "runs/first"}) == config


def test_init_takes_the_place_of_a_file_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine\n", encoding="utf-8")
    trivet(tmp_path, "init", code=2)
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "# mine\n"
    assert "trivet validate config.yaml" in trivet(tmp_path, "init", "--force").stdout
    assert load(tmp_path / "config.yaml").model.name == "demo"


def test_validate_shows_what_is_learned_and_writes_nothing(shop: Path) -> None:
    before = files(shop)
    overrides = [*OVERRIDES, "training.batch_size=10", "training.max_steps=null"]
    done = trivet(shop, "validate", "config.yaml", *overrides, "--rows", "1")
    assert files(shop) == before
    assert done.stdout.count("what is learned stands between « and »") == 1
    assert "what colour is the sky ?\n«the sky is blue<|endoftext|>»" in done.stdout
    assert "train: 46 rows of format prompt-completion from train.jsonl" in done.stdout
    assert "validation: 2 rows" in done.stdout
    assert "test: 6 rows" in done.stdout
    assert "% of them learned" in done.stdout
    # r (in + out) over c_attn, c_proj, c_fc and c_proj of two blocks of width 32.
    assert f"{2 * 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)):,} trainable parameters" in done.stdout
    assert "15 steps; estimated memory at the longest rows:" in done.stdout  # 46 rows in 5 batches, 3 epochs
    assert "Nothing was trained or written" in done.stdout


def test_train_makes_the_run_folder(shop: Path) -> None:
    run = shop / "runs" / "first"
    assert {p.name for p in run.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "log.jsonl", "predictions.jsonl", "report.html", "result.json",
    }  # fmt: skip
    decided = ["training.packing=true", "training.share_prefix=false"]
    assert load(run / "config.yaml") == load(shop / "config.yaml", [*OVERRIDES, *decided])
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 40
    assert result["evaluated_on"] == {"split": "test", "source": "test.jsonl"}
    assert result["metrics"]["tuned"]["loss"] < result["metrics"]["base"]["loss"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in log if "validation_loss" in row] == [20, 40]


def test_train_shows_base_and_tuned_side_by_side(shop: Path) -> None:
    out, said = (shop / "train.out").read_text(encoding="utf-8"), (shop / "train.err").read_text(encoding="utf-8")
    lines = out.splitlines()
    assert lines[0].split() == ["metric", "base", "tuned", "difference", "[95%", "interval]", "n"]
    assert [line.split()[0] for line in lines[1:4]] == ["loss", "perplexity", "token_accuracy"]
    assert "40 steps in " in out
    assert "trivet generate runs/first --prompt" in out
    assert "step 1/40  loss " in said
    assert "step 20: validation loss " in said
    assert "reloaded and compared: relative logit error" in said
    assert "Warning" not in said


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_updates_the_result_and_keeps_what_was_there(shop: Path, tmp_path: Path) -> None:
    run = run_of(shop, tmp_path)
    before = json.loads((run / "result.json").read_text(encoding="utf-8"))
    other = write_jsonl(tmp_path / "other.jsonl", colour_rows(4))
    done = trivet(tmp_path, "evaluate", "run", "--data", str(other), "--max-rows", "3", "--output", "out/figures.json")
    after = json.loads((run / "result.json").read_text(encoding="utf-8"))
    names = ("evaluated_on", "metrics", "intervals", "n")
    assert after["earlier_evaluations"] == [{name: before[name] for name in names}]
    assert after["evaluated_on"]["source"] == str(other)
    assert after["n"]["loss"] == 3
    assert {k: v for k, v in after.items() if k not in (*names, "earlier_evaluations")} == {
        k: v for k, v in before.items() if k not in names
    }
    assert json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8")) == {k: after[k] for k in names}
    assert len((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert f"{after['metrics']['tuned']['loss']:.4g}" in done.stdout

    done = trivet(shop, "evaluate", str(run), "--no-generate")  # the run's own test rows, named relative to the folder
    again = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert [e["evaluated_on"]["source"] for e in again["earlier_evaluations"]] == ["test.jsonl", str(other)]
    assert again["metrics"]["tuned"]["loss"] == pytest.approx(before["metrics"]["tuned"]["loss"], abs=1e-5)
    assert set(again["metrics"]["tuned"]) == {"loss", "perplexity", "token_accuracy"}


# -- generate, chat ----------------------------------------------------------------------------------------------------


def test_generate_answers_prompts_as_the_library_does(shop: Path) -> None:
    model = LoRAModel.load(shop / "runs" / "first")
    tuned = model.generate(PROMPTS, max_new_tokens=8)
    base = model.generate(PROMPTS, max_new_tokens=8, adapter=False)
    assert tuned != base
    asked = ["generate", "runs/first", "--max-new-tokens", "8"]
    assert trivet(shop, *asked, "-p", PROMPTS[0], "--prompt", PROMPTS[1]).stdout == "".join(f"{a}\n" for a in tuned)
    piped = trivet(shop, *asked, "--base", said=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    assert piped.stdout == "".join(f"{a}\n" for a in base)
    assert piped.stderr == ""


def test_generate_prints_the_class_that_a_classifier_gives(classifier: Path) -> None:
    texts = ["the zero number", "the one number", "the dog"]
    expected = LoRAModel.load(classifier).predict(texts)
    assert set(expected) <= {"zero", "one"}
    assert trivet(classifier.parent, "generate", "run", said="\n".join(texts)).stdout.splitlines() == expected


def test_chat_answers_until_an_empty_line(shop: Path) -> None:
    done = trivet(shop, "chat", "runs/first", "--max-new-tokens", "4", said="hello\n/reset\nhello\n\nnever read\n")
    assert done.stdout.count("model: ") == 2
    first, second = (part.partition("you: ")[0] for part in done.stdout.split("model: ")[1:])
    assert first == second  # what was said before /reset is forgotten
    ended = trivet(shop, "chat", "runs/first", "--max-new-tokens", "4", said="hello\n")  # Ctrl-D
    assert ended.stdout.count("model: ") == 1


def test_a_classifier_does_not_chat(classifier: Path) -> None:
    done = trivet(classifier.parent, "chat", "run", code=1, said="hello\n")
    assert done.stderr == "error: chat needs a causal language model, and run is for classification\n"


# -- merge, export -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(shop: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, and the tuned model's logits on them."""
    model = LoRAModel.load(shop / "runs" / "first")
    batch = model.tokenizer(PROMPTS[0], return_tensors="pt")
    with torch.inference_mode():
        return dict(batch), model.model.eval()(**batch).logits


def test_a_merged_model_is_a_plain_transformers_model(shop: Path, live: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = trivet(shop, "merge", "runs/first", str(tmp_path / "merged"))
    assert f"wrote {tmp_path / 'merged'}; reloaded and compared: relative logit error " in done.stdout
    assert done.stderr == ""
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer(PROMPTS[0])["input_ids"] == live[0]["input_ids"][0].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(merged(**live[0]).logits, live[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["native", "portable"])
def test_an_exported_adapter_loads_in_plain_peft(shop: Path, tiny: Any, live: Any, tmp_path: Path, form: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "old.txt").write_text("old", encoding="utf-8")
    done = trivet(shop, "export", "runs/first", str(tmp_path / "exported"), "--format", form, "--overwrite")
    assert f"wrote {tmp_path / 'exported'} ({form}); reloaded and compared" in done.stdout
    assert not {"old.txt", "trivet.json"} & {p.name for p in (tmp_path / "exported").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype="float32")
    tuned = PeftModel.from_pretrained(base, tmp_path / "exported").eval()
    with torch.inference_mode():
        torch.testing.assert_close(tuned(**live[0]).logits, live[1], atol=1e-4, rtol=1e-4)
        with tuned.disable_adapter():
            assert not torch.allclose(tuned(**live[0]).logits, live[1], atol=1e-2)


# -- methods, --debug, Ctrl-C ------------------------------------------------------------------------------------------


def test_methods_lists_every_method_and_part(tmp_path: Path) -> None:
    from trivet.methods import METHODS, PARTS

    said = trivet(tmp_path, "methods").stdout
    for name in (*METHODS, *(part for table in PARTS.values() for part in table)):
        assert f"\n  {name} " in said


@pytest.mark.parametrize("words", [["--debug", "train", "c.yaml"], ["train", "c.yaml", "--debug"]])
def test_debug_shows_where_an_error_comes_from(words: list[str], tmp_path: Path) -> None:
    done = trivet(tmp_path, *words, code=1)
    assert "Traceback" in done.stderr
    assert "trivet.errors.ConfigError: config file c.yaml: no such file" in done.stderr


def interrupted(shop: Path, tmp_path: Path, when: Iterator[str], *more: str) -> str:
    """Ctrl-C in a long run, once its standard error has shown all of `when`; the rest of what it says."""
    words = ["train", "config.yaml", *OVERRIDES, "training.max_steps=100000", f"output_dir={tmp_path / 'long'}", *more]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    # A shell's background jobs ignore SIGINT and hand that on, as tests in CI may find themselves.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(**command(shop, *words), **pipes) as running:
        assert running.stderr is not None
        for sign in when:
            for line in running.stderr:
                if sign in line:
                    break
            else:
                pytest.fail(f"the run ended before it said {sign!r}")
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=120)
    assert running.returncode == 130, rest
    assert "error: interrupted" in rest
    assert "Traceback" not in rest
    return rest


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_while_a_learning_rate_is_looked_for_leaves_nothing(shop: Path, tmp_path: Path) -> None:
    rest = interrupted(shop, tmp_path, iter(["trials of"]), "training.learning_rate=auto")
    assert "SIGINT: finishing the step; once more to stop at once" in rest
    assert "interrupted by SIGINT while a learning rate was looked for; nothing was trained or written" in rest
    assert not (tmp_path / "long").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_finishes_the_step_and_keeps_it(shop: Path, tmp_path: Path) -> None:
    from trivet.train.checkpoint import newest_checkpoint, step_of

    rest = interrupted(shop, tmp_path, iter(["step 1/100000"]), "training.eval_steps=50000")
    assert "SIGINT: finishing the step and saving it" in rest
    newest = newest_checkpoint(tmp_path / "long" / "checkpoints")
    assert newest is not None and f"interrupted by SIGINT after step {step_of(newest)}" in rest
    assert f"trivet train {tmp_path / 'long' / 'config.yaml'} --resume" in rest
    assert not (tmp_path / "long" / "result.json").exists()
