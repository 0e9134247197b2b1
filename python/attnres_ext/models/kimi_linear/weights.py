"""Weights on disk under the names of Kimi Linear's and, for residuals, Kimi K3's checkpoints.

Every tensor of a model but the residual's is already named as in the checkpoints.
:func:`checkpoint_names` is the one table that renames and reshapes the rest; saving, loading and
checking all go through it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM

__all__ = ["checkpoint_names", "load_model", "load_weights", "save_weights"]

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
)
# Kimi K3's language model sits inside a larger one.
_OUTER_PREFIX = "language_model."


def checkpoint_names(config: KimiLinearConfig) -> dict[str, str]:
    """Module name -> Kimi K3's name of each Attention Residuals parameter.

    Site ``2 i`` is read before layer ``i``'s attention, site ``2 i + 1`` before its feed-forward
    network, the last one before the output. Queries are stored as ``[1, D]``, the weight of a
    projection to one logit; key gains as ``[D]``. Layer 0's attention site has a single source,
    hence no effect; its parameters are stored all the same.
    """
    if config.residual == "standard":
        return {}
    sites = [
        f"model.layers.{index}.{site}"
        for index in range(config.num_hidden_layers)
        for site in ("self_attention_res", "mlp_res")
    ]
    sites.append("model.output_attn_res")
    return {
        f"model.residual.{ours}.{number}": f"{site}_{theirs}.weight"
        for number, site in enumerate(sites)
        for ours, theirs in (("queries", "proj"), ("key_weights", "norm"))
    }


def save_weights(model: KimiLinearForCausalLM, folder: str | Path) -> Path:
    """Writes ``model.safetensors`` and ``config.json`` into ``folder``, each at once or not at all.

    Returns:
        The path of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        slot.name: slot.tensor.detach().reshape(slot.shape).cpu().contiguous()
        for slot in _slots(model)
    }
    with _replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    with _replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return folder / WEIGHTS_FILE


def load_weights(model: KimiLinearForCausalLM, path: str | Path) -> None:
    """Fills ``model`` from a ``.safetensors`` file, or a folder with one or an index of several.

    Values are cast to the model's dtypes. Checkpoints may carry the prefix ``language_model.``,
    ``A_log`` as ``[H]`` or padded beyond its ``H`` heads (Kimi K3) in place of ``[1, 1, H, 1]``
    (Kimi Linear), and pseudo-queries as ``[D]`` in place of ``[1, D]``.

    Raises:
        FileNotFoundError: No weights at ``path``.
        ValueError: Tensors are missing, unexpected or of the wrong shape; all of them are named,
            and nothing was loaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "load_weights: the model is on the meta device; give it memory first, "
            "model.to_empty(device=...)"
        )
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in _weight_files(Path(path))
        ]
        found = {
            key.removeprefix(_OUTER_PREFIX): (file, key)
            for file in files
            for key in file.keys()  # noqa: SIM118
        }
        slots = list(_slots(model))
        _check(
            slots,
            {name: tuple(file.get_slice(key).get_shape()) for name, (file, key) in found.items()},
            path,
        )
        with torch.no_grad():
            for slot in slots:
                file, key = found[slot.name]
                values = file.get_tensor(key)
                slot.tensor.copy_(values.flatten()[: slot.tensor.numel()].view(slot.tensor.shape))


def load_model(folder: str | Path) -> KimiLinearForCausalLM:
    """The model in a folder that :func:`save_weights` wrote, or in a public checkpoint's."""
    model = KimiLinearForCausalLM(KimiLinearConfig.from_json(folder))
    load_weights(model, folder)
    return model


@dataclass
class _Slot:
    """A tensor of the model, and its name and shape in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if shape in (self.shape, tuple(self.tensor.shape)):
            return True
        padded = len(shape) == 1 and shape[0] > self.tensor.numel()
        return self.name.endswith(".A_log") and padded


def _slots(model: KimiLinearForCausalLM) -> Iterator[_Slot]:
    names = checkpoint_names(model.config)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = names.get(key, key)
        yield _Slot(name, _stored_shape(name, tensor), tensor)


def _stored_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if name.endswith("_res_proj.weight"):  # a projection of D channels to one logit
        return 1, *tensor.shape
    if name.endswith(".A_log"):  # broadcasts over batch, tokens and channels
        return 1, 1, *tensor.shape, 1
    return tuple(tensor.shape)


def _check(slots: list[_Slot], found: dict[str, tuple[int, ...]], path: str | Path) -> None:
    expected = {slot.name for slot in slots}
    problems = {
        "missing": sorted(expected - found.keys()),
        "unexpected": sorted(found.keys() - expected),
        "wrongly shaped": [
            f"{slot.name} is {list(found[slot.name])}, the model has {list(slot.shape)}"
            for slot in slots
            if slot.name in found and not slot.accepts(found[slot.name])
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
        index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
        return [path / name for name in sorted(set(index["weight_map"].values()))]
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    raise FileNotFoundError(
        f"no weights at {path}: neither a file, nor a folder with {WEIGHTS_FILE} or {INDEX_FILE}"
    )


class _replacing:  # noqa: N801
    """``with _replacing(path) as temporary``: at the end it becomes ``path``, if nothing failed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)
