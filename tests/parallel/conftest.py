"""Processes of these tests."""

import pytest

from tests.parallel.processes import Processes


@pytest.fixture(scope="module")
def _kept(tmp_path_factory):
    kept = []
    yield kept, tmp_path_factory
    for processes in kept:
        processes.close()


@pytest.fixture
def four(_kept):
    """Four processes, the same ones for all tests of a module unless one failed in them."""
    kept, tmp_path_factory = _kept
    if not kept or not kept[-1].alive:
        kept.append(Processes(4, tmp_path_factory.mktemp("store") / "store"))
    return kept[-1]
