"""Replay: every logged decision is repeated under other goals or another predictor, and valued.

What the log does not have is assumed unchanged: candidates that a filter or a rule excluded stay
excluded; TTFT, TPOT and joules per token are those predicted at that time. With the logged goals,
predictor and exploration the logged choice must result again; `Replay.reproduced` counts this.
Goals with targets move the weights as in a router: a controller reads the log in its order, with
the predictions of all candidates and the measurements of the chosen one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from calm_serve.config import Goals
from calm_serve.goals import GoalController
from calm_serve.learning.decision_log import (
    LoggedDecision,
    PromptPredictor,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.learning.off_policy import METRICS, PolicyLog, estimate
from calm_serve.prediction import fits_layout
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    DecisionReason,
    Outcome,
    RoutingContext,
    ServiceLevel,
)

POLICY = "replayed"  # name of the replayed policy in its PolicyLog
MAX_DIFFERING = 10  # ids of decisions that were not reproduced, for the report


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """Goals and predictor of the replay."""

    goals: Goals
    goals_version: str
    predictor: PromptPredictor | None = None  # None keeps the logged predictions


@dataclass(slots=True)
class Replay:
    """One replay; call `add` for each outcome, in the log's order."""

    settings: ReplaySettings
    outcomes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    comparable: int = 0  # decided under the same goals and predictor
    reproduced: int = 0
    differing: list[str] = field(
        default_factory=list
    )  # ids of the first ones that were not reproduced
    not_comparable: Counter[str] = field(default_factory=Counter)  # by reason
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)  # from SLM, to SLM
    log: PolicyLog = field(default_factory=lambda: PolicyLog([POLICY]))
    controller: GoalController = field(init=False)

    def __post_init__(self) -> None:
        self.controller = GoalController(self.settings.goals)

    def add(self, outcome: Outcome) -> None:
        """Repeat one logged decision."""
        self.outcomes += 1
        if not outcome.slm_id:
            self.skipped["no SLM could be chosen"] += 1
            return
        logged = read_decision(outcome)
        if logged is None:
            self.skipped[_skip_reason(outcome)] += 1
            self._learn(_decision_of(outcome), outcome)
            return
        if self.settings.predictor is not None and not fits_layout(outcome):
            self.skipped["logged under another feature layout"] += 1
            return
        goals = self.settings.goals
        same_goals = outcome.decision.versions.goals == self.settings.goals_version
        # A controller may have moved the weights of the same goals; the log has those in use.
        weights = logged.weights if same_goals else self.controller.weights
        values = None
        if self.settings.predictor is not None:
            values = self.settings.predictor.of_prompt(
                outcome.features.numbers, outcome.features.buckets
            )
        ranked = rescore(logged, weights, values)
        self._compare(logged, ranked, same_goals)
        choice = redecide(
            logged,
            ranked,
            goals.quality_floor,
            default_slm=goals.default_slm,
            predictor=self.settings.predictor,
        )
        if choice != logged.chosen:
            self.moved[logged.chosen, choice] += 1
        self.log.add(logged, ranked, {POLICY: choice}, weights)
        self._learn(_decision_of(outcome, logged, ranked), outcome)

    def report(self, seed: int = 0) -> dict[str, Any]:
        """The results as plain data; an estimate is None where its metric was never measured."""
        decided = len(self.log)
        return {
            "outcomes": self.outcomes,
            "decisions": decided,
            "skipped": dict(self.skipped),
            "comparable": self.comparable,
            "reproduced": self.reproduced,
            "differing": self.differing,
            "not_comparable": dict(self.not_comparable),
            "changed": sum(self.moved.values()),
            "moved": [
                {"from": a, "to": b, "decisions": n} for (a, b), n in self.moved.most_common()
            ],
            # The controller's last weights; without targets they are those of the goals.
            "weights": asdict(self.controller.weights) if self.settings.goals.targets else None,
            "estimates": {metric: self._estimate(metric, seed) for metric in METRICS},
        }

    def _learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.settings.goals.targets:
            self.controller.learn(decision, outcome)
            self.controller.step()

    def _compare(self, logged: LoggedDecision, ranked: list[Candidate], same_goals: bool) -> None:
        outcome, predictor = logged.outcome, self.settings.predictor
        if not same_goals:
            self.not_comparable["decided under other goals"] += 1
        elif (
            predictor is not None
            and predictor.version.champion != outcome.decision.versions.predictor.champion
        ):
            self.not_comparable["decided by another predictor"] += 1
        elif outcome.decision.reason == "baseline":
            self.not_comparable["decided by another policy"] += 1
        elif not logged.complete:
            self.not_comparable["more candidates than are logged"] += 1
        else:
            goals = self.settings.goals
            again = redecide(
                logged,
                ranked,
                goals.quality_floor,
                goals.exploration_ratio,
                default_slm=goals.default_slm,
                predictor=predictor,
            )
            self.comparable += 1
            if again == logged.chosen:
                self.reproduced += 1
            elif len(self.differing) < MAX_DIFFERING:
                self.differing.append(outcome.outcome_id)

    def _estimate(self, metric: str, seed: int) -> dict[str, Any] | None:
        log = self.log.metric(metric, POLICY)
        if not len(log.value):
            return None
        found = asdict(estimate(log, seed=seed))
        found["logged"] = float(log.value.mean())
        found["difference"] = asdict(self.log.difference(metric, POLICY, None, seed=seed))
        return found


def _decision_of(
    outcome: Outcome, logged: LoggedDecision | None = None, ranked: Sequence[Candidate] = ()
) -> Decision:
    """The logged choice for the controller; where no score decided only its costs count."""
    path = DecisionPath.RULE if logged is None else DecisionPath.SCORED
    if outcome.decision.path == DecisionPath.UNFAMILIAR:
        path = DecisionPath.UNFAMILIAR
    return Decision(
        decision_id=outcome.outcome_id,
        slm_id=outcome.slm_id if logged is None else logged.chosen,
        adapter=outcome.adapter,
        path=path,
        reason=DecisionReason.RULE_MATCH if logged is None else DecisionReason.BEST_SCORE,
        rule=outcome.decision.rule,
        propensity=outcome.decision.propensity,
        candidates=tuple(ranked),
        ranking=(),
        context=_context(outcome, logged),
        versions=outcome.decision.versions,
    )


def _context(outcome: Outcome, logged: LoggedDecision | None) -> RoutingContext:
    """The part of a logged request that goals read."""
    return RoutingContext(
        request_id=outcome.outcome_id,
        slo=logged.slo if logged else ServiceLevel(),
        quality_floor=logged.terms.quality_floor if logged else 0.0,
        features=outcome.features,
    )


def _skip_reason(outcome: Outcome) -> str:
    reasons = {
        DecisionPath.PINNED: "chosen by the client",
        DecisionPath.RULE: "chosen by a rule",
        DecisionPath.CONVERSATION: "kept in its conversation",
    }
    if reason := reasons.get(DecisionPath(outcome.decision.path or DecisionPath.FALLBACK)):
        return reason
    return "logged without its candidates"
