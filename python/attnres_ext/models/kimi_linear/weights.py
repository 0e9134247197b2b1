"""Weights on disk: safetensors, in one file or several, under the names in ``names.py``.

Loading is checked as a whole first, by names and shapes alone, and then goes from file to file and
tensor to tensor: no more than one tensor is in memory beside the model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.names import checkpoint_names, spelling_of, stored_names
from attnres_ext.models.kimi_linear.shards import gathered, is_shard, share_of
from attnres_ext.models.kimi_linear.stages import KimiLinearStage

__all__ = ["load_model", "load_weights", "save_weights"]

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
)
# Kimi K3's language model sits inside a larger one.
_OUTER_PREFIX = "language_model."
# What public checkpoints have in a file.
_SHARD_BYTES = 5 * 10**9


def save_weights(
    model: KimiLinearForCausalLM,
    folder: str | Path,
    *,
    max_shard_bytes: int = _SHARD_BYTES,
    residual_names: str = "k3",
    write: bool = True,
) -> Path:
    """Writes a model and its ``config.json`` into ``folder``.

    One file ``model.safetensors``, or where that would be too large, ``model-00001-of-...`` and an
    index of them. A folder holds either the model that was there before, or none that could be
    loaded, or this one.

    Args:
        model: The model. If its parameters are spread over processes, all have to call this.
        folder: Created when missing.
        max_shard_bytes: Largest file, but for a tensor that alone is larger.
        residual_names: Spelling of the residual's parameters, a key of ``RESIDUAL_SPELLINGS`` in
            ``names.py``: "k3", "fla", "fla_residuals" or "torchtitan".
        write: False only takes part in gathering; one process writes.

    Returns:
        The path of the weights, or of their index.
    """
    folder = Path(folder)
    slots = list(_slots(model, residual_names))
    shards = _shards(slots, max_shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    with _Replacements(folder) as files:
        for name, shard in zip(names, shards, strict=True):
            # Gathered by all, one file's worth at a time.
            tensors = {stored: tensor for slot in shard for stored, tensor in slot.stored()}
            if write:
                save_file(tensors, files.new(name), metadata={"format": "pt"})
        if not write:
            return folder / names[0]
        config = json.dumps(model.config.to_dict(), indent=2) + "\n"
        files.new(CONFIG_FILE).write_text(config, encoding="utf-8")
        if len(shards) > 1:
            weight_map = {
                stored: name
                for name, shard in zip(names, shards, strict=True)
                for slot in shard
                for stored in slot.names
            }
            total = sum(slot.tensor.numel() * slot.tensor.element_size() for slot in slots)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files.new(INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        # An index names what belongs together: without one nothing is loaded by halves.
        for stale in (INDEX_FILE, *((WEIGHTS_FILE,) if len(shards) > 1 else ())):
            (folder / stale).unlink(missing_ok=True)
    for path in folder.glob("model-*-of-*.safetensors"):
        if path.name not in names:
            path.unlink()
    return folder / (INDEX_FILE if len(shards) > 1 else WEIGHTS_FILE)


def load_weights(model: KimiLinearForCausalLM | KimiLinearStage, path: str | Path) -> None:
    """Fills a model, or a stage of it, from a ``.safetensors`` file, or a folder with one or an
    index of several.

    A stage takes what it has, from a checkpoint of the whole model.
    Values are cast to the model's dtypes. Checkpoints may carry the prefix ``language_model.``,
    ``A_log`` as ``[H]`` or padded beyond its ``H`` heads (Kimi K3) in place of ``[1, 1, H, 1]``
    (Kimi Linear), pseudo-queries as ``[D]`` in place of ``[1, D]``, and any spelling of the
    residual's parameters in ``names.py``. What no file holds begins anew (the counts of routers,
    say): the model may have come from ``to_empty``.

    Raises:
        FileNotFoundError: No weights at ``path``, or not all the files of an index.
        ValueError: Tensors are missing, unexpected or of the wrong shape; all of them are named,
            and nothing was loaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "load_weights: the model is on the meta device; give it memory first, "
            "model.to_empty(device=...)"
        )
    files = _weight_files(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        # Reads the header, and finds a file that is shorter than it says.
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                shapes[_plain(key)] = tuple(opened.get_slice(key).get_shape())
    spelling = spelling_of(shapes)
    slots = list(_slots(model, spelling))
    known = {name for slot in _slots(_whole(model), spelling) for name in slot.names}
    _check(slots, known, shapes, path)
    places = {name: (slot, i) for slot in slots for i, name in enumerate(slot.names)}
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if _plain(key) in places:
                        slot, index = places[_plain(key)]
                        slot.fill(index, opened.get_tensor(key))
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                module.get_buffer(name).zero_()


def load_model(folder: str | Path) -> KimiLinearForCausalLM:
    """The model in a folder that :func:`save_weights` wrote, or in a public checkpoint's."""
    model = KimiLinearForCausalLM(KimiLinearConfig.from_json(folder))
    load_weights(model, folder)
    return model


def _whole(model: KimiLinearForCausalLM | KimiLinearStage) -> KimiLinearForCausalLM:
    """What ``model`` is a stage of, without its values."""
    if not isinstance(model, KimiLinearStage):
        return model
    with torch.device("meta"):
        return KimiLinearForCausalLM(model.config)


def _plain(key: str) -> str:
    return key.removeprefix(_OUTER_PREFIX)


@dataclass
class _Slot:
    """A tensor of the model, and what it is in a checkpoint.

    Attributes:
        names: Its name there; several if it is stored apart, by its first dimension.
        shape: Shape there, of each.
        tensor: The model's.
    """

    names: list[str]
    shape: tuple[int, ...]
    tensor: Tensor

    def __post_init__(self) -> None:
        self._waiting: dict[int, Tensor] = {}

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of each part in the model."""
        return tuple(self.tensor.shape[1:] if len(self.names) > 1 else self.tensor.shape)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if shape in (self.shape, self.part_shape):
            return True
        padded = len(shape) == 1 and shape[0] > self.tensor.numel()
        return self.names[0].endswith(".A_log") and padded

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values for a file; gathers a tensor that is spread over processes."""
        whole = gathered(self.tensor.detach()).cpu()
        parts = whole.unbind(0) if len(self.names) > 1 else [whole]
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.reshape(self.shape).contiguous()

    def fill(self, index: int, values: Tensor) -> None:
        """Puts the part ``index`` in its place."""
        values = values.flatten()[: _numel(self.part_shape)].view(self.part_shape)
        if len(self.names) == 1:
            self.tensor.copy_(share_of(values, self.tensor))
        elif not is_shard(self.tensor):
            self.tensor[index].copy_(values)
        else:
            # Shards are cut from the whole.
            self._waiting[index] = values.clone()
            if len(self._waiting) == len(self.names):
                whole = torch.stack([self._waiting.pop(i) for i in range(len(self.names))])
                self.tensor.copy_(share_of(whole, self.tensor))


def _slots(model: KimiLinearForCausalLM | KimiLinearStage, spelling: str) -> Iterator[_Slot]:
    renamed = checkpoint_names(model.config, spelling)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if key in renamed:
            query = key.startswith("model.residual.queries.")  # a projection of D to one logit
            yield _Slot(
                [renamed[key]], (1, *tensor.shape) if query else tuple(tensor.shape), tensor
            )
        elif key.endswith(".A_log"):  # broadcasts over batch, tokens and channels
            yield _Slot([key], (1, 1, *tensor.shape, 1), tensor)
        else:
            names = stored_names(key, len(tensor) if tensor.ndim else 0)
            apart = names != [key]
            yield _Slot(names, tuple(tensor.shape[1:] if apart else tensor.shape), tensor)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _shards(slots: list[_Slot], most: int) -> list[list[_Slot]]:
    """Slots in their order, in files of at most ``most`` bytes."""
    shards: list[list[_Slot]] = [[]]
    filled = 0
    for slot in slots:
        size = slot.tensor.numel() * slot.tensor.element_size()
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += size
    return shards


def _check(
    slots: list[_Slot], known: set[str], found: dict[str, tuple[int, ...]], path: str | Path
) -> None:
    expected = {name for slot in slots for name in slot.names}
    problems = {
        "missing": sorted(expected - found.keys()),
        "unexpected": sorted(found.keys() - known),
        "wrongly shaped": [
            f"{name} is {list(found[name])}, the model has {list(slot.shape)}"
            for slot in slots
            for name in slot.names
            if name in found and not slot.accepts(found[name])
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {len(names)} {kind}: " + ", ".join(names)
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(
            "\n".join([f"the weights in {path} do not fit this model; nothing was loaded:", *lines])
        )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX_FILE).is_file():
        try:
            index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
            files = [path / name for name in sorted(set(index["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / INDEX_FILE} is no index of weights: {error}") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path / INDEX_FILE} names files that are missing: {missing}")
        return files
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    raise FileNotFoundError(
        f"no weights at {path}: neither a file, nor a folder with {WEIGHTS_FILE} or {INDEX_FILE}"
    )


class _Replacements:
    """``with _Replacements(folder) as files``: at the end, files take their names, if nothing
    failed; in the order in which they were asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[Path, str]] = []

    def __enter__(self) -> _Replacements:
        return self

    def new(self, name: str) -> Path:
        """A temporary file that will be called ``name``."""
        handle, path = tempfile.mkstemp(dir=self._folder, prefix=f".{name}.")
        os.close(handle)
        self._files.append((Path(path), name))
        return Path(path)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for path, name in self._files:
            if kind is None:
                os.replace(path, self._folder / name)
            else:
                path.unlink(missing_ok=True)
