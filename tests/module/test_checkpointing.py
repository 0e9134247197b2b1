"""Activation checkpointing around any stretch of a forward pass: the same gradients, to the bit."""

import weakref
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from tests.module import naive_residual
from tests.module.naive_residual import Toy, gradients, on_device
from tests.module.test_residual import assert_same, embed, toy
from tests.module.test_residual_autograd import every_mode

SITES = 7


def again(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def plainly(function, *args):
    return function(*args)


def read(model, state, site):
    if site == SITES:
        return state.read_output(model.norms[-1], model.norm_eps)
    return state.read(site, model.norms[site], model.norm_eps)


def sites(model, state, first, last):
    """Sublayers ``first`` to ``last - 1`` with their reads and writes."""
    for site in range(first, last):
        state.write(model.sublayer(site, read(model, state, site)))


def by_stretches(lengths, wrap=again, output=plainly):
    """A forward whose stretches of so many sublayers are checkpointed each."""

    def forward(model, embedding):
        state, first = model.residual.start(embedding), 0
        for length in lengths:
            wrap(sites, model, state, first, first + length)
            first += length
        return output(read, model, state, SITES)

    return forward


def sublayers_alone(model, embedding):
    state = model.residual.start(embedding)
    for site in range(SITES):
        state.write(again(model.sublayer, site, read(model, state, site)))
    return read(model, state, SITES)


def write_inside(model, embedding):
    """The read stays outside, the write does not."""
    state = model.residual.start(embedding)
    for site in range(SITES):
        hidden = read(model, state, site)
        again(lambda h, site=site: state.write(model.sublayer(site, h)), hidden)
    return read(model, state, SITES)


def shifted(model, embedding):
    """From one sublayer's function to the next one's read."""
    state = model.residual.start(embedding)

    def step(site, hidden):
        state.write(model.sublayer(site, hidden))
        return read(model, state, site + 1)

    hidden = read(model, state, 0)
    for site in range(SITES):
        hidden = again(step, site, hidden)
    return hidden


def nested(model, embedding):
    state = model.residual.start(embedding)

    def outer(first, last):
        again(sites, model, state, first, first + 1)
        sites(model, state, first + 1, last - 1)
        again(sites, model, state, last - 1, last)

    again(outer, 0, 3)
    again(outer, 3, SITES)
    return again(read, model, state, SITES)


def whole(model, embedding):
    return again(model, embedding)


FORWARDS = {
    "sublayers": sublayers_alone,
    "sites": by_stretches([1] * 7),
    "sites and output": by_stretches([1] * 7, output=again),
    "layers": by_stretches([2, 2, 2, 1]),
    "uneven": by_stretches([1, 4, 2]),
    "all but the ends": by_stretches([7], output=again),
    "write inside": write_inside,
    "shifted": shifted,
    "nested": nested,
    "whole": whole,
}
every_forward = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())


@on_device
@every_mode
@every_forward
def test_gradients_are_the_same_bits(options, forward):
    model = toy(**options)
    expected = gradients(model, embed(4), model)
    assert_same(gradients(model, embed(4), partial(forward, model)), expected, 0)
    with set_checkpoint_early_stop(False):
        assert_same(gradients(model, embed(4), partial(forward, model)), expected, 0)


@on_device
@every_mode
@pytest.mark.parametrize("save", ["nothing", "output"])
@pytest.mark.parametrize("name", ["sites", "uneven"])
def test_whatever_is_saved(options, save, name):
    model = toy(save=save, **options)
    actual = gradients(model, embed(4), partial(FORWARDS[name], model))
    assert_same(actual, gradients(model, embed(4), model), 0)


@on_device
@every_mode
def test_some_stretches_alone(options):
    model = toy(**options)

    def forward(embedding):
        state = model.residual.start(embedding)
        sites(model, state, 0, 2)
        again(sites, model, state, 2, 5)
        sites(model, state, 5, SITES)
        return read(model, state, SITES)

    assert_same(gradients(model, embed(4), forward), gradients(model, embed(4), model), 0)


@on_device
@every_mode
@pytest.mark.parametrize("name", ["sites", "uneven", "shifted"])
def test_low_precision(options, name):
    """Rounded sums are what was read first, not what rounding once more would make of them."""
    model = toy(dtype=torch.bfloat16, **options)
    model.residual.float()
    x = embed(4, dtype=torch.bfloat16)
    assert_same(gradients(model, x, partial(FORWARDS[name], model)), gradients(model, x, model), 0)


@on_device
@every_mode
@pytest.mark.parametrize("name", ["sites", "uneven", "shifted"])
def test_retained_graph_and_some_inputs(options, name):
    model, x = toy(**options), embed(4).requires_grad_()
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    loss = FORWARDS[name](model, x).square().sum()
    for _ in range(2):
        for a, b in zip(
            torch.autograd.grad(loss, inputs, retain_graph=True), expected, strict=True
        ):
            assert torch.equal(a, b)
    for i in range(0, len(inputs), 4):
        (alone,) = torch.autograd.grad(loss, inputs[i], retain_graph=True)
        torch.testing.assert_close(alone, expected[i], rtol=1e-12, atol=1e-12)
    loss.backward()
    assert torch.equal(x.grad, expected[0])


