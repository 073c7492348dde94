"""Data sets: fingerprints, splits, every kind of source, and the real task files."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import colour_rows, write_jsonl
from trivet.data import Dataset, Example, load_dataset
from trivet.errors import ConfigError, DataError

Rows = list[dict[str, Any]]


def numbered(n: int) -> Dataset:
    return load_dataset([{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)])


def prompts(data: Dataset) -> list[str]:
    return [example.prompt for example in data]


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- fingerprint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": 'a, "b"\n ü', "completion": "c"}, {"prompt": "d", "completion": " 4"}],
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        [{"text": "a", "text_pair": "b", "label": 2.5}, {"text": "c", "text_pair": "d", "label": 3.0}],
        [{"text": "a"}, {"text": "b"}],
    ],
    ids=["prompt-completion", "classification", "regression", "text"],
)
def test_the_same_rows_have_one_fingerprint_however_they_come(tmp_path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.json").write_text(json.dumps(rows))
    more = [{**row, "id": i} for i, row in enumerate(rows)]  # columns that no one reads
    sources: list[Any] = [
        rows,
        tuple(rows),
        [dict(reversed(row.items())) for row in rows],
        more,
        write_jsonl(tmp_path / "a.jsonl", rows),
        str(write_jsonl(tmp_path / "deep" / "b.jsonl", rows)),
        write_csv(tmp_path / "a.csv", rows),
        tmp_path / "a.parquet",
        tmp_path / "a.json",
        datasets.Dataset.from_list(rows),
        [write_jsonl(tmp_path / "1.jsonl", rows[:1]), write_csv(tmp_path / "2.csv", rows[1:])],
    ]
    # one file may look like classes alone and like numbers together with the other, so the format is said
    fmt = load_dataset(rows).format
    prints = {load_dataset(source, format=fmt).fingerprint for source in sources}
    assert len(prints) == 1
    assert all(load_dataset(source).format == fmt for source in sources)


#: Each differs from the first in one thing only.
VARIANTS: list[Rows] = [
    [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}],
    [{"prompt": "c", "completion": "d"}, {"prompt": "a", "completion": "b"}],
    [{"prompt": "a", "completion": "b"}],
    [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d "}],
    [{"prompt": "ac", "completion": "b"}, {"prompt": "", "completion": "d"}],
    [{"prompt": "a", "completion": "b", "system": "s"}, {"prompt": "c", "completion": "d"}],
    [{"prompt": "a", "completion": "b", "answer": "7"}, {"prompt": "c", "completion": "d"}],
    [{"prompt": "a", "references": ["b"]}, {"prompt": "c", "references": ["d"]}],
    [{"prompt": "a", "references": ["b", "x"]}, {"prompt": "c", "references": ["d"]}],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}]}],
    [{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"n": 1}]}],
    [{"text": "a", "label": "x"}],
    [{"text": "a", "label": "y"}],
    [{"text": "a", "text_pair": "b", "label": "x"}],
    [{"text": "a"}],
    [{"text": "b"}],
    [{"text": "a", "label": 0.5}],
    [{"prompt": "a", "choices": ["b", "c"], "answer": 0}],
    [{"prompt": "a", "choices": ["b", "c"], "answer": 1}],
    [{"prompt": "a", "choices": ["b", "d"], "answer": 0}],
]


def test_any_change_of_content_changes_the_fingerprint() -> None:
    prints = [load_dataset(rows).fingerprint for rows in VARIANTS]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    as_class = load_dataset([{"text": "a", "label": "1"}], format="classification")
    alpaca = load_dataset([{"instruction": "a", "output": "b"}])
    assert alpaca.fingerprint != load_dataset([{"prompt": "a", "completion": "b"}]).fingerprint  # the format counts
    assert as_class.fingerprint != load_dataset([{"text": "a", "label": "1"}], format="regression").fingerprint


# --- order and splits ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_split_is_deterministic_disjoint_and_complete(n: int, share: float, seed: int) -> None:
    data, k = numbered(n), int(share * n)
    rest, chosen = data.split(k, seed)
    assert (len(rest), len(chosen)) == (n - k, k)
    assert sorted([*prompts(rest), *prompts(chosen)]) == sorted(prompts(data))
    in_order = {p: i for i, p in enumerate(prompts(data))}
    for part in (rest, chosen):
        places = [in_order[p] for p in prompts(part)]
        assert places == sorted(places)
        assert (part.format, part.source) == (data.format, data.source)
    assert [prompts(part) for part in numbered(n).split(k, seed)] == [prompts(rest), prompts(chosen)]


def test_another_seed_chooses_other_rows() -> None:
    chosen = {tuple(prompts(numbered(100).split(10, seed)[1])) for seed in range(5)}
    assert len(chosen) == 5


def test_shuffling_depends_on_the_seed_and_the_number_of_rows_only() -> None:
    data = numbered(50)
    order = list(range(50))
    random.Random(3).shuffle(order)
    assert prompts(data.shuffled(3)) == [f"question {i}" for i in order]
    assert prompts(data) == [f"question {i}" for i in range(50)]
    assert prompts(data.shuffled(4)) != prompts(data.shuffled(3))
    other = load_dataset([{"text": f"text {i}"} for i in range(50)])
    assert [e.text for e in other.shuffled(3)] == [f"text {i}" for i in order]


def test_take_gives_the_first_rows() -> None:
    data = numbered(5)
    assert prompts(data.take(2)) == ["question 0", "question 1"]
    assert data.take(None) is data
    assert data.take(9) is data
    assert data[4] == Example(origin="row 5", prompt="question 4", completion="answer 4")


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_dataset_is_returned_as_it_is() -> None:
    data = numbered(3)
    assert load_dataset(data) is data


def test_files_keep_their_origins_and_names(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "1.jsonl", colour_rows(2))
    second = write_csv(tmp_path / "2.csv", colour_rows(2))
    data = load_dataset([first, str(second)])
    assert [e.origin for e in data] == [f"{first}:1", f"{first}:2", f"{second}:2", f"{second}:3"]
    assert data.source == f"{first}, {second}"
    assert load_dataset(first).source == str(first)


def test_a_missing_file_among_several(tmp_path: Path) -> None:
    there = write_jsonl(tmp_path / "1.jsonl", colour_rows(2))
    with pytest.raises(ConfigError, match=r"2\.jsonl: no such file"):
        load_dataset([there, tmp_path / "2.jsonl"])


def test_hugging_face_datasets() -> None:
    table = datasets.Dataset.from_list(colour_rows(4))
    data = load_dataset(table)
    assert data.fingerprint == load_dataset(colour_rows(4)).fingerprint
    assert data.source == "Dataset of rows"
    both = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert len(load_dataset(both)) == 4
    assert len(load_dataset(both, split="test")) == 1
    with pytest.raises(ConfigError, match="has no split `dev`; it has train, test"):
        load_dataset(both, split="dev")
    streamed = table.to_iterable_dataset()
    assert load_dataset(streamed).fingerprint == data.fingerprint


def test_null_columns_of_a_united_table_do_not_hide_the_format() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    table = datasets.Dataset.from_list([{**chat, "prompt": None, "completion": None}, *colour_rows(3)])
    assert set(table.column_names) == {"messages", "prompt", "completion"}
    data = load_dataset(table, on_bad_row="skip")
    assert (data.format, len(data), [b.origin for b in data.skipped]) == ("prompt-completion", 3, ["row 1"])


def test_python_rows_that_are_wrong() -> None:
    with pytest.raises(DataError, match=r"^row 2: a row is a dict of columns, not str"):
        load_dataset([{"text": "a"}, "b"])
    with pytest.raises(DataError, match="list of rows: no rows"):
        load_dataset([])
    with pytest.raises(ConfigError, match="a data set is a path, a hub id or rows, not int"):
        load_dataset(3)
    with pytest.raises(ConfigError, match="not NoneType"):
        load_dataset(None)


def test_a_file_may_be_called_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docstrings").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_dataset("docstrings")


# --- the real task files ----------------------------------------------------------------------------------------------

#: file -> (rows, as its documentation counts them; format)
FILES = {
    "cls_banking77_test.jsonl": (3080, "classification"),
    "cls_banking77_train.jsonl": (10003, "classification"),
    "cls_cola_dev.jsonl": (1043, "classification"),
    "cls_cola_train.jsonl": (8551, "classification"),
    "cls_sst2_dev.jsonl": (872, "classification"),
    "cls_sst2_test.jsonl": (1821, "classification"),
    "cls_sst2_train.jsonl": (6920, "classification"),
    "cls_trec_test.jsonl": (500, "classification"),
    "cls_trec_train.jsonl": (5452, "classification"),
    "code_mbpp_test.jsonl": (500, "prompt-completion"),
    "code_mbpp_train.jsonl": (374, "prompt-completion"),
    "code_mbpp_valid.jsonl": (90, "prompt-completion"),
    "d2t_e2e_test.jsonl": (630, "references"),
    "d2t_e2e_train.jsonl.gz": (42061, "prompt-completion"),
    "d2t_e2e_valid.jsonl": (4672, "prompt-completion"),
    "d2t_webnlg_dev.jsonl": (871, "references"),
    "d2t_webnlg_test_seen.jsonl": (971, "references"),
    "d2t_webnlg_train.jsonl.gz": (18025, "prompt-completion"),
    "extract_snips_test.jsonl": (700, "prompt-completion"),
    "extract_snips_train.jsonl": (7000, "prompt-completion"),
    "instruct_selfinstruct_seed.jsonl": (175, "prompt-completion"),
    "instruct_t0mix.jsonl.gz": (6469, "prompt-completion"),
    "lm_tinyshakespeare_train.jsonl": (6282, "text"),
    "lm_tinyshakespeare_valid.jsonl": (940, "text"),
    "lm_wikitext2_valid.jsonl": (2461, "text"),
    "math_gsm8k_test.jsonl": (1319, "prompt-completion"),
    "math_gsm8k_train.jsonl.gz": (7473, "prompt-completion"),
    "mc_arc_challenge_test.jsonl": (1172, "multiple-choice"),
    "mc_arc_challenge_train.jsonl": (1119, "multiple-choice"),
    "mc_arc_easy_test.jsonl": (2376, "multiple-choice"),
    "mc_arc_easy_train.jsonl": (2251, "multiple-choice"),
    "mc_boolq_test.jsonl": (3270, "multiple-choice"),
    "mc_boolq_train.jsonl": (9427, "multiple-choice"),
    "mc_openbookqa_test.jsonl": (500, "multiple-choice"),
    "mc_openbookqa_train.jsonl": (4957, "multiple-choice"),
    "mt_multi30k_en_de_test.jsonl": (1000, "references"),
    "mt_multi30k_en_de_train.jsonl": (9000, "prompt-completion"),
    "mt_multi30k_en_de_valid.jsonl": (1014, "prompt-completion"),
    "pair_rte_dev.jsonl": (277, "classification"),
    "pair_rte_train.jsonl": (2490, "classification"),
    "pair_stsb_dev.jsonl": (1500, "regression"),
    "pair_stsb_test.jsonl": (1379, "regression"),
    "pair_stsb_train.jsonl": (5749, "regression"),
    "sql_advising_dev.jsonl": (181, "prompt-completion"),
    "sql_advising_test.jsonl": (463, "prompt-completion"),
    "sql_advising_train.jsonl": (2084, "prompt-completion"),
    "sql_geoquery_dev.jsonl": (49, "prompt-completion"),
    "sql_geoquery_test.jsonl": (279, "prompt-completion"),
    "sql_geoquery_train.jsonl": (549, "prompt-completion"),
    "sum_dialogsum_dev.jsonl": (500, "prompt-completion"),
    "sum_dialogsum_test.jsonl": (500, "references"),
    "sum_dialogsum_train.jsonl.gz": (12460, "prompt-completion"),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files_load_without_a_bad_row(shared: Path, name: str) -> None:
    data = load_dataset(shared / "data" / name)  # refuses at the first bad row
    assert (len(data), data.format) == FILES[name]
    assert data.skipped == ()
    assert data[0].origin == f"{shared / 'data' / name}:1"


def test_the_table_names_every_real_file(shared: Path) -> None:
    assert {p.name for p in (shared / "data").glob("*.jsonl*")} == set(FILES)


def test_fields_of_the_real_files(shared: Path) -> None:
    def first(name: str) -> Example:
        return load_dataset(shared / "data" / name)[0]

    sentence = first("pair_stsb_test.jsonl")
    assert (sentence.text, sentence.text_pair, sentence.label) == (
        "A girl is styling her hair.",
        "A girl is brushing her hair.",
        2.5,
    )
    problem = first("math_gsm8k_test.jsonl")
    assert problem.number == "18"
    assert str(problem.completion).endswith("#### 18")
    choice = first("mc_boolq_test.jsonl")
    assert (choice.choices, choice.answer, choice.completion) == (("true", "false"), 1, "false")
    assert len(first("d2t_e2e_test.jsonl").references) == 2
    assert first("cls_trec_test.jsonl").label == "NUM"
