"""Attention Residuals in a GPT of one's own: a small model with the usual residual stream and the
same with blocks, trained side by side on the same bytes.

    python examples/nanogpt.py

takes a minute or two on two CPU cores. The text is Python's own standard library, or a file's.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnres_ext import AttentionResiduals


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def mlp(hidden_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(hidden_size, 4 * hidden_size, bias=False),
        nn.GELU(),
        nn.Linear(4 * hidden_size, hidden_size, bias=False),
    )


class GPT(nn.Module):
    """Bytes in, logits of the next byte out. ``residual`` is what differs from any other GPT."""

    def __init__(
        self,
        *,
        mode: str,
        hidden_size: int = 64,
        num_layers: int = 8,
        num_heads: int = 4,
        context: int = 128,
        sublayers_per_block: int = 4,
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(256, hidden_size)
        self.positions = nn.Embedding(context, hidden_size)
        self.sublayers = nn.ModuleList()
        for _ in range(num_layers):
            self.sublayers += [Attention(hidden_size, num_heads), mlp(hidden_size)]
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=1e-6) for _ in self.sublayers)
        self.last_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.head = nn.Linear(hidden_size, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)
        self.residual = AttentionResiduals(
            hidden_size, len(self.sublayers), mode=mode, sublayers_per_block=sublayers_per_block
        )

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        state = self.residual.start(self.tokens(ids) + self.positions(positions))
        for site, (norm, sublayer) in enumerate(zip(self.norms, self.sublayers, strict=True)):
            state.write(sublayer(state.read(site, norm.weight, norm.eps)))
        return self.head(state.read_output(self.last_norm.weight, self.last_norm.eps))

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.7) -> bytes:
        ids = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(ids[:, -self.context :])[:, -1] / temperature
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
        return bytes(ids[0].tolist())


def optimizer_of(model: GPT, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW. Matrices decay; gains and pseudo-queries, which are one-dimensional, do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def read_text(path: str | None) -> Tensor:
    """Bytes of a file, or of the standard library's modules."""
    if path is not None:
        text = Path(path).read_bytes()
    else:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"\n".join(module.read_bytes() for module in modules)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss_of(model: GPT, text: Tensor, starts: Tensor) -> Tensor:
    windows = torch.stack([text[start : start + model.context + 1] for start in starts.tolist()])
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", help="a file to train on")
    parser.add_argument("--modes", default="standard,block", help="of standard, block and full")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.text is not None and not Path(options.text).is_file():
        parser.error(f"--text {options.text} is no file")

    text = read_text(options.text)
    train, valid = text[: -len(text) // 20], text[-len(text) // 20 :]
    models, optimizers, seconds = {}, {}, {}
    for mode in options.modes.split(","):
        torch.manual_seed(options.seed)  # the same weights in every mode
        models[mode] = GPT(mode=mode, num_layers=options.num_layers)
        optimizers[mode] = optimizer_of(models[mode], options.learning_rate)
        seconds[mode] = 0.0

    print(f"{len(text):,} bytes; losses on the same batches:")
    print("  step  " + "  ".join(f"{mode:>8}" for mode in models))
    batches = torch.Generator().manual_seed(options.seed)
    for step in range(1, options.steps + 1):
        starts = torch.randint(
            len(train) - models[mode].context, (options.batch_size,), generator=batches
        )
        warmup, rest = min(1, step / 20), 1 - step / (options.steps + 1)
        losses = []
        for mode, model in models.items():
            began = time.perf_counter()
            for group in optimizers[mode].param_groups:
                group["lr"] = options.learning_rate * min(warmup, rest)
            loss = loss_of(model, train, starts)
            optimizers[mode].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[mode].step()
            losses.append(loss.item())
            seconds[mode] += time.perf_counter() - began
        if step == 1 or step % 50 == 0 or step == options.steps:
            print(f"{step:>6}  " + "  ".join(f"{loss:8.3f}" for loss in losses), flush=True)

    starts = torch.linspace(0, len(valid) - models[mode].context - 1, 64).long()
    for mode, model in models.items():
        model.eval()
        with torch.no_grad():
            loss = loss_of(model, valid, starts).item()
        print(
            f"\n{mode}: validation loss {loss:.3f}, "
            f"{1000 * seconds[mode] / options.steps:.0f} ms a step. It writes:"
        )
        print(model.generate(b"def ", 120).decode(errors="replace"))


if __name__ == "__main__":
    main()
