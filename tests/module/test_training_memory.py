"""What a forward keeps for its backward, in bytes: with recomputation on, a standard residual's."""

import pytest

from tests.tool import load_tool

tool = load_tool("training_memory")

X = 32 * 2  # bytes of a token
STATISTICS = 4  # of a float32 number


@pytest.fixture
def connections(monkeypatch):
    """Twelve sublayers in blocks of four."""
    for name, value in {"HIDDEN": 32, "SUBLAYERS": 12, "BLOCK": 4}.items():
        monkeypatch.setattr(tool, name, value)
    return tool.connections()


PLAIN = "`x + f(norm(x))`"
BLOCK = [
    'block, single pass, `save="nothing"`',
    'block, single pass, `save="stats"`',
    'block, two phases, `save="nothing"`',
    'block, two phases, `save="stats"`',
]
LEAN = [*BLOCK, '`mode="standard"`']


def saved_by_output_site(name):
    """The last read is outside of all checkpoints, and keeps what ``save`` says."""
    if "nothing" in name:
        return 0
    if "standard" in name:
        return 3 * STATISTICS  # 1/rms, logit and log-sum-exp of one source
    sources = 3  # embedding, two blocks; the third is what is merged or read last
    if "two phases" in name:
        return 0  # phase 1 is recomputed with the block's other sites
    return (2 * (sources + 1) + 1) * STATISTICS


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("recompute", ["sites", "layers"])
def test_with_recomputation_a_standard_residual_keeps_as_much(connections, name, recompute):
    plain = tool.kept(connections[PLAIN], recompute)
    length = 1 if recompute == "sites" else 2
    # The plain model's output norm keeps its 1/rms. Its first stretch keeps the embedding, which is
    # there anyway.
    assert plain == 12 // length * X + STATISTICS
    kept = tool.kept(connections[name], recompute)
    assert kept == plain - STATISTICS + saved_by_output_site(name)


@pytest.mark.parametrize("name", LEAN)
def test_without_recomputation_in_the_residual(connections, name):
    """Besides the sum, what the sublayers themselves keep: their input."""
    for recompute in ("nothing", "sublayers"):
        plain = tool.kept(connections[PLAIN], recompute)
        assert plain == 24 * X + 13 * STATISTICS
        kept = tool.kept(connections[name], recompute)
        if name == 'block, two phases, `save="stats"`':
            # Phase 1: a mix and a log-sum-exp for each of the sites 1 to 12; for each block, 1/rms
            # of its sources and their logits for four sites. Site 0 reads in a single pass.
            statistics = 12 + sum(sources * (1 + 4) for sources in (1, 2, 3)) + 3
            assert kept == 36 * X + statistics * STATISTICS
        elif "stats" in name:
            statistics = sum(2 * (1 + -(-site // 4)) + 1 for site in range(1, 13)) + 3
            assert kept == 24 * X + statistics * STATISTICS
        elif "standard" in name:
            assert kept == 24 * X + 13 * 3 * STATISTICS
        else:
            assert kept == 24 * X


def test_full_residuals_keep_every_output(connections):
    """Each is a source of its own: larger stretches recompute sublayers, and spare no source."""
    for recompute in ("sites", "layers"):
        assert tool.kept(connections['full, `save="nothing"`'], recompute) == 12 * X


@pytest.mark.parametrize(
    ("name", "recompute"),
    [(PLAIN, "sites"), (BLOCK[1], "nothing"), (BLOCK[2], "layers"), ("full", "nothing")],
)
def test_the_table_is_up_to_date(name, recompute):
    """Some of its cells: the whole takes ``python tools/training_memory.py --check``."""
    (line,) = (
        line for line in tool.DOCUMENT.read_text().splitlines() if line.startswith(f"| {name} |")
    )
    cell = line.split("|")[2 + list(tool.RECOMPUTED).index(recompute)].strip()
    unit = tool.SUBLAYERS * tool.HIDDEN * tool.DTYPE.itemsize
    assert cell == f"{tool.kept(tool.connections()[name], recompute) / unit:.2f}"
