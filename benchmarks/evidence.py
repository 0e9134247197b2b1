"""Small and honest evidence: residual modes compared at each one's own best learning rate.

    python -m attnres_ext.benchmarks.evidence --out runs/evidence
    python -m attnres_ext.benchmarks.evidence --out runs/evidence --keep benchmarks/results

A design is a grid of learning rates and seeds. Each cell of it is one ``attnres train`` in which
all modes start from the same weights and see the same batches, so that modes are compared pairwise
within a seed. The command may be killed and started again: finished cells are kept, others go on
from their last checkpoint. ``--keep`` writes one JSON of all losses, which
``tools/figures.py`` renders.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres_ext.training.files import write_json

from . import machine


@dataclass(frozen=True)
class Design:
    """What is compared.

    Attributes:
        model: A ``config.json`` of Kimi Linear, less the vocabulary and the residual mode.
        residuals: The modes, the one that others are compared with first.
        learning_rates: Swept for every mode.
        seeds: Of weights and batches; each cell is trained once per seed.
        steps: Optimizer steps of a cell.
        batch_size: Sequences a step.
        sequence_length: Tokens a sequence.
        validation_batches: Batches of the validation that is reported.
    """

    model: dict[str, Any]
    residuals: tuple[str, ...] = ("standard", "block", "full")
    learning_rates: tuple[float, ...] = (2e-3, 5e-3, 1.2e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    batch_size: int = 8
    sequence_length: int = 128
    validation_batches: int = 16

    def cells(self) -> Iterator[tuple[float, int]]:
        """Learning rate and seed of every cell; whole grids of a seed come first."""
        for seed in self.seeds:
            for rate in self.learning_rates:
                yield rate, seed


DESIGNS = {
    # 20 sublayers of 64 channels, the shape in which depth is hardest to use. Three quarters of
    # the layers are KDA, as in the large models; no experts, so that all weights see all tokens.
    "deep-narrow": Design(
        {
            "vocab_size": 257,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 0,
            "v_head_dim": 16,
            "linear_attn_config": {
                "kda_layers": [1, 2, 3, 5, 6, 7, 9],
                "full_attn_layers": [4, 8, 10],
                "num_heads": 2,
                "head_dim": 32,
                "chunk_size": 32,
            },
            "model_max_length": 128,
            "residual": "block",
            "sublayers_per_block": 4,
        }
    ),
}


def cell_folder(out: Path, rate: float, seed: int) -> Path:
    """Where a cell is trained."""
    return out / f"rate{rate:g}-seed{seed}"


def command(design: Design, config: Path, folder: Path, rate: float, seed: int) -> list[str]:
    """The ``attnres`` arguments that begin or continue a cell."""
    arguments = {
        "out": folder,
        "config": config,
        "residual": ",".join(design.residuals),
        "seeds": seed,
        "learning-rate": rate,
        "steps": design.steps,
        "batch-size": design.batch_size,
        "sequence-length": design.sequence_length,
        "validate-every": max(1, design.steps // 3),
        "validation-batches": design.validation_batches,
        "checkpoint-every": max(1, design.steps // 6),
    }
    argv = [f"--{name}={value}" for name, value in arguments.items()]
    # A folder appears together with its run.json; what it was asked to do is checked on resuming.
    return ["train", *argv, *(["--resume"] if folder.exists() else [])]


def train_cell(design: Design, config: Path, out: Path, rate: float, seed: int) -> None:
    """Trains a cell, or what is missing of it, in a process of its own.

    Raises:
        SystemExit: Training failed; its own message is on stderr.
    """
    folder = cell_folder(out, rate, seed)
    if (folder / "summary.json").is_file():
        return
    argv = [sys.executable, "-m", "attnres_ext", *command(design, config, folder, rate, seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if code := subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)


def collect(design: Design, out: Path) -> list[dict[str, Any]]:
    """The last losses of every finished arm."""
    losses = []
    for rate, seed in design.cells():
        folder = cell_folder(out, rate, seed)
        if not (folder / "summary.json").is_file():
            continue
        summary = json.loads((folder / "summary.json").read_text())
        losses += [
            {
                "residual": arm["arm"],
                "learning_rate": rate,
                "seed": seed,
                "train_loss": arm["train_loss"],
                "val_loss": arm["val_loss"],
                "bits_per_byte": arm["bits_per_byte"],
            }
            for arm in summary["arms"]
        ]
    return losses


def describe(name: str, design: Design, out: Path) -> dict[str, Any]:
    """Everything that is kept of a design: what, where, and all losses."""
    first = next(cell_folder(out, *cell) for cell in design.cells())
    run = json.loads((first / "run.json").read_text())
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        "command": f"python -m attnres_ext.benchmarks.evidence --design {name} --out DIR",
        "name": name,
        "design": dataclasses.asdict(design),
        "text": run["text"]["source"],
        "text_fingerprint": run["text"]["fingerprint"],
        **machine.code(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "losses": collect(design, out),
    }


def main() -> int:
    """Trains every cell, then writes ``evidence.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--design", choices=sorted(DESIGNS), default="deep-narrow")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, a thread each")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="also keep the losses there")
    arguments = parser.parse_args()
    design = DESIGNS[arguments.design]
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = arguments.out / "config.json"
    write_json(config, design.model)
    with ThreadPoolExecutor(arguments.workers) as pool:
        cells = (
            pool.submit(train_cell, design, config, arguments.out, *cell) for cell in design.cells()
        )
        for cell in list(cells):
            cell.result()
    record = describe(arguments.design, design, arguments.out)
    write_json(arguments.out / "evidence.json", record)
    if arguments.keep:
        write_json(arguments.keep / f"evidence-{arguments.design}.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
