"""Attention Residuals of a saved model: which files hold them, and how they come back."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from attnres_ext.integrations.transformers.passes import MODULE
from attnres_ext.residual import AttentionResiduals

__all__ = ["HUB_ARGUMENTS", "Path", "load_weights", "without_report"]

Path = str | PathLike[str]

#: What `from_pretrained` takes to say where files are.
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token",
)  # fmt: skip

_KEY = re.compile(rf"(?:^|\.){MODULE}\.(.+)$")


def load_weights(residual: AttentionResiduals, path: Path, **hub: Any) -> None:
    """Fills ``residual`` with the parameters that ``save_pretrained`` wrote, all or none.

    Args:
        residual: What to fill.
        path: Folder, or name on the hub, of a model or an adapter saved with Attention Residuals.
        hub: Arguments of ``from_pretrained`` that say where files are (``HUB_ARGUMENTS``).

    Raises:
        ValueError: If parameters are missing, unexpected or of another shape, or there are no
            safetensors files; the message names them all.
    """
    found: dict[str, Tensor] = {}
    for file, key, name in _entries(path, hub):
        if name in found:
            raise ValueError(f"attach: {path} holds {name} of Attention Residuals twice")
        with safe_open(file, "pt") as tensors:
            found[name] = tensors.get_tensor(key)
    wanted = dict(residual.named_parameters())
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if not found:
        raise ValueError(f"attach: {path} holds no parameters of Attention Residuals")
    if wrong:
        raise ValueError(
            f"attach: the Attention Residuals in {path} do not fit the model: "
            + "; ".join(sorted(wrong))
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


@contextmanager
def without_report() -> Iterator[None]:
    """Inside, a load report of transformers that lists nothing but the parameters of Attention
    Residuals, which it cannot know, is not logged."""
    # A key and its status, which terminals get in colour; before transformers 5 a list of keys.
    rows = re.compile(r"^(.+?)\s*\|\s*(?:\x1b\[[\d;]*m)*[A-Z]+\b", re.MULTILINE)
    keys = re.compile(r"'([\w.]+)'")

    def tells_more(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        before_5 = "were not used when initializing" in message
        listed = keys.findall(message) if before_5 else rows.findall(message)
        return not listed or not all(_KEY.search(key) for key in listed)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(tells_more)
    try:
        yield
    finally:
        logger.removeFilter(tells_more)


def _entries(path: Path, hub: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(file, name in the file, name in the module) of each parameter."""
    index = _file(path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None:
        with open(index) as text:
            files = json.load(text)["weight_map"]
        files = {key: _file(path, file, hub) for key, file in files.items() if _KEY.search(key)}
    else:
        names = SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME
        single = next((file for name in names if (file := _file(path, name, hub))), None)
        if single is None:
            raise ValueError(
                f"attach: {path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} nor "
                f"{ADAPTER_SAFE_WEIGHTS_NAME}"
            )
        with safe_open(single, "pt") as tensors:
            files = dict.fromkeys(filter(_KEY.search, tensors.keys()), single)
    for key, file in files.items():
        yield file, key, _KEY.search(key)[1]


def _file(path: Path, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path, name, **hub, _raise_exceptions_for_missing_entries=False)
