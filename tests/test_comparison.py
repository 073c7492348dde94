"""`trivet compare`: its figures are the evaluation's own, its words follow from them, nothing unlike is compared."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from conftest import colour_rows, write_jsonl
from trivet import LoRAModel
from trivet.cli.app import build
from trivet.comparison import Pair, compare_adapters
from trivet.errors import AdapterError, ConfigError, DataError
from trivet.evaluate.compare import Comparison, MetricComparison
from trivet.evaluate.measure import Evaluation, Settings
from trivet.evaluation import evaluate_adapter

FEW = Settings(resamples=20, max_new_tokens=8, max_generate_rows=4)


def trivet(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(build(), [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def place(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that learned much and little, a classifier, and their rows."""
    folder = tmp_path_factory.mktemp("compare")
    common: dict[str, Any] = {"dtype": "float32", "resamples": 10, "evaluation.generate": False}
    files = {"data.train": write_jsonl(folder / "train.jsonl", colour_rows(48))}
    files["data.test"] = write_jsonl(folder / "test.jsonl", colour_rows(12))
    read = {key: str(path) for key, path in files.items()}
    for name, steps in (("much", 30), ("little", 2)):
        settings = {"max_steps": steps, "learning_rate": 1e-2, "output_dir": str(folder / name), **common, **read}
        LoRAModel(str(tiny("gpt2")), 4, **settings).finetune(quiet=True)
    labelled = [{"text": f"{word} {i}", "label": word} for i in range(10) for word in ("red", "blue")]
    settings = {"max_steps": 3, "output_dir": str(folder / "classes"), **common}
    LoRAModel(str(tiny("bert")), 4, **settings).finetune(labelled, quiet=True)
    write_jsonl(folder / "classes.jsonl", labelled)
    return folder


def compared(place: Path, *names: str, data: str | None = "test.jsonl", **more: Any) -> Any:
    candidates = [name if name == "base" else str(place / name) for name in names]
    return compare_adapters(candidates, data=data and str(place / data), settings=FEW, **more)


def test_against_the_base_it_is_the_evaluations_own_table(place: Path) -> None:
    found = compared(place, "base", "much")
    evaluation, _ = evaluate_adapter(place / "much/adapter", data=str(place / "test.jsonl"), settings=FEW)
    (pair,) = found.pairs
    assert (pair.first, pair.other, found.rows) == ("base", "much", 12)
    assert pair.evaluation.table() == evaluation.table()
    assert pair.verdict.startswith("much is better than base: loss -")
    assert "exact_match" in pair.metrics


def test_each_is_compared_with_the_first_on_the_same_rows(place: Path) -> None:
    much, base = compared(place, "little", "much", "base").pairs
    loss, n = much.metrics["loss"]
    assert n == 12
    assert loss.difference == loss.tuned - loss.base
    assert loss.difference_interval[0] <= loss.difference <= loss.difference_interval[1] < 0
    assert loss.better is True
    assert much.verdict.startswith(f"much is better than little: loss {loss.difference:+.3g} [")
    assert " on 12 rows" in much.verdict
    (back,) = compared(place, "much", "little").pairs
    turned, _ = back.metrics["loss"]
    assert turned.difference == -loss.difference
    assert back.verdict.startswith("little is worse than much: loss +")
    assert base.metrics["loss"][0].base == loss.base  # the first one is measured once


def test_a_copy_is_no_different(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "much/adapter", tmp_path / "copy")
    (pair,) = compare_adapters([str(place / "much"), str(tmp_path / "copy")], settings=FEW).pairs
    assert {m.difference for m, _ in pair.metrics.values()} == {0.0}
    assert pair.verdict == "no difference between copy and much that 12 rows can show: loss +0 [+0, +0]"


def test_an_adapter_folder_has_its_runs_name(place: Path) -> None:
    (pair,) = compared(place, "much/adapter", "little").pairs
    assert (pair.first, pair.other) == ("much", "little")


