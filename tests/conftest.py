"""What every test gets: poisoned fresh memory, a seed, and the devices of this machine.

With ``--device simulated`` the operators' library has a simulated GPU: see tests/simt/device.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# No deadline: the first call of an operator loads a library. Derandomised: a red run is red for
# everybody.
hypothesis.settings.register_profile("attnres", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("attnres")

#: The simulated GPU, in a session that has one.
SIMULATOR: pytest.StashKey[Any] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "simulated"],
        help="only tests of what runs on a device, on this one (default: all tests, all devices)",
    )
    parser.addoption(
        "--simulate",
        default="h100",
        help="the GPU that is simulated: a name of DEVICES in tests/simt/device.py (default: h100)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports the operators: their library is another on a simulated GPU."""
    if config.getoption("--device") == "simulated":
        from tests.simt import device

        if reason := device.missing():
            raise pytest.UsageError(f"--device simulated: {reason}")
        simulated = config.getoption("--simulate")
        if simulated not in device.DEVICES:
            raise pytest.UsageError(
                f"--simulate is {simulated!r}, expected one of {', '.join(device.DEVICES)}"
            )
        config.stash[SIMULATOR] = device.load()
        config.stash[SIMULATOR].use(device.DEVICES[simulated])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a ``device`` runs on each device this machine has."""
    if "device" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--device")
    devices: list[Any] = ["cpu"] if chosen in (None, "cpu") else []
    if chosen == "simulated":
        # Its memory is the CPU's; its tests have the names, and so the numbers, of a GPU's.
        devices.append(pytest.param("cpu", id="cuda"))
    if chosen == "cuda" or (chosen is None and torch.cuda.is_available()):
        devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("device", devices)


def _is_about(item: pytest.Item, chosen: str | None) -> bool:
    """Whether a test belongs into a session about a device, or into one about all of them."""
    fixtures = getattr(item, "fixturenames", ())
    needs_gpu = item.get_closest_marker("cuda") is not None
    if chosen is None:
        return "simulator" not in fixtures
    if chosen == "simulated":
        # Kernels run thread by thread: what is large, or about a CPU's caches and threads, is not
        # for them.
        return (
            ("device" in fixtures or "simulator" in fixtures)
            and not needs_gpu
            and not {"large", "slow"} & {mark.name for mark in item.iter_markers()}
        )
    return ("device" in fixtures or needs_gpu) and "simulator" not in fixtures


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what ``--device`` does not ask for; skips, visibly, what needs a GPU; puts what
    takes long first."""
    chosen = config.getoption("--device")
    others = [item for item in items if not _is_about(item, chosen)]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
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
def simulator(request: pytest.FixtureRequest) -> Any:
    """The simulated GPU: what it is, how it runs threads, and what was launched."""
    return request.config.stash[SIMULATOR]


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
