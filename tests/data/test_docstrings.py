from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from trivet.data import docstrings, load_dataset
from trivet.data.docstrings import INSTRUCTION, TEST_PACKAGES, Row, harvest, split_by_package
from trivet.errors import DataError


def write(site: Path, name: str, source: str, encoding: str = "utf-8") -> None:
    path = site / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(textwrap.dedent(source).lstrip("\n").encode(encoding))


def pairs(site: Path, source: str, **options: int) -> dict[str, tuple[str, str]]:
    """Harvest one module: qualname -> (prompt without the instruction, completion)."""
    write(site, "pkg/mod.py", source)
    rows = harvest([site], **options)
    assert all(row["package"] == "pkg" and row["prompt"].startswith(f"{INSTRUCTION}\n\n") for row in rows)
    return {
        row["function"].removeprefix("pkg.mod."): (row["prompt"][len(INSTRUCTION) + 2 :], row["completion"])
        for row in rows
    }


# --- what is taken out of a file ------------------------------------------------------------------------------------


def test_function_without_its_docstring(tmp_path: Path) -> None:
    source = '''
    def add(a, b):
        """Add two numbers.

        Returns their sum.
        """
        # the sum
        return a + b  # done


    x = 1
    '''
    assert pairs(tmp_path, source) == {
        "add": ("def add(a, b):\n    # the sum\n    return a + b  # done", "Add two numbers.")
    }


def test_methods_async_decorators_and_nested_functions(tmp_path: Path) -> None:
    source = '''
    class Box:
        """Not a function at all."""

        @property
        def size(self) -> int:
            """Number of things inside."""
            return 3

        class Lid:
            async def open(
                self,
                *,
                slowly: bool = False,
            ) -> None:
                """Open the lid now"""
                await self.turn()

    def outer():
        """Make an inner function."""
        def inner():
            """Do the inner thing."""
            return 1
        return inner

    if True:
        def guarded(): return "Not a docstring at all."
        def conditional():
            """Stand inside a condition."""
    '''
    found = pairs(tmp_path, source)
    assert found == {
        "Box.size": ("def size(self) -> int:\n    return 3", "Number of things inside."),
        "Box.Lid.open": (
            "async def open(\n    self,\n    *,\n    slowly: bool = False,\n) -> None:\n    await self.turn()",
            "Open the lid now",
        ),
        "outer": (
            'def outer():\n    def inner():\n        """Do the inner thing."""\n        return 1\n    return inner',
            "Make an inner function.",
        ),
        "outer.<locals>.inner": ("def inner():\n    return 1", "Do the inner thing."),
        "conditional": ("def conditional():", "Stand inside a condition."),
    }


def test_one_line_functions(tmp_path: Path) -> None:
    source = """
    def bare(): "Do nothing at all."
    def two(): "Return the number two."; return 2
    def noted(): "Carry a small note."  # note
    """
    assert pairs(tmp_path, source) == {
        "bare": ("def bare():", "Do nothing at all."),
        "two": ("def two(): return 2", "Return the number two."),
        "noted": ("def noted(): # note", "Carry a small note."),
    }


def test_quotes_raw_strings_parentheses_and_concatenation(tmp_path: Path) -> None:
    source = r'''
    def quoted(a):
        'Say "hello" to \'them\' all.'
        return a

    def raw(b):
        r"""Match \d and \w only."""
        return b

    def wrapped(c):
        (
            "Join two "
            "literals here."
        )
        return c

    def größe(d): "Größe wird hier berechnet.";  return "é" + d

    def formatted(e):
        f"""Never a docstring {1}."""
        return e
    '''
    assert pairs(tmp_path, source) == {
        "quoted": ("def quoted(a):\n    return a", "Say \"hello\" to 'them' all."),
        "raw": ("def raw(b):\n    return b", r"Match \d and \w only."),
        "wrapped": ("def wrapped(c):\n    return c", "Join two literals here."),
        "größe": ('def größe(d): return "é" + d', "Größe wird hier berechnet."),
    }


