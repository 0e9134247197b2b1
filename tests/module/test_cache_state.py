"""Bookkeeping of the block cache, as Python sees it; its rules are tested in C++."""

import pytest

from attnres_ext import _C


def test_counters():
    state = _C.CacheState(2)
    assert (state.capacity, state.sealed, state.open_slot, state.num_sources) == (2, 0, 0, 0)
    assert not state.begin_write()
    assert state.begin_write()
    assert state.open_holds_partial
    state.close()
    assert (state.sealed, state.open_slot, state.num_sources, state.full) == (1, 1, 1, False)
    state.begin_write()
    state.close()
    assert state.full
    state.reset()
    assert (state.sealed, state.num_sources) == (0, 0)


def test_errors_become_python_errors():
    with pytest.raises(ValueError, match="capacity is 0, expected at least 1 slot"):
        _C.CacheState(0)
    with pytest.raises(RuntimeError, match="slot 0 holds nothing and cannot be closed"):
        _C.CacheState(1).close()
