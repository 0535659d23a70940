"""Measured over predicted of one quantity of one SLM: the one estimator, and its half-lives.

The router corrects TTFT by its level and prices the risk of missing an SLO by its spread; the goals
correct the predictions of their window by it; the knowledge actor finds drift by its change test.
Everything is a decayed sum, O(1) in time and memory, and forgets by answers, not by seconds.
"""

from __future__ import annotations

import math

from calm_serve.telemetry.change_detection import LevelChange
from calm_serve.telemetry.statistics import DecayedLine, decay
from calm_serve.types import PRIOR_SPREAD, LoadAtDecision, Outcome, SLMState

# Half-lives, in answers of one SLM. How fast a goal holds again after a shift depends on them
# (bounds in tests/unit/goals, figures in decisions/0033).
TIME_HALF_LIFE = 8.0  # level and slope of a time: they follow a change of load or hardware
SPREAD_HALF_LIFE = 32.0  # a second moment needs more answers than a mean
JOULES_HALF_LIFE = 16.0  # joules scatter more; all of them tell a mean

PRIOR_ANSWERS = 2.0  # weight of "the prediction is right"
SPREAD_PRIOR_ANSWERS = 4.0
MIN_SPREAD = 0.05  # a smaller one, of a few like answers, is chance and no certainty
MAX_LOG_RATIO = 3.0  # a factor of 20: beyond it an answer is an accident and counts as this
MIN_RATIO, MAX_RATIO = math.exp(-MAX_LOG_RATIO), math.exp(MAX_LOG_RATIO)
TINY_S = 1e-6  # instead of a prediction of 0 seconds

# Engines on one machine take each other's cores. Slope of log(latency) over the logarithm of all
# requests in flight, until it is measured; 0.4 to 0.7 with six engines on 2 cores.
LATENCY_SLOPE, MAX_LATENCY_SLOPE = 0.5, 1.5
# Sum of squares of the logarithm that the stated slope is worth, chosen by hand: at steady load the
# measured slope is mostly noise. tests/unit/telemetry/test_residuals.py notices ten times as much,
# not a tenth.
LATENCY_RIDGE = 4.0
# An engine's step costs about the same whoever is in it, so a token's joules fall with the number
# of requests that share its steps. Share of a lone token's joules that is the step's, until it is
# measured; 0.8 to 0.95 on small models on CPU.
STEP_SHARE = 0.8
ENERGY_RIDGE = 16.0  # tokens times squares of 1 / requests that the stated slope is worth

# Page-Hinkley test on log(measured / predicted). With the residuals of a served fleet (standard
# deviation 0.3 to 0.7), TPOT twice as long is found in 9 to 12 answers, a third more in 40.
CHANGE_SLACK, CHANGE_LIMIT = 0.15, 6.0

_SPREAD_KEEP = decay(1.0, SPREAD_HALF_LIFE)


class LoadLine:
    """A positive quantity of one SLM as a power of the requests that the whole fleet has in flight.

    Its logarithm is a line over the logarithm of the requests, the newest one included. Reading is
    on the path of every decision, so the line is made when an answer comes.

    Args:
        prior_answers: weight, in answers, of the level and slope 0 that it starts from.
    """

    __slots__ = ("_level", "_line", "_prior_answers", "_slope", "answers")

    def __init__(self, prior_answers: float = 0.0) -> None:
        self._prior_answers = prior_answers
        self.reset()

    def reset(self) -> None:
        """Forget all answers."""
        self._line = DecayedLine(TIME_HALF_LIFE)
        self._level = self._slope = 0.0
        self.answers = 0

    @property
    def trust(self) -> float:
        """Share of the level and the slope that is measured and not the prior's, in [0, 1]."""
        # All answers count, or the level would stay too near to 0 for ever.
        return self.answers / (self.answers + self._prior_answers) if self.answers else 0.0

    def add(self, value: float, in_flight: int = 1) -> None:
        """Count a value above 0 of a request that made it `in_flight`."""
        self.answers += 1
        self._line.add(math.log(max(in_flight, 1)), math.log(value))
        slope = self._line.slope(LATENCY_SLOPE, LATENCY_RIDGE)
        self._slope = min(max(slope, 0.0), MAX_LATENCY_SLOPE)
        x, y = self._line.means
        self._level = y - self._slope * x
        trust = self.trust
        self._level *= trust
        self._slope *= trust

    def log_at(self, log_in_flight: float = 0.0) -> float:
        """The logarithm for a request that makes it so many; 0 before the first answer."""
        return self._level + self._slope * log_in_flight


