"""The traffic plan, as Python sees it."""

import pytest

from attnres_ext import _C

X = 100 * 64 * 2


def bytes_moved(operator, direction, accumulate=False, num_sources=5, num_queries=3):
    return _C.bytes_moved(operator, direction, num_sources, num_queries, 100, 64, 2, accumulate)


@pytest.mark.parametrize(
    ("operator", "forward", "backward", "accumulating"),
    [
        ("depth_attention", 6, 11, 16),
        ("accumulate_depth_attention", 9, 14, 19),
        ("inter_block_attention", 8, 13, 18),
        ("merge_partial", 5, 6, 6),
    ],
)
def test_bytes_of_operators(operator, forward, backward, accumulating):
    assert bytes_moved(operator, "forward") == forward * X
    assert bytes_moved(operator, "backward") == backward * X
    assert bytes_moved(operator, "backward", accumulate=True) == accumulating * X


@pytest.mark.parametrize(
    ("operator", "fresh", "adding"),
    [
        ("block_cache_write", 2, 3),
        ("block_cache_attend", 8, 9),
        ("block_cache_inter", 8, 8),
        ("block_cache_merge", 4, 5),
    ],
)
def test_bytes_of_cache_operators(operator, fresh, adding):
    assert bytes_moved(operator, "forward") == fresh * X
    assert bytes_moved(operator, "forward", accumulate=True) == adding * X
    with pytest.raises(ValueError, match="inference operator and has no backward"):
        bytes_moved(operator, "backward")


def test_a_block_is_the_sum_of_its_operators():
    """The plan's totals are the bytes of the calls that the module makes."""
    n, s = 5, 3

    def total(calls):
        return sum(calls) - 2 * X  # a block's first delta is its partial: not added, not written

    plan = _C.plan(n, s, 100, 64, 2, "cuda")
    single = [bytes_moved("accumulate_depth_attention", "forward", num_sources=n)] * s
    assert plan.bytes_single_pass == total(single)
    phases = [bytes_moved("inter_block_attention", "forward", num_sources=n, num_queries=s)]
    phases += [bytes_moved("merge_partial", "forward")] * s
    assert plan.bytes_two_phase == total(phases)

    training = _C.plan(n, s, 100, 64, 2, "cuda", training=True)
    single += [bytes_moved("accumulate_depth_attention", "backward", True, num_sources=n)] * s
    assert training.bytes_single_pass == total(single)
    phases += [bytes_moved("inter_block_attention", "backward", True, n, s)]
    phases += [bytes_moved("merge_partial", "backward")] * s
    assert training.bytes_two_phase == total(phases)


@pytest.mark.parametrize("num_sources", range(1, 12))
@pytest.mark.parametrize("num_queries", [1, 2, 3, 6, 24])
def test_bytes_decide_where_there_are_many_tokens(num_sources, num_queries):
    plan = _C.plan(num_sources, num_queries, 1 << 30, 64, 2, "cuda")
    assert plan.two_phase == (num_sources * (1 - 1 / num_queries) > 2)
    assert plan.two_phase == (plan.bytes_two_phase < plan.bytes_single_pass)


@pytest.mark.parametrize("num_sources", range(1, 12))
@pytest.mark.parametrize("num_queries", [1, 2, 3, 6, 24])
def test_one_choice_serves_forward_and_backward(num_sources, num_queries):
    """A mixture of single pass and two phases moves no fewer bytes than the better of the two."""
    forward = _C.plan(num_sources, num_queries, 1, 64, 2, "cuda")
    both = _C.plan(num_sources, num_queries, 1, 64, 2, "cuda", training=True)
    single = both.bytes_single_pass - forward.bytes_single_pass
    phases = both.bytes_two_phase - forward.bytes_two_phase
    # The backward of two phases needs what phase 1 found: after a single pass it is run for that.
    phase_one = (num_sources + num_queries) * 64 * 2
    best = min(both.bytes_single_pass, both.bytes_two_phase)
    assert forward.bytes_single_pass + phase_one + phases >= best
    assert forward.bytes_two_phase + single >= best


def test_arithmetic_decides_on_a_cpu():
    plan = _C.plan(9, 6, 1 << 30, 64, 2, "cpu")
    assert not plan.two_phase
    assert plan.bytes_two_phase < plan.bytes_single_pass
    assert "arithmetic takes longer" in plan.reason


def test_devices_differ():
    kimi, k3 = (9, 6, 8192, 2304), (8, 24, 8192, 7168)
    a100 = {"capability": 80, "shared_bytes": 163 << 10}
    rtx3090 = {"capability": 86, "shared_bytes": 99 << 10}
    for training in (False, True):
        for shape, device, two_phase in [
            (kimi, {}, True),
            (k3, {}, True),
            (kimi, a100, True),
            (k3, a100, False),
            (kimi, rtx3090, False),
            (k3, rtx3090, False),
        ]:
            plan = _C.plan(*shape, training=training, **device)
            assert plan.two_phase == two_phase
            assert plan.phase_one_resident == two_phase
    assert _C.plan(*kimi).two_phase_from_tokens < _C.plan(*kimi, **a100).two_phase_from_tokens


