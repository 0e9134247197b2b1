"""BlockCache: the operators' definition in place, and the state that reads through it."""

import copy
import itertools

import pytest
import torch

from attnres_ext import reference
from attnres_ext.cache import BlockCache
from tests.helpers import allocated
from tests.module import naive_residual
from tests.module.naive_residual import Toy, assert_as_exact_as_plain_pytorch, on_device
from tests.module.test_residual import MODES, D, embed, toy


def weights(count):
    return torch.randn(count, D), torch.rand(count, D) + 0.5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@on_device
@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cached_state_equals_the_training_state(options, dtype):
    model = toy(**options).to(dtype)
    exact = copy.deepcopy(model).double()
    cache = model.residual.new_cache((2, 3), dtype=dtype, device=naive_residual.device)
    x = embed(2, 3, dtype=dtype)
    expected, naive = exact.naive(x.double()), model.naive(x)
    for _ in range(2):  # the memory is used again
        out = model(x, cache=cache)
        assert out.dtype == dtype
        assert out.shape == x.shape
        if dtype == torch.float64:
            # The cache keeps 1/rms in float32, whatever the dtype of the slots.
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        else:
            assert_as_exact_as_plain_pytorch([out], [naive], [expected])
            assert_as_exact_as_plain_pytorch([model(x)], [naive], [expected])


@pytest.mark.parametrize("options", MODES)
def test_recording_through_the_cache(options):
    model = Toy(toy(**options).residual.float())
    cache = model.residual.new_cache(4)
    with model.residual.recording() as training:
        model(embed(4, dtype=torch.float32))
    with model.residual.recording() as cached:
        model(embed(4, dtype=torch.float32), cache=cache)
    assert training.weights.keys() == cached.weights.keys()
    for site, expected in training.weights.items():
        torch.testing.assert_close(cached.weights[site], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("norm", [False, True])
def test_attend_and_write_by_definition(scale, norm):
    cache = BlockCache(3, (2, 2), D, eps=1e-4)
    (query, gain), norm_weight = (w[0] for w in weights(1)), torch.rand(D) if norm else None
    first, second, third = (torch.randn(2, 2, D) for _ in range(3))
    cache.write(first)
    cache.close()
    cache.write(second)
    assert torch.equal(cache.sources()[1], second)

    options = {"out_weight": norm_weight, "out_eps": 1e-2, "scale": scale}
    expected, partial = reference.accumulate_depth_attention(
        second, third, [first], query, gain, eps=1e-4, **options
    )
    torch.testing.assert_close(cache.attend(third, query, gain, **options), expected)
    assert torch.equal(cache.sources()[1], partial)
    # Reading without a delta changes nothing.
    torch.testing.assert_close(cache.attend(None, query, gain, **options), expected)
    assert torch.equal(cache.sources()[1], partial)
    assert cache.num_sealed == 1
    cache.close()
    torch.testing.assert_close(cache.attend(None, query, gain, **options), expected)


def test_two_phases_by_definition():
    cache = BlockCache(4, 5, D)
    blocks = [torch.randn(5, D) for _ in range(3)]
    for block in blocks:
        cache.write(block)
        cache.close()
    queries, gains = weights(3)
    deltas = [torch.randn(5, D) for _ in range(3)]
    cache.inter(queries, gains)
    partial = None
    for i, delta in enumerate(deltas):
        expected, partial = reference.accumulate_depth_attention(
            partial, delta, blocks, queries[i], gains[i]
        )
        torch.testing.assert_close(cache.merge(i, delta, queries[i], gains[i]), expected)
    assert torch.equal(cache.sources()[3], partial)
    # A shorter block afterwards uses a part of the same scratch memory.
    cache.reset()
    cache.write(blocks[0])
    cache.close()
    cache.inter(queries[:1])
    expected, _ = reference.accumulate_depth_attention(None, deltas[0], blocks[:1], queries[0])
    torch.testing.assert_close(cache.merge(0, deltas[0], queries[0]), expected)


def test_nothing_but_results_is_allocated():
    cache = BlockCache(2, 4, D)
    (query, gain) = (w[0] for w in weights(1))
    cache.attend(torch.randn(4, D), query, gain)
    before = [tensor.data_ptr() for tensor in cache.sources()]
    cache.close()
    cache.attend(torch.randn(4, D), query, gain)
    cache.attend(torch.randn(4, D), query, gain)
    assert [tensor.data_ptr() for tensor in cache.sources()][:1] == before


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", ["given", "the cache's", "a smaller cache's"])
def test_a_step_allocates_nothing(options, dtype, places):
    """Read after read into memory that is there: nothing for the allocator, nothing to free."""
    model = toy(**options).to(dtype)
    residual = model.residual
    given = places == "given"
    tokens = 6 if "smaller" in places else 4
    cache = residual.new_cache((tokens, 1), dtype=dtype, reuse_result=not given)
    x, *deltas = (embed(4, 1, dtype=dtype, seed=seed) for seed in range(8))
    results = [torch.empty_like(x) if given else None for _ in range(2)]
    read = []

    def step():
        part = cache if tokens == 4 else cache.resized((4, 1))
        state = residual.start(x, cache=part)
        for site, delta in enumerate(deltas):
            out = state.read(site, model.norms[site], out=results[site % 2])
            assert out is results[site % 2] or not given
            state.write(delta)
        read.append(state.read_output(model.norms[-1], out=results[1]))

    step()  # makes the scratch memory
    expected = read[0].clone()
    step()
    assert torch.equal(read[1], expected)
    assert read[1].data_ptr() == read[0].data_ptr()
    assert allocated(step) == []
    state = residual.start(x)
    for site, delta in enumerate(deltas):
        state.read(site, model.norms[site])
        state.write(delta)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        expected, state.read_output(model.norms[-1]), rtol=tolerance, atol=tolerance
    )


