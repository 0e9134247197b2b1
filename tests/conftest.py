"""What every test gets: poisoned fresh memory, a seed, and the devices of this machine."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# No deadline: the first call of an operator loads a library. Derandomised: a red run is red for
# everybody.
hypothesis.settings.register_profile("attnres", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("attnres")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        help="only tests of what runs on a device, on this one (default: all tests, all devices)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a ``device`` runs on each device this machine has."""
    if "device" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--device")
    devices = ["cpu"] if chosen in (None, "cpu") else []
    if chosen == "cuda" or (chosen is None and torch.cuda.is_available()):
        devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("device", devices)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what ``--device`` does not ask for; skips, visibly, what needs a GPU."""
    if config.getoption("--device") is not None:
        about = [
            "device" in getattr(item, "fixturenames", ())
            or item.get_closest_marker("cuda") is not None
            for item in items
        ]
        others = [item for item, kept in zip(items, about, strict=True) if not kept]
        if others:
            config.hook.pytest_deselected(items=others)
        items[:] = [item for item, kept in zip(items, about, strict=True) if kept]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """Fills what ``torch.empty`` and the stable ABI allocate with NaN: what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds from the test's own name: its inputs do not depend on the tests that ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Lets a test call ``torch.set_num_threads`` and puts the count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """On a GPU, an operator that this build has no CUDA kernel for is skipped, and says so."""
    try:
        return (yield)
    except RuntimeError as error:
        if item.get_closest_marker("cuda") and "has no CUDA kernel for it" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise
