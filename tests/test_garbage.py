"""Python's garbage collector stands still where it is told to, and nowhere else."""

from __future__ import annotations

import gc

import pytest

from trivet.garbage import uncollected


def searches() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_searched_inside_and_what_was_made_is_old_afterwards() -> None:
    before, frozen = searches(), gc.get_freeze_count()
    with uncollected():
        made = [[] for _ in range(100_000)]
        assert searches() == before
    assert gc.isenabled()
    assert gc.get_count()[0] < 100_000 and not any(thing is made[0] for thing in gc.get_objects(generation=0))
    assert gc.get_freeze_count() <= frozen


def test_garbage_made_inside_is_found_later() -> None:
    class Ring:
        pass

    with uncollected():
        ring = Ring()
        ring.itself = ring  # type: ignore[attr-defined]
        del ring
    assert any(isinstance(thing, Ring) for thing in gc.get_objects())
    gc.collect()
    assert not any(isinstance(thing, Ring) for thing in gc.get_objects())


def test_it_stays_off_where_it_was_off_and_comes_back_after_an_error() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
