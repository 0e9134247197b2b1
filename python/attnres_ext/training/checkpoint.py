"""Checkpoints: directories that are either whole or not there.

Layout of a run, ``--out DIR``::

    run.json                    settings of the run, written once
    tokenizer.json
    metrics.jsonl               one object a line, appended
    checkpoints/step-000100/
        manifest.json           step, arms, size and hash of every file
        block-seed0/            one folder per arm, complete for inference:
            config.json  tokenizer.json  model.safetensors
            optimizer.safetensors          moments and step counts, for --resume

A checkpoint is built under a hidden name and renamed when every byte is on disk, so that a folder
``step-N`` that exists is complete. All arms of a run are in one checkpoint: they go on together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.shards import gathered, share_of
from attnres_ext.models.kimi_linear.stages import KimiLinearStage
from attnres_ext.models.kimi_linear.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    save_weights,
)
from attnres_ext.residual_variants import VARIANTS
from attnres_ext.training.errors import UserError
from attnres_ext.training.files import sync_directory, write_json
from attnres_ext.training.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from attnres_ext.training.pipeline import Pipeline

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_OPTIMIZER = "optimizer.safetensors"
_TOKENIZER = "tokenizer.json"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ArmState:
    """What one arm contributes to a checkpoint.

    Attributes:
        name: Folder name, such as ``block-seed0``.
        model: The model, saved under the public checkpoints' names.
        optimizer: Its optimizer, with parameters named by ``model.named_parameters()``.
        pipeline: Which stages of it this process has, if it has not all.
    """

    name: str
    model: KimiLinearForCausalLM
    optimizer: torch.optim.Optimizer
    pipeline: Pipeline | None = None


def save_checkpoint(
    folder: Path,
    step: int,
    arms: Sequence[ArmState],
    tokenizer: Tokenizer,
    keep: int = 1,
    write: bool = True,
) -> Path:
    """Writes ``folder/step-N`` and removes all but the newest ``keep`` checkpoints.

    Args:
        folder: The run's ``checkpoints`` folder; created when missing.
        step: Steps done so far.
        arms: Every arm of the run.
        tokenizer: Saved with each arm, so that an arm's folder is all that inference needs.
        keep: How many checkpoints stay, this one included.
        write: False only takes part in gathering what is spread over processes, all of which have
            to call this; one of them writes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: It cannot be written; nothing of it stays, and the checkpoints before it do.
    """
    target = folder / f"step-{step:06d}"
    building = folder / f".{target.name}.tmp"
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    try:
        files = {}
        for arm in arms:
            arm_folder = building / arm.name
            _save_arm(arm, arm_folder, write)
            if not write:
                continue
            save_tokenizer(tokenizer, arm_folder / _TOKENIZER)
            for path in sorted(arm_folder.iterdir()):
                files[f"{arm.name}/{path.name}"] = _describe(path, sync=True)
            sync_directory(arm_folder)
        if not write:
            return target
        manifest = {"step": step, "arms": [arm.name for arm in arms], "files": files}
        write_json(building / _MANIFEST, manifest)
        sync_directory(building)
        # A finished run that is resumed arrives at the same step again.
        discard(target)
        os.rename(building, target)
    except Exception as error:
        # On a full disk, half a checkpoint would be in the way of a whole one.
        if write:
            shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, SafetensorError):
            # It quotes the system's words: Os { code: 28, message: "No space left on device" }.
            reason = str(error).partition('message: "')[2].partition('"')[0]
            raise OSError(reason or str(error)) from error
        raise
    sync_directory(folder)
    for _, old in list(checkpoints(folder))[:-keep]:
        discard(old)
    return target


def _save_arm(arm: ArmState, folder: Path, write: bool) -> None:
    model, moments = arm.model, _optimizer_tensors(arm.model, arm.optimizer)
    if arm.pipeline is not None:
        weights = arm.pipeline.collected(arm.pipeline.weights())
        moments = arm.pipeline.collected(moments)
        if not write:
            return
        model = _with_weights(arm.model, weights)
    save_weights(model, folder, write=write)
    if write:
        save_file(moments, folder / _OPTIMIZER)


def _with_weights(
    model: KimiLinearForCausalLM, weights: Mapping[str, torch.Tensor]
) -> KimiLinearForCausalLM:
    with torch.device("meta"):
        whole = KimiLinearForCausalLM(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Complete checkpoints in ``folder``, oldest first, as (step, path)."""
    if folder.is_dir():
        matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
        yield from sorted((int(match[1]), path) for match, path in matches if match)


