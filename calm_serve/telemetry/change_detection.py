"""Change detectors: CUSUM, Page-Hinkley test, population stability index.

Each keeps a few numbers and counts events, not seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# Population stability index. The usual bounds of credit scoring are: below 0.1 no shift, above 0.25
# another population (Siddiqi, Credit Risk Scorecards, 2006). An alarm ends below PSI_CLEAR.
PSI_ALARM, PSI_CLEAR = 0.25, 0.15
RECENT_REQUESTS, USUAL_REQUESTS = 300, 5_000  # spans of the two histograms
WARM_UP = 50  # values of the first mean of a Page-Hinkley test
MEAN_WARM_UPS = 20  # length of its running mean, in warm-ups


class Cusum:
    """One-sided cumulative sum of what exceeds `slack` (Page, Biometrika 41, 1954).

    The sum falls back to 0 between changes, so `run` counts the values since the change began:
    Page's estimate of when it did. Feed deviations for a rise, their negatives for a fall.
    """

    __slots__ = ("_limit", "_slack", "_sum", "change", "run")

    def __init__(self, slack: float, limit: float) -> None:
        self._slack, self._limit = slack, limit
        self._sum = 0.0
        self.run = 0
        self.change = 0.0

    def add(self, deviation: float, limit_ratio: float = 1.0) -> bool:
        """Count a value; True when the sum exceeds `limit_ratio` of the limit, and starts anew.

        Then `run` and `change` (the mean deviation of its values) describe the change until the
        next value is added.
        """
        if self._sum <= 0.0:
            self._sum, self.run = 0.0, 0
        self._sum += deviation - self._slack
        if self._sum <= 0.0:
            return False
        self.run += 1
        if self._sum <= limit_ratio * self._limit:
            return False
        self.change = self._sum / self.run + self._slack
        self._sum = 0.0
        return True

    def reset(self) -> None:
        """Set the sum to 0."""
        self._sum = 0.0


class LevelChange:
    """Two-sided Page-Hinkley test: the mean of a stream has moved.

    After a detected change the mean starts anew from the values that follow it (Gama et al.,
    "A survey on concept drift adaptation", ACM Computing Surveys 46(4), 2014, section 3.2).

    Args:
        slack: smaller deviations count against a change; in the stream's unit.
        limit: summed deviation that counts as a change, in the stream's unit.
        warm_up: values of the first mean, during which there is no test.
    """

    __slots__ = ("_count", "_down", "_mean", "_up", "_warm_up")

    def __init__(self, slack: float, limit: float, warm_up: int = WARM_UP) -> None:
        self._up, self._down = Cusum(slack, limit), Cusum(slack, limit)
        self._warm_up = warm_up
        self._count = 0
        self._mean = 0.0

    def add(self, value: float) -> float | None:
        """Count a value; return the size of a detected change (new level less old), else None."""
        self._count += 1
        deviation = value - self._mean
        # An ordinary mean at first, later one that follows slowly.
        self._mean += deviation / min(self._count, MEAN_WARM_UPS * self._warm_up)
        if self._count <= self._warm_up:
            return None
        rose, fell = self._up.add(deviation), self._down.add(-deviation)
        if not (rose or fell):
            return None
        self._count = 0
        self._up.reset()
        self._down.reset()
        return self._up.change if rose else -self._down.change


class PopulationShift:
    """Population stability index between recent requests and the usual ones.

    PSI = sum over bins of (recent - usual) * ln(recent / usual), shares in [0, 1]. Both histograms
    decay, over about `recent` and about `usual` requests, so a lasting shift becomes usual.
    Sampling alone gives an expected index of (bins - 1) * (1/n + 1/m) (Yurdakul, "Statistical
    properties of PSI", 2018), which is subtracted: with the defaults 0.1 for 32 bins.
    """

    __slots__ = ("_gain", "_new", "_old", "_slow", "_warm_up", "bins", "requests")

    def __init__(
        self, bins: int, recent: int = RECENT_REQUESTS, usual: int = USUAL_REQUESTS
    ) -> None:
        self.bins = bins
        self.requests = 0
        self._gain, self._slow = 1.0 / recent, 1.0 / usual
        self._warm_up = 2 * recent
        self._new, self._old = [1.0 / bins] * bins, [1.0 / bins] * bins

    def add(self, hits: Iterable[int]) -> None:
        """Count one request that falls into these bins; every request has the same weight."""
        found = list(hits)
        self.requests += 1
        if not found:
            return
        # The first requests are counted with equal weight, as there is nothing to decay.
        slow = max(self._slow, 1.0 / self.requests)
        fast = max(self._gain, 1.0 / self.requests)
        for shares, gain in ((self._new, fast), (self._old, slow)):
            keep, part = 1.0 - gain, gain / len(found)
            for index in range(self.bins):
                shares[index] *= keep
            for hit in found:
                shares[hit] += part

    def index(self) -> float:
        """The index less its expectation from sampling, at least 0; 0 during the warm-up."""
        if self.requests < self._warm_up:
            return 0.0
        floor = 0.5 / (self.bins / self._gain)  # half a request, spread over all bins
        psi = 0.0
        for new, old in zip(self._new, self._old, strict=True):
            new, old = max(new, floor), max(old, floor)
            psi += (new - old) * math.log(new / old)
        # An exponential window of mean age 1/gain has the variance of 2/gain - 1 equal weights.
        sizes = 0.5 * self._gain + 0.5 * max(self._slow, 1.0 / self.requests)
        return max(psi - (self.bins - 1) * sizes, 0.0)
