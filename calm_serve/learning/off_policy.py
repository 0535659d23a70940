"""Off-policy estimates: the value of other choices of SLMs, estimated from logged outcomes.

An answer's value is `routing.reward` under the goals' weights, without SLO penalty and switching:
of its label and measured seconds and joules, or of a prediction. With r the logged value, p the
propensity of the logged SLM a, t the SLM that the evaluated policy chooses, m(s) the model's value
of SLM s for this request and w = min(1[t = a] / p, clip):

    direct method   mean of m(t)
    IPS             mean of w r
    self-normalised sum of w r / sum of w
    doubly robust   mean of m(t) + w (r - m(a))

(Dudik, Langford, Li: Doubly Robust Policy Evaluation and Learning, ICML 2011.) Weights are clipped
at the square root of the number of rows, at least MIN_CLIP (Ionides, Truncated Importance Sampling,
JCGS 17, 2008): for an SLM that was hardly ever tried, the interval is a little too short on its
side. A `mean_weight` well below 1 shows that this is the case. Labels are assumed to be missing at
random, given SLM and prompt. The effect of a moved request on the queues of its new SLM is not
estimated.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calm_serve.learning.decision_log import LoggedDecision
from calm_serve.learning.labels import quality_label
from calm_serve.learning.metrics import Values, ci95, resampled
from calm_serve.routing import reward
from calm_serve.types import Candidate, Outcome, Weights

METRICS = ("reward", "quality", "e2e_s", "energy_j")
MIN_CLIP = 10.0  # least clip of an importance weight
# Strength of the prior that the reward model has no bias on an SLM, in outcomes.
BIAS_PRIOR_ROWS = 10.0
MIN_WEIGHT_SUM = 1e-12  # avoids a division by zero where the policy never matches
_UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its bootstrap interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PolicyValue:
    """Four estimates of one policy's mean, and how much evidence the log has for them."""

    direct: Estimate
    ips: Estimate
    self_normalised: Estimate
    doubly_robust: Estimate
    rows: int
    matched_rows: int  # the policy chooses the logged SLM
    effective_rows: float  # (sum w)^2 / sum w^2, Kish
    mean_weight: float  # 1 in expectation; less where SLMs were never tried or weights clipped
    clip: float
    clipped_rows: int


@dataclass(frozen=True, slots=True)
class Log:
    """One metric of n logged choices against one evaluated policy; all arrays have shape (n,)."""

    value: Values  # measured
    propensity: Values  # of the logged SLM
    matched: NDArray[np.bool_]  # the policy chooses the logged SLM
    model_logged: Values  # reward model's value of the logged SLM
    model_target: Values  # the same of the policy's SLM

    @property
    def clip(self) -> float:
        """Largest weight."""
        return max(MIN_CLIP, math.sqrt(len(self.value)))

    @property
    def weights(self) -> Values:
        """Clipped importance weights."""
        found: Values = np.minimum(np.where(self.matched, 1.0 / self.propensity, 0.0), self.clip)
        return found

    @property
    def doubly_robust_terms(self) -> Values:
        """Contribution of each row to the doubly robust mean."""
        terms: Values = self.model_target + self.weights * (self.value - self.model_logged)
        return terms


def estimate(log: Log, *, seed: int) -> PolicyValue:
    """All four estimates. Raises ValueError for an empty log."""
    if not len(log.value):
        raise ValueError("nothing was logged")
    w, terms = log.weights, log.doubly_robust_terms
    columns = np.stack([log.model_target, w * log.value, w, terms], axis=1)
    count = len(columns)
    point = _four_means(columns.sum(axis=0)[None, :], count)[0]
    drawn = resampled(columns, lambda sums: _four_means(sums, count), seed=seed)
    direct, ips, normalised, robust = (
        Estimate(float(point[k]), ci95(drawn[:, k])) for k in range(4)
    )
    squares = float(np.sum(w * w))
    return PolicyValue(
        direct=direct,
        ips=ips,
        self_normalised=normalised,
        doubly_robust=robust,
        rows=count,
        matched_rows=int(log.matched.sum()),
        effective_rows=float(w.sum()) ** 2 / squares if squares else 0.0,
        mean_weight=float(w.mean()),
        clip=log.clip,
        clipped_rows=int(np.sum(log.matched & (1.0 / log.propensity > log.clip))),
    )


def mean_estimate(terms: Values, *, seed: int) -> Estimate:
    """The mean of paired terms with its interval."""
    drawn = resampled(terms[:, None], lambda sums: sums / len(terms), seed=seed)
    return Estimate(float(terms.mean()), ci95(drawn[:, 0]))


def _four_means(sums: Values, count: int) -> Values:
    found = sums / count
    found[:, 2] = sums[:, 1] / np.maximum(sums[:, 2], MIN_WEIGHT_SUM)
    return found


