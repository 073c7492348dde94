"""The evidence harness in bench/: runs that can be interrupted, seeds that are paired, tables that say what was run."""

from __future__ import annotations

import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import colour_rows, tiny_model, write_jsonl
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.data.batch import Collator
from trivet.methods import find_method

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import cuts
import four_bit
import order
import page
import pareto
import processors_table
import quality
import quality_adalora
import quality_table
import quality_tasks
import rates
import translator
from quality_tasks import CANDIDATES, TASKS, Candidate, Task

LORA, WIDE = Candidate("lora-r2", "lora", 2), Candidate("lora-r4", "lora", 4)
SQUEEZE = Candidate("squeeze-r1", {"rank": {"name": "squeeze", "budget": "r1-equivalent"}}, 1)
ADALORA = Candidate("peft_adalora-r2", None, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two classes for an encoder, and prompts with several answers for a decoder."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["the cat sat", "the dog ran", "the sky is blue", "the grass is green"]
    labelled = [{"text": f"{words[i % 4]} {i}", "label": "animal" if i % 4 < 2 else "colour"} for i in range(60)]
    write_jsonl(folder / "cls_train.jsonl", labelled)
    write_jsonl(folder / "cls_test.jsonl", labelled[:12])
    written = [{"prompt": f"name : {i % 9}", "completion": f"it is {i}"} for i in range(36)]
    write_jsonl(folder / "train.jsonl", colour_rows(20))
    write_jsonl(folder / "test.jsonl", written)
    return folder


@pytest.fixture(scope="module")
def task(tiny: Any) -> Task:
    rates = (1e-3, 1e-2, 3e-2)
    files = ("cls_train.jsonl", "cls_test.jsonl")
    return Task("tiny", "Tiny", str(tiny("bert")), "float32", *files, "train", 8, 4, 32, "accuracy", rates)


@pytest.fixture(scope="module")
def loaded(task: Task, place: Path) -> Any:
    return quality_tasks.load_task(task, place)


# -- runs ------------------------------------------------------------------------------------------------------


def test_interrupted_work_goes_on_where_it_stopped(task: Task, place: Path, tmp_path: Path) -> None:
    results = tmp_path / "quality.jsonl"
    assert quality.compare(task, [LORA], [0, 1], place, results, deadline=0.0) == 0
    assert not results.exists()  # no time left: no run was started
    quality.compare(task, [LORA], [0, 1], place, results)
    lines = results.read_text().splitlines(keepends=True)
    first = quality_table.read(results)
    assert len(lines) == 4  # three rates with seed 0, the best of them with seed 1
    best = min((row for row in first.values() if row["seed"] == 0), key=lambda row: row["validation"]["loss"])
    assert [row["learning_rate"] for row in first.values() if row["seed"] == 1] == [best["learning_rate"]]

    results.write_text(lines[0] + lines[1][:40])  # killed while it wrote
    quality.compare(task, [LORA], [0, 1], place, results)
    assert len(results.read_text().splitlines()) == 5  # what was done anew stands on lines of its own
    again = quality_table.read(results)
    assert again.keys() == first.keys()
    for which, row in first.items():
        assert again[which]["validation"] == row["validation"], which
        assert again[which]["test"] == row["test"], which
    size = results.stat().st_size
    quality.compare(task, [LORA], [0, 1], place, results)
    assert results.stat().st_size == size


def test_no_run_depends_on_the_ones_before(loaded: Any) -> None:
    base = quality.fingerprint(loaded)
    first = quality.run(loaded, LORA, 1, 1e-2, 2.0)
    squeezed = quality.run(loaded, SQUEEZE, 1, 1e-2, 2.0)
    quality.run(loaded, ADALORA, 2, 1e-2, 2.0)
    full = quality.run(loaded, CANDIDATES["full"], 1, 1e-2, 2.0)
    again = quality.run(loaded, LORA, 1, 1e-2, 2.0)
    assert (first["validation"], first["test"]) == (again["validation"], again["test"])
    assert first["validation"] != quality.run(loaded, LORA, 3, 1e-2, 2.0)["validation"]
    quality.start_heads(loaded, 1)
    at_one = quality.fingerprint(loaded)
    assert {name for name in base if base[name] != at_one[name]} <= {"classifier.weight", "classifier.bias"}
    assert squeezed["ranks"]["layers"] == len(quality_tasks.targets(loaded)) == 13
    assert first["adapter_parameters"] == first["trainable_parameters"] - 2 * 33  # the head of 32 inputs and a bias
    assert full["trainable_parameters"] == sum(p.numel() for p in loaded.base.model.parameters())
    assert full["validation"] not in (first["validation"], squeezed["validation"])
    assert squeezed["adapter_parameters"] <= first["adapter_parameters"] / 2


def test_a_seed_gives_every_method_the_same_head(loaded: Any) -> None:
    head = loaded.base.model.get_submodule("classifier")
    quality.start_heads(loaded, 1)
    start = head.weight.clone()
    quality.start_heads(loaded, 2)
    assert not torch.equal(head.weight, start)
    quality.run(loaded, WIDE, 1, 3e-2, 2.0)
    assert torch.equal(loaded.base.model.get_submodule("classifier").weight, start)


def test_only_a_run_that_may_be_chosen_looks_at_the_test_rows(loaded: Any) -> None:
    seen = quality.run(loaded, LORA, 0, 1e-2, 2.0)
    assert set(seen["test"]) == {"loss", "accuracy", "macro_f1", "matthews"}
    assert quality.run(loaded, LORA, 0, 1e-2, 2.0, best=seen["validation"]["loss"])["test"] is None


def test_a_rate_that_diverges_is_a_row(loaded: Any) -> None:
    row = quality.run(loaded, LORA, 0, 1e30, 2.0)
    assert "nan" in row["failed"] or "inf" in row["failed"]
    assert row["validation"] is row["test"] is None
    assert math.isfinite(quality.run(loaded, LORA, 0, 1e-3, 2.0)["validation"]["loss"])  # and harms nobody after it


def test_a_regression_is_compared_by_its_squared_error(tiny: Any, place: Path) -> None:
    rows = [{"text": f"line {i}", "text_pair": f"line {i % 5}", "label": i % 5 + 0.5} for i in range(60)]
    write_jsonl(place / "pair_train.jsonl", rows)
    write_jsonl(place / "pair_test.jsonl", rows[:20])
    files = ("pair_train.jsonl", "pair_test.jsonl")
    task = Task("pair", "Pair", str(tiny("bert")), "float32", *files, "train", 4, 4, 32, "pearson", (1e-2,))
    row = quality.run(quality_tasks.load_task(task, place), LORA, 0, 1e-2, 2.0)
    assert set(row["test"]) == {"loss", "pearson", "spearman"}
    assert 0 < row["test"]["loss"] < 12  # the labels' mean square is 8.25


def test_several_references_can_be_held_out(tiny: Any, place: Path) -> None:
    held_out = [{"prompt": f"name : {i}", "references": [f"it is {i}", "who knows"]} for i in range(12)]
    write_jsonl(place / "references.jsonl", held_out)
    base, files = str(tiny("llama")), ("train.jsonl", "references.jsonl")
    task = Task("w", "W", base, "float32", *files, "test", 2, 2, 64, "token_accuracy", (1e-2,), 10, 5)
    row = quality.run(quality_tasks.load_task(task, place), LORA, 0, 1e-2, 2.0)
    assert set(row["test"]) == {"loss", "token_accuracy"}


def test_a_translator_is_made_once_and_turned_round(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path))
    files = ("train.jsonl", "test.jsonl")
    task = Task("t", "T", translator.NAME, "float32", *files, "test", 2, 4, 32, "token_accuracy", (1e-2,))
    with pytest.raises(SystemExit, match="make it with: python bench/translator.py"):
        quality_tasks.load_task(task, place)
    pairs = translator.pairs(place / "train.jsonl")
    assert pairs[0] == tuple(colour_rows(1)[0][side] for side in ("completion", "prompt"))
    translator.train(pairs, pairs, steps=2)
    loaded = quality_tasks.load_task(task, place)
    assert loaded.base.task == "seq2seq"
    ids = loaded.encoder.tokenizer("Größe, the sky")["input_ids"]
    assert loaded.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() == "Größe, the sky"
    row = quality.run(loaded, LORA, 0, 1e-2, 2.0)
    assert set(row["test"]) == {"loss", "token_accuracy"}
    layers = [loaded.base.model.get_submodule(name) for name in quality_tasks.targets(loaded)]
    assert len(layers) == 2 * 6 + 2 * 10  # those of the decoder attend to the encoder too
    assert row["adapter_parameters"] == sum(2 * (m.in_features + m.out_features) for m in layers)


