"""The registries: every case once, found by its name, with inputs and bytes as the name says."""

from __future__ import annotations

import pytest

from attnres_ext.benchmarks import baselines, model_registry, registry
from attnres_ext.benchmarks.inputs import arguments, make_inputs
from attnres_ext.benchmarks.model_stack import configuration
from attnres_ext.benchmarks.registry import CASES, DEVICES, GRADIENTS, Case, UnknownCaseError
from attnres_ext.benchmarks.traffic import bytes_moved, standard_bytes_moved
from tests.benchmarks.shapes import SMALL_CASES


def test_every_case_once_and_in_the_known_words() -> None:
    everything = [*CASES, *model_registry.CASES]
    assert len({case.name for case in everything}) == len(everything)
    assert not any(" " in case.name for case in everything)
    assert {case.origin for case in CASES} == set(registry.ORIGINS)
    assert {case.origin for case in model_registry.CASES} == set(model_registry.ORIGINS)
    for case in CASES:
        assert {case.suite, case.cuda} <= {"quick", "ops", "all", None}
        assert case.suite or case.cuda
        assert case.gradients in GRADIENTS
        assert set(case.baselines) <= set(baselines.NAMES)
    for case in model_registry.CASES:
        configuration(case).validate()


@pytest.mark.parametrize("kind", DEVICES)
def test_suites_contain_the_smaller_ones_and_every_operator(kind: str) -> None:
    suites = [set(registry.select(suite, device=kind)) for suite in ("quick", "ops", "all")]
    assert suites[0] < suites[1] <= suites[2] < set(CASES)
    for suite in suites:
        assert len({case.operator for case in suite}) == 4
    assert registry.select("model") == registry.select("decode") == []
    training, decoding = (model_registry.select(suite, kind) for suite in ("model", "decode"))
    assert {case.work for case in training} == {"train"}
    assert {case.work for case in decoding} == {"prefill", "decode", "reads"}
    assert model_registry.select("ops", kind) == []


def test_runs_that_may_end_early_begin_with_the_headline_and_with_what_is_cheap() -> None:
    quick, ops = (registry.select(suite, device="cuda") for suite in ("quick", "ops"))
    cases = registry.most_wanted_first(ops, "cuda")
    assert cases[: len(quick)] == quick
    assert len(cases) == len(ops)
    stacks = model_registry.cheapest_first(model_registry.select("all", "cuda"))
    assert stacks[0].work == "decode"
    assert (stacks[-1].work, stacks[-1].layers) == ("train", 24)


def test_a_gpu_runs_the_peers_published_table() -> None:
    """Its forward cases without and with the output norm, in sources and tokens."""
    names = {case.name for case in registry.select("ops", device="cuda")}
    for sources, tokens in ((2, 1), (5, 128), (5, 1024), (9, 128), (9, 8192)):
        assert f"depth_attention/N{sources}-M{tokens}-D7168-bf16/none" in names
    for sources, tokens in ((2, 1), (5, 128)):
        assert f"depth_attention/N{sources}-M{tokens}-D7168-bf16/none/norm" in names


@pytest.mark.parametrize("pattern", ["merge_partial", "merge*", "*D2304-bf16/none/norm", "M2048"])
def test_filter_takes_parts_and_patterns(pattern: str) -> None:
    chosen = registry.select("all", pattern)
    assert any(case.operator == "merge_partial" for case in chosen)
    assert all(registry.matches(case, pattern) for case in chosen)
    assert registry.select("quick", "D9") == []
    for select in (registry.select, lambda suite: model_registry.select(suite, "cpu")):
        with pytest.raises(UnknownCaseError, match="suite 'slow' is not one of quick, ops, model"):
            select("slow")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_points_of_an_axis_differ_in_nothing_else(kind: str) -> None:
    fields = {
        "layers": {"layers"},
        "blocks": {"sublayers_per_block"},
        "tokens": {"tokens", "batch"},
        "hidden": {"hidden", "intermediate", "heads"},
    }
    everything = model_registry.select("all", kind)
    assert {axis for case in everything if case.work == "train" for axis in case.scaling} == {
        *fields
    }
    for work in ("train", "prefill", "decode", "reads"):
        for axis, free in fields.items():
            points = [case for case in everything if case.work == work and axis in case.scaling]
            assert len(points) != 1
            fixed = {
                tuple(v for n, v in vars(case).items() if n not in {*free, "scaling"})
                for case in points
            }
            assert len(fixed) <= 1


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_inputs_have_the_shape_that_the_name_says(case: Case) -> None:
    inputs = make_inputs(case)
    leaves = inputs.leaves()
    assert len(inputs.sources) == (0 if case.operator == "merge_partial" else case.sources)
    for name, leaf in leaves.items():
        if name.startswith("sources") or name in ("partial", "delta", "out"):
            assert leaf.shape == (case.tokens, case.hidden)
            assert str(leaf.dtype) == f"torch.{case.dtype}"
        assert leaf.requires_grad == (case.gradients != "none")
    assert inputs.sources == [] or inputs.sources[0].is_contiguous() == (case.layout != "padded")
    # Blocks and weights meet gradients that others left; what a single site reads does not.
    with_grad = {name for name, leaf in leaves.items() if leaf.grad is not None}
    shared = {n for n in leaves if n.startswith(("sources", "query", "key_weight", "out_weight"))}
    assert with_grad == (shared if case.gradients == "accumulate" else set())
    arguments(case, inputs)


@pytest.mark.parametrize(
    ("operator", "sources", "gradients", "tensors"),
    [
        ("depth_attention", 9, "none", 10),
        ("depth_attention", 9, "fresh", 29),
        ("depth_attention", 9, "accumulate", 38),
        ("accumulate_depth_attention", 8, "none", 12),
        ("accumulate_depth_attention", 8, "accumulate", 12 + 28),
        ("inter_block_attention", 9, "fresh", 15 + 24),
        ("merge_partial", 2, "fresh", 5 + 6),
    ],
)
def test_bytes_are_those_of_the_operators_table(
    operator: str, sources: int, gradients: str, tensors: int
) -> None:
    queries = 6 if operator == "inter_block_attention" else 1
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        case = Case(operator, sources, 100, 64, dtype, queries=queries, gradients=gradients)
        assert bytes_moved(case) == tensors * 100 * 64 * itemsize
    if operator == "merge_partial":
        assert standard_bytes_moved(case) == 8 * 100 * 64 * 4
