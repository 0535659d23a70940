"""Simulated time for the `paper` experiment: the real decision core, simulated engines and network.

Real: `ModelSelector` with rules, filters, predictor, objective, exploration and goals; the router's
statistics and breaker; the watch that corrects P(success) from what is said of answers; the
residency planner; trainer and gate. Simulated: engines (queues with the speeds of
`paper_answers`), waking, the clock, and messages, of which outcomes reach the watch every
`FLUSH_S`. One router, one replica per SLM.
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
    answer,
    refusal,
)
from load_tests.paper.simulated.memory import Memory

TICK_S = 0.25  # the controller moves the weights this often
FLUSH_S = 0.5  # outcomes travel to the watch this often
STATE_LIFETIME_S = 0.02  # as the router keeps a state
RETRIES = 2  # as `RouterOptions.retries`
FAILS_AFTER_S = 0.02  # a broken SLM needs this long to say so
JITTER = 0.1
FORM_FAILS = 0.05  # of the usual wrong answers fail their SLM's own format check; assumed

Event = Callable[[], None]


class World:
    """Serves arrivals one after another on simulated time; the same for the same arguments.

    Change `faults` to break an SLM and `set_fleet` to add one. `feedback_ratio` is the share of
    answers of which somebody says how good they were; what is said is the measured credit.
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
        retrain: Callable[[World], None] | None = None,
    ) -> None:
        self.answers, self.seed = answers, seed
        self.feedback_ratio = feedback_ratio
        self.faults: dict[str, Fault] = {}
        self.rows: list[Row] = []
        self.outcomes: list[Outcome] | None = None  # a list here keeps what a trainer reads
        self.clock = FakeClock(0.0)
        fleet = fleet or answers.fleet
        self.monitor = FleetStats([s.id for s in fleet.slms], self.clock)
        self._retrain = retrain
        self.retrainings = 0
        self.watch = OutcomeMonitor(self.clock, self.clock, self._published, self._asked_to_retrain)
        self.loop = ModelSelector(
            fleet,
            goals,
            read_state=self.state,
            predictor=predictor,
            decision_log=256,
            controller=GoalController(goals),
        )
        self.engines: dict[str, EngineSimulator] = {}
        self.inside: dict[str, int] = {}  # requests in each engine, waiting ones with them
        self._states: dict[str, tuple[float, SLMState]] = {}
        self._random = Random(seed)
        self._events: list[tuple[float, int, Event]] = []
        self._number = 0
        self._batch: list[Outcome] = []
        self._next_tick_s = self._next_flush_s = 0.0
        self.memory = None if residency is None else Memory(self, residency)
        self.set_fleet(fleet)
        if self.memory is not None:
            self.memory.step()

    def set_fleet(self, fleet: Fleet) -> None:
        """Follow SLMs that came or went."""
        self.loop.set_fleet(fleet)
        self.watch.set_slms(fleet.slms)
        for spec in fleet.slms:
            if spec.id not in self.engines:
                speed = self.answers.speeds[spec.id]
                prompt = self.answers.tables["prompt_tokens"].mean()
                self.engines[spec.id] = EngineSimulator(
                    spec,
                    prefill_s_per_token=max(speed.first_s - speed.tpot_s, 0.0) / float(prompt),
                    tpot_s=speed.tpot_s,
                    jitter_ratio=JITTER,
                    seed=self.seed,
                )
                self.inside[spec.id] = 0
                self.monitor.add(spec.id)
                self.monitor.woke(spec.id, speed.wake_s)
        for slm_id in self.engines.keys() - self.loop.specs.keys():
            self.monitor.remove(slm_id)

    def serve(self, arrivals: Iterable[tuple[float, int]]) -> None:
        """Let requests of the workload (by row) arrive, in order; `finish` waits for the last."""
        for at_s, request in arrivals:
            self._until(at_s)
            self._arrive(request)

    def finish(self) -> None:
        """Let every request end."""
        while self._events:
            self._until(self._events[0][0])

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's state as the router sees it, at most `STATE_LIFETIME_S` old."""
        now = self.clock.now_s
        kept = self._states.get(spec.id)
        if kept is not None and now - kept[0] < STATE_LIFETIME_S:
            return kept[1]
        replica = self.engines[spec.id].replica(now, spec.id)
        state = self.monitor.state(spec, (replica,), now)
        if self.memory is not None:
            state = self.memory.seen(state)
        self._states[spec.id] = now, state
        return state

    def forget_states(self) -> None:
        """Residency changed: what was read before is not true any more."""
        self._states.clear()

    def at(self, at_s: float, event: Event) -> None:
        """Let something happen at a time."""
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, event))

    def resume(self, call: Call, slm_id: str, *, held_s: float) -> None:
        """The SLM that a held request waits for is awake; or None is, within the hold."""
        self._start(call, slm_id, held_s)

    def give_up(self, call: Call) -> None:
        """A held request has waited too long."""
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
            self.watch.observe(batch)
        if self.clock.now_s >= self._next_tick_s:
            self._next_tick_s = self.clock.now_s + TICK_S
            self.loop.tick()

    def _arrive(self, request: int) -> None:
        now = self.clock.now_s
        row = Row(now, request)
        self.rows.append(row)
        name = f"{self.seed}-{len(self.rows)}"
        context = replace(self.answers.contexts[request], request_id=name)
        try:
            decision = decision_for(self.loop, context)
        except CalmError:
            row.error = "unavailable"
            return
        row.chosen, row.path = decision.slm_id, str(decision.path)
        row.propensity = decision.propensity
        row.preferred = decision.preferred
        plan = [decision.slm_id, decision.slm_id, *decision.ranking[1:]][: 1 + RETRIES]
        call = Call(row, decision, plan)
        if self.memory is not None:
            row.hit = self.memory.is_hot(decision.slm_id)
            row.preferred_hot = self.memory.is_hot(row.preferred)
            self.memory.wanted(row.preferred)
        self._try(call)
        if self.memory is not None:
            self.memory.step()

    def _try(self, call: Call) -> None:
        """The next SLM of the plan that takes the request, as the router's dispatcher does."""
        while call.position < len(call.plan):
            slm_id = call.plan[call.position]
            call.position += 1
            if slm_id in call.full:
                continue
            spec = self.loop.specs[slm_id]
            held = self.memory.held(slm_id) if self.memory is not None else 0
            bound = spec.limits.max_ongoing_requests + spec.limits.max_queued_requests
            if self.inside[slm_id] + held >= bound:
                call.full.add(slm_id)
                continue
            call.row.tried += (slm_id,)
            call.state = self.state(spec)
            call.load = live_load(call.decision.context, spec, call.state)
            if self.memory is not None and not self.memory.is_hot(slm_id):
                self.memory.hold(slm_id, call)
            else:
                self._start(call, slm_id, 0.0)
            return
        self._end_without(call, "shed" if call.full else "failed")

    def _start(self, call: Call, slm_id: str, held_s: float) -> None:
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
            served.ended_s, lambda: self._answered(call, slm_id, served, held_s, joules, tokens)
        )
        self._states.pop(slm_id, None)

    def _failed(self, call: Call, slm_id: str) -> None:
        self.monitor.attempt_failed(slm_id)
        self._states.pop(slm_id, None)
        self._try(call)

    def _end_without(self, call: Call, error: str) -> None:
        call.row.error = error
        self._observe(call, refusal(call, self.clock.now_s))

    def _answered(
        self,
        call: Call,
        slm_id: str,
        served: Served,
        held_s: float,
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
        validator = self.loop.specs[slm_id].validator if slm_id in self.loop.specs else ""
        garbled = fault.garbled if wrong else self._random.random() < FORM_FAILS * (row.exact < 1.0)
        if garbled and validator:
            signals += (QualitySignal(f"validator:{validator}", 0.0, served.ended_s),)
        prompt = int(answers.tables["prompt_tokens"][row.request, column])
        outcome = answer(call, served, signals, prompt=prompt, tokens=tokens, cold=held_s > 0.0)
        self._observe(call, outcome)
        if self.memory is not None:
            self.memory.step()

    def _observe(self, call: Call, outcome: Outcome) -> None:
        """As the router's `record`."""
        self.monitor.observe(outcome)
        self.loop.learn(call.decision, outcome)
        self._states.pop(outcome.slm_id, None)
        self._batch.append(outcome)
        if self.outcomes is not None:
            self.outcomes.append(outcome)

    def _published(self, findings: MonitorFindings) -> None:
        self.monitor.set_calibration_factors(findings.calibration_factors)
        self._states.clear()

    def _asked_to_retrain(self) -> None:
        self.retrainings += 1
        if self._retrain is not None:
            self._retrain(self)
