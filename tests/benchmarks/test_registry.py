"""The registry: every case once, and found by its name."""

from __future__ import annotations

import pytest

from attnres_ext.benchmarks import contestants, registry
from attnres_ext.benchmarks.inputs import arguments, make_inputs
from attnres_ext.benchmarks.registry import CASES, DEVICES, GRADIENTS, ORIGINS, UnknownCaseError
from tests.benchmarks.shapes import SMALL_CASES


def test_every_case_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_cases_speak_the_known_words() -> None:
    for case in CASES:
        assert case.origin in ORIGINS
        assert {case.suite, case.cuda} <= {"quick", "ops", "all", None}
        assert case.suite or case.cuda
        assert case.gradients in GRADIENTS
        assert set(case.rivals) <= set(contestants.NAMES)
        assert " " not in case.name


def test_every_origin_is_used() -> None:
    assert {case.origin for case in CASES} == set(ORIGINS)


@pytest.mark.parametrize("kind", DEVICES)
def test_suites_contain_the_smaller_ones(kind: str) -> None:
    quick, ops, everything = (
        set(registry.select(suite, device=kind)) for suite in ("quick", "ops", "all")
    )
    assert quick < ops <= everything < set(CASES)


def test_suites_of_models_have_no_operators() -> None:
    assert registry.select("model") == registry.select("decode") == []


def test_runs_that_may_end_early_begin_with_the_headline() -> None:
    cases = registry.most_wanted_first(registry.select("ops", device="cuda"), "cuda")
    quick = registry.select("quick", device="cuda")
    assert cases[: len(quick)] == quick
    assert len(cases) == len(registry.select("ops", device="cuda"))


def test_a_gpu_runs_the_peers_published_table() -> None:
    """Its forward cases without and with the output norm, in sources and tokens."""
    names = {case.name for case in registry.select("ops", device="cuda")}
    for sources, tokens in ((2, 1), (5, 128), (5, 1024), (9, 128), (9, 8192)):
        assert f"depth_attention/N{sources}-M{tokens}-D7168-bf16/none" in names
    for sources, tokens in ((2, 1), (5, 128)):
        assert f"depth_attention/N{sources}-M{tokens}-D7168-bf16/none/norm" in names


def test_every_operator_runs_in_every_suite() -> None:
    expected = {
        "depth_attention",
        "accumulate_depth_attention",
        "inter_block_attention",
        "merge_partial",
    }
    for suite in ("quick", "ops", "all"):
        for device in DEVICES:
            found = registry.operators(registry.select(suite, device=device))
            assert set(found) == expected


@pytest.mark.parametrize("pattern", ["merge_partial", "merge*", "*D2304-bf16/none/norm", "M2048"])
def test_filter_takes_parts_and_patterns(pattern: str) -> None:
    chosen = registry.select("all", pattern)
    assert any(case.operator == "merge_partial" for case in chosen)
    assert all(registry.matches(case, pattern) for case in chosen)


def test_filter_without_match() -> None:
    assert registry.select("quick", "D9") == []


def test_unknown_suite() -> None:
    with pytest.raises(
        UnknownCaseError, match="suite 'slow' is not one of quick, ops, model, decode, all"
    ):
        registry.select("slow")


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_inputs_have_the_shape_that_the_name_says(case: registry.Case) -> None:
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
