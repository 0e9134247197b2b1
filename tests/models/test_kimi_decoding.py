"""A decoding step's reads: into one tensor, with phase 1 beside the sublayers where it can be."""

import pytest
import torch

from attnres_ext.models.kimi_linear import modeling
from attnres_ext.residual_cached import CachedState
from tests.helpers import allocated
from tests.late_stream import late_phase1
from tests.models.test_kimi_modeling import MODES, make_ids, make_model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def decoder(mode, two_phase, dtype=torch.float32):
    model = make_model(mode, queries=0.3, sublayers_per_block=3).to(dtype).eval()
    model.residual.two_phase = two_phase
    return model


@pytest.fixture
def reads(monkeypatch):
    """``(data_ptr of the result, sizes allocated)`` of every read through a cache."""
    seen = []
    for name in ("read", "read_output"):
        original = getattr(CachedState, name)

        def counted(*args, original=original, **kwargs):
            results = []
            sizes = allocated(lambda: results.append(original(*args, **kwargs)))
            seen.append((results[0].data_ptr(), sizes))
            return results[0]

        monkeypatch.setattr(CachedState, name, counted)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("two_phase", [False, True])
def test_reads_of_a_step_allocate_nothing(mode, two_phase, reads):
    model, ids = decoder(mode, two_phase, torch.bfloat16), make_ids(tokens=8)
    state = model.new_state(2, 8)
    model.prefill(ids[:, :5], state, 3)  # the last chunk is shorter
    model(ids[:, 5:6], state=state)  # makes the scratch memory
    reads.clear()
    for position in (6, 7):
        model(ids[:, position : position + 1], state=state)
    assert len(reads) == 2 * model.residual.num_sites
    assert {pointer for pointer, _ in reads} == {reads[0][0]}
    assert [sizes for _, sizes in reads] == [[]] * len(reads)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_chunks_of_a_prompt_share_their_memory(mode, reads):
    """What the first chunk makes the others use, the shorter last one too."""
    model, ids = decoder(mode, True), make_ids(tokens=11)
    model.prefill(ids, model.new_state(2, 11), 4)
    sites = model.residual.num_sites
    assert len(reads) == 3 * sites
    assert any(sizes for _, sizes in reads[:sites])
    assert [sizes for _, sizes in reads[sites:]] == [[]] * (2 * sites)


def test_the_cache_of_a_prompt_is_as_large_as_a_chunk(monkeypatch):
    """Whatever the prompt's length."""
    model, made = decoder("block", True), []
    new = model.model.new_block_cache
    monkeypatch.setattr(
        model.model, "new_block_cache", lambda *shape: made.append(new(*shape)) or made[-1]
    )
    for length in (4, 5, 20):
        state = model.new_state(2, length)
        made.clear()
        model.prefill(make_ids(tokens=length), state, 4)
        assert [cache.shape[:2] for cache in made] == [(2, 4)]
        assert state.prefill_cache is None


@pytest.mark.parametrize("mode", ["block", "full"])
def test_phase_1_runs_beside_the_sublayers(mode, monkeypatch):
    model, ids = decoder(mode, True), make_ids(tokens=8)
    expected = [token.clone() for token in model.generate(ids, 4, chunk_size=3)]
    with late_phase1(monkeypatch) as (side, log):
        monkeypatch.setattr(modeling, "new_stream", lambda device: side)
        actual = list(model.generate(ids, 4, chunk_size=3))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        # Three chunks and three tokens after the first, a phase 1 for every block of each.
        assert log.count("phase 1 starts") == 6 * model.residual.num_blocks
        assert log.count("main waits for side") == log.count("phase 1 starts")

        state = model.new_state(2, 8)
        for index, layer in enumerate(model.model.layers):
            for sublayer in (layer.self_attn, layer.feed_forward):
                sublayer.register_forward_pre_hook(
                    lambda *_, index=index: log.append(f"layer {index}")
                )
        log.clear()
        model(ids[:, :1], state=state)
    start, wait = ["side waits for main", "phase 1 starts"], "main waits for side"
    assert log[:5] == [*start, "layer 0", wait, *(["layer 0"] if mode == "block" else start[:1])]


def test_without_streams_there_are_none():
    state = decoder("block", True).new_state(2, 8)
    assert state.block_cache._side.stream is None


def test_autocast():
    """Sums are as wide as the cache, products as narrow as autocast makes them."""
    model, ids = decoder("block", True), make_ids(tokens=9)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.new_state(2, 9)
        model.prefill(ids[:, :6], state, 4)
        logits = torch.cat(
            [model(token, state=state).logits for token in ids[:, 6:].split(1, 1)], 1
        )
    # 8 bits of mantissa through some 60 roundings in a row.
    assert (logits - expected[:, 6:]).abs().max() < 60 * 2**-9 * expected.abs().max()
