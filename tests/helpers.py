"""Numbers agree: how far a result may be from the definition, derived and not picked.

An operator passes when its error against the definition in float64 is at most twice the error of
the same definition in the operator's own dtype, plus one rounding of the result, plus what another
order of summation costs: n products summed in another order walk away by about sqrt(n) roundings of
the compute dtype, and terms that cancel leave a rounding of theirs. Errors are maximum norms over a
tensor. Float64 operators have no wider definition to be measured against; what rounding costs there
is what it costs in float32, scaled by the ratio of the two precisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnres_ext import ops, reference

#: Arguments whose gradient is a sum over all tokens.
WEIGHTS = ("query", "queries", "key_weight", "key_weights", "out_weight", "w_query", "w_norm")

#: Factors near 1 by which a problem is rounded anew, see ``scaled``. One error may be three times
#: another by luck: a result that is over what a few draws allow is held against many.
FEW = (1.01, 0.987)
MANY = tuple(1 + 0.0031 * draw for draw in range(-12, 13) if draw)

Arguments = Mapping[str, Any]
Function = Callable[..., Any]


def leaves_of(arguments: Arguments, dtype: torch.dtype | None, frozen: Iterable[str]) -> Arguments:
    """Detached copies that require gradients; a tensor given twice stays one tensor.

    Strides and storage offsets are kept unless ``dtype`` asks for a cast. ``frozen`` names
    arguments (``"query"``) or elements of list arguments (``"sources[1]"``) that must not require a
    gradient.
    """
    made: dict[int, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copy = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            made[id(tensor)] = copy.requires_grad_(name not in frozen)
        return made[id(tensor)]

    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            result[name] = leaf(name, value)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value):
            result[name] = [leaf(f"{name}[{i}]", v) for i, v in enumerate(value)]
        else:
            result[name] = value
    return result


def evaluate(
    function: Function,
    module: ModuleType,
    arguments: Arguments,
    *,
    dtype: torch.dtype | None = None,
    frozen: Iterable[str] = (),
    grad_dtypes: list[torch.dtype] | None = None,
) -> tuple[dict[str, Tensor | None], list[torch.dtype]]:
    """Calls ``function(module, **arguments)``, differentiates a linear form of its outputs.

    Returns outputs (``"output 0"``, ...) and gradients (``"gradient of query"``, ...) by name, and
    the dtypes of the outputs. The linear form is random and the same for every ``dtype``: it is
    rounded to ``grad_dtypes`` before it is used.
    """
    leaves = leaves_of(arguments, dtype, frozen)
    outputs = function(module, **leaves)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    dtypes = [o.dtype for o in outputs]
    results: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(outputs)}

    generator = torch.Generator().manual_seed(1234)
    forms = []
    for output, grad_dtype in zip(outputs, grad_dtypes or dtypes, strict=True):
        form = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        forms.append(form.to(grad_dtype).to(output.dtype).to(output.device))
    named: dict[str, Tensor] = {}
    for name, value in leaves.items():
        if isinstance(value, list):
            named.update({f"gradient of {name}[{i}]": v for i, v in enumerate(value)})
        elif isinstance(value, Tensor):
            named[f"gradient of {name}"] = value
    named = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    live = [(o, f) for o, f in zip(outputs, forms, strict=True) if o.requires_grad]
    if named and live:
        gradients = torch.autograd.grad(
            [o for o, _ in live], list(named.values()), [f for _, f in live], allow_unused=True
        )
        results.update(zip(named, gradients, strict=True))
    return results, dtypes


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64; 0 for empty tensors."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def magnitude(a: Tensor) -> float:
    return a.double().abs().max().item() if a.numel() else 0.0


def assert_as_good_as(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    compute: torch.dtype = torch.float32,
    error: float = 0.0,
    terms: int = 1,
) -> None:
    """Error of ``actual`` <= 2 x error of ``plain`` + one rounding of the result.

    Args:
        name: what is compared, for the message.
        actual: the operator's result.
        plain: the definition evaluated in the operator's dtypes.
        exact: the definition evaluated in float64.
        compute: the dtype in which the operator computes.
        error: what the definition's error may be elsewhere, see ``check``.
        terms: how many products were summed on the way to an element.
    """
    assert actual.shape == plain.shape, f"{name}: shape {actual.shape}, expected {plain.shape}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    size = magnitude(exact)
    allowed = (
        2 * max(distance(plain, exact), error)
        + torch.finfo(actual.dtype).eps * size
        + torch.finfo(compute).eps * math.sqrt(terms) * size
    )
    found = distance(actual, exact)
    assert found <= allowed, f"{name}: error {found:.3e} > {allowed:.3e} (largest value {size:.3e})"


def check(
    function: Function,
    arguments: Arguments,
    *,
    exact: Callable[[Arguments], Function] | None = None,
    frozen: Iterable[str] = (),
    tokens: int | None = None,
) -> dict[str, Tensor | None]:
    """Holds the operators against their definition: outputs and every gradient.

    Args:
        function: ``function(module, **arguments)`` calls operators of ``module``.
        arguments: tensors, lists of tensors, and anything else, by name.
        exact: ``exact(arguments)`` is what to evaluate in float64 instead of ``function``, when a
            rounding is part of the definition.
        frozen: arguments that require no gradient.
        tokens: rows a weight gradient sums over; by default counted from the first output.

    Returns:
        The operators' results, as ``evaluate`` returns them.
    """
    frozen = tuple(frozen)
    actual, dtypes = evaluate(function, ops, arguments, frozen=frozen)

    def both(arguments: Arguments) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        plain, _ = evaluate(function, reference, arguments, frozen=frozen, grad_dtypes=dtypes)
        wide = exact(arguments) if exact else function
        truth, _ = evaluate(
            wide, reference, arguments, dtype=torch.float64, frozen=frozen, grad_dtypes=dtypes
        )
        return plain, truth

    plain, truth = both(arguments)
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    error = errors(plain, truth)

    def draw(factors: Iterable[float]) -> None:
        """Lets ``error`` be what the definition's are in these draws too."""
        for factor in factors:
            if factor != 1:
                for name, e in errors(*both(scaled(arguments, factor))).items():
                    error[name] = max(error[name], e)
            if compute == torch.float64:
                ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                for name, rough in errors(*both(scaled(arguments, factor, narrow=True))).items():
                    # 1.5 x 2: twice for the operator, once for the float64 definition itself.
                    error[name] = max(error[name], 1.5 * ratio * rough)

    # Gradients are differences of products of an incoming gradient (|4| at most) and a value.
    values = max([1.0, *(magnitude(v) for n, v in flat(arguments).items() if n not in WEIGHTS)])
    cancelled = 4 * torch.finfo(compute).eps * values

    assert actual.keys() == plain.keys()
    first = plain["output 0"]
    hidden = max(first.shape[-1], 1)
    sources = sum(len(v) if isinstance(v, list) else 1 for v in arguments.values())
    rows = tokens if tokens is not None else first.numel() // hidden

    def compare() -> None:
        for name, value in plain.items():
            if value is None:
                assert actual[name] is None, f"{name}: expected None"
                continue
            assert actual[name] is not None, f"{name} is missing"
            terms = hidden
            if name.removeprefix("gradient of ") in WEIGHTS:
                terms *= max(rows, 1) * sources
            assert_as_good_as(
                name,
                actual[name],
                value,
                truth[name],
                compute=compute,
                error=max(error[name], cancelled if name.startswith("gradient") else 0.0),
                terms=terms,
            )

    draw((1.0, *FEW))
    try:
        compare()
    except AssertionError:
        draw(MANY)
        compare()
    return actual


