"""The runs of a sweep: every combination of the values that were given, with every seed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trivet.config import Config
from trivet.configio import canonical, load
from trivet.errors import ConfigError
from trivet.runfolder import RunFolder


@dataclass(frozen=True, eq=False)
class Run:
    """One training: a setting with a seed. `config.output_dir` is its run folder; beside it are its config and log."""

    setting: str
    seed: int
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir))

    @property
    def config_file(self) -> Path:
        return self.folder.path.with_suffix(".yaml")

    @property
    def log_file(self) -> Path:
        return self.folder.path.with_suffix(".log")

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


def plan(path: Path | None, overrides: Sequence[str], seeds: int) -> tuple[Path, list[Run]]:
    """The sweep's folder and its runs, every config checked.

    Args:
        path: the config file; its `output_dir` is the sweep's folder, its seed the first one.
        overrides: "key=value", or "key=value,value": such keys make the grid.

    Raises:
        ConfigError: a wrong key or value, or there is nothing to choose by.
    """
    grid = [(_key(text), [f"{text.partition('=')[0]}={value}" for value in _values(text)]) for text in overrides]
    names = [key for key, _ in grid]
    for key in names:
        if names.count(key) > 1:
            raise ConfigError(f"override {key}: is given twice; write its values behind one =, with commas")
    swept = [key for key, texts in grid if len(texts) > 1]
    for key in {"output_dir", "training.seed"} & set(swept):
        raise ConfigError(f"override {key}: can't be swept" + ("; use --seeds" if key == "training.seed" else ""))
    base = load(path, [texts[0] for _, texts in grid])
    if base.data.validation is None:
        raise ConfigError("data.validation is null, but a sweep chooses by the validation loss; set it")
    folder, runs = Path(base.output_dir), []
    short = [key.rpartition(".")[2] for key in swept]
    for choice in itertools.product(*(texts for _, texts in grid)):
        named = [
            f"{last if short.count(last) == 1 else key}={text.partition('=')[2].strip()}"
            for key, text in zip(names, choice, strict=True)
            for last in [key.rpartition(".")[2]]
            if key in swept
        ]
        setting = ", ".join(named) or "as configured"
        for seed in range(base.training.seed, base.training.seed + seeds):
            place = folder / re.sub(r"[^\w.+-]+", "_", setting.replace("=", "-"))[:120] / f"seed-{seed}"
            config = load(path, [*choice, f"training.seed={seed}"])
            runs.append(Run(setting, seed, dataclasses.replace(config, output_dir=str(place))))
    places = [run.config.output_dir for run in runs]
    for run in runs:
        if places.count(run.config.output_dir) > 1:
            raise ConfigError(f"two settings would be in one folder, {run.folder.path.parent}: are they the same?")
    return folder, runs


def _key(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{text}': write key=value, or key=value,value for a choice")
    return canonical(key.strip(), f"override '{text}'")


def _values(text: str) -> list[str]:
    """The values behind =, as they are written; a [list] or {mapping} is one of them."""
    listed = f"[{text.partition('=')[2]}]"
    try:
        node: Any = yaml.compose(listed, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{text}': the values are not valid YAML: {error}") from error
    return [listed[item.start_mark.index : item.end_mark.index] for item in node.value] or [""]
