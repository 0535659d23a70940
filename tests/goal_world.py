"""A fleet of three simulated engines, whose workload and hardware can shift under the controller.

The predictor has the fleet's initial speeds and joules, and the queue of each SLM. The controller
has to find every other change in the outcomes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from calm_serve.config import Goals, SLMSpec
from calm_serve.goals.controller import GoalController
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import (
    EngineSimulator,
    decision_for,
    make_context,
    make_fleet,
    make_outcome,
    make_prediction,
    make_spec,
)
from calm_serve.types import Decision, Outcome, Prediction, RoutingContext, SLMState

TICK_S = 0.25
RECENT = 100  # requests over which a goal is looked at


@dataclass(frozen=True)
class Kind:
    """What an SLM is able to, and what it costs."""

    skill: float  # difficulty at which half of its answers are right
    tpot_s: float
    joules: float  # per output token


KINDS = {
    "small": Kind(0.35, 0.004, 0.02),
    "medium": Kind(0.65, 0.010, 0.07),
    "large": Kind(1.05, 0.025, 0.25),
}
PREFILL_S = 0.1  # per tpot: tokens of a prompt cost less than those of an answer


@dataclass
class Request:
    """What one request needs."""

    difficulty: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Seen:
    """What happened to one request, in order of arrival."""

    slm_id: str
    quality: float  # the true chance of a right answer
    ttft_s: float
    e2e_s: float
    energy_j: float
    arrived_s: float


@dataclass
class World:
    """Serves requests one after another. Change the fields to shift it."""

    goals: Goals
    seed: int = 0
    rate: float = 8.0  # requests per second
    harder: float = 0.0  # added to every difficulty
    jitter: float = 0.2
    tokens_off: float = 1.25  # answers are so much longer than predicted
    slots: int = 8
    slower: dict[str, float] = field(default_factory=dict)
    thirstier: dict[str, float] = field(default_factory=dict)
    rule_ratio: float = 0.0  # requests that a pin decides

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.now_s = 0.0
        self.history: list[Seen] = []
        self.decisions: list[Decision] = []
        self._requests: dict[str, Request] = {}
        self._running: list[tuple[float, int, Decision, Outcome]] = []
        self._next_tick_s = 0.0
        self._engines: dict[tuple[str, float], EngineSimulator] = {}
        self.version = "world-1"
        self.controller = GoalController(self.goals)
        self.selector = ModelSelector(
            make_fleet(*(make_spec(i) for i in KINDS)),
            self.goals,
            read_state=self._state,
            predictor=self,
            controller=self.controller,
        )

    def novelty(self, bits: Sequence[int]) -> None:
        """Nothing is unfamiliar here."""
        del bits

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """The first speeds and joules; quality as it is, the answer's length with an error."""
        request = self._requests[context.request_id]
        return [self._predict(request, spec.id, s) for spec, s in zip(specs, states, strict=True)]

    def serve(self, count: int) -> None:
        """Let `count` requests arrive, and the selector learn from those that end meanwhile."""
        for _ in range(count):
            self._until(self.now_s + self.random.expovariate(self.rate))
            self._arrive()

    def recovery(self, shift: int, metric: str, limit: float, *, least: bool = False) -> int:
        """Requests after `shift` until the next RECENT ones keep `metric` within 10 %.

        `least`: the limit is a least value. Returns as many as there are when it is never so.
        """
        for start in range(shift, len(self.history) - RECENT + 1):
            found = self.over(metric, start, start + RECENT)
            if (found >= 0.9 * limit) if least else (found <= 1.1 * limit):
                return start - shift
        return len(self.history) - shift

    def over(self, metric: str, start: int, stop: int | None = None) -> float:
        """A goal's metric over requests by position."""
        rows = self.history[start:stop]
        if metric == "power_w":
            spent = sum(r.energy_j for r in rows)
            return spent / (rows[-1].arrived_s - rows[0].arrived_s)
        values = [getattr(r, metric) for r in rows]
        if metric in ("ttft_s", "e2e_s"):
            return float(np.percentile(values, 95))
        return float(np.mean(values))

    def shares(self, start: int, stop: int | None = None) -> dict[str, float]:
        """Share of each SLM in the requests."""
        ids = [r.slm_id for r in self.history[start:stop]]
        return {i: ids.count(i) / len(ids) for i in KINDS}

    def _arrive(self) -> None:
        number = len(self.history)
        request = Request(
            difficulty=self.random.random() + self.harder,
            prompt_tokens=self.random.randint(40, 300),
            output_tokens=round(self.random.lognormvariate(3.6, 0.5)) + 2,
        )
        name = f"r{number}"
        self._requests = {name: request}
        pinned = self.random.random() < self.rule_ratio
        context = make_context(
            request_id=name,
            requested_model="large" if pinned else "auto",
            prompt_tokens=request.prompt_tokens,
        )
        decision = decision_for(self.selector, context)
        slm_id = decision.slm_id
        engine = self._engine(slm_id)
        served = engine.submit(self.now_s, request.prompt_tokens, request.output_tokens)
        joules = KINDS[slm_id].joules * request.output_tokens * self.thirstier.get(slm_id, 1.0)
        e2e_s = served.ended_s - self.now_s
        outcome = make_outcome(
            name,
            slm_id=slm_id,
            at=served.ended_s,
            path=str(decision.path),
            ttft_s=served.ttft_s,
            e2e_s=e2e_s,
            energy_j=joules,
            output_tokens=request.output_tokens,
        )
        heapq.heappush(self._running, (served.ended_s, number, decision, outcome))
        quality = _quality(request, slm_id)
        seen = Seen(slm_id, quality, served.ttft_s, e2e_s, joules, self.now_s)
        self.history.append(seen)
        self.decisions.append(decision)

    def _until(self, at_s: float) -> None:
        while self._next_tick_s <= at_s:
            self._finish(self._next_tick_s)
            self.selector.tick()
            self._next_tick_s += TICK_S
        self._finish(at_s)
        self.now_s = at_s

    def _finish(self, at_s: float) -> None:
        while self._running and self._running[0][0] <= at_s:
            _, _, decision, outcome = heapq.heappop(self._running)
            self.selector.learn(decision, outcome)

    def _engine(self, slm_id: str) -> EngineSimulator:
        slower = self.slower.get(slm_id, 1.0)
        if (slm_id, slower) not in self._engines:
            tpot_s = KINDS[slm_id].tpot_s * slower
            self._engines[slm_id, slower] = EngineSimulator(
                make_spec(slm_id),
                slots=self.slots,
                prefill_s_per_token=tpot_s * PREFILL_S,
                tpot_s=tpot_s,
                jitter_ratio=self.jitter,
                seed=self.seed,
            )
        return self._engines[slm_id, slower]

    def _state(self, spec: SLMSpec) -> SLMState:
        return self._engine(spec.id).state(self.now_s)

    def _predict(self, request: Request, slm_id: str, state: SLMState) -> Prediction:
        kind = KINDS[slm_id]
        output_tokens = request.output_tokens / self.tokens_off
        wait_s = state.waiting * kind.tpot_s * 40 / max(state.capacity, 1)
        return make_prediction(
            slm_id,
            success_ratio=_quality(request, slm_id),
            output_tokens=output_tokens,
            ttft_s=kind.tpot_s * (1 + PREFILL_S * request.prompt_tokens) + wait_s,
            tpot_s=kind.tpot_s,
            energy_j=kind.joules * output_tokens,
        )


def _quality(request: Request, slm_id: str) -> float:
    return 1.0 / (1.0 + math.exp(8.0 * (request.difficulty - KINDS[slm_id].skill)))