def test_losses_over_other_tokens_are_left_out(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "much/adapter", tmp_path / "whole")
    notes = json.loads((tmp_path / "whole/trivet.json").read_text())
    notes["data"]["loss_on"] = "all"
    (tmp_path / "whole/trivet.json").write_text(json.dumps(notes))
    candidates = [str(place / "much"), str(tmp_path / "whole")]
    found = compare_adapters(candidates, settings=FEW)
    (pair,) = found.pairs
    assert "loss" not in pair.metrics
    assert pair.metrics["bleu"][0].difference == 0.0  # it writes the same
    assert found.remarks == [
        "loss, perplexity, token_accuracy of whole are left out: it reads the rows as other tokens than much"
    ]
    with pytest.raises(DataError, match="can't be compared"):
        compare_adapters(candidates, settings=Settings(generate=False, resamples=10))


def test_classifiers_are_compared_too(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "classes/adapter", tmp_path / "same")
    candidates = [str(place / "classes"), str(tmp_path / "same"), "base"]
    same, base = compare_adapters(candidates, data=str(place / "classes.jsonl"), settings=FEW).pairs
    assert "loss +0 [+0, +0]" in same.verdict
    assert set(base.metrics) == {"loss", "accuracy", "macro_f1", "matthews"}
    with pytest.raises(DataError):
        compared(place, "much", "classes")


@pytest.mark.parametrize(
    ("candidates", "kind", "words"),
    [
        (["much"], ConfigError, "two candidates or more"),
        (["base", "base"], ConfigError, "named twice"),
        (["much", "much"], ConfigError, "named twice"),
        (["much", "nowhere"], ConfigError, "no such folder"),
        (["much", "."], AdapterError, "adapter_config.json"),
    ],
)
def test_what_can_not_be_compared_says_why(
    place: Path, candidates: list[str], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        compared(place, *candidates)


def metric(low: float, high: float, *, higher: bool = False) -> MetricComparison:
    middle = (low + high) / 2
    return MetricComparison(1.0, 1.0 + middle, middle, (0.0, 1.0), (0.0, 1.0), (low, high), higher)


@pytest.mark.parametrize(
    ("metrics", "verdict"),
    [
        ({"loss": metric(-0.15, -0.09)}, "B is better than A: loss -0.12 [-0.15, -0.09] on 200 rows"),
        ({"loss": metric(0.1, 0.3)}, "B is worse than A: loss +0.2 [+0.1, +0.3] on 200 rows"),
        (
            {"loss": metric(-0.1, 0.1)},
            "no difference between B and A that 200 rows can show: loss +0 [-0.1, +0.1]",
        ),
        (
            {"loss": metric(-2, -1), "bleu": metric(-3, -1, higher=True), "chrf": metric(1, 3, higher=True)},
            "B is better than A: loss -1.5 [-2, -1] on 200 rows; better in chrf; worse in bleu",
        ),
        (
            {"pearson": metric(math.nan, math.nan)},
            "B and A can't be told apart: the difference in pearson is not defined",
        ),
        ({"mse": metric(1, 3), "pearson": metric(0, 1)}, "B is worse than A: mse +2 [+1, +3] on 200 rows"),
    ],
)
def test_a_verdict_in_words(metrics: dict[str, MetricComparison], verdict: str) -> None:
    pair = Pair("A", "B", Evaluation([Comparison(metrics, 200)]))
    assert pair.verdict == verdict
    assert json.loads(json.dumps(pair.to_dict(), allow_nan=False))["verdict"] == verdict


def test_the_command_shows_tables_and_verdicts(place: Path, tmp_path: Path) -> None:
    goal = tmp_path / "out" / "compared.json"
    arguments = [place / "little", place / "much", "base", "--data", place / "test.jsonl", "--max-rows", "6"]
    out = trivet("compare", *arguments, "--no-generate", "--output", goal).stdout
    lines = out.splitlines()
    assert lines[0] == f"6 rows of {place / 'test.jsonl'}"
    heads = [line.split()[:3] for line in lines if line.startswith("metric")]
    assert heads == [["metric", "little", "much"], ["metric", "little", "base"]]
    written = json.loads(goal.read_text())
    assert [pair["other"] for pair in written["pairs"]] == ["much", "base"]
    assert all(pair["verdict"] in out for pair in written["pairs"])
    assert trivet("compare", place / "much", "base", "--no-generate").stdout.startswith("12 rows")  # the run's own
    assert "two candidates or more" in trivet("compare", place / "much", code=2).stderr
