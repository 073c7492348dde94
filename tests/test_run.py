"""A whole run: what it leaves in its folder and nowhere else, which rows it takes, and what happens when it fails."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import colour_rows, save_tiny, write_jsonl
from trivet.configio import load
from trivet.data.dataset import load_dataset
from trivet.errors import ConfigError, DataError, RunExistsError, TrivetError
from trivet.evaluation import evaluate_adapter
from trivet.report import load_run
from trivet.report.remarks import remarks
from trivet.run import Outcome, train
from trivet.schedule import planned_steps
from trivet.splits import load_splits

QUICK: dict[str, Any] = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "training.max_steps": 4,
    "training.learning_rate": 1e-2,
    "evaluation.resamples": 10,
    "evaluation.max_new_tokens": 6,
}


def run(base: Path, out: Path, *, resume: bool = False, overwrite: bool = False, **settings: Any) -> Outcome:
    datasets = {name: settings.pop(name) for name in ("train", "validation", "test") if name in settings}
    config = load(values={"model.name": str(base), "output_dir": str(out), **QUICK, **settings})
    return train(config, resume=resume, overwrite=overwrite, console=Console(quiet=True), **datasets)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_a_reader_should_know_is_said_at_the_end(tiny: Any, tmp_path: Path) -> None:
    """A classifier that learns nothing."""
    rows = [{"text": f"line {i}", "label": ("odd", "even")[i % 2]} for i in range(60)]
    settings = {**QUICK, "model.name": str(tiny("bert")), "output_dir": str(tmp_path / "run")}
    said = io.StringIO()
    train(
        load(values={**settings, "training.learning_rate": 1e-12}),
        train=load_dataset(rows[:20]),
        validation=load_dataset(rows[20:]),
        console=Console(file=said),
    )
    found = remarks(load_run(tmp_path / "run"))
    assert [remark.title for remark in found] == [
        "One answer for all", "No difference to the base model that these rows can show",
    ]  # fmt: skip
    assert said.getvalue().endswith("".join(f"  {remark.title}: {remark.text}\n" for remark in found))


# -- the run folder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that held a model, data and a config; and now a finished run."""
    place = tmp_path_factory.mktemp("run")
    save_tiny("gpt2", place / "gpt2")
    rows = colour_rows(44)
    write_jsonl(place / "train.jsonl", rows[:40])
    write_jsonl(place / "test.jsonl", rows[40:])
    before = tree(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))
        run(Path("gpt2"), Path("runs/first"), **{"data.train": "train.jsonl", "data.test": "test.jsonl"})
    assert {name for name in tree(place) - before if not name.startswith("runs/first/")} == {
        "runs",
        "runs/first",
    }
    return place


def test_the_folder_holds_exactly_what_is_documented(done: Path) -> None:
    assert {path.name for path in (done / "runs/first").iterdir()} == {
        "config.yaml", "adapter", "checkpoints", "log.jsonl", "result.json", "predictions.jsonl", "report.html",
    }  # fmt: skip
    assert {path.name for path in (done / "runs/first/adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "trivet.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in (done / "runs/first/checkpoints").iterdir()} <= {f"checkpoint-{i}" for i in range(5)}


def test_the_saved_config_is_the_one_that_ran(done: Path) -> None:
    ran = load(
        values={
            "model.name": "gpt2", "output_dir": "runs/first", "data.train": "train.jsonl", "data.test": "test.jsonl",
            "training.packing": True, "training.share_prefix": False, **QUICK,
        }
    )  # fmt: skip
    assert load(done / "runs/first/config.yaml") == ran  # with what was left open as it was decided


def test_the_log_has_a_line_a_step_and_one_a_validation(done: Path) -> None:
    rows = lines(done / "runs/first/log.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert list(row) == [
            "step", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens", "supervised_tokens", "epoch",
            "memory_bytes",
            "adapter_parameters",
        ]  # fmt: skip
        assert row["tokens"] > row["supervised_tokens"] > 0 and row["memory_bytes"] > 1e6 and row["step_seconds"] > 0
    others = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in others] == [1, 2, 3, 4]
    assert all(list(row) == ["step", "validation_loss", "validation_accuracy"] for row in others)
    assert steps[0]["epoch"] == pytest.approx(1 / 5, abs=1e-3)  # 38 rows are 5 batches of 8


