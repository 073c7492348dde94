"""Files of every kind as rows, and errors that say which file, which line, and why."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trivet.data.dataset import load_dataset
from trivet.data.read import SUFFIXES, BadRow, Row, file_kind, read
from trivet.errors import ConfigError, DataError

ROWS = [
    {"prompt": "what colour is the sky ?", "completion": "blue"},
    {"prompt": 'say "hi", twice\nplease', "completion": "hi, hi"},
    {"prompt": "Größe? 你好 🦙", "completion": "\ttabs and é"},
]


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def table(rows: list[dict[str, str]], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


#: name -> (suffix, the bytes of ROWS, where the rows stand in the file; a table's row is named by its last line)
FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "jsonl": (".jsonl", jsonl(ROWS), ["1", "2", "3"]),
    "json-list": (".json", json.dumps(ROWS, indent=1).encode(), ["row 1", "row 2", "row 3"]),
    "json-data": (".json", json.dumps({"version": 1, "data": ROWS}).encode(), ["row 1", "row 2", "row 3"]),
    "json-lines": (".json", jsonl(ROWS), ["1", "2", "3"]),
    "csv": (".csv", table(ROWS, ","), ["2", "4", "5"]),
    "tsv": (".tsv", table(ROWS, "\t"), ["2", "4", "5"]),
    "parquet": (".parquet", parquet(ROWS), ["row 1", "row 2", "row 3"]),
}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows_and_says_where_they_stand(tmp_path: Path, name: str, zipped: str) -> None:
    suffix, content, places = FILES[name]
    path = put(tmp_path / f"rows{suffix}{zipped}", content)
    assert list(read(path)) == [Row(values, f"{path}:{place}") for values, place in zip(ROWS, places, strict=True)]
    assert list(read(str(path))) == list(read(path))


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_line_of_text_is_a_row(tmp_path: Path, zipped: str) -> None:
    path = put(tmp_path / f"rows.txt{zipped}", "first\n\n  indented 🦙 \r\n \t\nlast".encode())
    assert list(read(path)) == [
        Row({"text": "first"}, f"{path}:1"),
        Row({"text": "  indented 🦙 "}, f"{path}:3"),
        Row({"text": "last"}, f"{path}:5"),
    ]


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "parquet"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str, zipped: str) -> None:
    suffix, content, _ = FILES[name]
    path = put(tmp_path / f"rows{suffix}{zipped}", b"\xef\xbb\xbf" + content)
    assert [row.values for row in read(path) if isinstance(row, Row)] == ROWS


def test_blank_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", b'\n{"text": "a"}\r\n   \n\n{"text": "b"}')
    assert [(r.values["text"], r.origin) for r in read(path) if isinstance(r, Row)] == [
        ("a", f"{path}:2"),
        ("b", f"{path}:5"),
    ]
    path = put(tmp_path / "rows.csv", b"text,label\n\na,x\n\nb,y\n")
    assert [(r.values["text"], r.origin) for r in read(path) if isinstance(r, Row)] == [
        ("a", f"{path}:3"),
        ("b", f"{path}:5"),
    ]


def test_line_separators_inside_json_strings_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"text": "a\u2028b\u0085c\x0bd\x1ce"}
    path = put(tmp_path / "rows.jsonl", jsonl([row]))
    assert list(read(path)) == [Row(row, f"{path}:1")]


def test_a_csv_cell_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    text = "x" * 200_000
    path = put(tmp_path / "rows.csv", f"text,label\n{text},1\n".encode())
    assert list(read(path)) == [Row({"text": text, "label": "1"}, f"{path}:2")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
        {"text": "a", "notes": [1, 2]},
    ],
)
def test_one_json_object_is_one_row_not_its_lists(tmp_path: Path, row: dict[str, Any]) -> None:
    path = put(tmp_path / "row.json", json.dumps(row).encode())
    assert list(read(path)) == [Row(row, f"{path}:row 1")]


@pytest.mark.parametrize("name", ["train.JSONL", "train.Json", "train.csv.gz", "a.b.tsv", "x.PARQUET.GZ", "x.txt"])
def test_the_kind_is_the_last_suffix_in_any_case(name: str) -> None:
    expected = Path(name.lower().removesuffix(".gz")).suffix
    assert file_kind(Path(name)) == expected
    assert expected in SUFFIXES


# --- rows that are wrong ----------------------------------------------------------------------------------------------

BAD_LINES = {
    '{"text": "cut': "not valid JSON: Unterminated string starting at column 10",
    "{'text': 1}": "not valid JSON",
    "[1, 2]": "a row is a JSON object {…}, not list",
    '"text"': "a row is a JSON object {…}, not str",
    "null": "a row is a JSON object {…}, not NoneType",
    "9" * 5000: "not usable JSON",
    '{"a": ' + "[" * 200_000: "not usable JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    path = put(tmp_path / "rows.jsonl", f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n'.encode())
    first, bad, last = read(path)
    assert (first, last) == (Row({"text": "a"}, f"{path}:1"), Row({"text": "b"}, f"{path}:4"))
    assert isinstance(bad, BadRow)
    assert bad.origin == f"{path}:3"
    assert BAD_LINES[line] in bad.reason
    with pytest.raises(DataError) as error:
        load_dataset(path)
    assert str(error.value).startswith(f"{path}:3: {bad.reason}")
    assert "data.on_bad_row: skip" in str(error.value)
    skipping = load_dataset(path, on_bad_row="skip")
    assert [e.text for e in skipping] == ["a", "b"]
    assert skipping.skipped == (bad,)


def test_rows_of_a_json_list_that_are_no_objects(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.json", b'[{"text": "a"}, 3, {"text": "b"}]')
    assert list(read(path))[1] == BadRow(f"{path}:row 2", "a row is a JSON object {…}, not int")


@pytest.mark.parametrize(("suffix", "cell"), [(".csv", ","), (".tsv", "\t")])
def test_ragged_tables(tmp_path: Path, suffix: str, cell: str) -> None:
    text = "text|label\na|x\nb\nc|y|z\nd|x\n".replace("|", cell)
    path = put(tmp_path / f"rows{suffix}", text.encode())
    assert list(read(path)) == [
        Row({"text": "a", "label": "x"}, f"{path}:2"),
        BadRow(f"{path}:3", "fewer cells than the header's 2 columns"),
        BadRow(f"{path}:4", "more cells than the header's 2 columns"),
        Row({"text": "d", "label": "x"}, f"{path}:5"),
    ]


# --- files that are wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_invalid_utf8_names_the_line(tmp_path: Path, suffix: str, zipped: str) -> None:
    good = b"x\n" * 20_000  # more than one buffer of the decoder
    path = put(tmp_path / f"rows{suffix}{zipped}", good + "naïve\n".encode("latin-1") + b"y\n")
    with pytest.raises(DataError, match="not UTF-8 text") as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}:20001: ")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet", ".json"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b[:30] + bytes(16) + b[46:], lambda b: b"not gzip at all"],
    ids=["truncated", "corrupt", "plain"],
)
def test_damaged_gzip(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows{suffix}.gz"
    content = "".join(json.dumps({"text": f"line {i * 7919 % 1009}"}) + "\n" for i in range(500))
    path.write_bytes(damage(gzip.compress(content.encode())))
    with pytest.raises(DataError, match=f"cannot be read as {suffix[1:]}|not UTF-8") as error:
        list(read(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"no parquet", lambda b: b[:-9], lambda b: b[:4] + bytes(len(b) - 8) + b[-4:]],
    ids=["empty", "other", "cut", "zeroed"],
)
def test_corrupt_parquet(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = put(tmp_path / "rows.parquet", damage(parquet(ROWS)))
    with pytest.raises(DataError, match="parquet") as error:
        list(read(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('[{"text": "a"},\n {"text": }]', ":2", "not valid JSON: Expecting value at column 11"),
        ("", ":1", "not valid JSON"),
        ("[1", ":1", "not valid JSON"),
        ("3", ":1", "expected a list of rows, found int"),
        ('"text"', ":1", "expected a list of rows, found str"),
        ("[" * 200_000, "", "not usable JSON"),
    ],
)
def test_json_that_is_no_list_of_rows(tmp_path: Path, content: str, place: str, reason: str) -> None:
    path = put(tmp_path / "rows.json", content.encode())
    with pytest.raises(DataError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}{place}: {reason}")


def test_a_table_with_an_open_quote(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", b'text,label\na,x\n"b,y\nc,x\n')
    with pytest.raises(DataError, match="not a valid table: a quote is never closed") as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}:3: ")  # where the row starts


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = put(tmp_path / name, content)
    assert list(read(path)) == []
    with pytest.raises(DataError, match="no rows; the file is empty"):
        load_dataset(path)


# --- sources that are not there ---------------------------------------------------------------------------------------


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name its files") as error:
        list(read(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.csv.gz", "./train", "/no/such/folder/train", "~/nothing-here.x"]
)
def test_a_file_that_is_not_there_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file") as error:
        list(read(name))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.gz", "rows.jsonl.zip", ".jsonl"])
def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, b"x")
    with pytest.raises(ConfigError, match="unknown kind of file") as error:
        list(read(path))
    assert all(text in str(error.value) for text in (name, *SUFFIXES))


@pytest.mark.parametrize("name", ["someone/some-data", "someone/some-data:config", "no such id!", "a/b/c"])
def test_a_hub_id_without_network(name: str) -> None:
    with pytest.raises(ConfigError, match="no local file of that name, and the hub data set") as error:
        list(read(name, "validation"))
    assert name in str(error.value)
    assert "validation" in str(error.value)