def test_peft_adalora_is_run_as_peft_means_it(loaded: Any) -> None:
    quality.start_heads(loaded, 0)
    model = quality_adalora.attach_peft_adalora(loaded, ADALORA, 0, 2.0)
    batch = Collator(0)(loaded.train_rows[:4])
    model.eval()
    with torch.no_grad():
        theirs = model(**batch)
        ours = torch.nn.functional.cross_entropy(theirs.logits, batch["labels"]) + quality_adalora.orthogonality(model)
    model.unload()
    torch.testing.assert_close(ours, theirs.loss)
    row = quality.run(loaded, ADALORA, 0, 1e-2, 2.0)
    assert row["ranks"]["mean"] == 2  # the target, from 3 in every layer
    assert row["ranks"]["least"] < 3 == row["ranks"]["most"]


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    names = ("task", "method", "seed", "learning_rate", "scale", "steps")

    def add(number: int) -> None:
        quality_table.append(path, dict.fromkeys(names, number) | {"filling": "x" * 20_000})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(100)))
    assert len(quality_table.read(path)) == 100


# -- what is compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)
def test_every_method_exists_and_has_as_many_trials(candidate: Candidate) -> None:
    if candidate.method is not None:
        find_method(candidate.method)
    for task in TASKS.values():
        trials = candidate.trials(task)
        assert len(set(trials)) == 3 * len(candidate.scales)
        assert len(candidate.scales) == 1 or candidate.method is None


