"""The registry: every case once, and found by its name."""

from __future__ import annotations

import pytest

from attnres_ext.benchmarks import contestants, registry
from attnres_ext.benchmarks.inputs import arguments, make_inputs
from attnres_ext.benchmarks.registry import CASES, GRADIENTS, ORIGINS, SUITES, UnknownCaseError
from tests.benchmarks.shapes import SMALL_CASES


def test_every_case_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_cases_speak_the_known_words() -> None:
    for case in CASES:
        assert case.origin in ORIGINS
        assert case.suite in SUITES
        assert case.gradients in GRADIENTS
        assert set(case.rivals) <= set(contestants.NAMES)
        assert " " not in case.name


def test_every_origin_is_used() -> None:
    assert {case.origin for case in CASES} == set(ORIGINS)


def test_suites_contain_the_smaller_ones() -> None:
    quick, ops, everything = (set(registry.select(suite)) for suite in SUITES)
    assert quick < ops < everything == set(CASES)


def test_every_operator_runs_in_every_suite() -> None:
    expected = {
        "depth_attention",
        "accumulate_depth_attention",
        "inter_block_attention",
        "merge_partial",
    }
    for suite in SUITES:
        assert set(registry.operators(registry.select(suite))) == expected


@pytest.mark.parametrize("pattern", ["merge_partial", "merge*", "*D2304-bf16/none/norm", "M2048"])
def test_filter_takes_parts_and_patterns(pattern: str) -> None:
    chosen = registry.select("all", pattern)
    assert any(case.operator == "merge_partial" for case in chosen)
    assert all(registry.matches(case, pattern) for case in chosen)


def test_filter_without_match_says_what_names_look_like() -> None:
    with pytest.raises(
        UnknownCaseError, match=r"no case .* 'quick' matches 'D9'.*depth_attention/"
    ):
        registry.select("quick", "D9")


def test_unknown_suite() -> None:
    with pytest.raises(UnknownCaseError, match="suite 'slow' is not one of quick, ops, all"):
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
