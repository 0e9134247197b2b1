"""AttentionResiduals against the paper's listing."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnres_ext.recording import Record
from attnres_ext.residual import AttentionResiduals
from tests.module import naive_residual
from tests.module.naive_residual import (
    Toy,
    assert_as_exact_as_plain_pytorch,
    gradients,
    on_device,
)

D = 12


def toy(num_sublayers=7, dtype=torch.float64, seed=0, **options):
    residual = AttentionResiduals(D, num_sublayers, **options)
    return Toy(residual, seed=seed).to(naive_residual.device, dtype)


def embed(*shape, dtype=torch.float64, seed=3):
    return torch.randn(
        *shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(naive_residual.device, dtype)


def assert_same(actual, expected, tolerance=1e-11):
    out, grads = actual
    expected_out, expected_grads = expected
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad,
            expected_grads[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


MODES = [
    pytest.param({"mode": "standard"}, id="standard"),
    pytest.param({"mode": "full"}, id="full"),
    pytest.param({"mode": "full", "two_phase": True}, id="full-two-phase"),
    *(
        pytest.param({"sublayers_per_block": size, "two_phase": phases}, id=f"block{size}-{phases}")
        for size in (1, 2, 3, 4, 7, 9)
        for phases in (False, True)
    ),
]


@on_device
@pytest.mark.parametrize("options", MODES)
def test_equals_the_papers_listing_with_gradients(options):
    model = toy(**options)
    expected = gradients(model, embed(2, 3), model.naive)
    # The first site has one source: its weight is 1 whatever the query, so that the true gradient
    # is 0. The naive softmax leaves rounding there; ours is exact.
    actual = gradients(model, embed(2, 3), model)
    if model.residual.mode != "standard":
        assert not actual[1]["residual.queries.0"].any()
        assert not actual[1]["residual.key_weights.0"].any()
    assert_same(actual, expected)


@on_device
@pytest.mark.parametrize("choices", list(itertools.product([False, True], repeat=3)))
def test_every_block_its_own_choice(choices, monkeypatch):
    """Blocks that read in two phases and blocks that do not, in any order."""
    model = toy(sublayers_per_block=3)
    assert model.residual.num_blocks == len(choices)
    monkeypatch.setattr(
        model.residual, "reads_in_two_phases", lambda block, like, training: choices[block - 1]
    )
    assert_same(gradients(model, embed(2, 3), model), gradients(model, embed(2, 3), model.naive))


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("wide", ["embedding", "sublayers"])
def test_dtypes_may_differ(two_phase, wide):
    """Sums have the dtype of a block's first term; everything else is as wide as its terms."""
    model = toy(dtype=torch.float32, sublayers_per_block=3, two_phase=two_phase)
    dense = model.sublayer
    if wide == "sublayers":
        model.sublayer = lambda site, x: dense(site, x.float()).double()
        x = embed(4, dtype=torch.float32)
    else:
        model.sublayer = lambda site, x: dense(site, x.float())
        x = embed(4)
    exact = toy(sublayers_per_block=3)
    out, grads = gradients(model, x, model)
    expected, expected_grads = gradients(exact, x.double(), exact.naive)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        error = (grad.double() - expected_grads[name]).norm()
        assert error <= 1e-4 * expected_grads[name].norm() + 1e-6


@pytest.mark.parametrize("num_sublayers", [1, 2, 3])
@pytest.mark.parametrize("two_phase", [False, True])
def test_few_sublayers(num_sublayers, two_phase):
    model = toy(num_sublayers, sublayers_per_block=2, two_phase=two_phase)
    assert_same(gradients(model, embed(4), model), gradients(model, embed(4), model.naive))


def test_blocks_of_one_are_full():
    block, full = toy(sublayers_per_block=1), toy(mode="full")
    assert_same(gradients(block, embed(5), block), gradients(full, embed(5), full), 0)


