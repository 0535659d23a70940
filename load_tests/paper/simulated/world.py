"""Simulated time for the `paper` experiment: the real decision core, simulated engines and network.

Real: `ModelSelector` with rules, filters, predictor, scoring, exploration and goals; the router's
statistics and circuit breakers; the outcome monitor that recalibrates P(success) from feedback and
validators; the residency planner. Simulated: the engines (queues with the speeds of `answers`),
waking, the clock, and messages, of which outcomes reach the monitor every `FLUSH_S`. One router,
one replica per SLM.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from calm_serve.config import Fleet, Goals, ResidencyOptions, SLMSpec
from calm_serve.errors import CalmError
from calm_serve.goals import GoalController
from calm_serve.learning import OutcomeMonitor
from calm_serve.prediction import Predictor, live_load
from calm_serve.protocol.topics import MonitorFindings
from calm_serve.routing import ModelSelector
from calm_serve.telemetry import FleetStats
from calm_serve.testing import EngineSimulator, FakeClock, Served, decision_for
from calm_serve.types import Outcome, QualitySignal, SLMState
from load_tests.paper.simulated.answers import Answers
from load_tests.paper.simulated.call import (
    Call,
    Fault,
    Row,
    answer_outcome,
    error_outcome,
)
from load_tests.paper.simulated.memory import Memory

TICK_S = 0.25  # period of the goal controller
FLUSH_S = 0.5  # period in which outcomes reach the outcome monitor
STATE_LIFETIME_S = 0.02  # as in the router
RETRIES = 2  # as `RouterOptions.retries`
FAILS_AFTER_S = 0.02  # time until a failing attempt returns its error
JITTER_RATIO = 0.1
INVALID_RATIO = 0.05  # share of the usual wrong answers that fail their SLM's validator; assumed

Event = Callable[[], None]


class World:
    """Serves arrivals in order on simulated time; equal arguments give equal rows.

    Set `faults` to break an SLM and call `set_fleet` to add one. `feedback_ratio` is the share of
    answers with feedback; its score is the measured credit.
    """

    def __init__(
        self,
        answers: Answers,
        goals: Goals,
        *,
        seed: int,
        predictor: Predictor | None = None,
        fleet: Fleet | None = None,
        residency: ResidencyOptions | None = None,
        feedback_ratio: float = 1.0,
    ) -> None:
        self.answers, self.seed, self.feedback_ratio = answers, seed, feedback_ratio
        self.faults: dict[str, Fault] = {}
        self.rows: list[Row] = []
        self.outcomes: list[Outcome] | None = None  # set a list to collect outcomes
        clock = self.clock = FakeClock(0.0)
        fleet = fleet or answers.fleet
        self.stats = FleetStats([s.id for s in fleet.slms], self.clock)
        self.outcome_monitor = OutcomeMonitor(clock, clock, self._published, _no_retraining)
        self.selector = ModelSelector(
            fleet,
            goals,
            read_state=self.state,
            predictor=predictor,
            decision_log=256,
            controller=GoalController(goals),
        )
        self.engines: dict[str, EngineSimulator] = {}
        self.inside: dict[str, int] = {}  # requests in each engine, queued ones included
        self._states: dict[str, tuple[float, SLMState]] = {}
        self._random = Random(seed)
        self._events: list[tuple[float, int, Event]] = []
        self._number, self._batch = 0, list[Outcome]()
        self._next_tick_s = self._next_flush_s = 0.0
        self.memory = None if residency is None else Memory(self, residency)
        self.set_fleet(fleet)
        if self.memory is not None:
            self.memory.step()

    def set_fleet(self, fleet: Fleet) -> None:
        """Add and remove SLMs."""
        self.selector.set_fleet(fleet)
        self.outcome_monitor.set_slms(fleet.slms)
        for spec in fleet.slms:
            if spec.id not in self.engines:
                self.engines[spec.id] = _engine(spec, self.answers, self.seed)
                self.inside[spec.id] = 0
                self.stats.add(spec.id)
                self.stats.woke(spec.id, self.answers.speeds[spec.id].wake_s)
        for slm_id in self.engines.keys() - self.selector.specs.keys():
            self.stats.remove(slm_id)

    def serve(self, arrivals: Iterable[tuple[float, int]]) -> None:
        """Serve (time, index of the request) arrivals in order; `finish` ends the last ones."""
        for at_s, request in arrivals:
            self._until(at_s)
            self._arrive(request)

    def finish(self) -> None:
        """Run until every request has ended."""
        while self._events:
            self._until(self._events[0][0])

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's state as the router sees it, at most `STATE_LIFETIME_S` old."""
        now = self.clock.now_s
        kept = self._states.get(spec.id)
        if kept is not None and now - kept[0] < STATE_LIFETIME_S:
            return kept[1]
        replica = self.engines[spec.id].replica(now, spec.id)
        state = self.stats.state(spec, (replica,), now)
        if self.memory is not None:
            state = self.memory.with_residency(state)
        self._states[spec.id] = now, state
        return state

    def forget_states(self) -> None:
        """Drop cached states, because residency changed."""
        self._states.clear()

    def at(self, at_s: float, event: Event) -> None:
        """Schedule an event."""
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, event))

    def resume(self, call: Call, slm_id: str, *, queued_s: float) -> None:
        """Start a queued request: its SLM is hot."""
        self._start(call, slm_id, queued_s)

    def expire(self, call: Call) -> None:
        """End a queued request that has waited `hold_s`."""
        self._end_without(call, "late")

    def _until(self, at_s: float) -> None:
        while self._events and self._events[0][0] <= at_s:
            then, _, event = heapq.heappop(self._events)
            self._advance(then)
            event()
        self._advance(at_s)

    def _advance(self, at_s: float) -> None:
        self.clock.advance(max(at_s - self.clock.now_s, 0.0))
        if self.clock.now_s >= self._next_flush_s:
            self._next_flush_s = self.clock.now_s + FLUSH_S
            batch, self._batch = self._batch, []
            self.outcome_monitor.observe(batch)
        if self.clock.now_s >= self._next_tick_s:
            self._next_tick_s = self.clock.now_s + TICK_S
            self.selector.tick()

    def _arrive(self, request: int) -> None:
        now = self.clock.now_s
        row = Row(now, request)
        self.rows.append(row)
        name = f"{self.seed}-{len(self.rows)}"
        context = replace(self.answers.contexts[request], request_id=name)
        try:
            decision = decision_for(self.selector, context)
        except CalmError:
            row.error = "unavailable"
            return
        row.chosen, row.path = decision.slm_id, str(decision.path)
        row.preferred = decision.preferred
        others = (*decision.ranking[1:], *self.selector.rank_unscored(decision))
        plan = [decision.slm_id, decision.slm_id, *others][: 1 + RETRIES]
        call = Call(row, decision, plan)
        if self.memory is not None:
            row.hit = self.memory.is_hot(decision.slm_id)
            row.preferred_hot = self.memory.is_hot(row.preferred)
            self.memory.report_demand(row.preferred)
        self._try(call)
        if self.memory is not None:
            self.memory.step()

    def _try(self, call: Call) -> None:
        """Send the request to the next SLM of the plan that accepts it, as the dispatcher does."""
        while call.position < len(call.plan):
            slm_id = call.plan[call.position]
            call.position += 1
            if slm_id in call.full:
                continue
            spec = self.selector.specs[slm_id]
            queued = self.memory.queued(slm_id) if self.memory is not None else 0
            bound = spec.limits.max_ongoing_requests + spec.limits.max_queued_requests
            if self.inside[slm_id] + queued >= bound:
                call.full.add(slm_id)
                continue
            call.row.tried += (slm_id,)
            call.state = self.state(spec)
            call.load = live_load(call.decision.context, spec, call.state)
            if self.memory is not None and not self.memory.is_hot(slm_id):
                self.memory.queue_for_wakeup(slm_id, call)
            else:
                self._start(call, slm_id, 0.0)
            return
        self._end_without(call, "shed" if call.full else "failed")

    def _start(self, call: Call, slm_id: str, queued_s: float) -> None:
        now, fault = self.clock.now_s, self.faults.get(slm_id, Fault())
        if self._random.random() < fault.fails:
            self.at(now + FAILS_AFTER_S, lambda: self._failed(call, slm_id))
            return
        answers, speed = self.answers, self.answers.speeds[slm_id]
        column, request = answers.column(slm_id), call.row.request
        tokens = max(int(answers.tables["output_tokens"][request, column]), 1)
        prompt = int(answers.tables["prompt_tokens"][request, column])
        engine = self.engines[slm_id]
        self.inside[slm_id] += 1
        at_once = min(self.inside[slm_id], engine.slots)
        pace = speed.pace(at_once) * fault.slower
        served = engine.submit(now, prompt, tokens, pace=pace)
        joules = speed.joules(tokens, at_once) * fault.slower
        self.at(
            served.ended_s, lambda: self._answered(call, slm_id, served, queued_s, joules, tokens)
        )
        self._states.pop(slm_id, None)

    def _failed(self, call: Call, slm_id: str) -> None:
        self.stats.attempt_failed(slm_id)
        self._states.pop(slm_id, None)
        self._try(call)

    def _end_without(self, call: Call, error: str) -> None:
        call.row.error = error
        self._observe(call, error_outcome(call, self.clock.now_s))

    def _answered(
        self,
        call: Call,
        slm_id: str,
        served: Served,
        queued_s: float,
        joules: float,
        tokens: int,
    ) -> None:
        row, answers = call.row, self.answers
        column = answers.column(slm_id)
        self.inside[slm_id] -= 1
        fault = self.faults.get(slm_id, Fault())
        wrong = self._random.random() < fault.wrong
        row.slm = slm_id
        row.exact = 0.0 if wrong else float(answers.tables["exact"][row.request, column])
        row.credit = 0.0 if wrong else float(answers.tables["credit"][row.request, column])
        row.latency_s = served.ended_s - row.at_s
        row.ttft_s = served.first_token_s - row.at_s
        row.energy_j = joules
        signals: tuple[QualitySignal, ...] = ()
        if self._random.random() < self.feedback_ratio:
            signals = (QualitySignal("feedback", row.credit, served.ended_s),)
        validator = self.selector.specs[slm_id].validator if slm_id in self.selector.specs else ""
        garbled = (
            fault.garbled if wrong else self._random.random() < INVALID_RATIO * (row.exact < 1.0)
        )
        if garbled and validator:
            signals += (QualitySignal(f"validator:{validator}", 0.0, served.ended_s),)
        prompt = int(answers.tables["prompt_tokens"][row.request, column])
        outcome = answer_outcome(
            call, served, signals, prompt=prompt, tokens=tokens, cold=queued_s > 0.0
        )
        self._observe(call, outcome)
        if self.memory is not None:
            self.memory.step()

    def _observe(self, call: Call, outcome: Outcome) -> None:
        """Record an outcome, as the router does."""
        self.stats.observe(outcome)
        self.selector.learn(call.decision, outcome)
        self._states.pop(outcome.slm_id, None)
        self._batch.append(outcome)
        if self.outcomes is not None:
            self.outcomes.append(outcome)

    def _published(self, findings: MonitorFindings) -> None:
        self.stats.set_calibration_factors(findings.calibration_factors)
        self._states.clear()


def _engine(spec: SLMSpec, answers: Answers, seed: int) -> EngineSimulator:
    speed, prompt_tokens = answers.speeds[spec.id], answers.tables["prompt_tokens"].mean()
    return EngineSimulator(
        spec,
        prefill_s_per_token=max(speed.first_s - speed.tpot_s, 0.0) / float(prompt_tokens),
        tpot_s=speed.tpot_s,
        jitter_ratio=JITTER_RATIO,
        seed=seed,
    )


def _no_retraining() -> None:
    """The outcome monitor's request to retrain; nothing is retrained here."""
