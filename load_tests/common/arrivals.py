"""Arrival times of open loops: Poisson processes, and the Azure trace of code requests."""

from __future__ import annotations

import csv
import math
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


def world_cup(hour: float) -> float:
    """Arrivals at an hour of the day, in [0, 24), over the mean of the day.

        (0.4 + 0.5 g(11, 2) + 0.6 g(20, 2.5) + g(14.5, 0.4) + g(17.5, 0.4) + g(21, 0.4)) / c
        g(m, s) = exp(-(hour - m)^2 / (2 s^2))

    The shape follows Arlitt and Jin's report on the web site of the 1998 football world cup
    (HPL-1999-35): few at night, a peak in the late morning, a higher one in the evening, and on top
    a spike at every match (here 14:30, 17:30 and 21:00). The highest is 2.5 times the mean.
    """
    return _world_cup(hour) / _WORLD_CUP_MEAN


def day(count: int, rate_per_s: float, rng: Random) -> list[float]:
    """Seconds of `count` arrivals of an inhomogeneous Poisson process: one compressed day.

    The day lasts `count / rate_per_s` seconds and its intensity follows `world_cup`. Given the
    number of arrivals, their times are independent draws from the intensity.
    """
    hours: list[float] = []
    while len(hours) < count:
        hour = 24.0 * rng.random()
        if rng.random() * _WORLD_CUP_PEAK <= world_cup(hour):
            hours.append(hour)
    length_s = count / rate_per_s
    return [hour / 24.0 * length_s for hour in sorted(hours)]


def read_trace(data_dir: Path) -> list[float]:
    """Seconds from the first arrival of the trace to each."""
    with (data_dir / TRACE).open(encoding="utf-8") as file:
        times = [row["TIMESTAMP"][:26] for row in csv.DictReader(file)]
    found = [datetime.fromisoformat(t).timestamp() for t in times]
    return [t - found[0] for t in found]


def scaled(trace: Sequence[float], start: int, count: int, rate_per_s: float) -> list[float]:
    """`count` arrivals of the trace from index `start` on, with their times scaled to a mean rate.

    The ratios between gaps are kept, so the window is as bursty as in the trace.
    """
    window = trace[start : start + count]
    first, length = window[0], window[-1] - window[0]
    scale = (count - 1) / rate_per_s / length
    return [(t - first) * scale for t in window]


def variation(at_s: Sequence[float]) -> float:
    """Coefficient of variation of the gaps: 1 for a Poisson process, more for bursts."""
    gaps = [b - a for a, b in pairwise(at_s)]
    mean = sum(gaps) / len(gaps)
    return float((sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean)


def _world_cup(hour: float) -> float:
    peaks = ((0.5, 11.0, 2.0), (0.6, 20.0, 2.5), *((1.0, at, 0.4) for at in (14.5, 17.5, 21.0)))
    return 0.4 + sum(a * math.exp(-((hour - m) ** 2) / (2.0 * s * s)) for a, m, s in peaks)


_MINUTES = [_world_cup(minute / 60.0) for minute in range(24 * 60)]
_WORLD_CUP_MEAN = sum(_MINUTES) / len(_MINUTES)
_WORLD_CUP_PEAK = max(_MINUTES) / _WORLD_CUP_MEAN * 1.001  # the peak may be between two minutes