def test_one_block_is_the_standard_sum_with_the_embedding_apart():
    model = toy(sublayers_per_block=7)
    with torch.no_grad(), model.residual.recording() as record:
        model(embed(5))
    assert model.residual.num_blocks == 1
    assert all(len(weights) <= 2 for weights in record.weights.values())
    # Read by hand: what a site sees is the embedding and the plain sum of everything written.
    state = model.residual.start(embed(5))
    written = []
    for site in range(7):
        state.read(site)
        written.append(embed(5, seed=site))
        state.write(written[-1])
    hidden = state.read_output()
    weights = record_weights(model.residual, [embed(5), sum(written)])
    expected = weights[0, :, None] * embed(5) + weights[1, :, None] * sum(written)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)


def record_weights(residual, sources):
    values = torch.stack(sources)
    keys = nn.functional.rms_norm(values, (D,), residual.key_weights[-1], residual.eps)
    return (keys @ residual.queries[-1]).softmax(0).detach()


@pytest.mark.parametrize("two_phase", [False, True])
def test_float32_is_as_exact_as_plain_pytorch(two_phase):
    outs, grads = ([], [], []), ([], [], [])
    # A rounding can be amplified by a sublayer further on: several models even that out.
    for seed in range(6):
        exact = toy(sublayers_per_block=3, seed=seed)
        model = toy(sublayers_per_block=3, seed=seed, dtype=torch.float32, two_phase=two_phase)
        x = embed(2, 9, dtype=torch.float32, seed=seed)
        runs = (model, x, model), (model, x, model.naive), (exact, x.double(), exact.naive)
        for i, run in enumerate(runs):
            out, gradient = gradients(*run)
            outs[i].append(out)
            grads[i].extend(gradient.values())
    assert_as_exact_as_plain_pytorch(*outs)
    assert_as_exact_as_plain_pytorch(*grads)


def test_fresh_queries_read_plain_averages():
    residual = AttentionResiduals(D, 6, sublayers_per_block=2)
    with residual.recording() as record:
        state = residual.start(embed(4, dtype=torch.float32))
        for site in range(6):
            state.read(site)
            state.write(embed(4, dtype=torch.float32, seed=site))
        state.read_output()
    assert sorted(record.weights) == list(range(7))
    for site, weights in record.weights.items():
        assert weights.dtype == torch.float32
        count = len(residual.sources_at(site))
        torch.testing.assert_close(weights, torch.full((count,), 1 / count))


@on_device
@pytest.mark.parametrize("options", [{"mode": "full"}, {"sublayers_per_block": 3}])
def test_fresh_model_equals_the_standard_residual(options):
    # Every read is 1/n of the residual stream, and the norm that follows removes the 1/n; eps alone
    # tells them apart.
    fresh, standard = toy(**options), toy(mode="standard")
    fresh.residual.reset_parameters()
    for model in (fresh, standard):
        model.norm_eps = 0.0
    torch.testing.assert_close(fresh(embed(6)), standard(embed(6)), rtol=1e-12, atol=1e-12)


def test_site_zero_is_the_embedding():
    residual = toy(sublayers_per_block=2).residual
    assert torch.equal(residual.start(embed(3, 4)).read(0), embed(3, 4))


@pytest.mark.parametrize("options", MODES)
def test_reads_without_a_norm_return_the_mix(options):
    model = toy(3, **options)
    unit = torch.ones(D, dtype=torch.float64)
    plain, normed = model.residual.start(embed(5)), model.residual.start(embed(5))
    for site in range(3):
        hidden = plain.read(site)
        expected = nn.functional.rms_norm(hidden, (D,), None, 1e-3)
        torch.testing.assert_close(normed.read(site, unit, 1e-3), expected, rtol=1e-12, atol=1e-12)
        for state in (plain, normed):
            state.write(embed(5, seed=site))


def test_a_row_depends_on_its_own_tokens():
    model = toy(sublayers_per_block=3)
    rows = embed(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(rows)[order], model(rows[order]))


@on_device
@pytest.mark.parametrize("two_phase", [False, True])
def test_no_tokens(two_phase):
    model = toy(sublayers_per_block=3, two_phase=two_phase)
    out, grads = gradients(model, embed(0), model)
    assert out.shape == (0, D)
    assert all(not grad.any() for grad in grads.values())


