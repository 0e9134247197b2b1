"""The facts that ``attnres info`` shows, as plain data."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from attnres_ext import _C
from attnres_ext._native import LIBRARY
from attnres_ext.cli.model_option import read_config
from attnres_ext.devices import plan_device
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.kda import KimiDeltaState
from attnres_ext.models.kimi_linear.mla import KimiLatentState
from attnres_ext.training.errors import UserError


def collect() -> dict[str, Any]:
    """Versions, binaries and devices of this process, ready for JSON."""
    return {
        "versions": {
            "attnres-ext": _C.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "binaries": _binaries(),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction set": torch.ops.attnres.cpu_instruction_set(),
            "torch's choice": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {
            "architectures": _architectures(),
            "torch CUDA": torch.version.cuda,
            "devices": _cuda_devices(),
        },
    }


def _binaries() -> dict[str, Any]:
    return {
        "operators": str(LIBRARY),
        "operators bytes": LIBRARY.stat().st_size,
        "bindings": str(_C.__file__),
        "compiler": _C.compiler,
        "standard": f"C++{_C.cxx_standard // 100 % 100}",
        "most sources": _C.max_sources,
    }


def _architectures() -> list[str]:
    """Compute capabilities with kernels in the operators' library, such as "sm_90"."""
    built = torch.ops.attnres.cuda_architectures()
    return [f"sm_{architecture}" for architecture in built.split(",") if architecture]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda_devices() -> list[str]:
    return [
        f"{torch.cuda.get_device_name(index)} "
        f"(compute capability {'.'.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    ]


def _planned_devices() -> dict[str, dict[str, Any]]:
    """What ``_C.plan`` is told of a CPU and of each kind of CUDA device here, or of an H100."""
    found = [plan_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    devices = {"cpu": plan_device(torch.device("cpu"))}
    for device in found or [{"device": "cuda", "capability": 90}]:
        devices[f"cuda {device['capability'] / 10}"] = device
    return devices


def collect_plan(shape: tuple[int, ...], dtype: str, itemsize: int) -> dict[str, Any]:
    """The plan for a block's sites, per kind of device, for inference and for training."""
    sources, queries, tokens, hidden = shape
    plans = []
    for name, device in _planned_devices().items():
        for training in (False, True):
            plan = _C.plan(
                num_sources=sources,
                num_queries=queries,
                num_tokens=tokens,
                hidden=hidden,
                itemsize=itemsize,
                training=training,
                **device,
            )
            plans.append(
                {
                    "device": name,
                    "for": "training" if training else "inference",
                    "plan": "two phases" if plan.two_phase else "single pass",
                    "bytes, single pass": plan.bytes_single_pass,
                    "bytes, two phases": plan.bytes_two_phase,
                    "tile": plan.tile_tokens,
                    "reason": plan.reason,
                }
            )
    described = f"N={sources} S={queries} M={tokens} D={hidden} {dtype}"
    return {
        "shape": described,
        "plans": plans,
        "kernels": _kernels(sources, queries, hidden, dtype),
    }


def _kernels(sources: int, queries: int, hidden: int, dtype: str) -> list[dict[str, str]]:
    """How the CUDA kernels of a site with an output norm, and of phase 1, cut their work."""
    kernels = []
    for name, device in _planned_devices().items():
        if device["device"] != "cuda":
            continue
        facts = {key: value for key, value in device.items() if key != "device"}
        for operator in (
            "depth_attention",
            "accumulate_depth_attention",
            "inter_block_attention",
            "merge_partial",
        ):
            row = {"device": name, "operator": operator}
            for direction in ("forward", "backward"):
                config = _C.kernel_config(
                    operator,
                    direction,
                    sources,
                    hidden,
                    dtype,
                    norm=True,
                    num_queries=queries,
                    **facts,
                )
                row[direction] = config or "general body"
            kernels.append(row)
    return kernels


def collect_state(
    model: str, residual: str | None, dtype: str, batch_size: int, length: int
) -> dict[str, Any]:
    """What a decoder of a model keeps: bytes of every part, and what they grow with.

    Args:
        model: A preset's name, or the path of a ``config.json``.
        residual: Residual mode in place of the model's own.
        dtype: Of weights and activations.
        batch_size: Sequences.
        length: Tokens to have room for.

    Raises:
        UserError: There is no such model, or it cannot work, or is too short.
    """
    config = read_config(model, residual)
    if length > config.model_max_length:
        raise UserError(
            f"--length {length} is more than the {config.model_max_length} tokens that the model "
            "was made for (model_max_length)"
        )
    with torch.device("meta"):
        decoder = KimiLinearForCausalLM(config).to(getattr(torch, dtype))
        state = decoder.new_state(batch_size, length)
    recurrent = [layer for layer in state.layers if isinstance(layer, KimiDeltaState)]
    latents = [layer.latents for layer in state.layers if isinstance(layer, KimiLatentState)]
    slots = decoder.residual.num_blocks + 1
    parts = (
        ("KDA memories", sum(layer.memory.nbytes for layer in recurrent), "layers"),
        ("KDA convolutions", sum(layer.convolutions.nbytes for layer in recurrent), "layers"),
        ("MLA latents", sum(latent.nbytes for latent in latents), "layers, tokens"),
        ("block cache", state.block_cache.nbytes, f"blocks ({slots} slots)"),
    )
    mode = f"{config.residual} residual, {config.num_hidden_layers} layers"
    return {
        "model": f"{model}, {mode}, {batch_size} x {length} tokens, {dtype}",
        "parts": [{"part": name, "bytes": size, "grows with": by} for name, size, by in parts],
    }
