"""Forward passes that stop at a site and go on elsewhere."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnres_ext import AttentionResiduals
from attnres_ext.suspended import SuspendedPass
from attnres_ext.torch_internals import at_end_of_backward
from tests.module.naive_residual import Toy, gradients, on_device
from tests.module.test_residual import assert_same, embed, toy

MODES = {
    "standard": {"mode": "standard"},
    "full": {"mode": "full"},
    "single-pass": {"sublayers_per_block": 3, "two_phase": False},
    "two-phase": {"sublayers_per_block": 3, "two_phase": True},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)
# Seven sublayers in blocks of three: sites 0, 3 and 6 close the embedding and two blocks.
CUTS = [
    pytest.param([0], id="before the embedding is read"),
    pytest.param([1], id="after it"),
    pytest.param([4], id="between blocks"),
    pytest.param([5], id="inside of a block"),
    pytest.param([7], id="before the output"),
    pytest.param([1, 2, 3, 4, 5, 6, 7], id="everywhere"),
    pytest.param([3, 5], id="twice"),
    pytest.param([5, 5], id="twice at one site"),
]


def read_and_write(model, state, stop):
    """The sites up to ``stop``; the output, if that is one of them."""
    for site in range(state.site, min(stop, model.residual.num_sublayers)):
        hidden = state.read(site, model.norms[site], model.norm_eps)
        state.write(model.sublayer(site, hidden))
    if stop == model.residual.num_sites:
        return state.read_output(model.norms[-1], model.norm_eps)
    return state.suspend()


def in_pieces(model, cuts, cache=None, detach=True, summed=False):
    """The model's forward, cut; its result goes backward through all pieces."""
    models = model if isinstance(model, list) else [model] * (len(cuts) + 1)

    def forward(embedding):
        state, cut_at = models[0].residual.start(embedding, cache=cache), []
        for model, stop in zip(models, cuts, strict=False):
            suspended = read_and_write(model, state, stop)
            if summed:
                suspended = suspended.summed()
                assert suspended.partial is None
            received = suspended.detach() if detach else suspended
            cut_at.append((suspended, received))
            state = models[len(cut_at)].residual.resume(received, cache=cache)
        out = read_and_write(models[-1], state, models[-1].residual.num_sites)
        return _Backward.apply(out, cut_at) if detach and out.requires_grad else out

    return forward


class _Backward(torch.autograd.Function):
    """Identity; goes backward through the pieces before, when the last one is through."""

    @staticmethod
    def forward(ctx, out, cut_at):
        ctx.cut_at = cut_at
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient):
        def rest():
            for suspended, received in reversed(ctx.cut_at):
                suspended.backward(received.gradients)

        at_end_of_backward(rest)
        return gradient, None