def test_sources_at():
    residual = AttentionResiduals(D, 5, sublayers_per_block=2)
    assert [residual.sources_at(site) for site in range(6)] == [
        ["embedding"],
        ["embedding", "partial"],
        ["embedding", "block 1"],
        ["embedding", "block 1", "partial"],
        ["embedding", "block 1", "block 2"],
        ["embedding", "block 1", "block 2", "block 3"],
    ]
    assert AttentionResiduals(D, 3, mode="standard").sources_at(2) == ["sum"]


@pytest.mark.parametrize("options", MODES)
def test_recorded_weights_match_the_names(options):
    residual = toy(**options).residual
    model = Toy(residual).double()
    with torch.no_grad(), residual.recording() as record:
        model(embed(3))
        model(embed(2))
    assert list(record.weights) == list(range(residual.num_sites))
    for site, weights in record.weights.items():
        assert len(weights) == len(residual.sources_at(site))
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    before = record.weights[3].clone()
    model(embed(3))
    assert torch.equal(record.weights[3], before), "nothing is recorded outside of the with block"


def test_recording_waits_for_no_device():
    """Nothing that is done depends on a value: there are none on the meta device."""
    record = Record()
    for _ in range(2):
        record.add(0, torch.empty(3, 4, device="meta"))


def test_sites_share_out_over_blocks():
    for size in (1, 2, 3, 5, 8):
        residual = AttentionResiduals(D, 7, sublayers_per_block=size)
        sites = [
            s for block in range(1, residual.num_blocks + 1) for s in residual.sites_of_block(block)
        ]
        assert sites == list(range(1, residual.num_sites))


def test_parameters():
    residual = AttentionResiduals(D, 5, sublayers_per_block=2)
    assert residual.num_sites == 6
    assert residual.num_blocks == 3
    assert [q.shape for q in residual.queries] == [(D,)] * 6
    assert all(q.dtype == torch.float32 and not q.any() for q in residual.queries)
    assert all(torch.equal(g, torch.ones(D)) for g in residual.key_weights)
    assert not list(AttentionResiduals(D, 5, mode="standard").parameters())
    assert not AttentionResiduals(D, 5, mode="standard").state_dict()
    assert AttentionResiduals(D, 20).num_blocks == 7, "blocks of ceil(20 / 8)"
    meta = AttentionResiduals(D, 5, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_plan_decides_when_asked():
    residual = AttentionResiduals(64, 18, sublayers_per_block=6)
    few, many = (torch.empty(tokens, 64, device="meta") for tokens in (1, 1 << 20))
    assert not residual.reads_in_two_phases(3, few, training=False)
    assert residual.reads_in_two_phases(3, many, training=False)
    assert not residual.reads_in_two_phases(1, many, training=False), "N(1 - 1/S) is below 2"
    full = AttentionResiduals(64, 6, mode="full")
    assert not full.reads_in_two_phases(6, many, training=True), "a block of one shares nothing"
    cpu = torch.empty(1, 64).expand(1 << 20, 64)
    assert not residual.reads_in_two_phases(3, cpu, training=False), "arithmetic is the limit"


@pytest.mark.parametrize(
    ("capability", "kib_per_multiprocessor", "two_phase"),
    [((8, 0), 164, True), ((8, 6), 100, False), ((9, 0), 228, True), ((12, 0), 100, True)],
)
def test_plan_knows_the_device(monkeypatch, capability, kib_per_multiprocessor, two_phase):
    major, minor = capability
    properties = SimpleNamespace(
        major=major, minor=minor, shared_memory_per_multiprocessor=kib_per_multiprocessor << 10
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    # Not one that is there: answers are kept.
    device = torch.device("cuda", 10 * major + minor)
    tensor = SimpleNamespace(device=device, element_size=lambda: 2, numel=lambda: 8192 * 2304)
    residual = AttentionResiduals(2304, 54, sublayers_per_block=6, device="meta")
    for training in (False, True):
        assert residual.reads_in_two_phases(9, tensor, training) == two_phase