def remove_leftovers(folder: Path) -> None:
    """Deletes what an interrupted save or removal left under hidden names."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Deletes a checkpoint, if it is there."""
    # Renamed first: a kill halfway through the deletion must not leave a checkpoint with holes.
    if path.exists():
        hidden = path.with_name(f".{path.name}.old.tmp")
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def load_arm(checkpoint: Path, arm: ArmState) -> None:
    """Restores model and optimizer of one arm in place.

    Raises:
        UserError: The checkpoint is damaged or belongs to another model.
    """
    folder = checkpoint / arm.name
    for part in [arm.model] if arm.pipeline is None else arm.pipeline.modules:
        _load_weights(part, folder)
    tensors = _load(folder / _OPTIMIZER)
    state = arm.optimizer.state_dict()
    names = [name for name, _ in arm.model.named_parameters()]
    index = {id(parameter): i for i, parameter in enumerate(_optimizer_parameters(arm.optimizer))}
    for name, parameter in arm.model.named_parameters():
        if id(parameter) not in index:
            continue  # another process trains it
        entries = {
            key.removeprefix(f"{name}:"): share_of(tensor, parameter) if tensor.ndim else tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}:")
        }
        if entries:
            state["state"][index[id(parameter)]] = entries
    unknown = {key.rpartition(":")[0] for key in tensors} - set(names)
    if unknown:
        raise UserError(f"{folder / _OPTIMIZER} has state for {min(unknown)}, unknown to the model")
    arm.optimizer.load_state_dict(state)


def load_model(folder: Path, device: str) -> tuple[KimiLinearForCausalLM, Tokenizer]:
    """The model in an arm's folder, ready for inference, and its tokenizer.

    Raises:
        UserError: A file is missing, damaged, or does not fit the others.
    """
    values = read_json_object(folder / CONFIG_FILE)
    try:
        model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(values))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is no model's configuration: {error}") from error
    _load_weights(model, folder)
    return model.to(device).eval(), load_tokenizer(folder / _TOKENIZER)


def _load_weights(model: KimiLinearForCausalLM | KimiLinearStage, folder: Path) -> None:
    try:
        load_weights(model, folder / WEIGHTS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        # A wrong configuration makes this a list of every tensor; the first ones tell enough.
        detail = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UserError(f"{folder / WEIGHTS_FILE} cannot be loaded: {detail}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: The file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def verify(checkpoint: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        UserError: A file is missing or has changed since it was written.
    """
    manifest = read_json_object(checkpoint / _MANIFEST)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("step"), int):
        raise UserError(f"{checkpoint / _MANIFEST} is not a manifest: files or step is missing")
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} is missing")
        if _describe(path) != expected:
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {name} is not what was written "
                f"({path.stat().st_size} bytes, expected {expected['bytes']} with their SHA-256)"
            )
    return manifest


def find_arms(path: Path) -> list[Path]:
    """The folders of all arms of a checkpoint, verified; block first, then full and standard.

    Args:
        path: A run (``--out`` of training), one of its checkpoints, or an arm's folder.

    Raises:
        UserError: Nothing there, or a damaged checkpoint.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / WEIGHTS_FILE).is_file():
        if (path.parent / _MANIFEST).is_file():
            verify(path.parent)
        return [path]
    if not (path / _MANIFEST).is_file():
        found = list(checkpoints(path / "checkpoints")) or list(checkpoints(path))
        if not found:
            raise UserError(f"{path} holds no checkpoint: no folder step-N is in it")
        path = found[-1][1]
    order = sorted(VARIANTS, key=lambda mode: not VARIANTS[mode].attends)
    names = sorted(verify(path)["arms"], key=lambda name: order.index(name.split("-")[0]))
    return [path / name for name in names]


def find_arm(path: Path, arm: str | None) -> Path:
    """The folder of one arm for inference, verified.

    Args:
        path: See :func:`find_arms`.
        arm: Which arm when there are several: ``block``, or ``block-seed1``. None takes the only
            one, or else the first of block, full and standard.

    Raises:
        UserError: Nothing there, no such arm, or a damaged checkpoint.
    """
    folders = find_arms(path)
    if arm is None or folders == [path]:
        return folders[0]
    for folder in folders:
        if arm in (folder.name, folder.name.split("-")[0]):
            return folder
    names = ", ".join(folder.name for folder in folders)
    raise UserError(f"--arm {arm} is not in {path}: it has {names}")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    # safetensors refuses tensors that share storage: each is a copy.
    return {
        f"{name}:{key}": gathered(value.detach()).cpu().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _describe(path: Path, sync: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = file.read()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