@on_device
@every_mode
def test_two_forwards_before_their_backwards(options):
    model, forward = toy(**options), FORWARDS["uneven"]
    xs = [embed(3, seed=seed).requires_grad_() for seed in (1, 2)]
    sum(forward(model, x).square().sum() for x in xs).backward()
    for x in xs:
        alone = x.detach().clone().requires_grad_()
        forward(model, alone).square().sum().backward()
        assert torch.equal(x.grad, alone.grad)


@on_device
@every_mode
@pytest.mark.parametrize("frozen", ["embedding", "sublayers", "residual", "norms"])
def test_frozen(options, frozen):
    model = toy(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith({"sublayers": "weights"}.get(frozen, frozen)))

    def run(forward):
        model.zero_grad()
        x = embed(4).requires_grad_(frozen != "embedding")
        forward(model, x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    for a, b in zip(run(FORWARDS["uneven"]), run(Toy.__call__), strict=True):
        assert a is None if b is None else torch.equal(a, b)


GIVEN = {
    "arguments": lambda checkpoint, *args: checkpoint(sites, *args),
    "keywords": lambda checkpoint, model, state, first, last: checkpoint(
        sites, model=model, state=state, first=first, last=last
    ),
    "closure": lambda checkpoint, *args: checkpoint(lambda: sites(*args)),
}


@on_device
@every_mode
@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("preserve", [True, False])
def test_randomness_is_repeated(options, give, preserve):
    """Whatever the function is given, and whether or not torch knows of the device's generator: the
    CPU's it can be told to leave alone."""
    model = toy(**options)
    dense = model.sublayer
    model.sublayer = lambda site, x: torch.dropout(dense(site, x), 0.4, True)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve)
    layers = by_stretches([2, 2, 2, 1], wrap=lambda _, *args: give(again, *args))

    def run(forward):
        torch.manual_seed(5)
        found = gradients(model, embed(4), partial(forward, model))
        return found, torch.rand(3, device=naive_residual.device)

    (actual, after), (expected, after_plain) = run(layers), run(Toy.__call__)
    assert_same(actual, expected, 0)
    assert torch.equal(after, after_plain), "the generator goes on where it was"


@on_device
def test_torch_sees_where_a_state_is():
    """It brings back the generators of devices on which it finds a tensor among the arguments."""
    state = toy().residual.start(embed(4).requires_grad_())
    found = []
    same, _ = tree_map(lambda leaf: found.append(leaf) or leaf, (state, 0))
    assert same is state
    leaf, _ = found
    assert leaf.device == embed(4).device


@on_device
@every_mode
def test_autocast(options):
    model, x = toy(dtype=torch.float32, **options), embed(4, dtype=torch.float32)

    def run(forward, x):
        with torch.autocast(naive_residual.device, dtype=torch.bfloat16):
            return forward(model, x)

    assert_same(
        gradients(model, x, partial(run, FORWARDS["layers"])),
        gradients(model, x, partial(run, Toy.__call__)),
        0,
    )


@on_device
@every_mode
def test_hooks_see_the_gradient_of_what_is_written(options):
    model = toy(3, **options)
    seen = []

    def forward(checkpointed, x):
        state = model.residual.start(x)

        def step(site):
            out = model.sublayer(site, state.read(site))
            state.write(out)
            return out

        for site in range(3):
            out = again(step, site) if checkpointed else step(site)
            out.register_hook(lambda gradient: seen.append(gradient.clone()))
        return state.read_output()

    for checkpointed in (False, True):
        gradients(model, embed(4), partial(forward, checkpointed))
    for a, b in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(a, b)


@on_device
@every_mode
@pytest.mark.parametrize("name", ["plain", "layers"])
def test_saved_tensors_go_elsewhere(options, name):
    """Hooks that are no checkpoint's repeat nothing, and may go around checkpoints, which do."""
    model = toy(**options)
    forward = model if name == "plain" else partial(FORWARDS[name], model)
    elsewhere = []

    def pack(tensor):
        elsewhere.append(tensor.clone())
        return len(elsewhere) - 1

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, elsewhere.__getitem__):
            return forward(x)

    assert_same(gradients(model, embed(4), run), gradients(model, embed(4), model), 0)
    assert elsewhere or name == "layers"
    x = embed(4).requires_grad_()
    inputs, loss = [x, *model.parameters()], run(x).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(a, b)


@every_mode
def test_records_count_each_read_once(options):
    model = toy(**options)
    with model.residual.recording() as expected:
        model(embed(4))
    with model.residual.recording() as record:
        gradients(model, embed(4), partial(FORWARDS["layers"], model))
    assert record.weights.keys() == expected.weights.keys()
    for site, weights in expected.weights.items():
        assert torch.equal(record.weights[site], weights)


