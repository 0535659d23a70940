"""Every logged choice made again, under other goals or another predictor, and what it is worth.

What the log does not hold is left as it was: candidates that a filter or a rule had excluded stay
excluded, TTFT, TPOT and joules per token of each candidate are those predicted then. With the goals
and the predictor that decided, exploration included, the logged choice must come out again;
`Replay.reproduced` counts it. Under goals with targets the weights move as they do in a router: a
controller follows the log, and steers by what was predicted of each candidate and measured of the
one that was chosen.
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

POLICY = "replayed"


@dataclass(frozen=True, slots=True)
class Rules:
    """Under what the choices are made again."""

    goals: Goals
    goals_version: str
    predictor: PromptPredictor | None = None  # None keeps the logged predictions


@dataclass(slots=True)
class Replay:
    """Counts and columns of one replay; feed it with `add`, in the log's order."""

    rules: Rules
    outcomes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    comparable: int = 0  # decided under these very goals and this predictor
    reproduced: int = 0
    differing: list[str] = field(default_factory=list)  # ids of the first that did not
    not_comparable: Counter[str] = field(default_factory=Counter)  # by reason
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)  # from SLM, to SLM
    log: PolicyLog = field(default_factory=lambda: PolicyLog([POLICY]))
    controller: GoalController = field(init=False)

    def __post_init__(self) -> None:
        self.controller = GoalController(self.rules.goals)

    def add(self, outcome: Outcome) -> None:
        """Make one logged choice again."""
        self.outcomes += 1
        logged = read_decision(outcome)
        if logged is None:
            self.skipped[_why_not(outcome)] += 1
            self._steer(_decided(outcome), outcome)
            return
        if self.rules.predictor is not None and not fits_layout(outcome):
            self.skipped["logged under another feature layout"] += 1
            return
        goals = self.rules.goals
        same_goals = outcome.decision.versions.goals == self.rules.goals_version
        # Under the same goals a controller may have moved the weights: the log has them as used.
        weights = logged.weights if same_goals else self.controller.weights
        values = None
        if self.rules.predictor is not None:
            values = self.rules.predictor.of_prompt(
                outcome.features.numbers, outcome.features.buckets
            )
        ranked = rescore(logged, weights, values)
        self._reproduce(logged, ranked, same_goals)
        choice = redecide(logged, ranked, goals.quality_floor)
        if choice != logged.chosen:
            self.moved[logged.chosen, choice] += 1
        self.log.add(logged, ranked, {POLICY: choice}, weights)
        self._steer(_decided(outcome, logged, ranked), outcome)

    def report(self, seed: int = 0) -> dict[str, Any]:
        """Everything as plain data; estimates are None where a metric was never measured."""
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
            # Those that the controller ended with; they are as stated without a target.
            "weights": asdict(self.controller.weights) if self.rules.goals.targets else None,
            "estimates": {metric: self._estimate(metric, seed) for metric in METRICS},
        }

    def _steer(self, decision: Decision, outcome: Outcome) -> None:
        if self.rules.goals.targets:
            self.controller.learn(decision, outcome)
            self.controller.step()

    def _reproduce(self, logged: LoggedDecision, ranked: list[Candidate], same_goals: bool) -> None:
        outcome, predictor = logged.outcome, self.rules.predictor
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
            goals = self.rules.goals
            again = redecide(logged, ranked, goals.quality_floor, goals.exploration_ratio)
            self.comparable += 1
            if again == logged.chosen:
                self.reproduced += 1
            elif len(self.differing) < 10:
                self.differing.append(outcome.outcome_id)

    def _estimate(self, metric: str, seed: int) -> dict[str, Any] | None:
        log = self.log.metric(metric, POLICY)
        if not len(log.value):
            return None
        found = asdict(estimate(log, seed=seed))
        found["logged"] = float(log.value.mean())
        found["difference"] = asdict(self.log.difference(metric, POLICY, None, seed=seed))
        return found


def _decided(
    outcome: Outcome, logged: LoggedDecision | None = None, ranked: Sequence[Candidate] = ()
) -> Decision:
    """The logged choice as a controller learns from it; without candidates it only spends."""
    return Decision(
        decision_id=outcome.outcome_id,
        slm_id=outcome.slm_id if logged is None else logged.chosen,
        adapter=outcome.adapter,
        path=DecisionPath.RULE if logged is None else DecisionPath.SCORED,
        reason=DecisionReason.RULE_MATCH if logged is None else DecisionReason.BEST_SCORE,
        rule=outcome.decision.rule,
        propensity=outcome.decision.propensity,
        candidates=tuple(ranked),
        ranking=(),
        context=_context(outcome, logged),
        versions=outcome.decision.versions,
    )


def _context(outcome: Outcome, logged: LoggedDecision | None) -> RoutingContext:
    """What goals read of a logged request."""
    return RoutingContext(
        request_id=outcome.outcome_id,
        slo=logged.slo if logged else ServiceLevel(),
        quality_floor=logged.terms.quality_floor if logged else 0.0,
        features=outcome.features,
    )


def _why_not(outcome: Outcome) -> str:
    reasons = {DecisionPath.PINNED: "chosen by the client", DecisionPath.RULE: "chosen by a rule"}
    if reason := reasons.get(DecisionPath(outcome.decision.path or DecisionPath.FALLBACK)):
        return reason
    return "logged without its candidates"