def test_the_result_says_what_was_measured_and_with_what(done: Path) -> None:
    text = (done / "runs/first/result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(result) == {
        "metrics", "intervals", "n", "evaluated_on", "best_validation_loss", "best_step", "steps", "model", "task",
        "method", "dtype", "load_in_4bit", "device", "ranks", "rank_history", "rank_seconds", "adapter_parameters",
        "trainable_parameters", "total_parameters", "tokens_per_second",
        "peak_memory_bytes", "wall_seconds", "proof", "seed", "data", "versions", "finished", "learning_rate_trials",
        "deterministic", "nondeterministic_because", "threads",
    }  # fmt: skip
    assert set(result["data"]) == {
        "format", "rows", "fingerprints", "tokens", "supervised_tokens", "shortened_rows", "dropped_rows",
        "skipped_rows", "sample",
    }  # fmt: skip
    assert result["data"]["rows"] == {"train": 38, "validation": 2, "test": 4}
    assert result["data"]["format"] == "prompt-completion"
    assert result["evaluated_on"] == {"split": "test", "source": "test.jsonl"}
    assert (result["model"], result["task"], result["method"], result["steps"]) == (
        "gpt2",
        "causal-lm",
        "lora",
        4,
    )
    assert set(result["metrics"]) == {"base", "tuned"} and set(result["intervals"]) == {
        "base",
        "tuned",
        "difference",
    }
    assert set(result["metrics"]["base"]) == set(result["metrics"]["tuned"]) == set(result["n"])
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "bleu", "rougeL"} <= set(result["n"])
    assert set(result["n"].values()) == {4}
    model = load_file(done / "gpt2/model.safetensors")
    assert result["total_parameters"] >= sum(t.numel() for t in model.values())
    adapter = load_file(done / "runs/first/adapter/adapter_model.safetensors")
    assert result["trainable_parameters"] == sum(t.numel() for t in adapter.values())
    assert result["proof"]["relative_logit_error"] <= result["proof"]["tolerance"] == 1e-4
    assert result["best_validation_loss"] == min(
        row["validation_loss"] for row in lines(done / "runs/first/log.jsonl") if "validation_loss" in row
    )
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or result["versions"]["torch"] == str(
        torch.__version__
    )


def test_predictions_stand_beside_their_prompts_and_references(done: Path) -> None:
    rows = lines(done / "runs/first/predictions.jsonl")
    asked = lines(done / "test.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] + "\n" for row in asked]
    assert [row["references"] for row in rows] == [[row["completion"]] for row in asked]
    assert all(set(row) == {"prompt", "references", "base", "tuned"} for row in rows)


def test_evaluating_again_keeps_the_earlier_figures(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    before = json.loads(Path("runs/first/result.json").read_text())
    evaluation, written = evaluate_adapter(Path("runs/first"), max_rows=2, output=tmp_path / "deep" / "report.json")
    assert written == [
        Path("runs/first/result.json"),
        Path("runs/first/predictions.jsonl"),
        Path("runs/first/report.html"),
        tmp_path / "deep/report.json",
    ]
    after = json.loads(Path("runs/first/result.json").read_text())
    assert set(after["n"].values()) == {2} and len(lines(Path("runs/first/predictions.jsonl"))) == 2
    names = ("evaluated_on", "metrics", "intervals", "n")
    assert after["earlier_evaluations"] == [{name: before[name] for name in names}]
    kept = set(before) - set(names)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert json.loads((tmp_path / "deep/report.json").read_text())["metrics"] == after["metrics"]
    for side in ("base", "tuned"):
        assert evaluation.to_dict()["metrics"][side]["loss"] == after["metrics"][side]["loss"]
    evaluate_adapter(Path("runs/first"), data="train.jsonl", max_rows=3)
    assert len(json.loads(Path("runs/first/result.json").read_text())["earlier_evaluations"]) == 2
    Path("runs/first/result.json").write_text(json.dumps(before))


# -- what is there already -----------------------------------------------------------------------------------


def test_an_existing_run_is_neither_touched_nor_trained_over(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny("gpt2"), out, train=colour_rows(8))
    before = (out / "result.json").read_bytes()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match="finished run.*--overwrite"):
        run(tiny("gpt2"), out, train=colour_rows(8))
    assert (out / "result.json").read_bytes() == before
    outcome = run(tiny("gpt2"), out, overwrite=True, train=colour_rows(8), **{"training.max_steps": 2})
    assert outcome.result["steps"] == 2 and json.loads((out / "result.json").read_text())["steps"] == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_no_run_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("work of years")
    (tmp_path / "file").write_text("")
    for out in ("thesis", "file", "file/run"):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="output_dir"):
                run(tiny("gpt2"), tmp_path / out, overwrite=overwrite, train=colour_rows(8))
    assert tree(tmp_path) == {"thesis", "thesis/chapter.txt", "file"}