def test_shards_share_the_work() -> None:
    everything = list(CANDIDATES.values())
    parts = [quality.shard(everything, f"{i}/3") for i in range(3)]
    assert sorted(c.name for part in parts for c in part) == sorted(CANDIDATES)
    with pytest.raises(SystemExit, match="counts from 0"):
        quality.shard(everything, "2/2")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_rows_of_every_task_are_there(task: Task, shared: Path) -> None:
    parts = quality_tasks.splits(task, shared / "data")
    train, validation, test = len(parts.train), len(parts.validation), len(parts.test)
    assert train == min(task.train_rows or train, train) >= task.batch_size
    assert validation >= 100
    assert test >= 100


def test_validation_and_test_share_no_prompt(place: Path) -> None:
    task = Task(
        "w", "W", "", "float32", "train.jsonl", "test.jsonl", "test", 1, 1, 32, "token_accuracy", (1.0,), 10, 12
    )
    parts = quality_tasks.splits(task, place)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (10, 12, 12)
    assert not {e.prompt for e in parts.validation} & {e.prompt for e in parts.test}
    again = quality_tasks.splits(task, place)
    assert parts.fingerprints() == again.fingerprints()


def test_truncation_leaves_the_largest_singular_values_of_every_update() -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4)
    torch.manual_seed(0)
    for layer in adapted_layers(model):
        layer.B.data.normal_()
    before = {layer.name: layer.scale * layer.B @ layer.A for layer in adapted_layers(model)}
    quality.truncate(model, 2)
    for layer in adapted_layers(model):
        u, sigma, v = torch.linalg.svd(before[layer.name], full_matrices=False)
        assert layer.rank == 2
        best = u[:, :2] * sigma[:2] @ v[:2]
        assert torch.allclose(layer.scale * layer.B @ layer.A, best, atol=1e-4 * sigma[0].item())