def measured(outcome: Outcome, weights: Weights) -> dict[str, float]:
    """The metrics of an outcome; NaN where one is unknown."""
    if outcome.status not in ("ok", "error"):  # rejected or cancelled: no evidence about the SLM
        return dict.fromkeys(METRICS, _UNKNOWN)
    label, done = quality_label(outcome.signals), outcome.status == "ok"
    # Failed answers have no label. Dropping them would bias the SLM's quality upwards, so they
    # count as 0; an unknown energy of theirs counts as 0 too.
    if_unknown = _UNKNOWN if done else 0.0
    quality = label[0] if label is not None else if_unknown
    e2e_s = outcome.timing.e2e_s if outcome.timing.e2e_s is not None else _UNKNOWN
    energy_j = outcome.engine.energy_j if outcome.engine.energy_j is not None else if_unknown
    ttft_s = outcome.timing.ttft_s or 0.0
    return {
        "reward": reward(weights, quality, ttft_s, e2e_s, energy_j)[0],
        "quality": quality,
        "e2e_s": e2e_s if done else _UNKNOWN,
        "energy_j": energy_j if done else _UNKNOWN,
    }


def expected(candidate: Candidate, weights: Weights) -> dict[str, float]:
    """The same metrics, as predicted for a candidate."""
    prediction = candidate.prediction
    assert prediction is not None
    quality, e2e_s, energy_j = candidate.quality, prediction.e2e_s, prediction.energy_j
    value, _, _ = reward(weights, quality, prediction.ttft_s, e2e_s, energy_j)
    return {"reward": value, "quality": quality, "e2e_s": e2e_s, "energy_j": energy_j}


class PolicyLog:
    """Logged choices next to those of named policies, in columns; about 150 bytes a row.

    The reward model's values are corrected by each SLM's mean error over the log, so a constant
    error in an SLM's speed does not bias the direct method.
    """

    def __init__(self, policies: Iterable[str]) -> None:
        self._policies = tuple(policies)
        self._slms: dict[str, int] = {}
        # Flat rows: propensity; METRICS measured, modelled of the logged SLM, and of each policy's.
        self._numbers = array("d")
        self._choices = array("q")  # index of the logged SLM, then of each policy's

    def __len__(self) -> int:
        return len(self._choices) // (1 + len(self._policies))

    def add(
        self,
        logged: LoggedDecision,
        model: Iterable[Candidate],
        choices: Mapping[str, str],
        weights: Weights,
    ) -> None:
        """Add one decision; `model` are all its candidates as the reward model predicts them."""
        by_slm = {c.slm_id: expected(c, weights) for c in model}
        names = [logged.chosen, *(choices[p] for p in self._policies)]
        value = measured(logged.outcome, weights)
        row = [logged.outcome.decision.propensity, *(value[m] for m in METRICS)]
        row += [by_slm[name][m] for name in names for m in METRICS]
        self._numbers.extend(row)
        self._choices.extend(self._slms.setdefault(name, len(self._slms)) for name in names)

    def metric(self, metric: str, policy: str) -> Log:
        """The rows in which a metric was measured."""
        at, which = METRICS.index(metric), 1 + self._policies.index(policy)
        kinds = 1 + len(self._policies)
        numbers = np.array(self._numbers).reshape(-1, 1 + (1 + kinds) * len(METRICS))
        choices = np.array(self._choices, dtype=np.int64).reshape(-1, kinds)
        known = ~np.isnan(numbers[:, 1 + at])
        numbers, choices = numbers[known], choices[known]
        model = numbers[:, 1 + len(METRICS) + at :: len(METRICS)]
        value, logged = numbers[:, 1 + at], choices[:, 0]
        error = np.bincount(logged, value - model[:, 0], minlength=len(self._slms))
        tried = np.bincount(logged, minlength=len(self._slms))
        bias = error / (tried + BIAS_PRIOR_ROWS)
        return Log(
            value=value,
            propensity=numbers[:, 0],
            matched=choices[:, which] == logged,
            model_logged=model[:, 0] + bias[logged],
            model_target=model[:, which] + bias[choices[:, which]],
        )

    def difference(self, metric: str, policy: str, other: str | None, *, seed: int) -> Estimate:
        """Doubly robust mean of `policy` less that of `other`, paired row by row.

        None stands for the logged policy, whose mean is measured. Raises ValueError when the metric
        was never measured.
        """
        log = self.metric(metric, policy)
        if not len(log.value):
            raise ValueError(f"no row has {metric}")
        less = log.value if other is None else self.metric(metric, other).doubly_robust_terms
        return mean_estimate(log.doubly_robust_terms - less, seed=seed)