def test_strings_over_several_lines_keep_their_value(tmp_path: Path) -> None:
    source = '''
    class Query:
        def text(self):
            """Return the query text."""
            sql = """
            SELECT 1
              FROM t
    WHERE x"""
            other = f\'\'\'
                {sql}
            \'\'\'
            slashed = "one \\
            two"
            return (
                "plain "
                "literals", sql, other, slashed
            )
    '''
    prompt, _ = pairs(tmp_path, source)["Query.text"]
    assert prompt.startswith("def text(self):\n    sql = ")
    assert '\n        "literals", sql' in prompt  # dedented with the code around it
    original = ast.parse((tmp_path / "pkg/mod.py").read_text()).body[0].body[0]  # type: ignore[attr-defined]
    del original.body[0]
    assert ast.dump(ast.parse(prompt).body[0]) == ast.dump(original)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Wrap the text\n    over two lines. Then more.", "Wrap the text over two lines."),
        ("Use it, e.g. For loops, i.e. Often. Then stop.", "Use it, e.g. For loops, i.e. Often."),
        ("Round 3.5 as in Fig. 2 of it. Next.", "Round 3.5 as in Fig. 2 of it."),
        ("Is this the end? Yes.", "Is this the end?"),
        ("Stop in (brackets now.) Then go on.", "Stop in (brackets now.)"),
        ("Keep it without a full stop", "Keep it without a full stop"),
        ("Sum the values\n    :param x: values", "Sum the values"),
        ("Sum the values\n    Parameters\n    ----------\n    x : int", "Sum the values"),
        ("Sum the values\n    >>> sum([1])\n    1", "Sum the values"),
        ("Two words", None),
        ("word " * 61, None),
        (" ".join(["word"] * 60), " ".join(["word"] * 60)),
        ("返回 一个 新的 字符串", None),
        (":param x: the value given", None),
        (">>> add(1, 2) # doctest first", None),
        ("Deprecated since version two.", None),
        ("TODO describe this function here.", None),
        ("This function was auto-generated from a schema.", None),
        ("Automatically generated by the build.", None),
        ("Initialize self.  See help(type(self)) for accurate signature.", None),
        ("add(a, b) -> the sum of both", None),
        ("Args:\n        x: the value given.", None),
        ("input_ids (`Tensor` of shape `(n, m)`): Indices of tokens.", None),
        ("Return all of these things:\n\n    - one", None),
        ("Fill %(name)s into the template.", None),
    ],
)
def test_first_sentence(tmp_path: Path, docstring: str, sentence: str | None) -> None:
    found = pairs(tmp_path, f'def f(x):\n    """{docstring}\n    """\n    return x\n')
    assert found == ({"f": ("def f(x):\n    return x", sentence)} if sentence else {})


def test_source_is_cut_at_a_line_end(tmp_path: Path) -> None:
    source = 'def f(x):\n    """Count up to three."""\n    a = 1\n    b = 2\n    return x\n'
    head = "def f(x):\n    a = 1"
    for limit in (len(head), len(head) + 5):
        assert pairs(tmp_path, source, max_source_chars=limit)["f"][0] == head
    assert pairs(tmp_path, source, max_source_chars=len(head) - 1)["f"][0] == "def f(x):"
    assert pairs(tmp_path, source, max_source_chars=len("def f(x):") - 1) == {}


def test_answer_inside_the_prompt_is_dropped(tmp_path: Path) -> None:
    source = '''
    def wrapper():
        """Do the inner thing."""
        def inner():
            """Do the
            inner thing. Or not."""
        return inner
    '''
    assert set(pairs(tmp_path, source)) == {"wrapper.<locals>.inner"}


# --- which files and rows are taken ---------------------------------------------------------------------------------


def function(name: str, docstring: str = "Return a constant value.") -> str:
    return f'def {name}():\n    """{docstring}"""\n    return {name!r}\n'