@every_mode
def test_memory_falls_as_the_backward_pass_goes(options):
    """What was kept to repeat reads dies with their nodes, not with the state."""
    model, x = toy(**options), embed(4).requires_grad_()
    state = model.residual.start(x)
    alive = []

    def sublayer(site, hidden):
        out = model.sublayer(site, hidden)
        out.register_hook(
            lambda _: alive.append(sum(kept() is not None for kept in state._snapshots.values()))
        )
        return out

    for site in range(SITES):
        again(lambda site=site: state.write(sublayer(site, read(model, state, site))))
    read(model, state, SITES).sum().backward()
    assert alive[:SITES] == sorted(alive[:SITES], reverse=True)
    assert alive[0] == SITES
    assert alive[SITES - 1] <= 2
    assert all(kept() is None for kept in state._snapshots.values())


@every_mode
@pytest.mark.parametrize("kept", ["aten::mm", "aten::div", "attnres::", "aten::stack", ""])
def test_selective_policies(options, kept):
    """Some operators' results are kept after all."""
    model = toy(**options)

    def policy(context, operator, *args, **kwargs):
        keeps = operator.name().startswith(kept) and "view" not in operator.name()
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def selectively(function, *args):
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    forward = by_stretches([1, 4, 2], wrap=selectively)
    actual = gradients(model, embed(4), partial(forward, model))
    assert_same(actual, gradients(model, embed(4), model), 0)


@every_mode
@every_forward
def test_the_graph_dies_with_its_result(options, forward):
    model, x = toy(**options), embed(4).requires_grad_()
    graph = []

    class Leaf:
        """Dies with the first sublayer's node."""

    dense = model.sublayer

    def sublayer(site, hidden):
        out = dense(site, hidden)
        if site == 0 and not graph:
            leaf = Leaf()
            graph.append(weakref.ref(leaf))
            out.grad_fn.metadata["leaf"] = leaf
        return out

    model.sublayer = sublayer
    out = forward(model, x)
    if graph[0]() is None:
        pytest.skip("nothing of the first sublayer is in the graph")
    del out
    assert graph[0]() is None, "without the garbage collector's help"


@every_mode
@pytest.mark.parametrize("name", ["sites", "nested"])
def test_the_state_dies_with_the_backward_pass(options, name):
    model, x = toy(**options), embed(4).requires_grad_()
    start, states = model.residual.start, []

    def remember(*args, **kwargs):
        state = start(*args, **kwargs)
        states.append(weakref.ref(state))
        return state

    model.residual.start = remember
    FORWARDS[name](model, x).sum().backward()
    assert states[0]() is None, "without the garbage collector's help"


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def shifted_reentrant(model, embedding):
    state = model.residual.start(embedding)
    hidden = read(model, state, 0)

    def step(hidden):
        state.write(model.sublayer(0, hidden))
        return read(model, state, 1)

    reentrant(step, hidden)


def written_inside(model, embedding):
    state = model.residual.start(embedding)
    hidden = read(model, state, 0)
    reentrant(lambda h: state.write(model.sublayer(0, h)), hidden)


def begun_inside(model, embedding):
    state = reentrant(model.residual.start, embedding)
    read(model, state, 0)


STRETCHES = {
    "reads and writes": by_stretches([2, 5], wrap=reentrant),
    "a write": written_inside,
    "a write and a read": shifted_reentrant,
    "the output": by_stretches([7], wrap=plainly, output=reentrant),
    "the start": begun_inside,
}


@every_mode
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES.keys())
def test_reentrant_checkpoints_are_an_error(options, stretch, frozen):
    """Whatever goes in and out of them inside of the state, whether or not the embedding learns."""
    model = toy(**options)
    with pytest.raises(RuntimeError, match=r"gradients are (off|on), but .*=False"):
        stretch(model, embed(4).requires_grad_(not frozen))


@every_mode
def test_reentrant_checkpoints_of_what_neither_reads_nor_writes(options):
    model = toy(**options)

    def run(function, x):
        return checkpoint(function, x, use_reentrant=True)

    actual = gradients(model, embed(4), lambda x: model(x, run=run))
    assert_same(actual, gradients(model, embed(4), model), 0)
    actual = gradients(model, embed(4), lambda x: run(model, x))
    assert_same(actual, gradients(model, embed(4), model), 0)


def test_reading_twice_is_still_an_error():
    model = toy(sublayers_per_block=3)
    state = model.residual.start(embed(4).requires_grad_())
    again(sites, model, state, 0, 2)
    for call in (partial(read, model, state, 0), partial(again, read, model, state, 1)):
        with pytest.raises(RuntimeError, match=r"site \d was asked for, but site 2 is next"):
            call()
    with pytest.raises(RuntimeError, match="called twice before site 2 was read"):
        state.write(embed(4))
