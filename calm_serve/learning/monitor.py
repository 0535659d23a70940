"""Outcome monitor: drift, calibration factors and alarms from the outcomes of all routers.

It is fed with every batch, keeps bounded statistics and publishes them for the routers as
`protocol.topics.MonitorFindings`. `load_tests paper` notices a change of the constants that move
factors (broken_slm_drain_requests).
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from calm_serve.config import SLMSpec
from calm_serve.learning import metrics
from calm_serve.learning.quality import SLMQualityStream, UnfamiliarQuality, feedback_score
from calm_serve.prediction import fits_layout
from calm_serve.protocol.topics import MonitorFindings, UnfamiliarAnswers
from calm_serve.requests import NUMBER_NAMES
from calm_serve.telemetry import (
    CHANGE_LIMIT,
    PSI_ALARM,
    PSI_CLEAR,
    Alarms,
    PopulationShift,
    ResidualEstimator,
)
from calm_serve.types import DecisionPath, Outcome, QualitySignal

# Bounds of memory.
MAX_SLMS = 256
MAX_REPLICAS = 32  # of one SLM
MAX_PREDICTORS = 64  # whose versions are remembered
MAX_REMEMBERED = 8_192  # outcomes for which feedback may still arrive

CHECK_S = 1.0  # between two checks of the whole fleet's statistics
PUBLISH_S = 5.0  # between two publications, unless a factor or an alarm has changed
FACTOR_STEP = 0.02  # factors are rounded to these steps, so that noise is not published
QUALITY_ALARM, QUALITY_CLEAR = 0.6, 0.8  # calibration factors

# Kinds of drift that another predictor could learn.
RETRAIN_KINDS = frozenset(("quality", "tokens", "prompt_mix"))
# Training starts so many outcomes after the change; with fewer, most rows are from before it.
RETRAIN_OUTCOMES = 100
RETRAIN_PAUSE_S = 600.0  # least time between two trainings for drift

LENGTH_CHANGE_LIMIT = 2.0 * CHANGE_LIMIT  # higher than for speed, because lengths vary more
MIN_CALIBRATION, CALIBRATION_WINDOW = 100, 500  # answers behind the calibration error
CALIBRATION_ALARM = 0.15  # mean error of P(success)

# Prompts behind the share of unfamiliar ones. Of familiar traffic 5 % are, so 20 % of the fewest
# prompts are seven standard errors above.
MIN_NOVELTY, NOVELTY_WINDOW = 100, 500
UNFAMILIAR_ALARM, UNFAMILIAR_CLEAR = 0.2, 0.12

WORD_BINS = 32  # hash buckets of words are folded into so many bins
LENGTH_BINS = 14  # of prompts, by powers of 2 of their tokens
MIN_TRAIT = 0.05  # a trait with a larger value is present
_TRAITS = tuple(
    NUMBER_NAMES.index(name)
    for name in (
        "shape_json",
        "shape_tools",
        "has_code",
        "has_system",
        "markers",
        "non_ascii_ratio",
    )
)

_log = logging.getLogger(__name__)


class _Answer(NamedTuple):
    """What is remembered of an answer until its feedback arrives."""

    slm_id: str
    predicted: float | None  # P(success) without the factor; None where a rule named the SLM
    unfamiliar: bool  # the prompt

    @classmethod
    def of(cls, outcome: Outcome) -> _Answer:
        """The part of an outcome."""
        predicted, novelty = outcome.decision.predicted, outcome.decision.novelty
        success_ratio = None if predicted is None else predicted.success_ratio
        return cls(outcome.slm_id, success_ratio, novelty is not None and novelty.unfamiliar)


class _SLM:
    """Detectors of one SLM."""

    def __init__(self, clock: Callable[[], float], form_is_checked: bool) -> None:
        self.quality = SLMQualityStream(clock, form_is_checked)
        self.unfamiliar = UnfamiliarQuality()
        self.tokens = ResidualEstimator(LENGTH_CHANGE_LIMIT)
        self.speed: OrderedDict[str, ResidualEstimator] = OrderedDict()  # of a token, by replica

    def forget_predictor(self) -> None:
        """Start anew what is compared with predictions."""
        self.quality.forget_predictor()
        self.tokens = ResidualEstimator(LENGTH_CHANGE_LIMIT)


class OutcomeMonitor:
    """Detectors over the outcomes of all routers. Used from one event loop.

    Args:
        clock: Unix time in seconds, for the alarms.
        monotonic: seconds that never go back, for intervals.
        publish: takes the findings whenever they have changed.
        retrain: starts a training without waiting for more labels.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        publish: Callable[[MonitorFindings], None],
        retrain: Callable[[], None],
    ) -> None:
        self._monotonic = monotonic
        self._publish, self._retrain = publish, retrain
        self.alarms = Alarms(clock)
        self._slms: OrderedDict[str, _SLM] = OrderedDict()
        self._validated: frozenset[str] = frozenset()  # SLMs with a validator of their own
        self._mix = PromptMix()
        self._remembered: OrderedDict[str, _Answer] = OrderedDict()
        self._early_feedback: OrderedDict[str, tuple[QualitySignal, ...]] = OrderedDict()
        self._predictors: OrderedDict[str, None] = OrderedDict()
        self._scored: deque[tuple[float, float]] = deque(maxlen=CALIBRATION_WINDOW)
        self._unfamiliar: deque[bool] = deque(maxlen=NOVELTY_WINDOW)
        self._published: MonitorFindings | None = None
        self._factors: dict[str, float] = {}
        self._published_at = self._checked_at = self._retrained_at = -math.inf
        self._outcomes = 0
        self._retrain_at: int | None = None

    def set_slms(self, specs: Iterable[SLMSpec]) -> None:
        """Take the SLMs with a validator: their answers without its signal count as passed."""
        self._validated = frozenset(s.id for s in specs if s.validator)
        for slm_id in self._validated & self._slms.keys():
            self._slms[slm_id].quality.form_is_checked = True

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count a batch; an outcome that was seen before is ignored."""
        for outcome in outcomes:
            if outcome.outcome_id in self._remembered or not outcome.slm_id:
                continue  # counted already; or no SLM could be chosen, so there is none to watch
            answer = _Answer.of(outcome)
            _remember(self._remembered, outcome.outcome_id, answer)
            self._outcomes += 1
            self._observe(outcome)
            early = self._early_feedback.pop(outcome.outcome_id, ())
            self._count_feedback(answer, (*outcome.signals, *early))
        self.tick()

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count feedback on an answer, now or when its outcome arrives."""
        known = self._remembered.get(outcome_id)
        if known is None:
            _remember(self._early_feedback, outcome_id, tuple(signals))
            return
        self._count_feedback(known, signals)
        self.tick()

    def tick(self) -> None:
        """Publish changed findings, those that changed with time included; retrain when due."""
        now = self._monotonic()
        if now >= self._checked_at + CHECK_S:
            self._checked_at = now
            self._check_mix()
            self._check_calibration()
            self._check_novelty()
            self._maybe_retrain()
            self._check_quality()
        factors = {i: f for i, f in self._factors.items() if f != 1.0}
        alarms, before = self.alarms.current(), self._published
        changed = before is None or (factors, alarms) != (before.calibration_factors, before.alarms)
        if not changed and now < self._published_at + PUBLISH_S:
            return
        findings = MonitorFindings(
            factors, self.calibration_error(), alarms, self.unfamiliar_ratio(), self._answers()
        )
        self._published_at = now
        if findings != before:
            self._published = findings
            self._publish(findings)

    def calibration_error(self) -> float | None:
        """Mean gap between P(success) and score of the last answers; None with too few."""
        if len(self._scored) < MIN_CALIBRATION:
            return None
        predicted, labels = np.array(self._scored).T
        return round(metrics.calibration_error(labels, predicted, np.ones(len(labels))), 3)

    def unfamiliar_ratio(self) -> float | None:
        """Share of unfamiliar prompts among the last ones; None with too few."""
        if len(self._unfamiliar) < MIN_NOVELTY:
            return None
        return round(sum(self._unfamiliar) / len(self._unfamiliar), 3)

    def _answers(self) -> dict[str, UnfamiliarAnswers]:
        reports = ((slm_id, slm.unfamiliar.report()) for slm_id, slm in self._slms.items())
        return {slm_id: report for slm_id, report in reports if report is not None}

    def _observe(self, outcome: Outcome) -> None:
        # Boosters of cold-start SLMs change P(success) of no other SLM.
        champion = outcome.decision.versions.predictor.champion
        if champion not in self._predictors:
            self._new_predictor(champion)
        slm = self._slm(outcome.slm_id)
        self._mix.observe(outcome)
        if outcome.decision.novelty is not None and outcome.decision.path != DecisionPath.PINNED:
            self._unfamiliar.append(outcome.decision.novelty.unfamiliar)
        if outcome.status != "ok":
            return
        changed = slm.quality.answered(outcome.signals)
        if slm.quality.form_is_checked:
            self._update_factor(outcome.slm_id, changed)
        predicted, replica_id = outcome.decision.predicted, outcome.engine.replica_id
        if predicted is None:
            return
        change = _change(slm.tokens, outcome.engine.output_tokens, predicted.output_tokens)
        if change is not None:
            slm.quality.suspect()
        self._report(change, "tokens", outcome.slm_id, "answers are {} times as long as predicted")
        if outcome.timing.tpot_s and not outcome.timing.cold:
            speed = slm.speed.get(replica_id) or ResidualEstimator(CHANGE_LIMIT)
            _remember(slm.speed, replica_id, speed, MAX_REPLICAS)
            change = _change(speed, outcome.timing.tpot_s, predicted.tpot_s)
            text = "a token takes {} times as long as predicted"
            self._report(change, "speed", outcome.slm_id, text, replica_id)

    def _new_predictor(self, version: str) -> None:
        """Forget what was measured against the former predictor's predictions.

        The new predictor may have learned the change; keeping the factor would then correct it
        twice.
        """
        _remember(self._predictors, version, None, MAX_PREDICTORS)
        self._scored.clear()
        self._unfamiliar.clear()
        for slm_id, slm in self._slms.items():
            slm.forget_predictor()
            self.alarms.end("tokens", slm_id)
        self._check_quality()

    def _count_feedback(self, answer: _Answer, signals: Iterable[QualitySignal]) -> None:
        score = feedback_score(signals)
        if score is None:
            return
        slm_id, predicted, unfamiliar = answer
        if unfamiliar:
            self._slm(slm_id).unfamiliar.add(score)
            if predicted is not None:
                return  # it is not trusted there, so its error says nothing of familiar prompts
        if predicted is not None:
            used = min(predicted * self._factors.get(slm_id, 1.0), 1.0)  # as the router decided
            self._scored.append((used, score))
        changed = self._slm(slm_id).quality.scored(predicted, score)
        self._update_factor(slm_id, changed)

    def _update_factor(self, slm_id: str, changed: bool) -> None:
        factor = self._factors[slm_id] = _rounded_factor(self._slm(slm_id))
        if changed or factor < QUALITY_ALARM:
            text = f"answers succeed {factor:.2f} times as often as expected"
            self._start("quality", slm_id, factor, text)

    def _check_quality(self) -> None:
        self._factors = {slm_id: _rounded_factor(slm) for slm_id, slm in self._slms.items()}
        for slm_id, factor in self._factors.items():
            if QUALITY_CLEAR < factor < 1.0 / QUALITY_CLEAR:
                self.alarms.end("quality", slm_id)

    def _check_mix(self) -> None:
        index = self._mix.index()
        if index > PSI_ALARM:
            self._start("prompt_mix", "", index, "prompts differ from the usual ones")
        elif index < PSI_CLEAR:
            self.alarms.end("prompt_mix")

    def _check_calibration(self) -> None:
        error = self.calibration_error()
        if error is not None and error > CALIBRATION_ALARM:
            self._start("calibration", "", error, "mean error of P(success)")
        else:
            self.alarms.end("calibration")

    def _check_novelty(self) -> None:
        ratio = self.unfamiliar_ratio()
        if ratio is not None and ratio > UNFAMILIAR_ALARM:
            detail = f"{ratio:.0%} of the prompts are unlike the predictor's training: refit it"
            self._start("unfamiliar", "", ratio, detail)
        elif ratio is None or ratio < UNFAMILIAR_CLEAR:
            self.alarms.end("unfamiliar")

    def _report(
        self, change: float | None, kind: str, slm_id: str, text: str, replica: str = ""
    ) -> None:
        if change is not None:
            times = math.exp(change)
            self._start(kind, slm_id, times, text.format(f"{times:.2f}"), replica)

    def _start(self, kind: str, slm_id: str, size: float, detail: str, replica: str = "") -> None:
        if self.alarms.start(kind, slm_id, size, detail, replica) is None:
            return
        _log.warning("%s changed %s%s: %s", kind, slm_id or "in the fleet", replica, detail)
        if kind in RETRAIN_KINDS and self._retrain_at is None:
            self._retrain_at = self._outcomes + RETRAIN_OUTCOMES

    def _maybe_retrain(self) -> None:
        if self._retrain_at is None or self._outcomes < self._retrain_at:
            return
        now = self._monotonic()
        if now >= self._retrained_at + RETRAIN_PAUSE_S:
            self._retrain_at, self._retrained_at = None, now
            self._retrain()

    def _slm(self, slm_id: str) -> _SLM:
        slm = self._slms.get(slm_id)
        if slm is None:
            slm = _SLM(self._monotonic, slm_id in self._validated)
            _remember(self._slms, slm_id, slm, MAX_SLMS)
        return slm


