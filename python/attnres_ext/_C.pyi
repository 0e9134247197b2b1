# ruff: noqa: N999
"""Build facts, the traffic plan and cache bookkeeping (compiled, csrc/python)."""

version: str
compiler: str
cxx_standard: int
cuda_archs: tuple[str, ...]
max_sources: int

class Plan:
    @property
    def two_phase(self) -> bool: ...
    @property
    def bytes_single_pass(self) -> int: ...
    @property
    def bytes_two_phase(self) -> int: ...
    @property
    def two_phase_from_tokens(self) -> int: ...
    @property
    def tile_tokens(self) -> int: ...
    @property
    def row_resident(self) -> bool: ...
    @property
    def phase_one_resident(self) -> bool: ...
    @property
    def reason(self) -> str: ...

def plan(
    num_sources: int,
    num_queries: int,
    num_tokens: int,
    hidden: int,
    itemsize: int = 2,
    device: str = "cuda",
    training: bool = False,
    capability: int = 90,
    shared_bytes: int = 232448,
) -> Plan: ...
def bytes_moved(
    operator: str,
    direction: str,
    num_sources: int,
    num_queries: int,
    num_tokens: int,
    hidden: int,
    itemsize: int = 2,
    accumulate: bool = False,
) -> int: ...
def kernel_config(
    operator: str,
    direction: str,
    num_sources: int,
    hidden: int,
    dtype: str = "bfloat16",
    norm: bool = False,
    accumulate: bool = False,
    num_queries: int = 0,
    capability: int = 90,
    shared_bytes: int = 232448,
) -> str | None: ...

class CacheState:
    def __init__(self, capacity: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def sealed(self) -> int: ...
    @property
    def full(self) -> bool: ...
    @property
    def open_holds_partial(self) -> bool: ...
    @property
    def num_sources(self) -> int: ...
    @property
    def open_slot(self) -> int: ...
    def begin_write(self) -> bool: ...
    def close(self) -> None: ...
    def reset(self) -> None: ...
