"""What ``attnres train`` does once its arguments are read."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from attnres_ext import _C
from attnres_ext.cli.arguments import given_fields, options_of, typed
from attnres_ext.cli.devices import check_device
from attnres_ext.cli.train_display import Display, print_table
from attnres_ext.fields import plain
from attnres_ext.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from attnres_ext.training.checkpoint import ArmState, load_arm
from attnres_ext.training.data import Corpus, check_utf8, read_text, tokenize
from attnres_ext.training.distributed import World, as_shards, joined, num_processes
from attnres_ext.training.errors import UserError
from attnres_ext.training.files import shown, write_json
from attnres_ext.training.loop import Arm, build_arms, depth_weights, train
from attnres_ext.training.model import make_config, site_names, source_names
from attnres_ext.training.run import FORMAT, Run, check_vacant
from attnres_ext.training.settings import Settings
from attnres_ext.training.split import Split
from attnres_ext.training.summary import summarize
from attnres_ext.training.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer


def start_run(args: argparse.Namespace) -> int:
    """Starts a run in an empty directory; returns the exit code.

    Everything that can be wrong with the request is found before anything is written, and before
    a process waits for others.
    """
    settings = Settings(**{field.name: v for field, v in given_fields(args, Settings).items()})
    check_device(settings.device)
    check_vacant(args.out, args.overwrite)
    text = read_text(settings.text, settings.validation_fraction)
    if settings.tokenizer == "bpe":
        check_utf8(text.source, [*text.training, *text.validation])
        documents = (document.content for document in text.training)
        tokenizer: Tokenizer = BpeTokenizer.learn(documents, settings.vocab_size)
    else:
        tokenizer = ByteTokenizer()
    corpus = tokenize(text, tokenizer, settings.sequence_length)
    config = make_config(settings, tokenizer.vocab_size)
    split = _split(args, config, settings)
    description = {
        "format": FORMAT,
        "attnres_ext": _C.version,
        "torch": torch.__version__,
        "command_line": args.command_line,
        "settings": settings.to_dict(),
        "model": settings.config.name if settings.config else settings.preset,
        "config": config.to_dict(),
        "text": {
            "kept": text.piped is not None,
            "source": text.source,
            "fingerprint": text.fingerprint,
        },
    }
    with joined(settings.device, split) as world:
        arms = _build(settings, config, world)
        # Nothing is created while another process may still be looking for an empty directory.
        world.wait()
        if world.leads:
            run = Run.create(args.out, description, tokenizer, args.overwrite, text.piped)
        else:
            run = Run(args.out.absolute())
        with _locked(run, world):
            return _train(run, description, settings, config, tokenizer, corpus, arms, 0, world)


def resume_run(args: argparse.Namespace) -> int:
    """Continues the run in ``args.out`` from its last checkpoint; returns the exit code."""
    run = Run.open(args.out)
    description, settings = run.description, run.settings
    _check_unchanged(args, settings, description["text"])
    config = KimiLinearConfig.from_dict(description["config"])
    check_device(settings.device)
    split = _split(args, config, settings)
    with joined(settings.device, split) as world, _locked(run, world):
        tokenizer = run.tokenizer
        stored = description["text"]
        path = run.kept_text if stored.get("kept") else settings.text
        text = read_text(path, settings.validation_fraction)
        if text.fingerprint != stored["fingerprint"]:
            raise UserError(
                f"--resume: the text ({text.source}) is not what {shown(args.out)} was started "
                f"with ({stored['source']}, then with other content)"
            )
        corpus = tokenize(text, tokenizer, settings.sequence_length)
        step, checkpoint = run.latest_checkpoint()
        arms = _build(settings, config, world)
        if checkpoint is not None:
            for arm in arms:
                load_arm(checkpoint, _state(arm))
        world.wait()
        if world.leads:
            run.rewind(step if checkpoint else None)
        return _train(run, description, settings, config, tokenizer, corpus, arms, step, world)


def _split(args: argparse.Namespace, config: KimiLinearConfig, settings: Settings) -> Split | None:
    """How a pipeline's processes share the layers; None if there is none."""
    if args.pipeline is None:
        for option, value in (("--virtual", args.virtual), ("--schedule", args.schedule)):
            if value is not None:
                raise UserError(f"{option} {value} needs --pipeline")
        return None
    split = Split.of(args.pipeline, args.virtual, args.schedule or "1F1B")
    split.check(config, settings, num_processes())
    return split


def _locked(run: Run, world: World) -> AbstractContextManager[None]:
    return run.lock() if world.leads else nullcontext()


