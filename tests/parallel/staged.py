"""A model that is trained by one process, and the same in stages."""

import copy

import torch
from torch import nn

from attnres_ext import AttentionResiduals
from attnres_ext.suspended import SuspendedPass
from tests.module.naive_residual import sublayer

WIDTH = 16


class Model(nn.Module):
    """Its sublayers compute the same bits everywhere; tokens are looked up, rows repeat."""

    def __init__(self, residual, dtype=torch.float32, frozen=False, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.residual = residual
        self.sites = residual.sites
        self.embedding = random(11, WIDTH).requires_grad_(not frozen)
        self.weights = nn.ParameterDict(
            {str(site): random(WIDTH) for site in range(residual.num_sublayers)}
        )
        self.norms = nn.ParameterDict({str(site): random(WIDTH) for site in self.sites})
        with torch.no_grad():
            for parameter in [*residual.queries, *residual.key_weights]:
                parameter.copy_(torch.randn(WIDTH, generator=generator))
        self.to(dtype)

    def keep(self, stage):
        """The module of a stage."""
        sites = stage.sites
        part = copy.deepcopy(self)
        part.sites = sites
        part.residual.keep_sites(sites)
        if stage.index > 0:
            part.embedding = None
        for site in self.sites:
            if site not in sites:
                del part.norms[str(site)]
                if site < part.residual.num_sublayers:
                    del part.weights[str(site)]
        return part

    def forward(self, x):
        if isinstance(x, SuspendedPass):
            state = self.residual.resume(x)
        else:
            state = self.residual.start(nn.functional.embedding(x, self.embedding))
        for site in self.sites:
            norm = self.norms[str(site)]
            if site == self.residual.num_sublayers:
                return state.read_output(norm, 1e-5)
            state.write(sublayer(self.weights[str(site)], state.read(site, norm, 1e-5)))
        return state.suspend()


def make(num_sublayers, sublayers_per_block, dtype=torch.float32, frozen=False, **options):
    if sublayers_per_block is None:
        options["mode"] = "standard"
    residual = AttentionResiduals(
        WIDTH, num_sublayers, sublayers_per_block=sublayers_per_block, **options
    )
    return Model(residual, dtype=dtype, frozen=frozen)


def batch(num_microbatches, seed=5, length=3):
    """Tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (2 * num_microbatches, length), generator=generator)
    return tokens, torch.randn(2 * num_microbatches, length, WIDTH, generator=generator)


def loss_of(output, target):
    return (output * target.to(output.dtype)).sum()


def train_alone(model, num_microbatches, seed=5):
    """Losses; gradients add up in the parameters."""
    losses = []
    for tokens, target in zip(*(t.split(2) for t in batch(num_microbatches, seed)), strict=True):
        loss = loss_of(model(tokens), target)
        loss.backward()
        losses.append(loss.detach())
    return losses