def test_threshold_is_where_the_choice_changes():
    threshold = _C.plan(9, 6, 1, 2304).two_phase_from_tokens
    assert not _C.plan(9, 6, threshold - 1, 2304).two_phase
    assert _C.plan(9, 6, threshold, 2304).two_phase
    assert _C.plan(1, 6, 1, 2304).two_phase_from_tokens == 2**63 - 1


def test_tiles():
    small, large = _C.plan(9, 6, 8192, 2304), _C.plan(200, 6, 8192, 7168)
    assert small.row_resident
    assert small.tile_tokens * 10 * 2304 * 2 <= 227 * 1024
    assert not large.row_resident
    assert large.tile_tokens == 1


def test_reads_well():
    text = repr(_C.plan(9, 6, 8192, 2304))
    assert text.startswith("Plan(two_phase=True, bytes_single_pass=")
    assert "fewer bytes" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 1), "plan: num_sources is 0, expected at least 1"),
        ((1, 0, 1, 1), "plan: num_queries is 0, expected at least 1"),
        ((1, 1, -1, 1), "plan: num_tokens is -1, expected at least 0"),
        ((1, 1, 1, 0), "plan: hidden is 0, expected at least 1"),
        ((1, 1, 1, 1, 0), "plan: itemsize is 0, expected at least 1"),
        ((1, 1, 1, 1, 2, "tpu"), "plan: device is 'tpu', expected 'cpu' or 'cuda'"),
        ((1, 1, 1, 1, 2, "cuda", False, 0), "plan: capability is 0, expected at least 1"),
        ((1, 1, 1, 1, 2, "cuda", False, 80, 0), "plan: shared_bytes is 0, expected at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.plan(*arguments)


def test_errors_of_bytes_moved():
    with pytest.raises(ValueError, match="unknown operator 'softmax', expected depth_attention"):
        bytes_moved("softmax", "forward")
    with pytest.raises(ValueError, match="direction is 'sideways', expected 'forward' or"):
        bytes_moved("merge_partial", "sideways")


def test_build_facts():
    assert _C.version
    assert _C.compiler.split()[0] in ("gcc", "clang")
    assert _C.cxx_standard >= 202002
    assert isinstance(_C.cuda_archs, tuple)
    assert _C.max_sources >= 256


def test_kernel_configs_are_those_of_the_launchers():
    """tests/simt compares the same shapes with what is launched."""
    rtx5090 = {"capability": 120, "shared_bytes": 99 << 10}
    for arguments, device, config in [
        (("depth_attention", "forward", 9, 7168), {}, "warps=14,columns=256,cluster=2,stages=3"),
        (("depth_attention", "forward", 54, 2304), {}, "warps=9,columns=64,cluster=4,stages=3"),
        (("depth_attention", "forward", 65, 2304), {}, None),
        (("depth_attention", "forward", 9, 7164), {}, None),
        (("depth_attention", "forward", 9, 2304), {"capability": 80}, None),
        (
            ("inter_block_attention", "forward", 9, 2304),
            {"num_queries": 6},
            "inter_block_warps=12,inter_block_columns=192,inter_block_cluster=1,"
            "inter_block_tokens=1,inter_block_stages=3",
        ),
        (
            ("inter_block_attention", "forward", 8, 7168),
            {"num_queries": 24},
            "inter_block_warps=4,inter_block_columns=224,inter_block_cluster=8,"
            "inter_block_tokens=2,inter_block_stages=3",
        ),
        (("inter_block_attention", "forward", 17, 2304), {"num_queries": 6}, None),
        (("merge_partial", "forward", 1, 7168), {"capability": 80}, "warps=7,chunks=4,teams=2"),
        (("merge_partial", "backward", 1, 8192), rtx5090, "warps=16,chunks=2,teams=1"),
        (("merge_partial", "backward", 1, 8200), {}, None),
    ]:
        found = _C.kernel_config(*arguments, **device)
        assert found is None if config is None else (found or "").startswith(config)
    # The backward of float16 with an output norm has no tile.
    of_dtype = {
        dtype: _C.kernel_config("depth_attention", "backward", 9, 2304, dtype, norm=True)
        for dtype in ("bfloat16", "float16", "float32")
    }
    assert [name for name, config in of_dtype.items() if config] == ["bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attend", "forward", 1, 8), "operator is 'attend', expected 'depth_attention'"),
        (("merge_partial", "up", 1, 8), "direction is 'up', expected 'forward' or 'backward'"),
        (("depth_attention", "forward", 0, 8), "got 0 sources of 8 values"),
        (("inter_block_attention", "forward", 1, 8), "got 0 queries, expected at least 1"),
    ],
)
def test_kernel_configs_refuse(arguments, message):
    with pytest.raises(ValueError, match=f"kernel_config: {message}"):
        _C.kernel_config(*arguments)
