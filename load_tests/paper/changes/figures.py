"""Figures of the served changes of the `paper` experiment. Counts start at the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from load_tests.common import report
from load_tests.paper.figures import Figures, Record
from load_tests.paper.simulated.adaptation import (
    GOAL_TOLERANCE,
    LOST_RATIO,
    SHARE_RATIO,
    SHORT,
    first_window,
)

WINDOW = 60  # requests over which a goal's metric is taken
SETTLED = 200  # requests after the change from which on the goal is expected to hold


def measured(records: Sequence[Record], metric: str) -> float:
    """Mean of `energy_j`, or 95th percentile of `latency_s`; an error has infinite latency."""
    values = np.array([getattr(r, metric) for r in records])
    if metric == "latency_s":
        return float(np.quantile(np.nan_to_num(values, nan=np.inf), 0.95, method="higher"))
    return float(np.nanmean(values))


def goal(metric: str, limit: float, after: Sequence[Record], without: Sequence[Record]) -> Figures:
    """Requests until the goal holds within 10 % over the next WINDOW of them; state later."""
    values = windows(after, metric)
    within = [value <= GOAL_TOLERANCE * limit for value in values]
    return {
        "recovery_requests": next((i for i, ok in enumerate(within) if ok), len(after)),
        # From here on the goal holds to the end; it may have held earlier and been missed again.
        "settled_requests": max((i + 1 for i, ok in enumerate(within) if not ok), default=0),
        "held_ratio": float(np.mean(within)),
        "worst_ratio": max(values) / limit,
        "over_goal_ratio": measured(after[SETTLED:], metric) / limit,
        "without_ratio": measured(without, metric) / limit,
        "credit": credit(after[SETTLED:]),
        "without_credit": credit(without),
    }


def windows(records: Sequence[Record], metric: str) -> list[float]:
    """The metric of every WINDOW consecutive requests, by the index of the first."""
    return [measured(records[i : i + WINDOW], metric) for i in range(len(records) - WINDOW + 1)]


def drain(before: Sequence[Record], during: Sequence[Record], slm: str) -> Figures:
    """A broken SLM's own requests until it has lost its traffic; see `adaptation.broken_slm`."""

    def sent(record: Record) -> bool:
        return record.slm == slm

    usual = share(before, slm)
    lost = first_window(during, sent, SHORT, lambda part: part <= LOST_RATIO * usual)
    return {
        "usual_share": usual,
        "lost": lost < len(during),
        "drain_requests": sum(map(sent, during[: lost + SHORT])),
        "last_share_ratio": share(during[-SHORT:], slm) / usual,
        "credit": credit(during),
        "usual_credit": credit(before),
    }


def adoption(known: Sequence[Record], after: Sequence[Record], slm: str) -> Figures:
    """Requests until a joining SLM has the share that a predictor trained on it gives it.

    `known` (such a predictor) and `after` (the joining SLM) have the same requests in the same
    order; shares are over the next SHORT requests.
    """
    places = range(min(len(known), len(after)) - SHORT + 1)
    ratios = [share(after[i : i + SHORT], slm) / share(known[i : i + SHORT], slm) for i in places]
    return {
        "share": share(known, slm),
        "adoption_requests": next(
            (i for i, ratio in enumerate(ratios) if ratio >= SHARE_RATIO), len(after)
        ),
        "first_share_ratio": ratios[0],
        "last_share_ratio": ratios[-1],
        "credit": credit(after),
        "known_credit": credit(known),
    }


def share(records: Sequence[Record], slm: str) -> float:
    """Share of the requests that the SLM answered."""
    return float(np.mean([r.slm == slm for r in records]))


def credit(records: Sequence[Record]) -> float:
    """Mean credit of the answers."""
    return float(np.mean([r.credit for r in records]))


def running(records: Sequence[Record], of: Callable[[Record], float], length: int) -> list[float]:
    """Mean over the last `length` requests, by index; NaN until there are that many."""
    sums = np.cumsum([0.0, *(of(r) for r in records)])
    means = (sums[length:] - sums[:-length]) / length
    return [float("nan")] * (length - 1) + [float(m) for m in means]


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures, one per row."""
    rows = [
        [name, _formatted(value)] for name, value in figures.items() if name.startswith("live.")
    ]
    print("\nserved changes, in requests from the change on")
    print(report.table(["figure", "measured"], rows), flush=True)


def _formatted(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
