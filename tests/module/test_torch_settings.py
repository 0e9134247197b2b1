"""What torch is set to while a forward and its backward run changes no bit, and is left as it
was."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnres_ext import AttentionResiduals
from tests.torch_settings import SETTINGS, state


def run(residual, x, checkpointed):
    """Output and gradients of a small stack."""
    residual.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    reads = residual.start(x)

    def step(site, gain):
        reads.write(torch.tanh(reads.read(site, gain, 1e-5)))

    gain = torch.full((8,), 1.5, dtype=x.dtype, device="cpu")
    for site in range(residual.num_sublayers):
        if checkpointed:
            checkpoint(step, site, gain, use_reentrant=False, preserve_rng_state=False)
        else:
            step(site, gain)
    out = reads.read_output()
    out.sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in residual.parameters())]


def infer(residual, x):
    with torch.no_grad():
        cache = residual.new_cache(x.shape[:-1], dtype=x.dtype, device="cpu")
        reads = residual.start(x, cache=cache)
        for site in range(residual.num_sublayers):
            reads.write(torch.tanh(reads.read(site)))
        return [reads.read_output()]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", ["standard", "block", "full"])
@pytest.mark.parametrize("two_phase", [False, True])
def test_what_torch_is_set_to_changes_nothing(setting, mode, two_phase):
    def make():
        sizes = {"sublayers_per_block": 2} if mode == "block" else {}
        made = AttentionResiduals(8, 6, mode=mode, two_phase=two_phase, device="cpu", **sizes)
        with torch.no_grad():
            for index, parameter in enumerate(made.parameters()):
                parameter.copy_(values[index])
        return made

    values = [torch.randn(8) for _ in range(14)]
    x = torch.randn(3, 5, 8)
    residual = make()
    expected = run(residual, x, False) + run(residual, x, True) + infer(residual, x)
    with SETTINGS[setting]():
        before = state()
        residual = make()
        found = run(residual, x, False) + run(residual, x, True) + infer(residual, x)
        assert state() == before
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("mode", ["standard", "block", "full"])
def test_a_module_made_in_inference_mode_trains_outside_of_it(mode):
    with torch.inference_mode():
        residual = AttentionResiduals(8, 6, mode=mode)
    found = run(residual, torch.randn(3, 5, 8), True)
    assert all(gradient is not None for gradient in found[: 2 + 7 * (mode != "standard")])