def flat(arguments: Arguments) -> dict[str, Tensor]:
    """Every finite tensor among the arguments, by name; the elements of lists by ``name[i]``."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found.update({f"{name}[{i}]": v for i, v in enumerate(value)})
    return {n: v for n, v in found.items() if isinstance(v, Tensor) and bool(v.isfinite().all())}


def errors(
    plain: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """Error of each result: its own, or the worst of its list, in units of its largest value."""
    own: dict[str, float] = {}
    worst: dict[str, float] = {}
    for name, value in plain.items():
        if value is not None:
            own[name] = distance(value, truth[name])
            size, group = magnitude(truth[name]), name.split("[")[0]
            worst[group] = max(worst.get(group, 0.0), own[name] / size if size > 0 else 0.0)
    return {n: max(e, worst[n.split("[")[0]] * magnitude(truth[n])) for n, e in own.items()}


def scaled(arguments: Arguments, factor: float, *, narrow: bool = False) -> Arguments:
    """The tensors times a factor near 1: the same problem, rounded anew.

    One evaluation of the definition is one draw from the distribution of its errors; a few say how
    large they may be. Identical tensors stay identical. ``narrow`` casts float64 to float32.
    """
    made: dict[int, Tensor] = {}

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                dtype = torch.float32 if narrow and value.dtype == torch.float64 else value.dtype
                made[id(value)] = (value.double() * factor).to(dtype)
            return made[id(value)]
        return [change(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {name: change(value) for name, value in arguments.items()}


def assert_same_bits(name: str, a: Tensor | None, b: Tensor | None) -> None:
    """Equal dtype, shape and bits (NaNs of equal position count as equal)."""
    if a is None or b is None:
        assert a is b, f"{name}: one is None"
        return
    assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{name}: {a.shape} and {b.shape}"
    same = (a == b) | (a.isnan() & b.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {a.numel()} elements differ"


def runs_cuda_kernels(device: str) -> bool:
    """Whether operators on this device run CUDA kernels: on a GPU, or a simulated one."""
    return device == "cuda" or torch.ops.attnres.cpu_instruction_set() == "simulated GPU"


def order_of_sums(dtype: torch.dtype, terms: int) -> float:
    """How far two orders of ``terms`` products may be apart, by the largest sum."""
    return 2 * math.sqrt(terms) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def assert_same_sums(name: str, a: Tensor, b: Tensor, terms: int) -> None:
    """Equal up to the order in which ``terms`` products are summed, and the rounding of a result
    that this order may turn over."""
    assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
    allowed = (torch.finfo(a.dtype).eps + order_of_sums(a.dtype, terms)) * magnitude(b)
    assert distance(a, b) <= allowed, f"{name}: apart by {distance(a, b):.3e} > {allowed:.3e}"


def assert_all_same_bits(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(name, a[name], b[name])


def allocated(call: Callable[[], object]) -> list[int]:
    """Sizes of what PyTorch's CPU allocator gives out while ``call`` runs, inside of operators
    too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
