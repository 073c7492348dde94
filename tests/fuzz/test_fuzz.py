"""The data reader, the config loader and the check of adapters answer any bytes with a value or a `TrivetError`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import SEEN, TARGETS, attempt


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    before = SEEN.copy()
    attempt(name, 150, repeatable=True)
    outcomes = {kind for kind, count in (SEEN - before).items() if kind.startswith(name) and count}
    assert f"{name}: accepted" in outcomes and len(outcomes) > 1, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_bytes(name: str) -> None:
    attempt(name, 3_000)