def test_an_empty_folder_is_free(tiny: Any, tmp_path: Path) -> None:
    run(tiny("gpt2"), tmp_path / "run", train=colour_rows(8), **{"training.max_steps": 1})
    assert (tmp_path / "run" / "result.json").exists()


# -- failures ------------------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_fails_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = tree(tmp_path)
    with pytest.raises(
        TrivetError, match=r"training diverged: \d steps in a row up to step \d .* its loss is nan.*learning_rate"
    ):
        run(folder, tmp_path / "run", train=colour_rows(8))
    assert tree(tmp_path) == before


def test_a_run_that_diverges_later_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    settings = {"training.learning_rate": 1e20, "training.lr_scheduler": "constant", "training.eval_steps": 1}
    with pytest.raises(TrivetError, match="training diverged"):
        run(folder, tmp_path / "run", train=colour_rows(8), **settings, **{"training.max_steps": 20})
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "result.json").exists()
    for row in lines(tmp_path / "run" / "log.jsonl"):
        assert row.get("loss", 0.0) is None or isinstance(row.get("loss", 0.0), float)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"train": [{"prompt": "a"}]}, DataError),
        ({"train": [{"text": "a", "label": "b"}] * 8}, DataError),
        ({"train": "nothing.jsonl"}, ConfigError),
        ({}, ConfigError),
        ({"train": colour_rows(8), "model.target_modules": ["nothing"]}, ConfigError),
        ({"train": colour_rows(8), "method": "nothing"}, ConfigError),
        ({"train": colour_rows(8), "model.name": "nothing/at/all"}, ConfigError),
        ({"train": colour_rows(8), "data.validation": 0.01}, ConfigError),
        ({"train": colour_rows(8), "validation": [{"text": "plain", "label": "x"}]}, DataError),
        ({"train": colour_rows(8), "test": [{"text": "plain", "label": "x"}]}, DataError),
    ],
)
def test_what_is_wrong_from_the_start_writes_nothing(
    tiny: Any, tmp_path: Path, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        run(tiny("gpt2"), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# -- which rows ----------------------------------------------------------------------------------------------


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"row {i}", "completion": f"the number {i}"} for i in range(n)]


def prompts(part: Any) -> list[str] | None:
    return None if part is None else [example.prompt for example in part]


def test_validation_is_a_share_a_file_nothing_or_five_percent(tmp_path: Path) -> None:
    rows, path = numbered(60), write_jsonl(tmp_path / "other.jsonl", numbered(5))

    def sizes(held: Any, n: int = 60) -> tuple[int, int | None]:
        splits = load_splits(load(values={"data.validation": held}), train=rows[:n])
        return len(splits.train), None if splits.validation is None else len(splits.validation)

    assert sizes("auto") == (57, 3)
    assert sizes("auto", 20) == (19, 1)
    assert sizes("auto", 19) == (19, None)
    assert sizes(0.25) == (45, 15)
    assert sizes(None) == (60, None)
    assert sizes(str(path)) == (60, 5)


def test_auto_holds_out_500_rows_at_most() -> None:
    splits = load_splits(load(), train=numbered(12_000))
    assert splits.validation is not None and len(splits.validation) == 500 and len(splits.train) == 11_500


