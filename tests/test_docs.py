"""The pages say what is: configs load, commands parse, links lead somewhere, examples are what they are said to be.

`python tests/test_docs.py` writes the generated parts of docs/configuration.md anew.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from trivet.cli.app import build, split_arguments
from trivet.config import ALIASES, FORMATS
from trivet.configio import keys, load, sections, template
from trivet.data import load_dataset
from trivet.data.read import SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(build()).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of the page's fenced code blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def generated() -> str:
    """What docs/configuration.md says after its heading "Every key"."""
    rows = [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    return "\n".join(
        [
            "## Every key",
            "",
            "With its default, as `trivet init` writes it.",
            "",
            "```yaml",
            template().strip(),
            "```",
            "",
            "## Aliases",
            "",
            "Names from Hugging Face and other trainers. They may stand in any section and at the top level.",
            "",
            "| alias | key |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def test_the_page_of_every_key_is_up_to_date() -> None:
    before, heading, _ = CONFIGURATION.read_text(encoding="utf-8").partition("## Every key\n")
    assert heading
    assert CONFIGURATION.read_text(encoding="utf-8") == before + generated(), "run: python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_config_loads(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml", "yml"):
        found = yaml.safe_load(text)
        if isinstance(found, dict) and {*found} & {*sections(), *keys(), *ALIASES}:
            (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
            load(tmp_path / "config.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=name_of)
def test_every_example_config_loads(path: Path) -> None:
    assert load(path).data.train


def commands(page: Path) -> list[list[str]]:
    """The words of every `trivet` command in the page's shell blocks, and in its text between backticks."""
    shell = "\n".join(blocks(page, "bash", "sh", "console", "shell")).replace("\\\n", " ")
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = []
    for line in [*shell.splitlines(), *re.findall(r"`(trivet [a-z]+ [^`]+)`", prose)]:
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        parts = [list(group) for _, group in itertools.groupby(words, lambda word: set(word) <= set("&|;<>"))]
        found += [part[1:] for part in parts if part[0] == "trivet"]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_has_a_known_verb_known_options_and_known_keys(page: Path) -> None:
    for words in commands(page):
        if words == ["--help"]:
            continue
        verb, *arguments = [word for word in words if word != "--debug"]
        assert verb in COMMANDS, f"trivet {shlex.join(words)}"
        context = COMMANDS[verb].make_context(verb, arguments)  # parses, runs nothing
        if verb in ("train", "validate"):
            load(None, split_arguments(context.params["arguments"])[1])


def test_commands_are_found_and_wrong_ones_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `trivet init x.yaml`:\n\n```bash\npip install trivet\ntrivet train x.yaml \\\n  lr=1 && trivet chat a\n"
        "trivet generate a -p 'x | y' > out.txt\n$ trivet merge runs/a --loud  # no such option\n```\n",
        encoding="utf-8",
    )
    found = commands(page)
    assert found == [
        ["train", "x.yaml", "lr=1"],
        ["chat", "a"],
        ["generate", "a", "-p", "x | y"],
        ["merge", "runs/a", "--loud"],
        ["init", "x.yaml"],
    ]
    with pytest.raises(Exception, match="--loud"):
        COMMANDS["merge"].make_context("merge", ["runs/a", "merged", "--loud"])


def slug(heading: str) -> str:
    """A heading's anchor, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(page)} links to {target}"


# -- docs/data.md ------------------------------------------------------------------------------------------------------

DATA = ROOT / "docs" / "data.md"


def example_rows() -> list[tuple[str, dict[str, Any]]]:
    """(format, row) of every row that docs/data.md shows, under the heading of its format."""
    text = DATA.read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        name = part.splitlines()[0].strip("` ")
        found += [(name, json.loads(row)) for row in re.findall(r"^```json\n(.*?)^```", part, re.MULTILINE | re.DOTALL)]
    return found


@pytest.mark.parametrize(("name", "row"), example_rows())
def test_every_example_row_is_of_the_format_it_stands_under(name: str, row: dict[str, Any]) -> None:
    assert load_dataset([row]).format == name


def test_every_format_and_every_kind_of_file_is_shown() -> None:
    assert {name for name, _ in example_rows()} == set(FORMATS) - {"auto"}
    assert all(f"`{suffix}`" in DATA.read_text(encoding="utf-8") for suffix in (*SUFFIXES, ".gz"))


# -- docs/evaluation.md, docs/errors.md --------------------------------------------------------------------------------


def test_every_metric_is_explained() -> None:
    from trivet.evaluate import metrics, text_metrics

    made = [
        *metrics.likelihood_metrics([1.0], [1], [1]),
        *metrics.classification_metrics([0], [0], 2),
        *metrics.regression_metrics([0.0], [0.0]),
        *metrics.choice_metrics([True]),
        *text_metrics.text_metrics(["a b", "c d"], [["a b"], ["c d"]]),
        metrics.number_match(["1"], ["1"]),
    ]
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [m.name for m in made if f"`{m.name}`" not in page] == []


def test_every_kind_of_error_is_explained_with_its_exit_code() -> None:
    from trivet import errors

    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TrivetError)]
    assert len(kinds) >= 8
    for kind in kinds:
        assert re.search(rf"^\| `{kind.__name__}` \| {kind.exit_code} \|", page, re.MULTILINE), kind.__name__


if __name__ == "__main__":
    head, _, _ = CONFIGURATION.read_text(encoding="utf-8").partition("## Every key\n")
    CONFIGURATION.write_text(head + generated(), encoding="utf-8")
