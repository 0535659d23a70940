"""What load does to one SLM, learned from what was measured of it: TTFT, TPOT, joules per token.

All are lines fitted by decayed least squares, O(1) in time and memory. A line with little behind
it, or whose load hardly varied, keeps a stated slope.
"""

from __future__ import annotations

import math

from calm_serve.telemetry.statistics import DecayedLine
from calm_serve.types import LoadAtDecision, Outcome, SLMState

# An engine's step costs about the same whoever is in it, so a token's joules fall with the number
# of requests that share its steps. Share of a lone token's joules that is the step's, until it is
# measured; 0.8 to 0.95 on small models on CPU.
STEP_SHARE = 0.8
ENERGY_HALF_LIFE = 64.0  # answers
ENERGY_RIDGE = 16.0  # tokens times squares of 1 / requests that the stated slope is worth
# Engines on one machine take each other's cores. Slope of log(latency) over the logarithm of all
# requests in flight, until it is measured; 0.4 to 0.7 with six engines on 2 cores.
LATENCY_SLOPE, MAX_LATENCY_SLOPE = 0.5, 1.5
LATENCY_HALF_LIFE = 12.0  # answers: level and slope follow a change of load
LATENCY_RIDGE = 4.0
PRIOR_ANSWERS = 2.0  # weight of "the predicted TTFT is right"
MAX_LOG_RATIO = 3.0  # a factor of 20
SPREAD_HALF_LIFE = 32.0
SPREAD_PRIOR_ANSWERS = 4.0
PRIOR_SPREAD, MIN_SPREAD = 0.5, 0.05
_SPREAD_KEEP = 0.5 ** (1.0 / SPREAD_HALF_LIFE)
TINY_S = 1e-6


class TokenEnergy:
    """Joules per output token of one SLM: b + a / n with n requests in its steps, a and b >= 0."""

    __slots__ = ("_line", "_step_j", "_token_j")

    def __init__(self) -> None:
        self._line = DecayedLine(ENERGY_HALF_LIFE)
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


class LoadedLatency:
    """A latency of one SLM as a power of how many requests the whole fleet has in flight.

    Its logarithm is a line over the logarithm of the requests, the newest one included. Reading is
    on the path of every decision, so the line is made when an answer comes.
    """

    __slots__ = ("_answers", "_level", "_line", "_slope")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all answers."""
        self._line = DecayedLine(LATENCY_HALF_LIFE)
        self._level = self._slope = 0.0
        self._answers = 0

    def add(self, value: float, in_flight: int) -> None:
        """Count a value above 0 of a request that made it `in_flight`."""
        self._answers += 1
        self._line.add(math.log(max(in_flight, 1)), math.log(value))
        slope = self._line.slope(LATENCY_SLOPE, LATENCY_RIDGE)
        self._slope = min(max(slope, 0.0), MAX_LATENCY_SLOPE)
        x, y = self._line.means
        self._level = y - self._slope * x

    def at(self, log_in_flight: float) -> float | None:
        """The value for a request that makes it so many; None before the first answer."""
        if not self._answers:
            return None
        return math.exp(self._level + self._slope * log_in_flight)


class TtftRatio(LoadedLatency):
    """Measured over predicted TTFT, both without this ratio; near 1 until there are answers."""

    __slots__ = ()

    def add(self, value: float, in_flight: int) -> None:
        """Count a ratio above 0 of a request that made it `in_flight`."""
        super().add(value, in_flight)
        # All answers count here, or the ratio would stay too near to 1 for ever.
        trust = self._answers / (self._answers + PRIOR_ANSWERS)
        self._level *= trust
        self._slope *= trust

    def at(self, log_in_flight: float) -> float:
        """The ratio for a request that makes it so many; 1 before the first answer."""
        log_ratio = self._level + self._slope * log_in_flight
        if not -MAX_LOG_RATIO <= log_ratio <= MAX_LOG_RATIO:
            log_ratio = math.copysign(MAX_LOG_RATIO, log_ratio)
        return math.exp(log_ratio)


class LogSpread:
    """Root mean square of log(measured / predicted), from PRIOR_SPREAD on."""

    __slots__ = ("_squares", "_weight", "value")

    def __init__(self) -> None:
        self._weight = SPREAD_PRIOR_ANSWERS
        self._squares = SPREAD_PRIOR_ANSWERS * PRIOR_SPREAD**2
        self.value = PRIOR_SPREAD

    def add(self, ratio: float) -> None:
        """Count measured over predicted (above 0)."""
        log_ratio = min(max(math.log(ratio), -MAX_LOG_RATIO), MAX_LOG_RATIO)
        self._weight = self._weight * _SPREAD_KEEP + 1.0
        self._squares = self._squares * _SPREAD_KEEP + log_ratio**2
        self.value = max(math.sqrt(self._squares / self._weight), MIN_SPREAD)


def load_at_decision(state: SLMState) -> LoadAtDecision:
    """The load that a request meets; `state` is that of its decision."""
    inside = (state.running + state.waiting) / max(state.replicas, 1)
    return LoadAtDecision(round(inside + 1.0, 2), state.in_flight + 1, round(state.ttft_ratio, 4))


class LoadEffect:
    """What the answers of one SLM say of the load they met (`load_at_decision`)."""

    __slots__ = ("_champion", "e2e_spread", "energy", "tpot", "ttft", "ttft_spread")

    def __init__(self, champion: str | None = None) -> None:
        self._champion = champion
        self.energy = TokenEnergy()
        self.ttft, self.tpot = TtftRatio(), LoadedLatency()
        self.ttft_spread, self.e2e_spread = LogSpread(), LogSpread()

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
        self.ttft.add(ratio * load.ttft_ratio, load.in_flight)
        self.ttft_spread.add(ratio)
        self.e2e_spread.add(timing.e2e_s / max(predicted.e2e_s, TINY_S))
