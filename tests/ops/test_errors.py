"""Bad input: a sentence that names operator, argument, what came and what was wanted.

And nothing is written.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import attnres_ext
from attnres_ext import ops

D = 24
# What a tensor or a number is not, and what is no tensor at all.
ERRORS = (RuntimeError, TypeError)


def t(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(shape, **kwargs)


def assert_says(call: Any, *words: str) -> None:
    with pytest.raises(ERRORS) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


# What is wrong with one argument of every operator that reads a query and gains: changes, words of
# the message.
WEIGHT_ERRORS = [
    pytest.param({"query": t(D + 1)}, ("query", f"[{D + 1}]", f"[{D}]"), id="query-size"),
    pytest.param({"query": t(2, D)}, ("query", f"[2, {D}]"), id="query-rows"),
    pytest.param({"query": t(1, 1, D)}, ("query", f"[1, 1, {D}]"), id="query-rank"),
    pytest.param({"query": t()}, ("query", "[]"), id="query-scalar"),
    pytest.param({"query": integers(D)}, ("query", "dtype", "float32"), id="query-dtype"),
    pytest.param(
        {"key_weight": t(D - 1)}, ("key_weight", f"[{D - 1}]", f"[{D}]"), id="key_weight-size"
    ),
    pytest.param(
        {"key_weight": t(1, D)}, ("key_weight", f"[1, {D}]", f"[{D}]"), id="key_weight-rank"
    ),
    pytest.param({"key_weight": integers(D)}, ("key_weight", "dtype"), id="key_weight-dtype"),
    pytest.param({"out_weight": t(1)}, ("out_weight", "[1]", f"[{D}]"), id="out_weight-size"),
    pytest.param({"out_weight": integers(D)}, ("out_weight", "dtype"), id="out_weight-dtype"),
    pytest.param({"eps": -1e-6}, ("eps", "-1e-06", "at least 0"), id="eps"),
    pytest.param({"eps": float("nan")}, ("eps", "nan", "at least 0"), id="eps-nan"),
    pytest.param({"eps": float("inf")}, ("eps", "inf", "a finite number"), id="eps-inf"),
    pytest.param({"out_eps": -1.0}, ("out_eps", "-1", "at least 0"), id="out_eps"),
    pytest.param({"scale": float("nan")}, ("scale", "nan", "a finite number"), id="scale-nan"),
    pytest.param({"scale": float("-inf")}, ("scale", "inf", "a finite number"), id="scale-inf"),
]

READERS = {
    "depth_attention": lambda **o: ops.depth_attention([t(3, D), t(3, D)], **o),
    "accumulate_depth_attention": lambda **o: ops.accumulate_depth_attention(
        t(3, D), t(3, D), [t(3, D)], **o
    ),
    "merge_partial": lambda **o: ops.merge_partial(t(3, D), t(3), t(3, D), t(3, D), **o),
}


@pytest.mark.parametrize(("change", "words"), WEIGHT_ERRORS)
@pytest.mark.parametrize("name", READERS)
def test_weights(name: str, change: dict[str, Any], words: tuple[str, ...]) -> None:
    arguments = {"query": t(D), "key_weight": t(D), "out_weight": t(D), **change}
    assert_says(lambda: READERS[name](**arguments), name, *words)


def named(name: str, tensors: list[Any]) -> Any:
    """The operator ``name`` on a list of sources, with everything else in order."""
    if name == "depth_attention":
        return lambda: ops.depth_attention(tensors, t(D))
    if name == "accumulate_depth_attention":
        return lambda: ops.accumulate_depth_attention(t(3, D), t(3, D), tensors, t(D))
    return lambda: ops.inter_block_attention(tensors, t(2, D))


LISTS = {
    "depth_attention": "sources",
    "accumulate_depth_attention": "blocks",
    "inter_block_attention": "blocks",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (t(4, D), (f"[4, {D}]", f"[3, {D}]")),
        (t(3, D + 1), (f"[3, {D + 1}]", f"[3, {D}]")),
        (t(1, 3, D), (f"[1, 3, {D}]", f"[3, {D}]")),
        (t(1, D), (f"[1, {D}]", f"[3, {D}]")),
        (integers(3, D), ("dtype", "float32")),
        (torch.zeros(3, D, dtype=torch.complex64), ("dtype", "float32")),
        (torch.zeros(3, D, dtype=torch.float8_e4m3fn), ("dtype", "float32")),
        (torch.zeros(3, D, dtype=torch.bool), ("dtype", "float32")),
    ],
    ids=["tokens", "hidden", "rank", "broadcast", "int", "complex", "float8", "bool"],
)
def test_lists(name: str, bad: torch.Tensor, words: tuple[str, ...]) -> None:
    assert_says(named(name, [t(3, D), bad, t(3, D)]), name, f"{LISTS[name]}[1]", *words)


@pytest.mark.parametrize("name", ["depth_attention", "inter_block_attention"])
def test_empty_lists(name: str) -> None:
    assert_says(named(name, []), name, LISTS[name], "empty", "at least 1")


@pytest.mark.parametrize("name", LISTS)
def test_too_many_sources(name: str) -> None:
    """256 sources are taken, and the message about more names the limit."""
    limit = (
        255 if name == "accumulate_depth_attention" else 256
    )  # the new partial is the last source
    named(name, [t(3, D)] * limit)()
    assert_says(named(name, [t(3, D)] * (limit + 1)), name, LISTS[name], str(limit))


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_not_a_list_of_tensors(name: str, recording: bool) -> None:
    first = t(3, D).requires_grad_(recording)
    for bad in ([first, None], [first, 3.0]):
        assert_says(named(name, bad), name, LISTS[name])
    assert_says(named(name, 3.0), f"{name}: {LISTS[name]} is a float, expected tensors")
    assert_says(named(name, None), f"{name}: {LISTS[name]} is None, expected tensors")


X = t(3, D)
MISSING = {
    "depth_attention": ([X], None),
    "accumulate_depth_attention": (X, X, [X], None),
    "accumulate_depth_attention ": (X, None, [X], t(D)),
    "inter_block_attention": ([X], None),
    "merge_partial": (None, t(3), X, X, t(D)),
    "merge_partial ": (X, None, X, X, t(D)),
    "merge_partial  ": (X, t(3), X, X, None),
}


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name: str, recording: bool) -> None:
    call = inspect.signature(getattr(ops, name.strip())).bind(*MISSING[name]).arguments
    (missing,) = (key for key, value in call.items() if value is None)
    given = {
        key: [X.clone().requires_grad_(recording)] if isinstance(value, list) else value
        for key, value in call.items()
    }
    assert_says(lambda: getattr(ops, name.strip())(**given), f"{missing} is None, expected")


def test_what_is_no_tensor_is_named() -> None:
    assert_says(
        lambda: ops.depth_attention([X], X[0], [1.0] * D),
        "depth_attention: key_weight is a list, expected a tensor",
    )
    assert_says(
        lambda: ops.merge_partial(X, t(3), X, X, t(D), out_weight=1.0),
        "merge_partial: out_weight is a float, expected a tensor",
    )
    assert_says(
        lambda: ops.inter_block_attention([X, 2.0], t(2, D)),
        "inter_block_attention: blocks[1] is a float, expected a tensor",
    )


@pytest.mark.parametrize("shape", [(), (3, 0), (0,)])
def test_no_hidden_size(shape: tuple[int, ...]) -> None:
    assert_says(
        lambda: ops.depth_attention([t(*shape)], t(shape[-1] if shape else 1)),
        "depth_attention",
        "sources[0]",
        "at least 1",
    )


@pytest.mark.parametrize("save", ["everything", "", None, 1])
def test_save(save: Any) -> None:
    for call in (
        lambda: ops.depth_attention([t(3, D).requires_grad_()], t(D), save=save),
        lambda: ops.accumulate_depth_attention(
            t(3, D).requires_grad_(), t(3, D), [t(3, D)], t(D), save=save
        ),
    ):
        assert_says(call, "save", repr(save), "nothing", "stats", "output")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": t(4, D)}, ("delta", f"[4, {D}]", f"[3, {D}]")),
        ({"partial": t(3, D + 1)}, (f"[3, {D + 1}]", f"[3, {D}]")),
        ({"delta": integers(3, D)}, ("delta", "dtype")),
        ({"partial": integers(3, D)}, ("partial", "dtype")),
        ({"delta": t(3, 1)}, ("delta", "[3, 1]", f"[3, {D}]")),
    ],
)
def test_accumulate(change: dict[str, Any], words: tuple[str, ...]) -> None:
    arguments = {"partial": t(3, D), "delta": t(3, D), "blocks": [t(3, D)], "query": t(D), **change}
    assert_says(
        lambda: ops.accumulate_depth_attention(**arguments), "accumulate_depth_attention", *words
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": t(D)}, ("queries", f"[{D}]")),
        ({"queries": t(2, D + 1)}, ("queries", f"[2, {D + 1}]")),
        ({"queries": t(0, D)}, ("queries", f"[0, {D}]")),
        ({"queries": integers(2, D)}, ("queries", "dtype")),
        ({"key_weights": t(3, D)}, ("key_weights", f"[3, {D}]", f"[2, {D}]")),
        ({"key_weights": t(D)}, ("key_weights", f"[{D}]", "expected [")),
        ({"key_weights": integers(2, D)}, ("key_weights", "dtype")),
        ({"eps": -1.0}, ("eps", "-1")),
    ],
)
def test_inter_block(change: dict[str, Any], words: tuple[str, ...]) -> None:
    arguments = {"blocks": [t(3, D)], "queries": t(2, D), "key_weights": t(2, D), **change}
    assert_says(lambda: ops.inter_block_attention(**arguments), "inter_block_attention", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lse": t(4)}, ("lse", "[4]", "[3]")),
        ({"lse": t(3, 1)}, ("lse", "[3, 1]", "[3]")),
        ({"lse": integers(3)}, ("lse", "dtype")),
        ({"out": integers(3, D)}, ("out", "dtype")),
        ({"partial": t(4, D)}, ("partial", f"[4, {D}]", f"[3, {D}]")),
        ({"delta": t(3, D + 1)}, ("delta", f"[3, {D + 1}]", f"[3, {D}]")),
        ({"delta": integers(3, D)}, ("delta", "dtype")),
    ],
)
def test_merge(change: dict[str, Any], words: tuple[str, ...]) -> None:
    arguments = {
        "out": t(3, D),
        "lse": t(3),
        "partial": t(3, D),
        "delta": t(3, D),
        "query": t(D),
        **change,
    }
    assert_says(lambda: ops.merge_partial(**arguments), "merge_partial", *words)


@pytest.mark.cuda
def test_devices() -> None:
    away = t(3, D, device="cuda")
    assert_says(lambda: ops.depth_attention([t(3, D), away], t(D)), "sources[1]", "cuda", "cpu")
    assert_says(lambda: ops.depth_attention([away, away], t(D)), "query", "cpu", "cuda")


def test_public_names() -> None:
    """The functions are those of the package."""
    for name in (
        "depth_attention",
        "accumulate_depth_attention",
        "inter_block_attention",
        "merge_partial",
    ):
        assert getattr(attnres_ext, name) is getattr(ops, name)


# ---- the operators themselves: what only torch.ops callers can get wrong


def backward_arguments() -> dict[str, Any]:
    sources = [t(3, D), t(3, D)]
    return {
        "grad_out": t(3, D),
        "grad_weights": None,
        "sources": sources,
        "query": t(D),
        "key_weight": t(D),
        "out_weight": t(D),
        "stats": None,
        "mix": None,
        "eps": 1e-6,
        "out_eps": None,
        "scale": 1.0,
        "needs": [True] * 5,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grad_out": t(4, D)}, ("grad_out", f"[4, {D}]", f"[3, {D}]")),
        ({"grad_out": integers(3, D)}, ("grad_out", "dtype")),
        ({"grad_weights": t(3, 2)}, ("grad_weights", "[3, 2]", "[2, 3]")),
        ({"stats": t(4, 3)}, ("stats", "[4, 3]", "[5, 3]")),
        ({"stats": integers(5, 3)}, ("stats", "Long", "float32")),
        ({"mix": t(2, D)}, ("mix", f"[2, {D}]", f"[3, {D}]")),
        ({"needs": [True] * 4}, ("needs", "4", "5")),
        ({"query": t(D + 1)}, ("query", f"[{D + 1}]")),
    ],
)
def test_backward(change: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_says(
        lambda: torch.ops.attnres.depth_attention_backward(**{**backward_arguments(), **change}),
        "depth_attention",
        *words,
    )


def in_place_arguments() -> dict[str, Any]:
    return {
        **backward_arguments(),
        "grad_sources": [t(3, D), t(3, D)],
        "accumulate": [True, True],
    }


def strided() -> torch.Tensor:
    return t(3, 2 * D)[:, ::2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grad_sources": [t(3, D)]}, ("grad_sources", "1", "2")),
        ({"accumulate": [True]}, ("accumulate", "1", "2")),
        ({"grad_sources": [t(3, D), t(4, D)]}, ("grad_sources[1]", f"[4, {D}]", f"[3, {D}]")),
        ({"grad_sources": [t(3, D), integers(3, D)]}, ("grad_sources[1]", "dtype")),
        ({"grad_sources": [t(3, D), strided()]}, ("grad_sources[1]", "contiguous")),
        ({"grad_sources": [t(3, D), t(1, D).expand(3, D)]}, ("grad_sources[1]",)),
    ],
)
def test_in_place_backward(change: dict[str, Any], words: tuple[str, ...]) -> None:
    arguments = {**in_place_arguments(), **change}
    before = [g.clone() for g in arguments["grad_sources"]]
    assert_says(
        lambda: torch.ops.attnres.depth_attention_backward_(**arguments), "depth_attention", *words
    )
    for gradient, copy in zip(arguments["grad_sources"], before, strict=True):
        assert torch.equal(gradient, copy)


@pytest.mark.parametrize("shared", ["sources", "grad_out", "grad_sources"])
def test_in_place_backward_overlap(shared: str) -> None:
    """A gradient may not share memory with anything that is read, or with another gradient."""
    memory = t(4, D)
    arguments = in_place_arguments()
    arguments["grad_sources"][1] = memory[:3]
    if shared == "grad_out":
        arguments["grad_out"] = memory[1:]
    else:
        arguments[shared][0] = memory[1:]
    before = memory.clone()
    assert_says(
        lambda: torch.ops.attnres.depth_attention_backward_(**arguments),
        "depth_attention",
        "grad_sources",
        "shares memory",
    )
    assert torch.equal(memory, before)


def test_a_message_is_a_sentence_and_nothing_else() -> None:
    """No file, function or line of the library in front of it."""
    with pytest.raises(RuntimeError) as caught:
        ops.depth_attention([t(3, D), t(3, D + 1)], t(D))
    wanted = (
        f"depth_attention: sources[1] has shape [3, {D + 1}], expected [3, {D}] like sources[0]"
    )
    assert str(caught.value) == wanted