def test_splits_are_disjoint_whole_and_decided_by_the_seed() -> None:
    rows = numbered(60)

    def parts(seed: int) -> tuple[Any, Any]:
        splits = load_splits(load(values={"training.seed": seed, "data.validation": 0.2}), train=rows)
        return prompts(splits.train), prompts(splits.validation)

    first, again, other = parts(1), parts(1), parts(2)
    assert first == again and first[1] != other[1]
    assert sorted(first[0] + first[1]) == sorted(row["prompt"] for row in rows)


def test_rows_can_be_limited() -> None:
    values = {
        "data.max_train_rows": 7,
        "data.max_validation_rows": 3,
        "data.max_test_rows": 2,
        "data.validation": 0.5,
    }
    rows = numbered(60)
    splits = load_splits(load(values=values), train=rows, test=rows[:9])
    assert (len(splits.train), len(splits.validation or ()), len(splits.test or ())) == (7, 3, 2)
    whole = load_splits(load(values={"data.validation": 0.5}), train=rows)
    assert not set(prompts(splits.train) or ()) & set(prompts(whole.validation) or ())
    assert prompts(splits.test) == ["row 0", "row 1"]
    another = load_splits(load(values=values | {"training.seed": 1}), train=rows, test=rows[:9])
    assert prompts(another.train) != prompts(splits.train)


def test_classes_that_look_like_numbers_stay_classes_in_every_split(tmp_path: Path) -> None:
    train_rows = [{"text": f"t {i}", "label": i % 3} for i in range(30)]
    splits = load_splits(load(), train=train_rows, test=[{"text": "t", "label": 1}])
    assert splits.train.format == splits.test.format == "classification"  # type: ignore[union-attr]


def test_the_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    rows = numbered(6)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with (tmp_path / "b.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, ["prompt", "completion"])
        out.writeheader()
        out.writerows(rows)
    print_of = {source: load_dataset(source).fingerprint for source in (str(path), str(tmp_path / "b.csv"))}
    assert len({*print_of.values(), load_dataset(rows).fingerprint}) == 1
    changed = [*rows[:5], {**rows[5], "completion": "the number 6"}]
    for other in (changed, rows[:5], rows[::-1]):
        assert load_dataset(other).fingerprint != load_dataset(rows).fingerprint
    assert len(load_dataset(rows).fingerprint) == 16


def test_steps_are_planned_as_the_trainer_takes_them(tiny: Any, tmp_path: Path) -> None:
    rows = numbered(22)
    for size, accumulate, epochs, steps in ((4, 1, 2, 12), (4, 3, 2, 4), (8, 2, 1.5, 3), (30, 1, 1, 1)):
        settings = {"training.batch_size": size, "training.gradient_accumulation_steps": accumulate}
        settings |= {"training.num_epochs": epochs, "training.max_steps": None, "data.validation": None}
        config = load(values=QUICK | settings)
        assert planned_steps(config, [{"input_ids": [1]}] * 22) == steps
        outcome = run(tiny("gpt2"), tmp_path / f"{size}-{accumulate}", train=rows, **settings)
        assert outcome.result["steps"] == steps


# -- every kind of rows --------------------------------------------------------------------------------------


def test_multiple_choice_rows_end_to_end(tiny: Any, tmp_path: Path) -> None:
    draw, colours = random.Random(0), ["blue", "green", "red"]
    rows = []
    for row in colour_rows(24):
        choices = draw.sample(colours, 3)
        rows.append(
            {
                "prompt": row["prompt"],
                "choices": choices,
                "answer": choices.index(row["completion"].split()[-1]),
            }
        )
    outcome = run(tiny("gpt2"), tmp_path / "run", train=rows, test=rows[:6])
    assert {"loss", "accuracy"} <= set(outcome.result["n"]) and "bleu" not in outcome.result["n"]
    for row, written in zip(rows, lines(tmp_path / "run" / "predictions.jsonl"), strict=False):
        assert written["prompt"] == row["prompt"] and written["answer"] == row["choices"][row["answer"]]
        assert written["choices"] == row["choices"]
        assert written["tuned"] in row["choices"] and written["base"] in row["choices"]


def test_rows_with_several_references_end_to_end(tiny: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": r["prompt"], "references": [r["completion"], "it is " + r["completion"]]} for r in colour_rows(24)
    ]
    outcome = run(tiny("t5"), tmp_path / "run", train=rows, test=rows[:3])
    assert outcome.result["data"]["format"] == "references" and outcome.result["task"] == "seq2seq"
    assert lines(tmp_path / "run" / "predictions.jsonl")[0]["references"] == rows[0]["references"]


def test_plain_text_end_to_end(tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat on the mat and the dog ran to the red house " * 20} for _ in range(24)]
    outcome = run(tiny("gpt2"), tmp_path / "run", train=rows, **{"data.max_length": 32})
    assert set(outcome.result["n"]) == {"loss", "perplexity", "token_accuracy"}
    assert outcome.evaluation is not None and not outcome.evaluation.predictions
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    data = outcome.result["data"]
    assert data["supervised_tokens"] > 0.95 * data["tokens"] and data["tokens"] > 23 * 200  # cut into rows, not cut off


def test_chats_end_to_end(tiny: Any, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"]},
            ]
        }
        for r in colour_rows(24)
    ]
    outcome = run(tiny("llama"), tmp_path / "run", train=rows, test=rows[:2])
    assert outcome.result["data"]["format"] == "messages"
    assert lines(tmp_path / "run" / "predictions.jsonl")[0]["references"] == ["the sky is blue"]


