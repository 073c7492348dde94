"""What holds for the package as a whole: quick to import, complete, in small modules, running no foreign code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import trivet
from trivet.cli.app import build

SOURCE = Path(trivet.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = {
    "accelerate", "datasets", "huggingface_hub", "matplotlib", "nltk", "numpy", "pandas", "peft", "pycocoevalcap",
    "rouge_score", "sacrebleu", "scipy", "sklearn", "tokenizers", "torch", "transformers",
}  # fmt: skip


def imported_by(code: str, cwd: Path) -> set[str]:
    """The top-level packages that a fresh interpreter has imported after `code`."""
    code += "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def imported_by_verb(arguments: str, cwd: Path, *, code: int = 0) -> set[str]:
    """The top-level packages that `trivet ARGUMENTS` has imported when it ends with exit code `code`."""
    return imported_by(
        f"import sys; sys.argv = ['trivet', *{arguments.split()!r}]\nfrom trivet.cli import main\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    assert (end.code or 0) == {code}, end.code",
        cwd,
    )


@pytest.mark.parametrize("arguments", ["--help", "methods", "init new.yaml", "train --help"])
def test_light_verbs_import_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    assert HEAVY & imported_by_verb(arguments, tmp_path) == set()


@pytest.mark.parametrize("verb", ["train", "validate"])
@pytest.mark.parametrize(
    ("data", "code"), [("bad.jsonl", 1), ("nowhere.jsonl", 2), ("good.jsonl data.validation=bad.jsonl", 1)]
)
def test_bad_data_is_refused_before_anything_heavy_is_imported(verb: str, data: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a",\n')
    assert HEAVY & imported_by_verb(f"{verb} model.name=demo data.train={data}", tmp_path, code=code) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate nowhere",
        "generate nowhere -p a",
        "chat nowhere",
        "inspect nowhere",
        "report nowhere",
        "compress nowhere --budget r1-equivalent",
        "merge nowhere a",
        "export nowhere a",
    ],
)
def test_a_missing_folder_is_refused_before_anything_heavy_is_imported(arguments: str, tmp_path: Path) -> None:
    assert HEAVY & imported_by_verb(arguments, tmp_path, code=2) == set()


def test_importing_the_package_and_its_config_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import trivet, trivet.configio, trivet.methods; trivet.Config(); trivet.TrivetError('x')"
    assert HEAVY & imported_by(code, tmp_path) == set()


def test_what_is_heavy_would_be_seen(tmp_path: Path) -> None:
    assert "numpy" in imported_by("import numpy", tmp_path)


def test_every_public_name_resolves() -> None:
    assert {"LoRAModel", "load_dataset", "attach", "Config", "Dataset", "TrivetError"} <= set(trivet.__all__)
    for name in trivet.__all__:
        assert getattr(trivet, name) is not None
        assert name in dir(trivet)
    with pytest.raises(AttributeError, match="'trivet' has no attribute 'LoraModel'"):
        trivet.LoraModel  # noqa: B018


def test_the_version_is_the_one_of_the_project_file() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert found is not None
    assert found[1] == trivet.__version__


def test_no_module_is_longer_than_300_lines() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(p) for p in MODULES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert silent == []


@pytest.mark.parametrize("verb", typer.main.get_command(build()).commands)  # type: ignore[attr-defined]
def test_every_verb_has_help_and_an_example_of_itself(verb: str) -> None:
    command = typer.main.get_command(build()).commands[verb]  # type: ignore[attr-defined]
    assert len((command.help or "").split()) >= 3
    assert (command.epilog or "").startswith("Example: trivet ")
    assert all(p.help for p in command.params)
    # `methods` shows where its output goes; every other verb shows itself.
    assert command.epilog.split()[2] == {"methods": "train"}.get(verb, verb)


# -- nothing that runs foreign code ------------------------------------------------------------------------------------


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib")


def unsafe(code: str) -> Iterator[str]:
    """Calls that could run code from a file or the network, or hand text to a shell."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in PICKLES and node.attr != "UnpicklingError":
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            yield f"line {node.lineno}: import from {node.module}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"):
            yield f"line {node.lineno}: {called}"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if called == "yaml.load":
            yield f"line {node.lineno}: yaml.load : use safeyaml.parse"
        if keywords.get("trust_remote_code") == "True" or keywords.get("shell") == "True":
            yield f"line {node.lineno}: {called} with trust_remote_code or shell"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_runs_foreign_code(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.load(f)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.FullLoader)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "exec(text)",
    ],
)
def test_the_scan_finds_what_it_looks_for(code: str) -> None:
    assert list(unsafe(code)) != []


def test_our_yaml_loader_builds_plain_values_only() -> None:
    import yaml

    from trivet.safeyaml import Loader

    assert issubclass(Loader, yaml.SafeLoader)