def assert_identical(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@on_device
@every_mode
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
def test_pieces_have_the_gradients_of_one_pass(options, cuts, dtype, summed):
    model = toy(dtype=dtype, **options)
    whole = gradients(model, embed(2, 5, dtype=dtype), model)
    pieces = gradients(model, embed(2, 5, dtype=dtype), in_pieces(model, cuts, summed=summed))
    # Before a block's first site nothing is open, and its phase 1 has not run.
    inside = any(model.residual.has_partial_before(cut) for cut in cuts)
    if options.get("two_phase") and inside:
        # Each piece runs phase 1 of the block that is cut: its gradient is one sum more.
        tolerance = 2e-5 if dtype == torch.float32 else 0.1
        return assert_same(pieces, whole, tolerance)
    return assert_identical(pieces, whole)


@every_mode
def test_a_pass_may_go_on_in_its_own_graph(options):
    model = toy(dtype=torch.bfloat16, **options)
    whole = gradients(model, embed(6, dtype=torch.bfloat16), model)
    attached = in_pieces(model, [4], detach=False)
    assert_identical(gradients(model, embed(6, dtype=torch.bfloat16), attached), whole)


def test_two_phases_cut_inside_of_a_block_are_exact_in_float64():
    model = toy(sublayers_per_block=3, two_phase=True)
    whole = gradients(model, embed(6), model)
    assert_same(gradients(model, embed(6), in_pieces(model, [2, 5])), whole)


def test_dtypes_stay_mixed():
    """A bfloat16 embedding and blocks of float32, as in a pass that is not cut."""
    model = toy(dtype=torch.float32, sublayers_per_block=3)
    pieces = in_pieces(model, [5])
    whole = gradients(model, embed(4), lambda x: model(x.bfloat16()))
    assert_identical(gradients(model, embed(4), lambda x: pieces(x.bfloat16())), whole)


def stage(model, sites):
    part = copy.deepcopy(model)
    part.residual.keep_sites(sites)
    return part


@every_mode
def test_each_piece_keeps_its_own_sites(options):
    """Names stay, so one checkpoint serves them all; gradients are those of the whole."""
    model = toy(dtype=torch.float32, **options)
    whole = gradients(model, embed(6, dtype=torch.float32), model)
    ranges = range(4), range(4, 7), range(7, 8)
    parts = [stage(model, sites) for sites in ranges]
    forward = in_pieces(parts, [4, 7])
    embedding = embed(6, dtype=torch.float32).requires_grad_()
    out = forward(embedding)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    assert torch.equal(embedding.grad, whole[1]["embedding"])
    for part, sites in zip(parts, ranges, strict=True):
        owned = {name: p for name, p in part.named_parameters() if name.startswith("residual.")}
        count = 0 if options.get("mode") == "standard" else len(sites)
        assert len(owned) == 2 * count
        for name, parameter in owned.items():
            assert torch.equal(parameter.grad, whole[1][name]), name
        kept = {name: t for name, t in model.state_dict().items() if name in part.state_dict()}
        part.load_state_dict(kept, strict=True)
        part.residual.reset_parameters()


def test_kept_sites_survive_copies():
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    residual.keep_sites(range(1, 4))
    residual.keep_sites(range(2, 4))
    for other in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
        assert other.sites == range(2, 4)
        assert [name for name, _ in other.named_parameters()] == [
            "queries.2", "queries.3", "key_weights.2", "key_weights.3",
        ]  # fmt: skip
        assert "num_blocks=2, sites 2 to 3\n" in repr(other)


def test_a_frozen_embedding_gets_no_gradient():
    model = toy(dtype=torch.float32, sublayers_per_block=3)
    frozen = embed(4, dtype=torch.float32)
    suspended = read_and_write(model, model.residual.start(frozen), 5)
    received = suspended.detach()
    assert [t.requires_grad for t in received.tensors] == [False, True, True, True]
    out = read_and_write(model, model.residual.resume(received), 8)
    out.sum().backward()
    assert received.gradients[0] is None
    suspended.backward(received.gradients)
    pieces = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(frozen).sum().backward()
    for parameter, gradient in zip(model.parameters(), pieces, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_gradients_stay_their_owners():
    """What the second piece found is not changed by the first."""
    model = toy(dtype=torch.float32, sublayers_per_block=3)
    suspended = read_and_write(model, model.residual.start(embed(4).float().requires_grad_()), 5)
    found = [torch.randn_like(tensor) for tensor in suspended.tensors]
    kept = [gradient.clone() for gradient in found]
    suspended.backward(found)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert not any(tensor._is_view() for tensor in suspended.tensors)


def suspended_at(residual, site, tensors):
    count = residual.num_blocks_before(site)
    partial = tensors[count] if residual.has_partial_before(site) else None
    return SuspendedPass(site, tuple(tensors[:count]), partial, tensors[-1])


@on_device
@pytest.mark.parametrize("cut", [2, 4, 5])
def test_checkpointed_pieces(cut):
    model = toy(dtype=torch.float32, sublayers_per_block=3)
    whole = gradients(model, embed(4, dtype=torch.float32), model)

    def run(embedding):
        def first(embedding):
            return read_and_write(model, model.residual.start(embedding), cut).tensors

        def second(*tensors):
            state = model.residual.resume(at.with_tensors(tensors))
            return read_and_write(model, state, 8)

        tensors = checkpoint(first, embedding, use_reentrant=False)
        at = suspended_at(model.residual, cut, tensors)
        return checkpoint(second, *tensors, use_reentrant=False)

    assert_identical(gradients(model, embed(4, dtype=torch.float32), run), whole)


@on_device
@every_mode
@pytest.mark.parametrize("cut", [2, 4, 5])
def test_checkpointed_layers(options, cut):
    """The checkpointed function begins with a read, and ends with a write."""
    model = toy(dtype=torch.float32, **options)

    def run(embedding, cut):
        state = model.residual.start(embedding)
        for site in range(7):

            def layer(state=state, site=site):
                state.write(model.sublayer(site, state.read(site, model.norms[site])))

            checkpoint(layer, use_reentrant=False)
            if site + 1 == cut:
                state = model.residual.resume(state.suspend())
        return state.read_output(model.norms[-1])

    whole = gradients(model, embed(4, dtype=torch.float32), lambda x: run(x, None))
    pieces = gradients(model, embed(4, dtype=torch.float32), lambda x: run(x, cut))
    assert_same(pieces, whole, 2e-5)


@pytest.mark.parametrize(
    ("mode", "by_layer"),
    [("single-pass", False), ("single-pass", True), ("two-phase", True), ("full", True)],
)
def test_compiled_pieces(mode, by_layer):
    torch.compiler.reset()
    model = toy(dtype=torch.float32, **MODES[mode])
    cut = 5
    whole = gradients(model, embed(4, dtype=torch.float32), model)

    def layer(state, site):
        hidden = state.read(site, model.norms[site], model.norm_eps)
        state.write(model.sublayer(site, hidden))

    step = torch.compile(layer, backend="aot_eager", fullgraph=True) if by_layer else layer

    def piece(state, stop):
        for site in range(state.site, min(stop, 7)):
            step(state, site)
        if stop == 8:
            return state.read_output(model.norms[-1], model.norm_eps)
        return state.suspend()

    def first(embedding):
        return piece(model.residual.start(embedding), cut)

    def second(suspended):
        return piece(model.residual.resume(suspended), 8)

    if not by_layer:
        first, second = (
            torch.compile(function, backend="aot_eager", fullgraph=True)
            for function in (first, second)
        )
    pieces = gradients(model, embed(4, dtype=torch.float32), lambda x: second(first(x)))
    if by_layer and mode != "two-phase":
        assert_identical(pieces, whole)
    else:
        assert_same(pieces, whole, 2e-5)


@on_device
@every_mode
@pytest.mark.parametrize("cuts", [[0], [1], [4], [5, 5, 6], [7]])
@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
@torch.no_grad()
def test_cached_pieces(options, cuts, device, summed):
    model = toy(dtype=torch.float32, **options)
    embedding = embed(3, dtype=torch.float32)
    caches = [model.residual.new_cache(3, dtype=torch.float32, device=device) for _ in range(2)]
    whole = model(embedding, cache=caches[0])
    assert torch.equal(in_pieces(model, cuts, cache=caches[0], summed=summed)(embedding), whole)
    # From one cache to another, and from none to one.
    for start_in in (caches[0], None):
        state = model.residual.start(embedding, cache=start_in)
        suspended = read_and_write(model, state, cuts[0])
        resumed = model.residual.resume(suspended, cache=caches[1])
        torch.testing.assert_close(read_and_write(model, resumed, 8), whole, rtol=2e-6, atol=2e-6)


def test_a_suspended_state_is_over():
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    state = residual.start(torch.randn(3, 8))
    state.write(state.read(0))
    suspended = state.suspend()
    assert suspended.site == 1
    for call in (lambda: state.read(1), lambda: state.write(torch.zeros(3, 8)), state.suspend):
        with pytest.raises(RuntimeError, match="suspended before site 1; the module's resume"):
            call()
    with pytest.raises(RuntimeError, match="nothing was written yet"):
        residual.start(None).suspend()
    resumed = residual.resume(suspended)
    with pytest.raises(RuntimeError, match="site 0 was asked for, but site 1 is next"):
        resumed.read(0)
    for site in range(1, 4):
        resumed.write(resumed.read(site)) if site > 1 else resumed.read(site)
        if site == 1:
            between = resumed.suspend()
            assert between.pending is None
            resumed = residual.resume(between)
            resumed.write(torch.zeros(3, 8))
    resumed.read_output()
    with pytest.raises(RuntimeError, match="the output is read"):
        resumed.suspend()


def test_gradients_go_on_as_they_began():
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    state = residual.start(torch.randn(3, 8))
    state.write(state.read(0))
    with torch.no_grad(), pytest.raises(RuntimeError, match="suspend: gradients are off"):
        state.suspend()


def at(residual, site, **changes):
    tensors = {
        "blocks": tuple(torch.zeros(3, 8) for _ in range(residual.num_blocks_before(site))),
        "partial": torch.zeros(3, 8) if residual.has_partial_before(site) else None,
        "pending": torch.zeros(3, 8),
    }
    return SuspendedPass(site, **{**tensors, **changes})


X = torch.zeros(3, 8)
ERRORS = [
    (ValueError, 1, {"blocks": ()}, "0 finished blocks, expected 1 before site 1"),
    (ValueError, 2, {"partial": None, "pending": None}, "neither partial nor pending, expected a"),
    (ValueError, 3, {"partial": X}, "has an open sum, expected none before site 3"),
    (ValueError, 0, {"pending": None}, "neither partial nor pending, expected the embedding"),
    (ValueError, 1, {"blocks": (torch.zeros(3, 9),)}, r"blocks\[0\] has shape \(3, 9\)"),
    (ValueError, 1, {"pending": torch.zeros(2, 8)}, r"pending has shape \(2, 8\), expected"),
    (ValueError, 1, {"pending": X.long()}, "pending has dtype torch.int64, expected a floating"),
    (ValueError, 1, {"pending": X.to("meta")}, "pending is on meta, expected cpu as blocks"),
    (TypeError, 1, {"pending": [X]}, "pending is a list, expected a tensor"),
]


@pytest.mark.parametrize(("error", "site", "changes", "message"), ERRORS)
def test_what_cannot_be_resumed_says_so(error, site, changes, message):
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    residual.resume(at(residual, site))
    with pytest.raises(error, match=message):
        residual.resume(at(residual, site, **changes))


def test_other_errors_are_sentences():
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    with pytest.raises(TypeError, match="suspended is a Tensor, expected what a state's suspend"):
        residual.resume(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="suspended is at site 5, expected one that this module"):
        residual.resume(at(residual, 5))
    suspended = at(residual, 2)
    with pytest.raises(ValueError, match="2 tensors came, expected 3"):
        suspended.with_tensors(suspended.tensors[:2])
    with pytest.raises(ValueError, match="1 gradients came, expected 3"):
        suspended.backward([None])
    for sites in (range(3, 7), range(-1, 2), range(0, 4, 2)):
        with pytest.raises(ValueError, match="expected sites that follow one another, of 0 to 4"):
            residual.keep_sites(sites)
    with pytest.raises(TypeError, match="sites is a int, expected a range"):
        residual.keep_sites(3)
    residual.keep_sites(range(1, 3))
    with pytest.raises(ValueError, match="at site 4, expected one that this module keeps, 1 to 2"):
        residual.resume(at(residual, 4))
    with pytest.raises(RuntimeError, match="site 0 is none of those that this module keeps, 1 to"):
        residual.start(torch.zeros(3, 8)).read(0)
    residual.keep_sites(range(1, 1))
    with pytest.raises(ValueError, match="of none"):
        residual.keep_sites(range(1, 2))
    residual = AttentionResiduals(8, 4, sublayers_per_block=2)
    cache = AttentionResiduals(8, 2, sublayers_per_block=2).new_cache(3)
    with pytest.raises(ValueError, match="resume: cache has 2 slots, expected at least 3"):
        residual.resume(suspended, cache=cache)
    with pytest.raises(
        RuntimeError, match=r"what is resumed has shape \(3, 8\), expected \(4, 8\)"
    ):
        residual.resume(suspended, cache=residual.new_cache(4))


def test_two_modules_of_a_pass(tmp_path):
    """By way of a file, as between processes."""
    model = toy(dtype=torch.float32, sublayers_per_block=3)
    with torch.no_grad():
        whole = model(embed(4, dtype=torch.float32))
        suspended = read_and_write(model, model.residual.start(embed(4, dtype=torch.float32)), 5)
        torch.save(suspended.tensors, tmp_path / "tensors")
        received = suspended.with_tensors(torch.load(tmp_path / "tensors"))
        other = Toy(AttentionResiduals(12, 7, sublayers_per_block=3))
        other.load_state_dict(model.state_dict())
        assert torch.equal(read_and_write(other, other.residual.resume(received), 8), whole)
