"""When requests arrive in an open loop: a Poisson process, or the Azure trace of code requests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random

TRACE = Path("azure_llm_2023") / "AzureLLMInferenceTrace_code.csv"  # below DATA_DIR


def poisson(rate_per_s: float, count: int, rng: Random) -> list[float]:
    """Seconds of `count` arrivals with exponential gaps."""
    at, found = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate_per_s)
        found.append(at)
    return found


def read_trace(data_dir: Path) -> list[float]:
    """Seconds of every arrival of the trace from its first one."""
    with (data_dir / TRACE).open(encoding="utf-8") as file:
        times = [row["TIMESTAMP"][:26] for row in csv.DictReader(file)]
    found = [datetime.fromisoformat(t).timestamp() for t in times]
    return [t - found[0] for t in found]


def scaled(trace: Sequence[float], start: int, count: int, rate_per_s: float) -> list[float]:
    """`count` arrivals of the trace from the one at `start` on, with their time scaled to a rate.

    What makes the trace bursty, the ratios of its gaps, is kept.
    """
    window = trace[start : start + count]
    first, length = window[0], window[-1] - window[0]
    scale = (count - 1) / rate_per_s / length
    return [(t - first) * scale for t in window]


def variation(at_s: Sequence[float]) -> float:
    """Coefficient of variation of the gaps: 1 for Poisson, more for bursts."""
    gaps = [b - a for a, b in pairwise(at_s)]
    mean = sum(gaps) / len(gaps)
    return float((sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean)
