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

#: What tests and benchmark import beside the package, by the name to install.
_NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "expecttest": "expecttest",
    "rich": "rich",
}
_OLDEST_TORCH = (2, 10)

_PROBE = f"""
import importlib.util, json, sys, sysconfig, warnings
needed = {_NEEDED!r}
found = {{
    "python": list(sys.version_info[:2]),
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "includes": [sysconfig.get_path("include")],
    "packages": sysconfig.get_path("purelib"),
    "missing": [n for m, n in needed.items() if importlib.util.find_spec(m) is None],
}}
if "torch" not in found["missing"]:
    import torch
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A driver that is too old for this torch is a warning.
    found["warning"] = str(caught[0].message).splitlines()[0] if caught else ""
    found["gpus"] = [
        {{
            "name": torch.cuda.get_device_name(i),
            "capability": 10 * torch.cuda.get_device_capability(i)[0]
            + torch.cuda.get_device_capability(i)[1],
        }}
        for i in range(count)
    ]
    # torch carries pybind11's headers, for Pythons that lack it.
    found["includes"].append(torch.__path__[0] + "/include")
if importlib.util.find_spec("pybind11") is not None:
    import pybind11
    found["includes"].insert(1, pybind11.get_include())
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

    @property
    def blindness(self) -> str:
        """Why its torch sees no GPU."""
        torch = f"{self.path} has torch {self.facts['torch']}, which"
        if self.facts["cuda"] is None:
            return f"{torch} was built without CUDA; one from pytorch.org for CUDA is needed"
        why = f" ({self.facts['warning']})" if self.facts["warning"] else ""
        return f"{torch} sees no NVIDIA GPU{why}"

    @property
    def complaint(self) -> str | None:
        """Why tests cannot run with it at all, or None."""
        if "torch" in self.facts:
            numbers = self.facts["torch"].split("+")[0].split(".")[:2]
            if tuple(map(int, numbers)) < _OLDEST_TORCH:
                oldest = ".".join(map(str, _OLDEST_TORCH))
                return f"{self.path} has torch {self.facts['torch']}, expected {oldest} or later"
        missing = self.facts["missing"]
        if missing:
            command = f"{self.path} -m pip install {' '.join(missing)}"
            return f"{self.path} lacks {', '.join(missing)}; `{command}` gets them"
        return None


def find(candidates: Sequence[str], device: str, run: Run, logs: Path) -> Python:
    """The first Python that can check ``device`` ("cuda" or "cpu").

    Raises:
        CannotCheckError: none can; the message says why, for the one that is nearest to it.
    """
    complaints: list[tuple[int, str]] = []  # how far from a Python that can, and why it cannot
    for path in candidates:
        finished = run([path, "-c", _PROBE], 120, logs / "probe.log", {})
        lines = finished.output.strip().splitlines()
        if finished.code != 0 or not lines:
            why = lines[-1] if lines else "no output"
            complaints.append((3, f"{path} cannot be asked: {why}"))
            continue
        # Whatever torch warns about comes before the last line.
        python = Python(path, json.loads(lines[-1]))
        if device == "cuda" and "torch" in python.facts and not python.gpus:
            complaints.append((1, python.blindness))
        elif python.complaint is not None:
            complaints.append((0 if "torch" in python.facts else 2, python.complaint))
        else:
            return python
    if not complaints:
        raise CannotCheckError("there is no Python to check with")
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