# -- tables ----------------------------------------------------------------------------------------------------


def rows_of(task: Task, candidate: Candidate, validation: dict[float, float], test: dict[int, float]) -> dict:
    """Rows as if measured: validation loss by rate for seed 0, and test loss by seed at the best of these rates."""
    best = min(validation, key=validation.__getitem__)
    made = {}
    for seed, rate in [*((0, rate) for rate in validation), *((seed, best) for seed in test if seed)]:
        loss = test.get(seed)
        row = {
            "learning_rate": rate, "scale": 2.0, "seed": seed, "failed": None,
            "adapter_parameters": 100 * candidate.rank, "train_cpu_seconds": 10.0 + candidate.rank,
            "validation": {"loss": validation[rate], "accuracy": 0.5},
            "test": {"loss": loss, "accuracy": 0.5} if rate == best and loss is not None else None,
        }  # fmt: skip
        made[quality_table.key(task, candidate, seed, rate, 2.0)] = row
    return made


def test_runs_on_two_processors_are_paired() -> None:
    task = TASKS["e2e"]
    low, middle, high = task.rates
    cpu = rows_of(task, LORA, {low: 0.5, middle: 0.3, high: 0.4}, {0: 0.30})
    gpu = rows_of(task, LORA, {low: 0.52, middle: 0.29}, {0: 0.31})
    lines = processors_table.on_both(cpu, gpu).splitlines()
    assert [line.split(" | ")[-3:] for line in lines[2:4]] == [
        ["0.5000", "0.5200", "+0.0200 |"],
        ["0.3000", "0.2900", "-0.0100 |"],
    ]
    assert lines[-1].endswith("the median difference is +0.0050.")


def test_the_table_pairs_seeds_and_names_what_is_too_small(task: Task) -> None:
    low, middle, high = task.rates
    lora = rows_of(task, WIDE, {low: 0.5, middle: 0.3, high: 0.4}, {0: 0.30, 1: 0.34, 2: 0.32})
    ours = rows_of(task, SQUEEZE, {low: 0.5, middle: 0.3, high: 0.2}, {0: 0.29, 1: 0.32, 2: 0.29, 9: 0.99})
    text = quality_table.table(lora | ours, [task], [WIDE, SQUEEZE], [0, 1, 2])
    line = next(line for line in text.splitlines() if line.startswith("| squeeze-r1 |"))
    # differences -0.01, -0.02, -0.03: mean -0.02, half 4.3027 * 0.01 / sqrt(3)
    assert "| -0.0200 [-0.0448, +0.0048] |" in line
    assert "| 0.03 ↑ | 3 |" in line  # the rate of the lowest validation loss, the highest that was tried
    assert "| lora-r4 × 0.25 |" in line
    assert "| 0.3000 ± 0.0173 |" in line
    plain = next(line for line in text.splitlines() if line.startswith("| lora-r4 |"))
    assert "| 0.01 | 3 |" in plain
    # 0.02 over sqrt((0.02² + 0.0173²) / 2)
    assert "| squeeze-r1 | -1.07 | n = 1: too small | 1 | -1.07 | none | none |" in text

    two = quality_table.table(lora | ours, [task], [WIDE, SQUEEZE], [0, 1])
    assert "-0.0150 (n = 2: too small)" in two


def test_rows_that_are_trained_on_twice_are_one_task(task: Task) -> None:
    rows, trials = {}, dict(zip(task.rates, (0.5, 0.3, 0.4), strict=True))
    for shift, where in ((0.01, task), (0.03, replace(task, name="again"))):
        for candidate, tests in ((WIDE, {0: 0.30, 1: 0.32}), (SQUEEZE, {0: 0.30 - shift, 1: 0.32 - shift})):
            rows |= rows_of(where, candidate, trials, tests)
    tasks = [task, replace(task, name="again"), replace(task, name="third", train="other.jsonl")]
    text = quality_table.table(rows, tasks, [WIDE, SQUEEZE], [0, 1])
    assert "| squeeze-r1 | -1.41 | n = 1: too small | 1 |" in text  # the mean of 0.01 and 0.03 over √2 · 0.01

    elsewhere = replace(task, name="elsewhere", base="another")
    rows |= rows_of(elsewhere, WIDE, trials, {0: 0.30, 1: 0.32, 2: 0.31})
    rows |= rows_of(elsewhere, SQUEEZE, trials, {0: 0.31, 1: 0.33, 2: 0.32})
    text = quality_table.table(rows, [*tasks, elsewhere], [WIDE, SQUEEZE], [0, 1, 2])
    assert "| squeeze-r1 | -0.21 | n = 2: too small | 2 | -0.21 | none | elsewhere |" in text  # and 0.01 over 0.01


