"""The speed benchmark in bench/: its arithmetic on made-up figures, and its driver on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from conftest import write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import speed
import speed_table
import speed_turns
from speed_trainers import Spread, contents, places

from trivet.data.batch import Collator

BENCH = Path(speed.__file__).parent


def steps(seconds: list[float], rows: int = 2, tokens: int = 20) -> list[dict[str, Any]]:
    """Answers of a side; the k-th held k bytes beyond its model."""
    counts = {"rows": rows, "tokens": tokens, "supervised": tokens // 2}
    return [{"seconds": s, "peak_extra_bytes": k, **counts} for k, s in enumerate(seconds)]


def side(seconds: list[float], **counts: int) -> dict[str, Any]:
    ready = {"dtype": "bfloat16", "frozen": 1000, "trained": 100, "resident_bytes": 5 * 2**20}
    return speed_table.summary(steps(seconds, **counts), 1, ready, 3.0)


def line(**sides: dict[str, Any]) -> dict[str, Any]:
    return {
        "workload": "dense", "model": "demo", "shape": "2 rows of 10 tokens", "machine": "a processor", "threads": 2,
        "sides": sides, "ratios": speed_table.ratios(sides),
    }  # fmt: skip


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 2.0, 9.0, 7.0]])
def test_quartiles_are_numpys(values: list[float]) -> None:
    found = speed_table.quartiles(values)
    expected = numpy.percentile(values, [25, 50, 75])
    assert [found["q1"], found["median"], found["q3"]] == pytest.approx(list(expected))


def test_summary_keeps_the_warm_up_apart() -> None:
    found = side([10.0, 1.0, 3.0])
    assert (found["warmup_seconds"], found["seconds"]) == ([10.0], [1.0, 3.0])
    assert found["step_seconds"]["median"] == 2.0
    assert (found["rows_per_second"], found["tokens_per_second"], found["supervised_per_second"]) == (1.0, 10.0, 5.0)
    assert found["first_step_seconds"] == 13.0  # loading, and the step that warms up
    assert found["peak_extra_bytes"] == 2


def test_ratios_are_of_rates_and_paired_by_round() -> None:
    """The other side has twice the rows and five times the tokens in a step, so equal times are no equal speed."""
    found = speed_table.ratios(
        {"trivet": side([9.0, 1.0, 2.0]), "other": side([9.0, 4.0, 4.0], rows=4, tokens=100), "gone": {"failed": "no"}}
    )
    assert list(found) == ["other"]
    assert found["other"]["rows"]["paired"] == [2.0, 1.0]
    assert found["other"]["rows"]["median"] == 1.5
    assert found["other"]["rows"]["overall"] == pytest.approx((4 / 3) / (8 / 8))
    assert found["other"]["tokens"]["paired"] == pytest.approx([0.8, 0.4])


def test_no_ratio_without_the_first_side() -> None:
    assert speed_table.ratios({"trivet": {"failed": "no"}, "other": side([1.0, 1.0])}) == {}


def test_utilisation_counts_four_and_six() -> None:
    found = side([1.0, 2.0], tokens=20)  # 10 tokens a second
    assert speed_table.utilisation(found, peak=1e5) == pytest.approx((4 * 1000 + 6 * 100) * 10 / 1e5)
    assert speed_table.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert speed_table.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert speed_table.peak_flops("another one") is None


def test_table_shows_the_newest_line_and_says_what_failed() -> None:
    old = line(trivet=side([1.0, 7.0]))
    new = line(trivet=side([1.0, 1.0]), peft=side([1.0, 2.0]), other={"failed": "it is not installed here"})
    text = speed_table.table([old, new])
    assert "7.00" not in text
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert [row.count("|") for row in rows] == [11] * 4
    assert (
        "| dense (2 rows of 10 tokens) | trivet (bfloat16) | 1.00 [1.00, 1.00] | 2.00 | 20.0 | 1 | 1 | 5 MiB |"
        in rows[2]
    )
    assert "peft (bfloat16) | 2.00 [2.00, 2.00] | 1.00 | 10.0 | 2.00 [2.00, 2.00] |" in rows[3]
    assert "Measured on a processor, 2 threads." in text
    assert "dense, other: did not run: it is not installed here" in text


def test_command_holds_no_folders() -> None:
    words = ["/somewhere/speed.py", "--data", "/home/me/rows", "--rounds", "9", "--python", "unsloth=other/bin/python"]
    wanted = "python bench/speed.py --data rows --rounds 9 --python unsloth=python"
    assert speed.command(words) == wanted


def test_steps_come_from_all_over_the_epoch() -> None:
    wanted = places(2, 5)
    assert sorted(wanted[2:]) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert wanted[2:] != sorted(wanted[2:])
    taken = list(Spread(range(104), 10, wanted))  # ten whole batches and a rest that is never drawn
    assert len(taken) == len(Spread(range(104), 10, wanted)) == 70
    assert taken[20:30] == list(range(int(wanted[2] * 10) * 10, int(wanted[2] * 10) * 10 + 10))
    with pytest.raises(SystemExit, match="there are 3 rows, fewer than the 10"):
        list(Spread(range(3), 10, wanted))


def test_contents_of_padded_packed_and_labelled_batches() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    labels = torch.tensor([[-100, -100, 5, 5], [-100, 5, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert contents(padded) == {"rows": 2, "tokens": 6, "supervised": 3}
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed = {"input_ids": ids.view(1, 8)[:, :6], "position_ids": positions, "labels": torch.full((1, 6), 5)}
    assert contents(packed) == {"rows": 3, "tokens": 6, "supervised": 5}
    ours = Collator(0, packed=True)([{"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1)} for n in (3, 2, 4)])
    assert ours["input_ids"].numel() == 16 and contents(ours) == {"rows": 3, "tokens": 9, "supervised": 6}
    alike = Collator(0, packed=True, share=True)(
        [{"input_ids": [5] * 6 + [n] * n, "labels": [-100] * 7 + [n] * (n - 1)} for n in (3, 2, 4)]
    )
    assert alike["input_ids"].numel() == 16 and contents(alike) == {"rows": 3, "tokens": 27, "supervised": 6}
    classes = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    assert contents(classes) == {"rows": 2, "tokens": 6, "supervised": 2}


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(BENCH / "speed.py"), "--threads", "1", "--out", str(out), *options]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_driver_takes_turns_and_goes_on_without_a_side(tmp_path: Path) -> None:
    out = tmp_path / "speed.jsonl"
    ended = run(out, "--tiny", "--rounds", "3", "--workloads", "dense", "--sides", "trivet", "floor")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert list(found["sides"]) == ["trivet", "floor"]
    for name, one in found["sides"].items():
        assert (len(one["warmup_seconds"]), len(one["seconds"])) == (2, 1), name
        assert (one["rows"], one["tokens"], one["supervised"], one["threads"]) == ([2], [64], [62], 1)
        assert one["first_step_seconds"] > one["ready_seconds"] > 0
        assert one["peak_extra_bytes"] > 0
    # 2 layers: q and o 64 x 64, k and v 64 x 32, the MLP's three 64 x 128; the head 64 x 512
    assert found["sides"]["trivet"]["frozen"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 512
    assert set(found["ratios"]) == {"floor"}
    assert str(tmp_path) not in out.read_text()
    shown = run(out, "--table")
    assert "| dense (2 rows of 32 tokens) | trivet" in shown.stdout


@pytest.mark.slow
def test_driver_has_other_models(tmp_path: Path) -> None:
    out = tmp_path / "speed.jsonl"
    ended = run(out, "--tiny", "--rounds", "2", "--workloads", "gpt2", "--sides", "trivet")
    assert ended.returncode == 0, ended.stderr
    gpt2 = json.loads(out.read_text())
    assert gpt2["model"] == "gpt2-tiny (random)"
    assert gpt2["sides"]["trivet"]["frozen"] == 2 * 64 * (3 * 64 + 64 + 2 * 4 * 64) + 64 * 512


@pytest.mark.slow
def test_driver_compares_a_base_in_4_bits(tmp_path: Path) -> None:
    out = tmp_path / "speed.jsonl"
    ended = run(out, "--tiny", "--rounds", "2", "--workloads", "four-bit", "--sides", "trivet-4bit", "trivet")
    assert ended.returncode == 0, ended.stderr
    four, whole = json.loads(out.read_text().splitlines()[-1])["sides"].values()
    assert four["frozen"] == whole["frozen"]


@pytest.mark.slow
def test_driver_runs_our_trainer_on_rows(tmp_path: Path, tiny: Any) -> None:
    rows = [{"text": f"the {name} is blue", "label": name} for name in ("sky", "house") for _ in range(8)]
    write_jsonl(tmp_path / "cls_trec_train.jsonl", rows)
    out = tmp_path / "speed.jsonl"
    options = ("--rounds", "4", "--workloads", "trec", "--sides", "trivet", "--data", str(tmp_path))
    ended = run(out, "--tiny", *options, "--base", str(tiny("bert")))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    side = found["sides"]["trivet"]
    assert found["model"] == "bert" and (side["rows"], side["supervised"]) == ([2, 2], [2, 2])
    assert all(tokens > 4 for tokens in side["tokens"]) and min(side["seconds"]) > 0


@pytest.mark.parametrize("together", [False, True])
def test_a_side_that_cannot_run_says_why(together: bool, tmp_path: Path) -> None:
    spec = {"side": "unsloth", "kind": "dense", "device": "cpu", "rounds": 2}
    child = speed_turns.Child(spec, 1, str(tmp_path))
    found = speed_turns.take_turns({"unsloth": child}, 2, 1, together=together)
    assert found == {"unsloth": {"failed": "unsloth is not installed here"}}


def test_a_side_may_have_another_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho another one was asked >&2\nexit 3\n")
    python.chmod(0o755)
    child = speed_turns.Child({"side": "trivet"}, 1, str(tmp_path), str(python))
    assert speed_turns.take_turns({"trivet": child}, 2, 1) == {"trivet": {"failed": "another one was asked"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workloads", "e2e"), "--data is needed, the folder that holds d2t_e2e_train.jsonl.gz"),
        (("--rounds", "1"), "--rounds must be at least 2"),
        (("--table",), "is not there yet"),
        (("--python", "unsloth"), "--python: SIDE=PYTHON"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--out", str(tmp_path / "none.jsonl"), *options])
    with pytest.raises(SystemExit):
        speed.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
