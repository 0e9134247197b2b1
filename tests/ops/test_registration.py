"""What torch is told about the operators: fakes, autograd, compilation, functorch, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from attnres_ext import ops, reference
from tests.helpers import assert_all_same_bits, assert_same_bits, evaluate
from tests.ops.cases import make_sources, make_weights

TOKENS, HIDDEN = (2, 3), 24


def tensors(count: int, **kwargs: Any) -> list[Tensor]:
    return make_sources(count, (*TOKENS, HIDDEN), **kwargs)


def learnt(values: Any) -> Any:
    """Marks every tensor as requiring a gradient."""
    if isinstance(values, Tensor):
        return values.clone().requires_grad_()
    return [learnt(v) for v in values] if isinstance(values, list) else values


def query_and_gains(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    weights = make_weights(HIDDEN, device=device)
    return weights["query"], weights["key_weight"], weights["out_weight"]


# ---- opcheck


def forward_calls(device: str, grad: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments of each differentiable operator."""
    mark = learnt if grad else lambda value: value
    partial, delta, *blocks = mark(tensors(5, device=device))
    q, k, o = (mark(w) for w in query_and_gains(device))
    rest = (1e-6, 1e-5, 0.5)
    lse = mark(torch.randn(TOKENS, device=device))
    queries, gains = (mark(torch.randn(2, HIDDEN, device=device)) for _ in range(2))
    half = mark([b.detach().bfloat16() for b in blocks])
    return {
        "depth_attention": (blocks, q, k, o, *rest),
        "depth_attention defaults": ([*blocks, half[0]], q),
        "depth_attention_with_stats": (blocks, q, k, o, *rest, True, True, True),
        "depth_attention_with_stats lean": (half, q, None, None, *rest, False, False, False),
        "accumulate_depth_attention": (partial, delta, blocks, q, k, o, *rest),
        "accumulate_depth_attention no blocks": (partial, delta, [], q),
        "accumulate_depth_attention_with_stats": (
            partial, delta, blocks, q, k, o, *rest, True, True,
        ),
        "inter_block_attention": (blocks, queries, gains, 1e-6, 0.5),
        "inter_block_attention_with_stats": (half, queries, None, 1e-6, 0.5),
        "merge_partial": (blocks[0], lse, partial, delta, q, k, o, *rest),
        "merge_partial no delta": (half[0], lse, partial, None, q),
        "merge_partial alone": (blocks[0], lse, None, None, q),
    }  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", forward_calls("cpu", False))
def test_opcheck_forward(device: str, name: str, grad: bool) -> None:
    op = getattr(torch.ops.attnres, name.split()[0]).default
    opcheck(op, forward_calls(device, grad)[name])


def backward_calls(device: str) -> dict[str, tuple[Any, ...]]:
    partial, grad, *blocks = tensors(5, device=device)
    q, k, o = query_and_gains(device)
    rest = (1e-6, 1e-5, 0.5)
    _, _, stats, mix = torch.ops.attnres.depth_attention_with_stats(
        blocks, q, k, o, *rest, False, True, True
    )
    lse = torch.randn(TOKENS, device=device)
    weights = torch.randn(3, *TOKENS, device=device)
    queries, gains = (torch.randn(2, HIDDEN, device=device) for _ in range(2))
    grads = [torch.randn(*TOKENS, HIDDEN, device=device) for _ in range(2)]
    out_grad = torch.randn(2, *TOKENS, HIDDEN, device=device)
    lse_grad = torch.randn(2, *TOKENS, device=device)
    some = [True, False, True]
    depth = (grad, weights, blocks, q, k, o, stats, mix, *rest)
    accumulate = (grad, partial, blocks, partial, q, k, o, None, None, *rest)
    inter = (out_grad, lse_grad, blocks, queries, gains, None, 1e-6, 0.5)
    return {
        "depth_attention_backward": (*depth, [True] * 6),
        "depth_attention_backward some": (
            grad,
            None,
            blocks,
            q,
            None,
            None,
            None,
            None,
            *rest,
            some * 2,
        ),
        "depth_attention_backward_": (*depth, [*some, True, True, True], grads, [True, False]),
        "accumulate_depth_attention_backward": (*accumulate, [True] * 7),
        "accumulate_depth_attention_backward_": (
            *accumulate,
            [*some, *[True] * 4],
            grads,
            [True, False],
        ),
        "inter_block_attention_backward": (*inter, [True] * 5),
        "inter_block_attention_backward_": (*inter, [*some, True, True], grads, [True, False]),
        "merge_partial_backward": (
            grad,
            partial,
            blocks[0],
            lse,
            blocks[1],
            q,
            k,
            o,
            *rest,
            [True] * 6,
        ),
        "merge_partial_backward_": (
            grad,
            partial,
            blocks[0],
            lse,
            blocks[1],
            q,
            k,
            o,
            *rest,
            [True] * 4,
            grads[0],
            torch.randn(TOKENS, device=device),
        ),
        "merge_partial_backward alone": (
            grad,
            None,
            blocks[0],
            lse,
            None,
            q,
            None,
            o,
            *rest,
            [True] * 6,
        ),
    }


