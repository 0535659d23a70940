"""Every logged choice made again, under other goals or another predictor, and what it is worth.

What the log does not hold is left as it was: candidates that a filter or a rule had excluded stay
excluded, TTFT, TPOT and joules per token of each candidate are those predicted then. With the goals
and the predictor that decided, exploration included, the logged choice must come out again;
`Replay.reproduced` counts it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calm_serve.analyze.lightgbm import fits_layout
from calm_serve.config import Goals
from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.codec import decode_outcome
from calm_serve.knowledge.decisions import (
    LoggedDecision,
    PromptPredictor,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.knowledge.evaluation import METRICS, PolicyLog, estimate
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.plan.objective import weights_of
from calm_serve.types import Candidate, DecisionPath, Outcome

PAGE_ROWS = 1000
POLICY = "replayed"


@dataclass(frozen=True, slots=True)
class Rules:
    """Under what the choices are made again."""

    goals: Goals
    goals_version: str
    predictor: PromptPredictor | None = None  # None keeps the logged predictions


@dataclass(slots=True)
class Replay:
    """Counts and columns of one replay; feed it with `add`, in any order."""

    rules: Rules
    outcomes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    comparable: int = 0  # decided under these very goals and this predictor
    reproduced: int = 0
    differing: list[str] = field(default_factory=list)  # ids of the first that did not
    not_comparable: Counter[str] = field(default_factory=Counter)  # by reason
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)  # from SLM, to SLM
    log: PolicyLog = field(default_factory=lambda: PolicyLog([POLICY]))

    def add(self, outcome: Outcome) -> None:
        """Make one logged choice again."""
        self.outcomes += 1
        logged = read_decision(outcome)
        if logged is None:
            self.skipped[_why_not(outcome)] += 1
            return
        if self.rules.predictor is not None and not fits_layout(outcome):
            self.skipped["logged under another feature layout"] += 1
            return
        goals = self.rules.goals
        same_goals = outcome.versions[1] == self.rules.goals_version
        # Under the same goals a controller may have moved the weights: the log has them as used.
        weights = logged.weights if same_goals else weights_of(goals)
        values = None
        if self.rules.predictor is not None:
            values = self.rules.predictor.of_prompt(outcome.numbers, outcome.buckets)
        ranked = rescore(logged, weights, values)
        self._reproduce(logged, ranked, same_goals)
        choice = redecide(logged, ranked, goals.quality_floor)
        if choice != logged.chosen:
            self.moved[logged.chosen, choice] += 1
        self.log.add(logged, ranked, {POLICY: choice}, weights)

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
            "estimates": {metric: self._estimate(metric, seed) for metric in METRICS},
        }

    def _reproduce(self, logged: LoggedDecision, ranked: list[Candidate], same_goals: bool) -> None:
        outcome, predictor = logged.outcome, self.rules.predictor
        if not same_goals:
            self.not_comparable["decided under other goals"] += 1
        elif predictor is not None and predictor.version != outcome.versions[0].partition("+")[0]:
            self.not_comparable["decided by another predictor"] += 1
        elif outcome.reason == "baseline":
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


def read_outcomes(log: str) -> Iterator[Outcome]:
    """Outcomes of a log: a JSON-lines file, an SQLite file or an SQLAlchemy URL.

    Raises KnowledgeError when it is none, or a line of it is no outcome.
    """
    path = Path(log)
    if "://" not in log and not path.is_file():
        raise KnowledgeError(f"log not found: {log}")
    if path.suffix in (".jsonl", ".json"):
        yield from _read_lines(path)
        return
    store = OutcomeStore(log if "://" in log else f"sqlite:///{path}")
    try:
        row = 0
        while page := store.rows(row, PAGE_ROWS):
            yield from (outcome for _, outcome in page)
            row = page[-1][0]
    finally:
        store.close()


def _read_lines(path: Path) -> Iterator[Outcome]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield decode_outcome(json.loads(line))
            except (ValueError, TypeError, KnowledgeError) as error:
                raise KnowledgeError(f"{path.name}:{number}: {error}") from error


def _why_not(outcome: Outcome) -> str:
    if outcome.path in (DecisionPath.PINNED, DecisionPath.RULE):
        return f"chosen by {'the client' if outcome.path == DecisionPath.PINNED else 'a rule'}"
    return "logged without its candidates"
