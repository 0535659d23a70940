"""Forecast of demand: the arrival rate, and how the next arrivals are distributed over the SLMs.

The distribution is a mixture of four components. Three are decayed counts, with half-lives of 8, 64
and 512 arrivals; the fourth is a decayed first-order transition matrix (which SLM follows which).
The weight of a component is the exponential of its decayed log-likelihood, which is Bayesian model
averaging with forgetting (Raftery et al., Technometrics 52(1), 2010). So bursts and cycles are
forecast by the component that captures them, and demand without such structure by the counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calm_serve.telemetry import DecayedRate, decay

Floats = npt.NDArray[np.float64]

COUNT_HALF_LIVES = (8.0, 64.0, 512.0)  # arrivals
SCORE_HALF_LIFE = 48.0  # arrivals, of a component's log-likelihood
TRANSITION_HALF_LIFE = 128.0  # arrivals of the same SLM
# The rate sets how many arrivals one residence is worth. Chosen by hand, long enough for some
# arrivals and short against a change of load. The unit tests of this room do not notice 60 s.
RATE_HALF_LIFE_S = 5.0
PRIOR_COUNT = 0.25  # arrivals per SLM, so that none has the probability 0
MAX_STEPS = 64  # arrivals ahead for which the transition matrix is applied
MAX_SLMS = 512
# Weight of the transition matrix below which it is not applied for several steps: it would move an
# expectation by less than this share, and costs SLMs^2 operations a step.
MIN_TRANSITION_WEIGHT = 0.01


class Forecast:
    """Expected arrivals per SLM, learned from the sequence of preferred SLMs. Memory: O(SLMs^2)."""

    def __init__(self) -> None:
        self._decays: Floats = np.array([[decay(1.0, h)] for h in COUNT_HALF_LIVES])
        self._scores: Floats = np.zeros(len(COUNT_HALF_LIVES) + 1)
        self._last: int | None = None  # index of the SLM of the last arrival
        self._resize(())
        self._rate: DecayedRate | None = None  # from the first arrival on

    def set_slms(self, slm_ids: tuple[str, ...]) -> None:
        """Follow SLMs that joined or left; those that stay keep their counts."""
        ids = slm_ids[:MAX_SLMS]
        if ids == tuple(self._index):
            return
        kept = [(self._index[i], n) for n, i in enumerate(ids) if i in self._index]
        old, new = [o for o, _ in kept], [n for _, n in kept]
        counts, transitions = self._counts, self._transitions
        self._resize(ids)
        self._last = dict(kept).get(self._last) if self._last is not None else None
        self._counts[:, new] = counts[:, old]
        self._transitions[np.ix_(new, new)] = transitions[np.ix_(old, old)]

    def observe(self, slm_id: str, now: float) -> None:
        """Count one arrival; an unknown SLM is ignored. `now` is in seconds."""
        position = self._index.get(slm_id)
        if position is None:
            return
        seen = np.log(self._components()[:, position])
        self._scores = self._scores * decay(1.0, SCORE_HALF_LIFE) + seen
        self._counts *= self._decays
        self._counts[:, position] += 1.0
        if self._last is not None:
            row = self._transitions[self._last]
            row *= decay(1.0, TRANSITION_HALF_LIFE)
            row[position] += 1.0
        self._last = position
        if self._rate is None:
            self._rate = DecayedRate(RATE_HALF_LIFE_S, now)
        self._rate.add(1.0, now)

    def rate_per_s(self, now: float) -> float:
        """Arrivals per second, all SLMs together."""
        return 0.0 if self._rate is None else self._rate.per_s(now)

    def expected(self, arrivals: float) -> dict[str, float]:
        """How many of the next `arrivals` each SLM will get; zeros before the first arrival."""
        if self._rate is None:
            return dict.fromkeys(self._index, 0.0)
        shares = self._shares(arrivals)
        return {slm_id: float(arrivals * shares[n]) for slm_id, n in self._index.items()}

    def _shares(self, arrivals: float) -> Floats:
        weights = np.exp(self._scores - self._scores.max())
        weights /= weights.sum()
        components = self._components()
        if (steps := min(round(arrivals), MAX_STEPS)) > 1 and weights[-1] > MIN_TRANSITION_WEIGHT:
            matrix = self._transition_matrix()
            ahead = total = components[-1]
            for _ in range(steps - 1):
                ahead = ahead @ matrix
                total = total + ahead
            components[-1] = total / steps
        mixed: Floats = weights @ components
        return mixed

    def _components(self) -> Floats:
        """One distribution over the SLMs per row; the transition matrix's is the last row."""
        smooth = self._counts + PRIOR_COUNT
        rows = smooth / smooth.sum(axis=1, keepdims=True)
        if self._last is None:
            return np.vstack([rows, rows[-1:]])
        # After few transitions the row is close to the counts of the middle half-life.
        row = self._transitions[self._last] + rows[1]
        return np.vstack([rows, row / row.sum()])

    def _transition_matrix(self) -> Floats:
        base = self._counts[1] + PRIOR_COUNT
        smooth = self._transitions + base / base.sum()
        matrix: Floats = smooth / smooth.sum(axis=1, keepdims=True)
        return matrix

    def _resize(self, ids: tuple[str, ...]) -> None:
        size = len(ids)
        self._index: dict[str, int] = {slm_id: n for n, slm_id in enumerate(ids)}
        self._counts: Floats = np.zeros((len(COUNT_HALF_LIVES), size))
        self._transitions: Floats = np.zeros((size, size))