def test_nothing_to_evaluate_on_is_said_in_the_result(tiny: Any, tmp_path: Path) -> None:
    outcome = run(tiny("gpt2"), tmp_path / "run", train=colour_rows(8))
    assert outcome.evaluation is None and outcome.result["evaluated_on"] is None
    assert outcome.result["metrics"] == {"base": {}, "tuned": {}}
    assert outcome.result["best_validation_loss"] is None and outcome.result["best_step"] is None
    with pytest.raises(ConfigError, match="data.train is not set|pass --data"):
        evaluate_adapter(tmp_path / "run")


def test_generation_can_be_left_out_or_limited(tiny: Any, tmp_path: Path) -> None:
    rows = colour_rows(24)
    outcome = run(tiny("gpt2"), tmp_path / "a", train=rows, test=rows[:5], **{"evaluation.generate": False})
    assert set(outcome.result["n"]) == {"loss", "perplexity", "token_accuracy"}
    outcome = run(tiny("gpt2"), tmp_path / "b", train=rows, test=rows[:5], **{"evaluation.max_generate_rows": 2})
    assert outcome.result["n"]["loss"] == 5 and outcome.result["n"]["exact_match"] == 2
    assert len(lines(tmp_path / "b" / "predictions.jsonl")) == 2


def test_bad_rows_are_skipped_and_counted_when_asked(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, colour_rows(8))
    path.write_text(path.read_text() + 'not json\n{"prompt": "no answer"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:9"):
        run(tiny("gpt2"), tmp_path / "run", train=str(path))
    outcome = run(tiny("gpt2"), tmp_path / "run", train=str(path), **{"data.on_bad_row": "skip"})
    assert outcome.result["data"]["skipped_rows"] == 2 and outcome.result["data"]["rows"]["train"] == 8


# -- further loggers -----------------------------------------------------------------------------------------


def test_tensorboard_writes_inside_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(folder, Path("run"), train=colour_rows(8), **{"training.report_to": ["tensorboard"]})
    made = tree(tmp_path) - before
    assert any("events.out.tfevents" in name for name in made)
    assert all(name == "run" or name.startswith("run/") for name in made)


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(tiny: Any, tmp_path: Path) -> None:
    try:
        import wandb  # type: ignore[import-not-found]  # noqa: F401

        pytest.skip("wandb is installed here")
    except ImportError:
        pass
    with pytest.raises(ConfigError, match="wandb is not installed"):
        run(tiny("gpt2"), tmp_path / "run", train=colour_rows(8), **{"training.report_to": ["wandb"]})
    assert not (tmp_path / "run").exists()