def test_allocations_are_seen():
    x = torch.zeros(1000)
    assert 4000 in allocated(lambda: x + 1)


def test_results_that_do_not_fit():
    cache, query = BlockCache(2, 4, D), torch.zeros(D)
    for out in (torch.empty(3, D), torch.empty(4, D).double()):
        with pytest.raises(RuntimeError, match=r"out has shape .* expected \(4, 12\) and "):
            cache.attend(torch.zeros(4, D), query, out=out)
    delta = torch.zeros(4, D)
    with pytest.raises(RuntimeError, match="out shares memory with delta"):
        cache.attend(delta, query, out=delta)
    assert not cache.open_holds_partial


def test_a_result_for_all_reads():
    cache, query = BlockCache(2, 4, D, reuse_result=True), torch.randn(D)
    first = cache.attend(torch.randn(4, D), query)
    delta = torch.randn(4, D)
    expected, _ = reference.accumulate_depth_attention(cache.sources()[0], delta, [], query)
    second = cache.attend(delta, query)
    assert second.data_ptr() == first.data_ptr()
    torch.testing.assert_close(first, expected)
    # Elsewhere, if it is told to; and what was read cannot be what is written.
    elsewhere = torch.empty(4, D)
    assert cache.attend(delta, query, out=elsewhere) is elsewhere
    before = cache.sources()[0].clone()
    with pytest.raises(RuntimeError, match="out shares memory with delta"):
        cache.attend(second, query)
    assert torch.equal(cache.sources()[0], before)


@on_device
@pytest.mark.parametrize("options", MODES)
def test_fewer_tokens_in_the_same_memory(options):
    model = toy(**options).float()

    def new(shape):
        return model.residual.new_cache(shape, device=naive_residual.device)

    large = new((2, 8))
    x = embed(2, 8, dtype=torch.float32)
    assert_as_exact_as_plain_pytorch(
        [model(x, cache=large)], [model.naive(x)], [copy.deepcopy(model).double().naive(x.double())]
    )
    memory = large._slots.data_ptr(), large._rstd.data_ptr()
    for tokens in (5, 1, 8):
        part = x[:, :tokens].contiguous()
        small = large.resized(part.shape[:-1])
        assert (small._slots.data_ptr(), small._rstd.data_ptr()) == memory
        assert small.shape == part.shape
        own = model(part, cache=new(part.shape[:-1]))
        assert torch.equal(model(part, cache=small), own)
    assert torch.equal(model(x, cache=large), model(x, cache=new((2, 8))))
    with pytest.raises(RuntimeError, match=r"resized to shape \(3, 8\), expected at most 16"):
        large.resized((3, 8))


def test_narrower_deltas_are_added_as_they_are():
    cache = BlockCache(1, 4, D)
    first, second = torch.randn(4, D), torch.randn(4, D, dtype=torch.bfloat16)
    cache.write(first)
    cache.write(second)
    assert torch.equal(cache.sources()[0], first + second.float())


def test_no_tokens():
    cache = BlockCache(2, (0, 3), D)
    query, gain = weights(1)
    assert cache.attend(torch.empty(0, 3, D), query[0], gain[0]).shape == (0, 3, D)


