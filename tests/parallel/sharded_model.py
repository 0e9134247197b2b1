"""A model whose sublayers mix tokens and are split over ranks, whole and in shards."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnres_ext import AttentionResiduals

VOCABULARY, HIDDEN, INNER, SUBLAYERS = 11, 12, 8, 5


class Mixer(nn.Module):
    """A mean over all tokens before, then a feed-forward layer of ``INNER`` channels.

    A part of it has some of the channels, and returns its addend of the output.
    """

    def __init__(self, inner, dtype):
        super().__init__()
        self.up = nn.Linear(HIDDEN, inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, HIDDEN, bias=False, dtype=dtype)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return self.down(F.gelu(self.up(x.cumsum(1) / count)))


class Model(nn.Module):
    """``parts`` is over how many ranks the sublayers' channels are split."""

    def __init__(self, parts=1, dtype=torch.float64, **options):
        super().__init__()
        options = {"mode": "block", "sublayers_per_block": 2, "eps": 1e-5, **options}
        self.residual = AttentionResiduals(HIDDEN, SUBLAYERS, **options)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype)
        self.sublayers = nn.ModuleList(Mixer(INNER // parts, dtype) for _ in range(SUBLAYERS))
        self.norms = nn.ModuleList(
            nn.RMSNorm(HIDDEN, eps=1e-6, dtype=dtype) for _ in range(SUBLAYERS + 1)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)

    def forward(self, state, checkpointing=False):
        for site in range(SUBLAYERS):
            if checkpointing:
                checkpoint(self.layer, state, site, use_reentrant=False)
            else:
                self.layer(state, site)
        return state.read_output(self.norms[-1].weight, self.norms[-1].eps)

    def layer(self, state, site):
        norm = self.norms[site]
        state.write(self.sublayers[site](state.read(site, norm.weight, norm.eps)))

    def loss(self, hidden, targets):
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")

    def used_on_shards(self):
        """Parameters that each rank uses for its own tokens, beside the residual's."""
        return [*self.norms.parameters(), *self.embed.parameters(), *self.head.parameters()]


def whole_model(**options):
    """One that has learnt something: queries are not zero, gains not one."""
    torch.manual_seed(5)
    model = Model(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "queries" in name or "weights" in name or "norms" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def part_of(whole, rank, parts, **options):
    """The rank's part of a whole model."""
    model = Model(parts, **options)
    values = {
        name: own_channels(name, value, rank, parts) for name, value in whole.state_dict().items()
    }
    model.load_state_dict(values)
    return model


def own_channels(name, value, rank, parts):
    """The part of a parameter, or of its gradient, that a rank has."""
    if ".up." in name:
        return value.chunk(parts, 0)[rank]
    if ".down." in name:
        return value.chunk(parts, 1)[rank]
    return value