def test_what_a_small_method_has_of_what_more_rank_gains(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "TASKS", {task.name: task})
    narrow, wide, squeeze = (CANDIDATES[name] for name in ("lora-r4", "lora-r16", "squeeze-r4"))

    def told(wide_losses: dict[int, float]) -> list[str]:
        rows = {}
        for candidate, losses in (
            (narrow, {0: 0.50, 1: 0.52, 2: 0.51}),
            (wide, wide_losses),
            (squeeze, {0: 0.44, 1: 0.44, 2: 0.44}),  # 0.06, 0.08 and 0.07 ahead: 0.07 with 0.0248 to each side
        ):
            rows |= rows_of(task, candidate, dict.fromkeys(task.rates, 0.5) | {task.rates[1]: 0.4}, losses)
        return pareto.of_the_gain(rows).splitlines()[2:-2]

    assert told({0: 0.40, 1: 0.42, 2: 0.41}) == ["| Tiny | 0.510 | 0.410 | 70% [45%, 95%] |  |  |  |  |  |"]
    assert told({0: 0.40, 1: 0.60, 2: 0.41}) == []  # 0.04 ahead in the mean, and in no interval
    assert told({0: 0.60, 1: 0.62, 2: 0.61}) == []


def test_a_sweep_is_chosen_by_validation_and_compared_on_test_rows(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, auto = CANDIDATES["lora-r16"], CANDIDATES["auto"]
    monkeypatch.setattr(pareto, "TASKS", {task.name: task})
    rows = {}
    for candidate, validation, test in (
        (wide, 0.3, {0: 0.30, 1: 0.32}),
        (CANDIDATES["lora-r2"], 0.4, {0: 0.10, 1: 0.12}),  # better on test rows, which nobody may choose by
        (CANDIDATES["truncated-r2"], 0.2, {0: 0.5, 1: 0.6}),  # no plain rank
        (auto, 0.3, {0: 0.29, 1: 0.92}),
    ):
        rows |= rows_of(task, candidate, dict.fromkeys(task.rates, 0.5) | {task.rates[1]: validation}, test)
    (line, _, last) = pareto.against_sweep(rows).splitlines()[2:]
    # spread: variances 0.0002, 0.0002, 0.005 and 0.19845 give 0.2258; auto has r = 8's 800 parameters
    assert line == "| Tiny | 2, 16 | 2 | r = 16, r = 16 | 50% | 1 of 2 | +0.295 | 0.69 | 1.5 |"
    assert "1 of 2 task-seeds (50%)" in last
    for key, row in rows.items():
        row["processor"] = "slow" if key[:3] in ((task.name, "auto", 1), (task.name, "lora-r2", 0)) else "fast"
    for row in rows.values():
        row["train_cpu_seconds"] *= 3 if row["processor"] == "slow" else 1
    line = pareto.against_sweep(rows).splitlines()[2]
    assert line.endswith("| 0.69 | 1.5 |")  # auto's first seed, and the sweep's second
    for row in rows.values():
        row["processor"] = row["seed"], row["adapter_parameters"]
    assert pareto.against_sweep(rows).splitlines()[2].endswith("| not comparable | not comparable |")
    for row in rows.values():
        row |= {"train_seconds": 10.0, "rank_seconds": 2.0}
    assert pareto.against_sweep(rows).splitlines()[2].endswith("| 1.25 * | not comparable |")
    against = pareto.against_r16(rows).splitlines()
    assert against[2].startswith("| lora-r2 | 12% | -0.89 |")  # -0.2 of 0.2258
    pareto.draw(rows, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_is_students() -> None:
    assert quality_table.interval([1.0, 2.0, 4.0, 5.0]) == pytest.approx((3.0, 3.182446 * math.sqrt(10 / 3) / 2))
    assert quality_table.interval([1.0]) == (1.0, math.inf)


def test_check_lists_what_is_missing(task: Task) -> None:
    low, middle, high = task.rates
    whole = rows_of(task, WIDE, {low: 0.5, middle: 0.3, high: 0.4}, {0: 0.3, 1: 0.3})
    assert quality_table.check(whole, [task], [WIDE], [0, 1]) == []
    assert quality_table.check(whole, [task], [WIDE], [0, 1, 2]) == ["tiny lora-r4: seeds 2 missing"]
    assert quality_table.next_run(whole, task, WIDE, [0, 1, 2]) == (2, middle, 2.0)
    del whole[quality_table.key(task, WIDE, 0, high, 2.0)]
    assert quality_table.check(whole, [task], [WIDE], [0]) == ["tiny lora-r4: 1 of 3 trials missing"]
    assert quality_table.next_run(whole, task, WIDE, [0]) == (0, high, 2.0)


def test_the_pages_are_what_the_results_say() -> None:
    renewed = page.renewed()
    assert {path.name for path in renewed} >= {"evidence.md", "README.md", "README.zh-CN.md"}
    for path, text in renewed.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python bench/page.py"


def test_a_measured_cut_is_the_one_that_auto_makes(loaded: Any) -> None:
    longer = replace(loaded, task=replace(loaded.task, steps=40))
    row = cuts.measure(longer, 0, 1e-2)
    made = quality.run(longer, CANDIDATES["auto"], 0, 1e-2, 2.0)
    left = cuts.kept(row, "d + e ≤ t / 2")
    assert 0.1 < left["share"] < 1
    assert len({cut["test"] for cut in row["cuts"]}) == len(cuts.SHARES)
    assert (made["validation"]["loss"], made["test"]["loss"]) == (left["validation"], left["test"])


def test_what_each_rule_would_keep_of_a_cut() -> None:
    """Two rows, losses 0 ± noise: the whole, a half 0.006 above with an error of 0.005, a quarter 0.011 above, 0.5."""
    looked = [[0.0, 0.0], [0.001, 0.011], [0.010, 0.012], [0.5, 0.5], [1.0, 1.0]]
    made = [{"share": 0.5**i, "looked": losses, "test": float(i)} for i, losses in enumerate(looked)]
    row = {"base": [1.0, 1.0], "cuts": made, "task": "sst2", "seed": 0}
    shares = [cuts.kept(row, rule)["share"] for rule in cuts.RULES]
    assert shares == [0.5, 0.5, 1.0, 1.0, 1.0]  # 0.006: within 1% of the gain, beyond its error, with it beyond 1%
    better = {**row, "cuts": [{**made[0], "looked": [0.2, 0.2]}, *made[1:]]}
    assert [cuts.kept(better, rule)["share"] for rule in cuts.RULES] == [0.25, 0.25, 0.5, 0.25, 0.5]
    assert cuts.table([row]).splitlines()[2].startswith("| SST-2 (MiniLM-L6), 0 | 0.000 | 1.000 | 2.000 |")


# -- a base model in 4 bits -----------------------------------------------------------------------------------


def test_a_base_in_4_bits_is_measured_and_compared_seed_by_seed(loaded: Any) -> None:
    row = four_bit.measure(loaded, 1, False, 1e-2, 2.0)
    assert row["before"] is None and math.isfinite(row["test"]["loss"])  # a classifier's head is new
    rows = [
        {
            "task": "e2e", "load_in_4bit": four, "seed": seed, "before": {"loss": 3.0 + four / 4}, "failed": None,
            "test": {"loss": seed + four / 8},
        }
        for four in (False, True)
        for seed in (0, 1, 2)
    ]  # fmt: skip
    alone, failed = {**rows[0], "seed": 7}, {**rows[0], "seed": 8, "failed": "why", "test": None}
    line = "| E2E (SmolLM2-135M) | 3 | 3.0000 | +0.2500 | 1.0000 | +0.1250 [+0.1250, +0.1250] |"
    assert four_bit.table([*rows, alone, failed]).splitlines()[2:] == [line]


# -- the order of the rows ------------------------------------------------------------------------------------


def test_orders_differ_in_nothing_else(loaded: Any) -> None:
    rows = {name: order.measure(loaded, 1, name, 1e-2, 2.0) for name in order.ORDERS}
    assert len({row["validation"]["loss"] for row in rows.values()}) == 3
    assert rows["shuffled"]["padding"] <= rows["random"]["padding"]
    lengths = [1 + i % 40 for i in range(640)]
    steps = {name: [lengths[i] for i in order.sampler(name)(lengths, 4, 1)][::4] for name in order.ORDERS}
    falls = {name: sum(a >= b for a, b in itertools.pairwise(longest)) for name, longest in steps.items()}
    assert falls["sorted"] > 150 > 110 > max(falls["shuffled"], falls["random"])  # of 159


def test_orders_are_compared_seed_by_seed() -> None:
    rows = [
        {"task": "sst2", "order": name, "seed": seed, "test": {"loss": seed + extra}, "padding": extra, "failed": None}
        for name, extra in (("shuffled", 0.0), ("sorted", 0.25), ("random", 0.5))
        for seed in (0, 1, 2)
    ]
    rows = [row for row in rows if (row["order"], row["seed"]) != ("sorted", 2)]
    apart = "+0.2500 (n = 2: too small) | +0.5000 [+0.5000, +0.5000]"
    line = f"| SST-2 (MiniLM-L6) | 3 | 1.0000 | {apart} | 0% | 50% |"
    unpaired, failed = {**rows[0], "seed": 3}, [{**row, "seed": 4, "failed": "why", "test": None} for row in rows]
    assert order.table([*rows, unpaired, *failed]).splitlines()[2:] == [line]


# -- the learning rate that is found ---------------------------------------------------------------------------


def test_a_rate_that_is_found_is_measured_like_one_that_is_given(loaded: Any) -> None:
    found = rates.measure(loaded, 1, "auto", 1e-2, 2.0)
    given = rates.measure(loaded, 1, "swept", found["learning_rate"], 2.0)
    assert {trial["learning_rate"] for trial in found["trials"]} >= {7e-4, 2.8e-3, found["learning_rate"]}
    assert (found["validation"], found["test"]) == (given["validation"], given["test"])
    assert found["trial_seconds"] > 0 and "trials" not in given
    others = [rates.measure(loaded, 1, way, 1e-2, 2.0)["learning_rate"] for way in ("start", "default")]
    assert others == [2.8e-3, 3e-4]


def test_rates_are_compared_seed_by_seed() -> None:
    extra = {"auto": 0.25, "swept": 0.0, "start": 0.5, "default": 1.0}
    rows = [
        {
            "task": "sst2", "way": way, "seed": seed, "test": {"loss": seed + more}, "failed": None,
            "learning_rate": 1e-3 * (1 + seed), "train_seconds": 10.0, "trial_seconds": 5.0,
        }
        for way, more in extra.items()
        for seed in (0, 1, 2)
    ]  # fmt: skip
    rows = [row for row in rows if (row["way"], row["seed"]) != ("default", 2)]
    failed = [{**row, "seed": 4, "failed": "why", "test": None} for row in rows]
    apart = "+0.2500 [+0.2500, +0.2500] | +0.5000 [+0.5000, +0.5000] | +1.0000 (n = 2: too small)"
    line = f"| SST-2 (MiniLM-L6) | 3 | 0.001 | 1.0000 | 0.001, 0.002, 0.003 | {apart} | 50% |"
    assert rates.table([*rows, *failed]).splitlines()[2:] == [line]