@pytest.mark.parametrize("two_phase", [False, True])
def test_inference_mode(two_phase):
    model = toy(sublayers_per_block=2, two_phase=two_phase).float()
    x = embed(3, dtype=torch.float32)
    with torch.inference_mode():
        cache = model.residual.new_cache(3)
        inside = model(x, cache=cache)
    assert torch.equal(inside, model(x, cache=cache))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, D), {}, "capacity is 0, expected at least 1"),
        ((257, 4, D), {}, "capacity is 257, at most 256"),
        ((2, -1, D), {}, "expected sizes not below 0"),
        ((2, 4, 0), {}, "hidden_size is 0, expected at least 1"),
        ((2, 4, D), {"dtype": torch.int32}, "dtype is torch.int32, expected a floating point"),
    ],
)
def test_errors_of_construction(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2.5, 4, D), {}, "capacity is 2.5, expected an integer"),
        ((2, "ab", D), {}, "shape is 'ab', expected integers"),
        ((2, 4, D), {"dtype": "bf16"}, "dtype is 'bf16', expected a torch.dtype"),
    ],
)
def test_kinds_of_arguments(arguments, options, message):
    with pytest.raises(TypeError, match=f"BlockCache: {message}"):
        BlockCache(*arguments, **options)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (torch.zeros(5, D), r"delta has shape \(5, 12\), expected \(4, 12\)"),
        (torch.zeros(4, D).double(), "delta has dtype torch.float64, expected torch.float32 or"),
        (torch.zeros(4, D, device="meta"), "delta is on meta, expected cpu"),
    ],
)
def test_deltas_that_do_not_fit(delta, message):
    cache = BlockCache(2, 4, D)
    cache.write(torch.zeros(4, D))
    cache.close()
    query = torch.zeros(D)
    cache.inter(query[None])
    for call in (
        lambda: cache.write(delta),
        lambda: cache.attend(delta, query),
        lambda: cache.merge(0, delta, query),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert not cache.open_holds_partial, "an error changes nothing"


@pytest.mark.parametrize("shape", [(6,), 12])
def test_queries_that_do_not_fit(shape):
    cache = BlockCache(2, 4, D)
    cache.write(torch.zeros(4, D))
    cache.close()
    with pytest.raises(RuntimeError, match=r"queries has shape .*, expected \[S, 12\]"):
        cache.inter(torch.zeros(shape))


def test_what_is_no_tensor():
    cache, query = BlockCache(2, 4, D), torch.zeros(D)
    with pytest.raises(TypeError, match="block cache: delta is a tuple, expected a tensor"):
        cache.write((torch.zeros(4, D), None))
    cache.write(torch.zeros(4, D))
    cache.close()
    with pytest.raises(TypeError, match="block cache: queries is a list, expected a tensor"):
        cache.inter([query, query])
    assert not cache.open_holds_partial


def test_memory_is_used_by_one_cache_at_a_time():
    large, delta, query = BlockCache(2, 4, D), torch.randn(4, D), torch.zeros(D)
    large.write(delta)
    large.close()
    large.inter(query[None])
    small = large.resized(3)
    small.write(delta[:3])
    for call in (
        large.close,
        lambda: large.write(delta),
        lambda: large.attend(delta, query),
        lambda: large.attend(None, query),
        lambda: large.inter(query[None]),
        lambda: large.merge(0, delta, query),
    ):
        with pytest.raises(RuntimeError, match="another cache of the same memory was taken into"):
            call()
    assert torch.equal(small.attend(None, query), delta[:3])
    large.reset()
    large.write(delta)
    with pytest.raises(RuntimeError, match="reset this one before it is used again"):
        small.close()


@pytest.mark.parametrize("two_phase", [False, True])
def test_two_forwards_at_a_time_need_two_caches(two_phase):
    model = toy(sublayers_per_block=2, two_phase=two_phase).float()
    cache, x = model.residual.new_cache(4), embed(4, dtype=torch.float32)
    first = model.residual.start(x, cache=cache)
    first.read(0)
    first.write(x)
    second = model.residual.start(2 * x, cache=cache)
    with pytest.raises(RuntimeError, match=r"before site 1 was read, another forward pass was st"):
        first.read(1)
    assert torch.equal(second.read(0), 2 * x)


@on_device
@pytest.mark.parametrize("choices", list(itertools.product([False, True], repeat=3)))
def test_every_block_its_own_choice(choices, monkeypatch):
    model = toy(sublayers_per_block=3)
    monkeypatch.setattr(
        model.residual, "reads_in_two_phases", lambda block, like, training: choices[block - 1]
    )
    cache = model.residual.new_cache((2, 3), dtype=torch.float64, device=naive_residual.device)
    x = embed(2, 3)
    # The cache keeps 1/rms in float32.
    torch.testing.assert_close(model(x, cache=cache), model.naive(x), rtol=1e-5, atol=1e-5)


def test_errors_of_order():
    cache, delta, query = BlockCache(1, 4, D), torch.zeros(4, D), torch.zeros(D)
    with pytest.raises(RuntimeError, match="attend has nothing to read, the cache is empty"):
        cache.attend(None, query)
    with pytest.raises(RuntimeError, match="slot 0 holds nothing and cannot be closed"):
        cache.close()
    with pytest.raises(RuntimeError, match="inter has nothing to read, no slot is closed"):
        cache.inter(query[None])
    with pytest.raises(RuntimeError, match="merge has no row 0, inter was called for 0 queries"):
        cache.merge(0, delta, query)
    cache.write(delta)
    cache.close()
    for call in (lambda: cache.write(delta), lambda: cache.attend(delta, query), cache.close):
        with pytest.raises(RuntimeError, match="all 1 slots are closed"):
            call()
    cache.reset()
    cache.write(delta)


def test_gradients_are_refused():
    cache = BlockCache(1, 4, D)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="delta requires a gradient"):
        cache.write(torch.zeros(4, D, requires_grad=True))
