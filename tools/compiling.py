"""Measures what compiling costs and gives: a Llama of 24 layers, whole and layer by layer.

``python tools/compiling.py`` takes some minutes on a quiet machine and writes the table in
docs/training-memory.md. Each row is a process of its own, without a cache of compiled graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date

import marked
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from attnres_ext.integrations.transformers import attach

LAYERS, HIDDEN, TOKENS, STEPS = 24, 256, 256, 9
RESIDUALS = {"standard residual": None, "block, 4 layers each": 8}
WAYS = ("nothing", "each layer", "the whole model")


def measure(residual: str, way: str) -> dict[str, float]:
    """Graphs, seconds of the first training step, and median seconds of those after it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if RESIDUALS[residual]:
        attach(model, sublayers_per_block=RESIDUALS[residual])
    if way == "each layer":
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    elif way == "the whole model":
        model.compile()
    ids = torch.randint(512, (2, TOKENS))
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - begin)
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "first": seconds[0],
        "step": statistics.median(seconds[2:]),
    }


def table() -> str:
    """The rows of all residuals and ways, and what they were measured on."""
    rows = [
        f"A Llama of {LAYERS} layers, D {HIDDEN}, 2 x {TOKENS} tokens, float32, forward and "
        f"backward on {torch.get_num_threads()} threads of a CPU, torch {torch.__version__}, "
        f"{date.today()} (`python tools/compiling.py`):",
        "",
        "| residual | compiled | graphs | first step, s | steps per second |",
        "|---|---|---:|---:|---:|",
    ]
    for residual in RESIDUALS:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [sys.executable, __file__, "--row", residual, way],
                    env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
            row = json.loads(done.stdout.splitlines()[-1])
            print(residual, way, row, file=sys.stderr, flush=True)
            rows.append(
                f"| {residual} | {way} | {row['graphs']} | {row['first']:.1f} "
                f"| {1 / row['step']:.2f} |"
            )
    return "\n".join(rows) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", nargs=2, metavar=("RESIDUAL", "COMPILED"), help="one row, as JSON")
    row = parser.parse_args().row
    if row:
        print(json.dumps(measure(*row)))
        return
    marked.write(marked.DOCS / "training-memory.md", "compiling", table())


if __name__ == "__main__":
    main()
