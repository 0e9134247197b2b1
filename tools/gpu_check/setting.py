"""What all parts of a check share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_check.process import Finished, Run
from tools.gpu_check.python import Python


@dataclass(frozen=True)
class Setting:
    """Who checks what, and where its output goes.

    Attributes:
        python: who runs the tests and the benchmark.
        device: "cuda", or "cpu" for a rehearsal.
        package: folder with the package, for PYTHONPATH.
        logs: folder for outputs.
        run: starts programs.
    """

    python: Python
    device: str
    package: Path
    logs: Path
    run: Run

    def start(
        self,
        part: str,
        arguments: list[str],
        seconds: float,
        patience: float = math.inf,
        **environment: str,
    ) -> Finished:
        """Runs a program with the package in reach; ``patience`` as for :func:`process.run`."""
        # The package first, then wherever the user has put what the Python lacks.
        path = [str(self.package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "120",
            **environment,
        }
        log = self.logs / f"{part}.log"
        return self.run([*arguments], seconds, log, variables, patience)