def _rounded_factor(slm: _SLM) -> float:
    return round(round(slm.quality.factor / FACTOR_STEP) * FACTOR_STEP, 4)


def _change(residual: ResidualEstimator, measured: float, predicted: float) -> float | None:
    return residual.add(measured / predicted) if measured > 0.0 and predicted > 0.0 else None


def _remember(
    kept: OrderedDict[str, Any], key: str, value: Any, limit: int = MAX_REMEMBERED
) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)


class PromptMix:
    """Population stability of words and of shapes over logged outcomes, in bounded memory."""

    def __init__(self) -> None:
        self._words = PopulationShift(WORD_BINS)
        self._shapes = PopulationShift(LENGTH_BINS + len(_TRAITS))

    def observe(self, outcome: Outcome) -> None:
        """Count the prompt of one outcome; without features it is ignored."""
        if not outcome.features.buckets or not fits_layout(outcome):
            return
        self._words.add({b % WORD_BINS for b in outcome.features.buckets})
        length = int(math.log2(max(outcome.engine.prompt_tokens, 1)))
        shapes = [min(length, LENGTH_BINS - 1)]
        shapes += (
            LENGTH_BINS + i
            for i, at in enumerate(_TRAITS)
            if outcome.features.numbers[at] > MIN_TRAIT
        )
        self._shapes.add(shapes)

    def index(self) -> float:
        """The larger of the two indices; see `PopulationShift.index`."""
        return max(self._words.index(), self._shapes.index())
