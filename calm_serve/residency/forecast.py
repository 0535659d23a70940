"""How many requests each SLM will get next: a rate, and a mixture of opinions on who is wanted.

Each opinion is a distribution over the SLMs for the next arrival. Three are decayed counts, with
half-lives of 8, 64 and 512 arrivals; one is a decayed first-order transition matrix (who follows
whom). They are mixed by how well each has predicted lately: the weight of an opinion is the
exponential of its decayed log-likelihood, which is Bayesian model averaging with forgetting
(Raftery et al., Technometrics 52(1), 2010). So a fleet whose requests come in bursts or in turns is
forecast by what shows it, and a fleet without such structure by the counts alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

HALF_LIVES = (8.0, 64.0, 512.0)  # arrivals
SCORE_HALF_LIFE = 48.0  # arrivals over which an opinion is judged
TRANSITION_HALF_LIFE = 128.0  # visits of the same SLM
RATE_HALF_LIFE_S = 5.0
PRIOR_COUNT = 0.25  # nobody is ever impossible
MAX_STEPS = 64  # arrivals that the transition matrix is followed for
MAX_SLMS = 512


class Forecast:
    """Arrivals per SLM, learned from the order in which SLMs were wanted. Memory: O(SLMs^2)."""

    def __init__(self) -> None:
        self._decays: Floats = np.array([[0.5 ** (1.0 / h)] for h in HALF_LIVES])
        self._scores: Floats = np.zeros(len(HALF_LIVES) + 1)
        self._last: int | None = None  # who was wanted last
        self._resize(())
        self._arrivals = 0.0  # decayed by time
        self._first: float | None = None
        self._at = 0.0

    def set_slms(self, slm_ids: tuple[str, ...]) -> None:
        """Follow SLMs that came or went; those that stay keep what is known of them."""
        ids = slm_ids[:MAX_SLMS]
        if ids == tuple(self._index):
            return
        kept = [(self._index[i], n) for n, i in enumerate(ids) if i in self._index]
        old, new = [o for o, _ in kept], [n for _, n in kept]
        counts, follows = self._counts, self._follows
        self._resize(ids)
        self._last = dict(kept).get(self._last) if self._last is not None else None
        self._counts[:, new] = counts[:, old]
        self._follows[np.ix_(new, new)] = follows[np.ix_(old, old)]

    def observe(self, slm_id: str, now: float) -> None:
        """Count one arrival; an unknown SLM is ignored. `now` is in seconds."""
        position = self._index.get(slm_id)
        if position is None:
            return
        seen = np.log(self._opinions()[:, position])
        self._scores = self._scores * 0.5 ** (1.0 / SCORE_HALF_LIFE) + seen
        self._counts *= self._decays
        self._counts[:, position] += 1.0
        if self._last is not None:
            row = self._follows[self._last]
            row *= 0.5 ** (1.0 / TRANSITION_HALF_LIFE)
            row[position] += 1.0
        self._last = position
        self._first = now if self._first is None else self._first
        self._arrivals = self._decayed(now) + 1.0
        self._at = max(now, self._at)

    def rate_per_s(self, now: float) -> float:
        """Arrivals per second, all SLMs together."""
        if self._first is None:
            return 0.0
        # A young window has not seen a full half-life; at least one second's worth of it.
        watched_s = max(now - self._first, 1.0)
        seen = 1.0 - 0.5 ** (watched_s / RATE_HALF_LIFE_S)
        return float(self._decayed(now) * np.log(2.0) / RATE_HALF_LIFE_S / seen)

    def expected(self, arrivals: float) -> dict[str, float]:
        """How many of the next `arrivals` each SLM will get; zeros before the first one came."""
        if self._first is None:
            return dict.fromkeys(self._index, 0.0)
        shares = self._shares(arrivals)
        return {slm_id: float(arrivals * shares[n]) for slm_id, n in self._index.items()}

    def _shares(self, arrivals: float) -> Floats:
        weights = np.exp(self._scores - self._scores.max())
        weights /= weights.sum()
        opinions = self._opinions()
        if (steps := min(round(arrivals), MAX_STEPS)) > 1 and weights[-1] > 0.01:
            matrix = self._transitions()
            ahead = total = opinions[-1]
            for _ in range(steps - 1):
                ahead = ahead @ matrix
                total = total + ahead
            opinions[-1] = total / steps
        mixed: Floats = weights @ opinions
        return mixed

    def _opinions(self) -> Floats:
        """One distribution per row, the transition matrix's last."""
        smooth = self._counts + PRIOR_COUNT
        rows = smooth / smooth.sum(axis=1, keepdims=True)
        if self._last is None:
            return np.vstack([rows, rows[-1:]])
        # Few visits: the row leans on the medium counts.
        row = self._follows[self._last] + rows[1]
        return np.vstack([rows, row / row.sum()])

    def _transitions(self) -> Floats:
        base = self._counts[1] + PRIOR_COUNT
        smooth = self._follows + base / base.sum()
        matrix: Floats = smooth / smooth.sum(axis=1, keepdims=True)
        return matrix

    def _decayed(self, now: float) -> float:
        return self._arrivals * float(0.5 ** (max(now - self._at, 0.0) / RATE_HALF_LIFE_S))

    def _resize(self, ids: tuple[str, ...]) -> None:
        size = len(ids)
        self._index: dict[str, int] = {slm_id: n for n, slm_id in enumerate(ids)}
        self._counts: Floats = np.zeros((len(HALF_LIVES), size))
        self._follows: Floats = np.zeros((size, size))
