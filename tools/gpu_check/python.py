"""The Python to check with: which one sees a GPU, what it lacks, how it imports the package."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check.process import ROOT, Run

#: What tests and benchmark import beside the package.
_NEEDED = ("torch", "numpy", "pytest", "hypothesis", "expecttest", "rich")
_OLDEST_TORCH = (2, 10)

_PROBE = f"""
import importlib.util, json, sys, sysconfig, warnings
found = {{
    "python": list(sys.version_info[:2]),
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "includes": [sysconfig.get_path("include")],
    "packages": sysconfig.get_path("purelib"),
    "missing": [name for name in {_NEEDED!r} if importlib.util.find_spec(name) is None],
}}
if importlib.util.find_spec("pybind11") is not None:
    import pybind11
    found["includes"].append(pybind11.get_include())
if "torch" not in found["missing"]:
    import torch
    # torch carries pybind11's headers, for Pythons that lack it.
    found["includes"].append(torch.__path__[0] + "/include")
    found |= {{"torch": torch.__version__, "cuda": torch.version.cuda}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A driver that is too old for this torch is a warning.
    found["warning"] = str(caught[0].message).splitlines()[0] if caught else ""
    found["gpus"] = []
    for i in range(count):
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        found["gpus"].append({{"name": name, "capability": 10 * major + minor}})
print(json.dumps(found))
"""


class CannotCheckError(Exception):
    """This machine, or this Python, cannot run the check; the message is a sentence."""


@dataclass(frozen=True)
class Python:
    """An interpreter and what it has.

    Attributes:
        path: the program.
        facts: what the probe found.
    """

    path: str
    facts: dict[str, Any]

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """Name and compute capability (10 * major + minor) of every GPU that torch sees."""
        return self.facts.get("gpus", [])

    def complaint(self, device: str) -> tuple[int, str] | None:
        """How far it is from being able to check ``device``, and why it cannot; None if it can."""
        torch = self.facts.get("torch")
        if torch is not None and device == "cuda" and not self.gpus:
            has = f"{self.path} has torch {torch}, which"
            if self.facts["cuda"] is None:
                return 1, f"{has} was built without CUDA; one for CUDA from pytorch.org is needed"
            why = f" ({self.facts['warning']})" if self.facts["warning"] else ""
            return 1, f"{has} sees no NVIDIA GPU{why}"
        if torch is not None and tuple(map(int, torch.split(".")[:2])) < _OLDEST_TORCH:
            oldest = ".".join(map(str, _OLDEST_TORCH))
            return 0, f"{self.path} has torch {torch}, expected {oldest} or later"
        if self.facts["missing"]:
            missing = self.facts["missing"]
            command = f"{self.path} -m pip install {' '.join(missing)}"
            distance = 2 if torch is None else 0
            return distance, f"{self.path} lacks {', '.join(missing)}; `{command}` gets them"
        return None


def find(candidates: Sequence[str], device: str, run: Run, logs: Path) -> Python:
    """The first Python that can check ``device`` ("cuda" or "cpu").

    Raises:
        CannotCheckError: none can; the message says why, for the one that is nearest to it.
    """
    complaints = [(4, "there is no Python to check with")]
    for path in candidates:
        finished = run([path, "-c", _PROBE], 120, logs / "probe.log", {})
        lines = finished.output.strip().splitlines() or ["no output"]
        if finished.code != 0:
            complaints.append((3, f"{path} cannot be asked: {lines[-1]}"))
            continue
        # Whatever torch warns about comes before the last line.
        python = Python(path, json.loads(lines[-1]))
        complaint = python.complaint(device)
        if complaint is None:
            return python
        complaints.append(complaint)
    raise CannotCheckError(min(complaints)[1])


def candidates() -> list[str]:
    """`make`'s environment, every python3 on the PATH, and the Python that runs this."""
    found = [str(ROOT / ".venv" / "bin" / "python")]
    found += [shutil.which("python3", path=folder) or "" for folder in os.get_exec_path()]
    found.append(sys.executable)
    return list(dict.fromkeys(path for path in found if path and Path(path).exists()))


def lay_out(folder: Path) -> Path:
    """Makes ``folder/attnres_ext`` the package as it would be installed, out of symbolic links.

    An interpreter imports it with ``folder`` in its PYTHONPATH; nothing is installed, and libraries
    that are built for this check go there instead of into the checkout.

    Returns:
        ``folder/attnres_ext``.
    """
    package = folder / "attnres_ext"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        if old.is_symlink():
            old.unlink()
    for path in [*(ROOT / "python" / "attnres_ext").iterdir(), ROOT / "benchmarks"]:
        if path.name != "__pycache__" and not (package / path.name).exists():
            (package / path.name).symlink_to(path)
    return package