def test_files_that_are_skipped(tmp_path: Path) -> None:
    for number, name in enumerate(
        (
            "pkg/__init__.py",
            "pkg/sub/deep.py",
            "pkg/tests/test_it.py",
            "pkg/sub/test/it.py",
            "pkg/test_it.py",
            "pkg/conftest.py",
            "pkg/_vendor/other.py",
            "pkg/vendored/other.py",
            "pkg/third_party/other.py",
            "pkg/thing_pb2.py",
            "pkg/data.txt",
            "pip/main.py",
            "setuptools/main.py",
            "pkg-1.0.dist-info/main.py",
            "single.py",
        )
    ):
        write(tmp_path, name, function(f"f{number}", f"Return the value {number}."))
    write(tmp_path, "pkg/large.py", function("large", "Sit in a large file.") + "#" * 500_000)
    write(tmp_path, "pkg/broken.py", function("broken", "Sit in a broken file.") + "def (:\n")
    write(tmp_path, "pkg/null.py", function("null", "Sit beside a null byte.") + "\0")
    write(tmp_path, "pkg/badcookie.py", "# coding: nonsense\n" + function("cookie", "Name an unknown encoding."))
    write(tmp_path, "pkg/badutf8.py", function("bad", "Sind es ungültige Bytes hier."), encoding="latin-1")
    assert [row["function"] for row in harvest([tmp_path])] == ["pkg.f0", "pkg.sub.deep.f1"]


def test_coding_cookie_and_byte_order_mark_are_honoured(tmp_path: Path) -> None:
    body = 'def f(): "Prüfe die Größe aller Kisten hier."; return "é"\n'
    write(tmp_path, "pkg/latin.py", f"# -*- coding: latin-1 -*-\n{body}", encoding="latin-1")
    write(tmp_path, "pkg/bom.py", body.replace("f()", "g()"), encoding="utf-8-sig")
    found = {row["function"]: (row["prompt"][len(INSTRUCTION) + 2 :], row["completion"]) for row in harvest([tmp_path])}
    assert found == {
        "pkg.latin.f": ('def f(): return "é"', "Prüfe die Größe aller Kisten hier."),
        "pkg.bom.g": ('def g(): return "é"', "Prüfe die Größe aller Kisten hier."),
    }


def test_duplicates(tmp_path: Path) -> None:
    write(tmp_path, "one/a.py", function("same"))
    write(tmp_path, "two/b.py", function("same"))  # the same function copied into another package
    for number in range(5):
        write(tmp_path, f"three/c{number}.py", function(f"f{number}", "Say the same every time."))
    rows = harvest([tmp_path])
    assert Counter(row["completion"] for row in rows) == {
        "Return a constant value.": 1,
        "Say the same every time.": 3,
    }
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_limit_per_package_takes_from_all_over_it(tmp_path: Path) -> None:
    for folder in "abcdefgh":
        for number in range(5):
            write(
                tmp_path, f"pkg/{folder}/m{number}.py", function(f"{folder}{number}", f"Return {folder}{number} now.")
            )
    write(tmp_path, "other/m.py", function("other", "Return something else entirely."))
    rows = harvest([tmp_path], limit_per_package=16)
    assert Counter(row["package"] for row in rows) == {"pkg": 16, "other": 1}
    assert len({row["function"].split(".")[1] for row in rows if row["package"] == "pkg"}) > 4


def test_same_rows_whatever_the_file_system_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"p{i % 3}/s{i % 5}/m{i}.py": function(f"f{i}", f"Return the value {i % 7} here.") for i in range(60)}
    for site, names in (("first", sorted(files)), ("second", sorted(files, reverse=True))):
        for name in names:
            write(tmp_path / site, name, files[name])

    expected = harvest([tmp_path / "first"], limit_per_package=10)
    assert harvest([tmp_path / "second"], limit_per_package=10) == expected
    assert expected == sorted(expected, key=lambda row: (row["package"], row["function"]))

    for name in ("_packages", "_source_files"):
        listing = getattr(docstrings, name)
        monkeypatch.setattr(docstrings, name, lambda folder, listing=listing: reversed([*listing(folder)]))
    assert harvest([tmp_path / "first"], limit_per_package=10) == expected


def test_nothing_installed(tmp_path: Path) -> None:
    assert harvest([tmp_path, tmp_path / "missing"]) == []


# --- the split ------------------------------------------------------------------------------------------------------


def rows_of(counts: dict[str, int]) -> list[Row]:
    return [{"package": name, "prompt": f"{name} {i}"} for name, count in counts.items() for i in range(count)]