class ResidualEstimator:
    """Measured over predicted: level, slope over load, spread, and a test for a change.

    A prediction may have been corrected by this very estimator; `add` is told by how much, so that
    what was corrected is not learned again and the spread is that of the corrected predictions.

    Args:
        change_limit: of the change test, summed logarithms; None for no test.
    """

    __slots__ = ("_change", "_line", "_squares", "_weight", "spread")

    def __init__(self, change_limit: float | None = None) -> None:
        self._line = LoadLine(PRIOR_ANSWERS)
        self._weight = SPREAD_PRIOR_ANSWERS
        self._squares = SPREAD_PRIOR_ANSWERS * PRIOR_SPREAD**2
        self.spread = PRIOR_SPREAD  # root mean square of log(measured / predicted)
        self._change = None if change_limit is None else LevelChange(CHANGE_SLACK, change_limit)

    def add(self, ratio: float, in_flight: int = 1, applied: float = 1.0) -> float | None:
        """Count an answer; the size of the change of log(ratio), when one was found.

        Args:
            ratio: measured over predicted, above 0.
            in_flight: requests inside all SLMs at the decision, this one included.
            applied: the factor by which the prediction had been corrected.
        """
        self._line.add(min(max(ratio * applied, MIN_RATIO), MAX_RATIO), in_flight)
        log_ratio = math.log(min(max(ratio, MIN_RATIO), MAX_RATIO))
        self._weight = self._weight * _SPREAD_KEEP + 1.0
        self._squares = self._squares * _SPREAD_KEEP + log_ratio**2
        self.spread = max(math.sqrt(self._squares / self._weight), MIN_SPREAD)
        return None if self._change is None else self._change.add(log_ratio)

    @property
    def trust(self) -> float:
        """As `LoadLine.trust`."""
        return self._line.trust

    def at(self, log_in_flight: float = 0.0) -> float:
        """The ratio for a request that makes it so many; 1 before the first answer."""
        return math.exp(self.log_at(log_in_flight))

    def log_at(self, log_in_flight: float = 0.0) -> float:
        """Its logarithm."""
        log_ratio = self._line.log_at(log_in_flight)
        if not -MAX_LOG_RATIO <= log_ratio <= MAX_LOG_RATIO:
            log_ratio = math.copysign(MAX_LOG_RATIO, log_ratio)
        return log_ratio

    def reset(self) -> None:
        """Forget level and slope: another predictor decides, with an error of its own."""
        self._line.reset()


class TotalRatio:
    """Sum of what was measured over the sum of what was predicted.

    For what is held as a mean: a log ratio would count a short answer like a long one.
    """

    __slots__ = ("_answers", "_sums")

    def __init__(self) -> None:
        self._sums = DecayedLine(JOULES_HALF_LIFE)
        self._answers = 0

    @property
    def trust(self) -> float:
        """As `LoadLine.trust`."""
        return self._answers / (self._answers + PRIOR_ANSWERS)

    def log_at(self) -> float:
        """The logarithm of the ratio; 0 before the first answer."""
        if not self._answers:
            return 0.0
        predicted, measured = self._sums.means
        return self.trust * math.log(measured / predicted)

    def add(self, measured: float, predicted: float) -> None:
        """Count an answer; both above 0."""
        self._answers += 1
        self._sums.add(predicted, measured)


class TokenEnergy:
    """Joules per output token of one SLM: b + a / n with n requests in its steps, a and b >= 0."""

    __slots__ = ("_line", "_step_j", "_token_j")

    def __init__(self) -> None:
        self._line = DecayedLine(JOULES_HALF_LIFE)
        self._step_j = self._token_j = 0.0

    def add(self, joules_per_token: float, running: float, tokens: int) -> None:
        """Count an answer of `tokens` that began with `running` requests inside, itself included.

        Weighed by tokens, so that the line keeps the total.
        """
        line = self._line
        line.add(1.0 / max(running, 1.0), joules_per_token, float(tokens))
        shared, mean_j = line.means
        prior = mean_j * STEP_SHARE / (1.0 - STEP_SHARE + STEP_SHARE * shared)
        slope = line.slope(prior, ENERGY_RIDGE)
        self._step_j = min(max(slope, 0.0), mean_j / shared)
        self._token_j = mean_j - self._step_j * shared

    def next_j(self, running: float) -> float | None:
        """Joules per token of one more request beside `running` others; None before an answer."""
        if not self._line.weight:
            return None
        return self._token_j + self._step_j / (running + 1.0)


def load_at_decision(state: SLMState) -> LoadAtDecision:
    """The load that a request meets; `state` is that of its decision."""
    inside = (state.running + state.waiting) / max(state.replicas, 1)
    return LoadAtDecision(round(inside + 1.0, 2), state.in_flight + 1, round(state.ttft_ratio, 4))


class SLMResiduals:
    """What the answers of one SLM say of its predictions and of the load they met.

    `load_at_decision` is that load. TPOT has no prediction of its own (it is what was measured),
    and joules of a token are not a ratio: both are lines over the load.
    """

    __slots__ = ("_champion", "e2e", "energy", "tpot", "ttft")

    def __init__(self, champion: str | None = None) -> None:
        self._champion = champion
        self.energy = TokenEnergy()
        self.tpot = LoadLine()
        self.ttft, self.e2e = ResidualEstimator(), ResidualEstimator()

    def set_champion(self, champion: str) -> None:
        """Count predictions of this predictor only; the TTFT ratio of another one is forgotten.

        A new predictor may have learned what the ratio corrects. Boosters of cold-start SLMs
        predict no TTFT, so their version does not matter. Until this is called, predictions of
        every predictor count.
        """
        if self._champion not in (None, champion):
            self.ttft.reset()
        self._champion = champion

    def observe(self, outcome: Outcome) -> None:
        """Count an answer, unless its SLM had to wake or its load was not written down."""
        load, timing, engine = outcome.decision.load, outcome.timing, outcome.engine
        if outcome.status != "ok" or timing.cold or load is None:
            return
        if engine.energy_j is not None and engine.output_tokens > 0:
            joules = engine.energy_j / engine.output_tokens
            self.energy.add(joules, load.running, engine.output_tokens)
        if timing.tpot_s:
            self.tpot.add(timing.tpot_s, load.in_flight)
        predicted = outcome.decision.predicted
        if predicted is None or not timing.ttft_s or not timing.e2e_s:
            return  # a rule's decision predicts nothing
        if self._champion not in (None, outcome.decision.versions.predictor.champion):
            return  # decided before the present predictor came
        ratio = timing.ttft_s / max(predicted.ttft_s, TINY_S)
        self.ttft.add(ratio, load.in_flight, load.ttft_ratio)
        self.e2e.add(timing.e2e_s / max(predicted.e2e_s, TINY_S))