@pytest.mark.parametrize("name", backward_calls_names := [
    "depth_attention_backward",
    "depth_attention_backward some",
    "depth_attention_backward_",
    "accumulate_depth_attention_backward",
    "accumulate_depth_attention_backward_",
    "inter_block_attention_backward",
    "inter_block_attention_backward_",
    "merge_partial_backward",
    "merge_partial_backward_",
    "merge_partial_backward alone",
])  # fmt: skip
def test_opcheck_backward(device: str, name: str) -> None:
    calls = backward_calls(device)
    assert list(calls) == backward_calls_names
    opcheck(getattr(torch.ops.attnres, name.split()[0]).default, calls[name])


@pytest.mark.parametrize("name", ["write", "attend", "inter", "merge"])
def test_opcheck_cache(device: str, name: str) -> None:
    slots = torch.randn(4, 6, HIDDEN, device=device)
    rstd = torch.rsqrt(slots.square().mean(-1) + 1e-6)
    delta, state, out = (torch.randn(6, HIDDEN, device=device) for _ in range(3))
    lse = torch.randn(6, device=device)
    q, k, o = query_and_gains(device)
    queries = torch.randn(2, HIDDEN, device=device)
    outs, lses = torch.randn(2, 6, HIDDEN, device=device), torch.randn(2, 6, device=device)
    rest = (1e-6, 1e-5, 0.5)
    calls = {
        "write": (slots, rstd, delta, 2, True, 1e-6),
        "attend": (slots, rstd, delta, 2, True, q, k, o, *rest, out),
        "inter": (slots, rstd, 3, queries, None, 0.5, outs, lses),
        "merge": (slots, rstd, state, lse, delta, 2, False, q, k, o, *rest, out),
    }
    opcheck(getattr(torch.ops.attnres, f"block_cache_{name}").default, calls[name])


def test_schemas_say_what_is_written() -> None:
    """Operators that write end in an underscore or belong to the cache; others write nothing."""
    found = {
        s.name.removeprefix("attnres::"): s
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("attnres::")
    }
    assert len(found) >= 17
    for name, schema in found.items():
        writes = name.endswith("_") or name.startswith("block_cache_")
        assert schema.is_mutable == writes, name


# ---- the public functions


