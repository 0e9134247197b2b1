"""Attention Residuals under tensor and sequence parallelism: a small GPT whose heads and channels
are split over the ranks, and whose blocks are sharded along the sequence.

    torchrun --nproc-per-node 4 examples/sequence_parallel.py

trains it for a few steps beside the same model on one device, whose losses are the same, and then
prefills a prompt in chunks. Takes seconds on a laptop's CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from attnres_ext import AttentionResiduals
from attnres_ext.parallel import SequenceParallel

VOCABULARY, HIDDEN, HEADS, LAYERS = 256, 64, 4, 4


class Attention(nn.Module):
    """``heads`` of the model's heads; with fewer than all of them the output is an addend."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        size = HIDDEN // HEADS
        self.heads = heads
        self.qkv = nn.Linear(HIDDEN, 3 * heads * size, bias=False)
        self.out = nn.Linear(heads * size, HIDDEN, bias=False)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        if past is not None:  # keys and values of the chunks before
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
            past[:] = k, v
        before = k.shape[2] - q.shape[2]
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``channels`` of the model's channels; with fewer than all of them an addend."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, channels, bias=False)
        self.down = nn.Linear(channels, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GPT(nn.Module):
    """The same forward whole and in parts: what differs is the state that it reads from."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.residual = AttentionResiduals(HIDDEN, 2 * LAYERS, sublayers_per_block=4)
        self.sublayers = nn.ModuleList()
        for _ in range(LAYERS):
            self.sublayers += [Attention(HEADS // parts), FeedForward(4 * HIDDEN // parts)]
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(2 * LAYERS + 1))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, state, past: list[list[Tensor]] | None = None) -> Tensor:
        for site, (norm, sublayer) in enumerate(zip(self.norms, self.sublayers, strict=False)):
            x = state.read(site, norm.weight, norm.eps)
            attends = isinstance(sublayer, Attention) and past is not None
            state.write(sublayer(x, past[site // 2]) if attends else sublayer(x))
        return state.read_output(self.norms[-1].weight, self.norms[-1].eps)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")


def part_of(whole: GPT, rank: int, parts: int) -> GPT:
    """The rank's heads and channels of a whole model, and all of the rest."""
    part = GPT(parts)
    values = whole.state_dict()
    for name, value in values.items():
        if name.endswith("qkv.weight"):
            values[name] = torch.cat([third.chunk(parts)[rank] for third in value.chunk(3)])
        elif name.endswith("up.weight"):
            values[name] = value.chunk(parts)[rank]
        elif name.endswith(("out.weight", "down.weight")):
            values[name] = value.chunk(parts, 1)[rank]
    part.load_state_dict(values)
    return part


def train(whole: GPT, part: GPT, parallel: SequenceParallel, steps: int, length: int) -> None:
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (whole, part)]
    shards = parallel.shards(length)
    # Used by each rank for its own tokens: their gradients are parts of a sum.
    shared = [*part.embed.parameters(), *part.norms.parameters(), *part.head.parameters()]
    for step in range(steps):
        text = torch.randint(32, (2, 1)) + torch.arange(length + 1)  # something to learn
        ids, targets = text[:, :-1], text[:, 1:]
        for optimizer in optimizers:
            optimizer.zero_grad()

        alone = whole.loss(whole(whole.residual.start(whole.embed(ids))), targets)
        alone.backward()

        state = parallel.start(part.embed(shards.part(ids, dim=1)), shards)
        loss = part.loss(part(state), shards.part(targets, dim=1))
        loss.backward()
        parallel.reduce_gradients(shared)

        for optimizer in optimizers:
            optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            count = targets.numel()
            print(f"step {step}: {alone / count:.5f} alone, {total / count:.5f} in parts")


@torch.inference_mode()
def prefill(whole: GPT, part: GPT, parallel: SequenceParallel, length: int, chunk: int) -> None:
    ids = torch.randint(VOCABULARY, (1, length))
    expected = whole(whole.residual.start(whole.embed(ids)))
    cache = parallel.new_cache((1, chunk))  # of this rank's part of one chunk
    heads = part.sublayers[0].heads
    past = [[torch.empty(1, heads, 0, HIDDEN // HEADS) for _ in "kv"] for _ in range(LAYERS)]
    found = []
    for begin in range(0, length, chunk):
        tokens = ids[:, begin : begin + chunk]
        shards = parallel.shards(tokens.shape[1])
        own = shards.part(tokens, dim=1)
        state = parallel.start(part.embed(own), shards, cache.resized(own.shape))
        found.append(shards.gather(part(state, past)))
    apart = (torch.cat(found, 1) - expected).abs().max()
    if dist.get_rank() == 0:
        slots = part.residual.num_blocks + 1
        print(
            f"prefill of {length} tokens in chunks of {chunk}: at most {apart:.1e} apart; blocks "
            f"take {cache.nbytes:,} bytes on each of {dist.get_world_size()} ranks, "
            f"{slots * length * (HIDDEN + 1) * 4:,} on one device without chunks"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=30, help="tokens of a sequence")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if HEADS % size:
        parser.error(f"{HEADS} heads are split over 1, 2 or 4 processes, not {size}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    whole = GPT()
    part = part_of(whole, rank, size)
    parallel = SequenceParallel(part.residual)
    train(whole, part, parallel, arguments.steps, arguments.length)
    prefill(whole, part_of(whole, rank, size), parallel, length=100, chunk=32)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