def _check_unchanged(args: argparse.Namespace, settings: Settings, text: dict[str, Any]) -> None:
    """Refuses settings that differ from those the run began with."""
    for field, value in given_fields(args, Settings).items():
        if field.name == "text" and text.get("kept"):
            continue  # another pipe: the run goes on with what it has kept of the first
        began = getattr(settings, field.name)
        if plain(value) != plain(began):
            raise UserError(
                f"--resume: {options_of(field)[0]} {typed(value)} differs from {typed(began)}, "
                f"with which {shown(args.out)} was started; a resumed run keeps its settings"
            )


def _build(settings: Settings, config: KimiLinearConfig, world: World) -> list[Arm]:
    def make_model(residual: str) -> KimiLinearForCausalLM:
        return KimiLinearForCausalLM(config.replace(residual=residual))

    return build_arms(settings, make_model, world)


def _state(arm: Arm) -> ArmState:
    return ArmState(arm.name, arm.model, arm.optimizer, arm.pipeline)


def _train(
    run: Run,
    description: dict[str, Any],
    settings: Settings,
    config: KimiLinearConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    arms: list[Arm],
    done: int,
    world: World,
) -> int:
    states = [_state(arm) for arm in arms]
    title = _title(description, settings, corpus)
    if world.leads:
        print(title, file=sys.stderr)
    saved = done
    with _StopRequest() as stop, Display(settings, done, quiet=not world.leads) as display:
        for records in train(arms, corpus, settings, done + 1, world):
            done = records[0].step
            if world.leads:
                run.append(records)
            display.show(records)
            stopping = world.any(stop.requested)
            wanted = done % settings.checkpoint_every == 0 or done == settings.steps
            if done > saved and (wanted or stopping):
                for arm in arms:
                    as_shards(arm.model)
                run.save(done, states, tokenizer, keep=settings.keep_checkpoints, write=world.leads)
                saved = done
            if stopping and done < settings.steps:
                break
    if done < settings.steps:
        if world.leads:
            print(
                f"stopped after step {done}; continue with: {run.resume_command}", file=sys.stderr
            )
        return 130
    depth = _depth(arms, config, corpus, settings, world)
    if world.leads:
        _report(run, arms, corpus, depth, title)
    return 0


def _title(description: dict[str, Any], settings: Settings, corpus: Corpus) -> str:
    tokens = settings.batch_size * settings.sequence_length
    return (
        f"Kimi Linear ({description['model']}) on {description['text']['source']}, "
        f"{corpus.training.numel():,} tokens; {settings.steps} steps of {tokens:,} tokens"
    )


def _depth(
    arms: Sequence[Arm],
    config: KimiLinearConfig,
    corpus: Corpus,
    settings: Settings,
    world: World,
) -> dict[str, dict[str, Any]]:
    return {
        arm.name: {
            "sites": site_names(config),
            "sources": source_names(config, arm.model.residual),
            "weights": depth_weights(arm, corpus, settings, world),
        }
        for arm in arms
        if arm.model.residual.variant.attends
    }


def _report(
    run: Run, arms: Sequence[Arm], corpus: Corpus, depth: dict[str, dict[str, Any]], title: str
) -> None:
    parameters = {arm.residual: arm.num_parameters for arm in arms}
    records = run.records()
    rows = summarize(records, parameters, corpus.bytes_per_token)
    summary = {"arms": [dataclasses.asdict(row) for row in rows], "depth_attention": depth}
    with run.writing("the report"):
        write_json(run.path / "summary.json", summary)
        _plot(run, records, depth, title)
    print_table(rows)
    print(f"everything is in {shown(run.path)}; to see it write:")
    print(f'  attnres generate --checkpoint {shlex.quote(shown(run.path))} --prompt "def "')


def _plot(run: Run, records: Sequence[Any], depth: dict[str, Any], title: str) -> None:
    try:
        from attnres_ext.training import plots
    except ImportError as error:
        # Hours of training are worth more than their picture; summary.json has the figures.
        print(f"no loss.png and depth_attention.png: {error}", file=sys.stderr)
        return
    plots.plot_loss(run.path / "loss.png", records, title)
    by_arm: dict[str, list[plots.DepthMap]] = {}
    for name, data in depth.items():
        arm = name.split("-")[0]
        by_arm.setdefault(arm, []).append(plots.DepthMap(arm=arm, **data))
    if by_arm:
        plots.plot_depth_attention(
            run.path / "depth_attention.png", plots.maps_by_arm(by_arm), title
        )


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop at the end of the step."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _StopRequest:
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