def depth_attention(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    return module.depth_attention(sources, q, k, out_weight=o, return_weights=True)


def depth_attention_lean(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    return module.depth_attention(sources, q, k, out_weight=o, save="nothing")


def accumulate(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    return module.accumulate_depth_attention(
        sources[0], sources[1], sources[2:], q, k, out_weight=o, save="output"
    )


def first_of_a_block(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    return module.accumulate_depth_attention(None, sources[1], sources[2:], q, k, out_weight=o)[0]


def inter_block(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    return module.inter_block_attention(sources, torch.stack([q, o]), torch.stack([k, k]))


def merge(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
    lse = sources[3].sum(-1)
    return module.merge_partial(sources[2], lse, sources[0], sources[1], q, k, out_weight=o)


FUNCTIONS: list[Callable[..., Any]] = [
    depth_attention,
    depth_attention_lean,
    accumulate,
    first_of_a_block,
    inter_block,
    merge,
]
NAMES = [f.__name__ for f in FUNCTIONS]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)


def named_arguments(
    dtype: torch.dtype = torch.float32, device: str = "cpu", tokens: Any = TOKENS
) -> dict[str, Any]:
    q, k, o = query_and_gains(device)
    sources = make_sources(4, (*tokens, HIDDEN), dtype=dtype, device=device)
    return {"sources": sources, "q": q, "k": k, "o": o}


@each_function
def test_gradcheck(function: Any) -> None:
    """Against finite differences, in float64."""
    sources = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weights = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def flat(*values: Tensor) -> Any:
        outputs = function(ops, list(values[:4]), *values[4:])
        return (
            tuple(o for o in outputs if o.requires_grad) if isinstance(outputs, tuple) else outputs
        )

    assert torch.autograd.gradcheck(
        flat, (*sources, *weights), check_undefined_grad=True, nondet_tol=0.0
    )


def compiled(function: Any, backend: str, dynamic: bool | None) -> Any:
    torch._dynamo.reset()

    def call(sources: list[Tensor], q: Tensor, k: Tensor, o: Tensor) -> Any:
        return function(ops, sources, q, k, o)

    graph = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    return lambda module, **arguments: graph(**arguments)


@each_function
def test_compiles_without_graph_breaks(function: Any) -> None:
    """Forward and backward in one graph each, for any number of tokens, with the bits of eager."""
    torch._dynamo.utils.counters.clear()
    graph = compiled(function, "aot_eager", True)
    for tokens in ((2, 3), (4, 5), (7, 4)):
        arguments = named_arguments(tokens=tokens)
        eager, _ = evaluate(function, ops, arguments)
        assert_all_same_bits(evaluate(graph, ops, arguments)[0], eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_with_inductor() -> None:
    """Sites between other operations, forward and backward, through the default backend."""

    def block(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
        hidden, partial = module.accumulate_depth_attention(
            None, torch.tanh(sources[0]), sources[1:], q, k, out_weight=o
        )
        hidden, partial = module.accumulate_depth_attention(
            partial, torch.tanh(hidden), sources[1:], q, k, out_weight=o
        )
        return hidden * 2, partial

    arguments = named_arguments(tokens=(3, 4))
    results, _ = evaluate(compiled(block, "inductor", None), ops, arguments)
    eager, _ = evaluate(block, ops, arguments)
    for name, value in eager.items():
        torch.testing.assert_close(results[name], value)


def test_compiles_the_cache() -> None:
    """In-place operators survive functionalisation."""

    def step(slots: Tensor, rstd: Tensor, delta: Tensor, query: Tensor) -> Tensor:
        out = torch.empty_like(delta)
        torch.ops.attnres.block_cache_attend(
            slots, rstd, delta * 2, 1, True, query, None, None, 1e-6, None, 1.0, out
        )
        return out + slots[1]

    torch._dynamo.reset()
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    slots = torch.randn(3, 6, HIDDEN)
    rstd = torch.rsqrt(slots.square().mean(-1) + 1e-6)
    delta, query = torch.randn(6, HIDDEN), torch.randn(HIDDEN)
    ours, theirs = (slots.clone(), rstd.clone()), (slots.clone(), rstd.clone())
    with torch.no_grad():
        assert_same_bits("out", graph(*ours, delta, query), step(*theirs, delta, query))
    assert_same_bits("slots", ours[0], theirs[0])
    assert_same_bits("rstd", ours[1], theirs[1])


@each_function
def test_meta_tensors(function: Any) -> None:
    """Shapes and dtypes without data: a model can be built and traced on the meta device."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = named_arguments(dtype)
        real = function(ops, **arguments)
        meta = function(
            ops,
            **{
                n: [t.to("meta") for t in v] if isinstance(v, list) else v.to("meta")
                for n, v in arguments.items()
            },
        )
        pairs = zip(real, meta, strict=True) if isinstance(real, tuple) else [(real, meta)]
        for a, b in pairs:
            assert b.device.type == "meta"
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", forward_calls("cpu", False))
def test_one_tensor_without_data_among_others_is_refused(name: str) -> None:
    """It makes every result one, and nobody would know before the first look at a value."""
    op, call = getattr(torch.ops.attnres, name.split()[0]), forward_calls("cpu", False)[name]
    for position, value in enumerate(call):
        changes = []
        if isinstance(value, Tensor):
            changes = [value.to("meta")]
        elif isinstance(value, list):
            changes = [[*value[:i], t.to("meta"), *value[i + 1 :]] for i, t in enumerate(value)]
        for changed in changes:
            with pytest.raises(RuntimeError, match=r": \w+(\[\d\])? is on (meta|cpu), expected"):
                op(*call[:position], changed, *call[position + 1 :])


def right_or_refused(call: Callable[[], Any], expected: Callable[[], Any]) -> None:
    """A clear error or the right number, never a wrong one."""
    try:
        value = call()
    except (RuntimeError, NotImplementedError) as error:
        assert len(str(error)) > 20  # noqa: PT017 (the error is one of two right answers)
        return
    torch.testing.assert_close(value, expected(), rtol=1e-4, atol=1e-5)


@each_function
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("wanted", ["q", "first", "second", "all"])
def test_double_backward(function: Any, wanted: str, mixed: bool) -> None:
    """A gradient penalty is right or refused, also where another path keeps the graph alive."""
    arguments = named_arguments()

    def penalty(module: Any) -> list[Tensor]:
        q = arguments["q"].clone().requires_grad_()
        sources = [s.clone().requires_grad_() for s in arguments["sources"]]
        outputs = function(module, sources, q, arguments["k"], arguments["o"])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        (gradient,) = torch.autograd.grad(
            sum(o.square().sum() for o in outputs), [sources[1]], create_graph=True
        )
        loss = gradient.square().sum()
        if mixed:
            loss = loss + (q.square().sum() + sum(s.square().sum() for s in sources))
        leaves = {"q": [q], "first": [sources[1]], "second": [sources[2]]}
        found = torch.autograd.grad(loss, leaves.get(wanted, [q, *sources]), allow_unused=mixed)
        return [torch.zeros(()) if f is None else f for f in found]

    right_or_refused(lambda: penalty(ops), lambda: penalty(reference))


@each_function
def test_double_backward_says_so(function: Any) -> None:
    arguments = named_arguments()
    sources = [s.clone().requires_grad_() for s in arguments["sources"]]
    outputs = function(ops, sources, arguments["q"], arguments["k"], arguments["o"])
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (gradient,) = torch.autograd.grad(out.square().sum(), [sources[1]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)(second derivative|twice)"):
        gradient.square().sum().backward()


@each_function
def test_vmap(function: Any) -> None:
    arguments = named_arguments()
    batch = torch.randn(3, *TOKENS, HIDDEN)

    def one(module: Any) -> Callable[[Tensor], Tensor]:
        def call(source: Tensor) -> Tensor:
            sources = [source, *arguments["sources"][1:]]
            out = function(module, sources, arguments["q"], arguments["k"], arguments["o"])
            return out[0] if isinstance(out, tuple) else out

        return call

    right_or_refused(
        lambda: torch.func.vmap(one(ops))(batch),
        lambda: torch.stack([one(reference)(b) for b in batch]),
    )


@each_function
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "jvp", "per-sample gradients"])
def test_functorch(function: Any, transform: str) -> None:
    arguments = named_arguments(tokens=(3,))

    def scalar(module: Any) -> Callable[[Tensor], Tensor]:
        def call(q: Tensor) -> Tensor:
            out = function(module, arguments["sources"], q, arguments["k"], arguments["o"])
            return (out[0] if isinstance(out, tuple) else out).square().sum()

        return call

    q = arguments["q"]

    def run(module: Any) -> Any:
        if transform == "jvp":
            return torch.func.jvp(scalar(module), (q,), (torch.ones_like(q),))
        if transform == "per-sample gradients":
            return torch.func.vmap(torch.func.grad(scalar(module)))(torch.stack([q, 2 * q]))
        return getattr(torch.func, transform)(scalar(module))(q)

    right_or_refused(lambda: run(ops), lambda: run(reference))


@pytest.mark.parametrize("name", [n for n in forward_calls("cpu", False) if "stats" not in n])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_transforms_of_operators(name: str, backend: str | None) -> None:
    """As ``torch.ops.attnres`` has them, and in a graph, too."""
    op = getattr(torch.ops.attnres, name.split()[0]).default
    call = list(forward_calls("cpu", False)[name])
    position = next(i for i, a in enumerate(op._schema.arguments) if a.name in ("query", "queries"))

    def loss(query: Tensor) -> Tensor:
        out = op(*call[:position], query, *call[position + 1 :])
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    queries = torch.stack([call[position], -2 * call[position]])
    transformed = torch.func.vmap(torch.func.grad(loss))
    if backend:
        torch._dynamo.reset()
        transformed = torch.compile(transformed, backend=backend, fullgraph=True)
    leaf = learnt(queries)
    (expected,) = torch.autograd.grad(sum(map(loss, leaf)), leaf)
    torch.testing.assert_close(transformed(queries), expected, rtol=1e-4, atol=1e-5)


@each_function
def test_forward_mode(function: Any) -> None:
    """Forward-mode derivatives are right or refused, not dropped."""
    arguments = named_arguments(tokens=(3,))
    tangent = torch.randn_like(arguments["sources"][0])

    def run(module: Any) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            first = torch.autograd.forward_ad.make_dual(arguments["sources"][0], tangent)
            out = function(
                module, [first, *arguments["sources"][1:]], *[arguments[n] for n in "qko"]
            )
            out = out[0] if isinstance(out, tuple) else out
            found = torch.autograd.forward_ad.unpack_dual(out).tangent
            return torch.zeros_like(out) if found is None else found

    if function is first_of_a_block:
        pytest.skip("does not read the first source")
    right_or_refused(lambda: run(ops), lambda: run(reference))


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_dtypes_alone(function: Any, dtype: torch.dtype) -> None:
    """The operators compute in float32 and round once already: autocast casts nothing."""
    arguments = named_arguments(dtype)

    def under_autocast(module: Any, **arguments: Any) -> Any:
        with torch.autocast(
            "cpu", dtype=torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        ):
            return function(module, **arguments)

    if function in (inter_block, merge):
        # What prepares their inputs here is not to be cast either.
        pass
    plain, _ = evaluate(function, ops, arguments)
    cast, _ = evaluate(under_autocast, ops, arguments)
    assert_all_same_bits(plain, cast)


@each_function
def test_activation_checkpointing(function: Any) -> None:
    arguments = named_arguments(torch.bfloat16)

    def checkpointed(module: Any, sources: Any, q: Any, k: Any, o: Any) -> Any:
        return checkpoint(
            lambda *s: function(module, list(s), q, k, o), *sources, use_reentrant=False
        )

    plain, _ = evaluate(function, ops, arguments)
    assert_all_same_bits(plain, evaluate(checkpointed, ops, arguments)[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved(dtype: torch.dtype, norm: bool) -> None:
    """``nothing`` keeps no tensor that is not an input; ``stats`` 8N + 4 bytes a token."""
    sources = [s.requires_grad_() for s in tensors(4, dtype=dtype)]
    weights = make_weights(HIDDEN, norm=norm)
    known = {t.untyped_storage().data_ptr() for t in (*sources, *weights.values())}
    rows = TOKENS[0] * TOKENS[1]
    size = {}
    for save in ("nothing", "stats", "output"):
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.depth_attention(sources, **weights, save=save)
        size[save] = sum(kept.values())
        out.sum().backward()
    assert size["nothing"] == 0
    assert size["stats"] == (8 * 4 + 4) * rows
    assert size["output"] <= size["stats"] + rows * HIDDEN * 4


def test_in_place_change_of_a_source_is_noticed() -> None:
    """Backward reads the sources: writing to one in between is an error, not a wrong gradient."""
    source, other = (t.requires_grad_() for t in tensors(2))
    middle = source * 1
    out = ops.depth_attention([middle, other], query_and_gains()[0])
    with torch.no_grad():
        middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
