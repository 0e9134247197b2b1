"""Attention Residuals as the paper writes them, one softmax over a stack per site; shares no code
with the library."""

from functools import partial

import pytest
import torch
from torch import nn

#: Where models of these tests are made: see the fixture ``on_device``.
device = "cpu"
#: For tests that say something about each kind of device.
on_device = pytest.mark.usefixtures("on_device")


def mix(sources, query, gain, eps):
    values = torch.stack(sources)
    keys = nn.functional.rms_norm(values, values.shape[-1:], gain, eps)
    weights = torch.einsum("d, n...d -> n...", query, keys).softmax(0)
    return torch.einsum("n..., n...d -> ...d", weights, values)


def forward(embedding, sublayers, norms, queries, gains, closing, eps, norm_eps):
    """Fig. 2 a sublayer at a time (Eq. 5 and 6); ``norms`` and the other lists have one entry per
    site. A block is finished at each site in ``closing``."""

    def read(site, sources):
        mixed = mix(sources, queries[site], gains[site], eps)
        return nn.functional.rms_norm(mixed, mixed.shape[-1:], norms[site], norm_eps)

    blocks, partial = [embedding], None
    for site, sublayer in enumerate(sublayers):
        if partial is not None and site in closing:
            blocks, partial = [*blocks, partial], None
        written = sublayer(read(site, blocks if partial is None else [*blocks, partial]))
        partial = written if partial is None else partial + written
    return read(len(sublayers), [*blocks, partial])


def forward_standard(embedding, sublayers, norms, norm_eps):
    hidden = embedding
    for site, sublayer in enumerate(sublayers):
        normed = nn.functional.rms_norm(hidden, hidden.shape[-1:], norms[site], norm_eps)
        hidden = hidden + sublayer(normed)
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], norms[-1], norm_eps)


def sublayer(weight, x):
    """The columns in another order, by a product that autocast narrows, and a nonlinearity."""
    order = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).roll(1, 0)
    return nn.functional.softsign((x @ order) * weight)


class Toy(nn.Module):
    """A model around an ``AttentionResiduals``, and the same model written naively.

    Its sublayers compute the same bits on every processor and in every library: their matrix
    product has one term an element, everything else is an operation of one element that IEEE 754
    rounds. So models of them may be compared bit for bit.
    """

    def __init__(self, residual, norm_eps=1e-5, seed=0):
        super().__init__()
        self.residual = residual
        self.norm_eps = norm_eps
        size, generator = residual.hidden_size, torch.Generator().manual_seed(seed)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.weights = nn.ParameterList(random(size) for _ in range(residual.num_sublayers))
        self.norms = nn.ParameterList(random(size) for _ in range(residual.num_sites))
        with torch.no_grad():
            for parameter in [*residual.queries, *residual.key_weights]:
                parameter.copy_(torch.randn(size, generator=generator))

    def sublayer(self, site, x):
        """What the sublayer of ``site`` makes of what it has read."""
        return sublayer(self.weights[site], x)

    def forward(self, embedding, cache=None, run=None):
        """``run(function, x)`` calls a sublayer; the default just calls it."""
        run = run or (lambda function, x: function(x))
        state = self.residual.start(embedding, cache=cache)
        for site in range(self.residual.num_sublayers):
            hidden = state.read(site, self.norms[site], self.norm_eps)
            # No lambda with a default: torch 2.10 takes graphs of one for those of another.
            state.write(run(partial(self.sublayer, site), hidden))
        return state.read_output(self.norms[-1], self.norm_eps)

    def naive(self, embedding, closing=None):
        residual = self.residual
        closing = closing or range(0, residual.num_sites, residual.sublayers_per_block)
        sublayers = [
            lambda x, site=site: self.sublayer(site, x) for site in range(residual.num_sublayers)
        ]
        if residual.mode == "standard":
            return forward_standard(embedding, sublayers, self.norms, self.norm_eps)
        return forward(
            embedding,
            sublayers,
            self.norms,
            residual.queries,
            residual.key_weights,
            closing,
            residual.eps,
            self.norm_eps,
        )


def gradients(model, embedding, run):
    """Result of ``run()`` and the gradients of a fixed weighted sum of it, by parameter name."""
    model.zero_grad(set_to_none=True)
    embedding = embedding.detach().requires_grad_()
    out = run(embedding)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out.detach(), {"embedding": embedding.grad, **grads}


def assert_as_exact_as_plain_pytorch(actual, naive, expected):
    """Against ``expected``, in float64: half of all rows at most twice as far away as ``naive``'s,
    and one rounding; no row wrong.

    Each is a list of tensors. A model amplifies roundings on its way, in a few rows a
    thousandfold: how two errors compare there is the luck of a processor, and of its rows' median
    it is not. What is wrong and not just rounded is farther off by orders of magnitude.
    """

    def errors(values):
        pairs = zip(values, expected, strict=True)
        return torch.cat([rows(value.double() - e).norm(dim=-1) for value, e in pairs])

    def rows(tensor):
        return tensor.reshape(-1, tensor.shape[-1])

    size = torch.cat([rows(e).norm(dim=-1) for e in expected])
    used = size > 0  # not those of tokens that do not occur
    ours, theirs = errors(actual), errors(naive)
    median, usual = ((error[used] / size[used]).median() for error in (ours, theirs))
    assert median <= 2 * usual + torch.finfo(actual[0].dtype).eps
    assert (ours <= 100 * (theirs + usual * size)).all()
