"""The evidence runs: every cell once, in order, whatever interrupts them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
from concurrent.futures import Future
from types import SimpleNamespace

import matplotlib.image
import pytest

from attnres_ext.benchmarks import evidence, evidence_plot, evidence_summary
from attnres_ext.cli import train_run
from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from attnres_ext.training.files import write_json

SMALL = evidence.Design(
    {
        **evidence.DESIGNS["deep-narrow"].model,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 1,
            "head_dim": 8,
            "chunk_size": 16,
        },
    },
    residuals=("standard", "block"),
    learning_rates=(1e-3, 1e-2),
    seeds=(4,),
    steps=2,
    batch_size=2,
    sequence_length=16,
    validation_batches=1,
)


def in_this_process(argv, **_):
    """Importing torch takes longer than training what is small."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return subprocess.CompletedProcess(argv, main([*argv[3:], "--validation-fraction=0.001"]))


class AtOnce:
    """An executor without threads: training handles signals, which the main thread alone may."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


@pytest.mark.parametrize("name", evidence.DESIGNS)
def test_designs_are_models_with_three_paired_seeds_and_a_sweep(name: str) -> None:
    design = evidence.DESIGNS[name]
    KimiLinearForCausalLM(KimiLinearConfig.from_dict(design.model))
    assert design.residuals[0] == "standard"
    assert len(set(design.seeds)) >= 3
    assert len(set(design.learning_rates)) >= 3
    assert len(set(design.cells())) == len(design.seeds) * len(design.learning_rates)
    assert design.sequence_length <= design.model["model_max_length"]


def test_cells_are_trained_once_and_collected(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(evidence.DESIGNS, "small", SMALL)
    monkeypatch.setattr(evidence, "subprocess", SimpleNamespace(run=in_this_process, DEVNULL=None))
    argv = ["evidence", "--design", "small", "--out", str(tmp_path), "--workers", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--keep", str(tmp_path)])
    monkeypatch.setattr(evidence, "ThreadPoolExecutor", lambda _: contextlib.nullcontext(AtOnce()))
    monkeypatch.setattr(train_run, "_plot", lambda *_: None)
    # A cell that was interrupted before its first checkpoint is taken up again.
    config = tmp_path / "config.json"
    write_json(config, SMALL.model)
    folder = evidence.cell_folder(tmp_path, 1e-3, 4)
    evidence.train_cell(SMALL, config, tmp_path, 1e-3, 4)
    (folder / "summary.json").unlink()
    assert evidence.main() == 0
    record = json.loads((tmp_path / "evidence.json").read_text())
    assert record == json.loads((tmp_path / "evidence-small.json").read_text())
    cells = [(one["residual"], one["learning_rate"], one["seed"]) for one in record["losses"]]
    assert cells == [(arm, rate, 4) for rate in (1e-3, 1e-2) for arm in ("standard", "block")]
    assert all(3 < one["val_loss"] < 7 for one in record["losses"])
    # Nothing is trained a second time.
    monkeypatch.setattr(evidence, "subprocess", None)
    evidence.train_cell(SMALL, config, tmp_path, 1e-3, 4)


def record(**losses: dict[float, list[float]]) -> dict:
    """What is kept of a design, with ``losses[mode][rate]`` a list over seeds."""
    design = dataclasses.asdict(evidence.DESIGNS["deep-narrow"])
    return {
        "name": "made-up",
        "text": "a text",
        "design": design,
        "losses": [
            {"residual": mode, "learning_rate": rate, "seed": seed, "val_loss": loss}
            for mode, by_rate in losses.items()
            for rate, values in by_rate.items()
            for seed, loss in enumerate(values)
        ],
    }


MADE_UP = record(
    standard={2e-3: [3.0, 3.2, 3.1], 5e-3: [2.0, 2.4, 2.2], 1.2e-2: [3.0, 3.0, 3.0]},
    block={2e-3: [1.9, 2.2, 1.9], 5e-3: [2.0, 2.5, 2.1], 1.2e-2: [2.5, 2.5, 2.5]},
    full={2e-3: [2.9, 2.9, 2.9], 5e-3: [2.1, 2.3, 2.2], 1.2e-2: [9.0, 9.0, 9.0]},
)


def test_modes_are_compared_at_their_own_best_rates_within_seeds() -> None:
    standard, block, full = evidence_summary.summarize(MADE_UP)
    assert (standard.best, block.best, full.best) == (5e-3, 2e-3, 5e-3)
    assert (standard.at_edge, block.at_edge, full.at_edge) == (False, True, False)
    assert standard.differences == []
    # Of -0.1, -0.2, -0.3, where the losses themselves spread by 0.2.
    assert evidence_summary.spread(block.differences) == "-0.200 ± 0.100"
    assert evidence_summary.spread(full.differences) == "0.000 ± 0.100"


def test_only_seeds_with_the_whole_grid_count() -> None:
    losses = [one for one in MADE_UP["losses"] if (one["residual"], one["seed"]) != ("full", 1)]
    partial = MADE_UP | {"losses": losses}
    assert evidence_summary.complete_seeds(partial) == [0, 2]
    assert evidence_summary.summarize(partial)[1].differences == pytest.approx([-0.1, -0.3])
    assert evidence_summary.summarize(MADE_UP | {"losses": losses[:5]}) == []


def test_the_plot_is_an_image(tmp_path) -> None:
    source, target = tmp_path / "record.json", tmp_path / "plot.png"
    source.write_text(json.dumps(MADE_UP))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evidence_plot", str(source), str(target)])
        assert evidence_plot.main() == 0
    assert matplotlib.image.imread(target).shape[1] > 1000