def test_split_takes_whole_packages() -> None:
    rows = rows_of({"numpy": 50, **{f"p{i}": 10 for i in range(40)}})
    train, validation, test = split_by_package(rows, test_packages=("numpy", "absent"))
    assert {row["package"] for row in test} == {"numpy"} and len(test) == 50
    assert (len(train), len(validation)) == (380, 20)  # two of forty packages are 5 %
    assert not {row["package"] for row in train} & {row["package"] for row in validation}
    key = lambda row: row["prompt"]  # noqa: E731
    assert sorted(train + validation + test, key=key) == sorted(rows, key=key)
    assert train == [row for row in rows if row in train]  # the order is kept

    assert split_by_package(rows[::-1], test_packages=("numpy",))[1] == validation[::-1]
    seeds = {split_by_package(rows, seed=seed)[1][0]["package"] for seed in range(10)}
    assert len(seeds) > 1
    assert split_by_package(rows, validation_share=0)[1] == []


def test_split_passes_over_packages_that_are_too_large() -> None:
    rows = rows_of({"numpy": 1, "large": 900, "small": 50, "tiny": 5})
    for seed in range(5):
        _, validation, _ = split_by_package(rows, test_packages=("numpy",), validation_share=0.05, seed=seed)
        assert {row["package"] for row in validation} <= {"small", "tiny"}


def test_split_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match=r"none is of a test package \(numpy, pandas\)"):
        split_by_package(rows_of({"other": 3}), test_packages=("numpy", "pandas"))
    with pytest.raises(DataError, match="all are of test or validation"):
        split_by_package(rows_of({"numpy": 3}))
    for share in (-0.1, 1.0):
        with pytest.raises(DataError, match="validation_share"):
            split_by_package(rows_of({"numpy": 3, "other": 3}), validation_share=share)


def test_all_splits_come_from_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    rows = [
        row | {"completion": "It does.", "function": row["prompt"]}
        for row in rows_of({"numpy": 4, "other": 60, "third": 3})
    ]
    monkeypatch.setattr(docstrings, "harvest", lambda: looks.append(1) or rows)
    docstrings.parts.cache_clear()
    try:
        sizes = {split: len(load_dataset("docstrings", split=split)) for split in ("train", "validation", "test")}
    finally:
        docstrings.parts.cache_clear()
    assert sizes == {"train": 60, "validation": 3, "test": 4} and len(looks) == 1


# --- this environment -----------------------------------------------------------------------------------------------


#: Packages whose rows are looked at every time; all that are installed take half a minute.
SOME = (*TEST_PACKAGES, "accelerate", "datasets", "peft", "huggingface_hub", "sklearn", "click", "tokenizers")


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    if request.param == "all":
        return harvest()
    site, here = tmp_path_factory.mktemp("site"), Path(sysconfig.get_path("purelib"))
    for name in SOME:
        (site / name).symlink_to(here / name)
    return harvest([site])


def test_installed_packages_give_clean_rows(installed: list[Row]) -> None:
    assert len(installed) >= 2000
    assert len({row["prompt"] for row in installed}) == len(installed)
    assert max(Counter(row["completion"] for row in installed).values()) <= 3
    assert max(Counter(row["package"] for row in installed).values()) <= 400
    for row in installed:
        instruction, empty, source = row["prompt"].split("\n", 2)
        assert (instruction, empty) == (INSTRUCTION, "")
        assert source.startswith(("def ", "async def ")) and len(source) <= 600
        assert row["completion"] not in " ".join(source.split())
        assert 3 <= len(row["completion"].split()) <= 60 and "\n" not in row["completion"]


def test_installed_packages_split_apart(installed: list[Row]) -> None:
    parts = split_by_package(installed)
    train, validation, test = ({row["package"] for row in part} for part in parts)
    assert not train & validation and not train & test and not validation & test
    assert test <= set(TEST_PACKAGES) and len(test) >= 6
    assert sum(map(len, parts)) == len(installed)
    share = len(parts[1]) / (len(parts[0]) + len(parts[1]))
    assert 0 < share <= 0.05 or share == pytest.approx(0.05, rel=0.1)
