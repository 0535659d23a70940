"""Limited memory on simulated time: the real residency planner, and SLMs that sleep and wake.

Desired residency is applied as a deployment does: an SLM that is to sleep first finishes its
requests, one that is to wake takes its measured time, and requests to an SLM that is not hot are
queued for its wake-up, for at most `hold_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from calm_serve.config import ResidencyOptions, SLMSpec
from calm_serve.residency import Demand, ModelFootprint, build, within_budget
from calm_serve.routing import ModelSelector
from calm_serve.testing import FakeClock
from calm_serve.types import Residency, SLMState
from load_tests.paper.simulated.answers import Answers

POLL_S = 0.25  # period of the planner while requests are queued
NODE = "node"


class Host(Protocol):
    """The part of `World` that the memory uses."""

    answers: Answers
    clock: FakeClock
    selector: ModelSelector
    inside: dict[str, int]

    def at(self, at_s: float, event: Callable[[], None]) -> None:
        """Schedule an event."""

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's state as the router sees it."""

    def forget_states(self) -> None:
        """Drop cached states, because residency changed."""

    def resume(self, call: Any, slm_id: str, *, queued_s: float) -> None:
        """Start a queued request: its SLM is hot."""

    def expire(self, call: Any) -> None:
        """End a queued request that has waited `hold_s`."""


class Memory:
    """Residency of every SLM, and the requests queued for wake-ups."""

    def __init__(self, host: Host, options: ResidencyOptions) -> None:
        self._host, self._options = host, options
        self._budget = int(options.memory_budget_bytes or 0)
        goals = host.selector.goals
        self.planner = build(
            options,
            latency_per_s=goals.latency_weight_per_s,
            energy_per_j=goals.energy_weight_per_j,
        )
        self.wake_j = 0.0  # spent on waking so far
        self._observed: dict[str, Residency] = {}
        self._draining: set[str] = set()
        self._published: dict[str, Residency] = {}
        self._wait_s: dict[str, float] = {}
        self._waiting: dict[str, list[tuple[float, Any]]] = {}
        self._arrivals: list[str] = []
        self._polling = False

    def is_hot(self, slm_id: str) -> bool:
        """Whether the SLM accepts requests now."""
        return self._observed.get(slm_id) is Residency.HOT and slm_id not in self._draining

    def queued(self, slm_id: str) -> int:
        """Number of requests queued for the SLM's wake-up."""
        return len(self._waiting.get(slm_id, ()))

    def with_residency(self, state: SLMState) -> SLMState:
        """The state with the SLM's residency, and the time until it would be hot."""
        if self.is_hot(state.slm_id):
            return state
        wait_s = self._wait_s.get(state.slm_id, state.wake_s)
        wake_s = min(wait_s, self._options.hold_s)
        return replace(state, residency=Residency.ASLEEP, wake_s=wake_s)

    def report_demand(self, slm_id: str) -> None:
        """Report a request that prefers the SLM."""
        self._arrivals.append(slm_id)

    def queue_for_wakeup(self, slm_id: str, call: Any) -> None:
        """Queue a request until the SLM is hot."""
        now = self._host.clock.now_s
        self._waiting.setdefault(slm_id, []).append((now, call))
        self._host.at(now + self._options.hold_s, lambda: self._expire(slm_id, call))

    def step(self) -> None:
        """Run the planner and apply the residency that it desires."""
        now = self._host.clock.now_s
        arrivals, self._arrivals = tuple(self._arrivals), []
        queued = {i: len(w) for i, w in self._waiting.items() if w}
        plan = self.planner.step(now, Demand(arrivals, queued), self._footprints())
        self._wait_s = dict(plan.wait_s)
        if not self._observed:  # at the start every desired SLM is hot at once
            self._observed = dict(plan.desired)
            self._published = dict(plan.desired)
            return
        # Twice, because SLMs that sleep at once make room for those that wake.
        for _ in range(2):
            desired = within_budget(plan, self._footprints(), self._published, self._budget)
            for slm_id, residency in desired.items():
                self._apply(slm_id, residency, now)
            self._published = desired
        self._host.forget_states()
        if queued and not self._polling:
            self._polling = True
            self._host.at(now + POLL_S, self._poll)

    def _poll(self) -> None:
        self._polling = False
        self.step()

    def _apply(self, slm_id: str, desired_residency: Residency, now: float) -> None:
        observed = self._observed[slm_id]
        if desired_residency is Residency.HOT:
            self._draining.discard(slm_id)
            if observed is Residency.HOT:
                self._release(slm_id)
            elif observed is not Residency.STARTING:
                self._observed[slm_id] = Residency.STARTING
                speed = self._host.answers.speeds[slm_id]
                self.wake_j += speed.wake_j
                self._host.at(now + speed.wake_s, lambda: self._wake_finished(slm_id))
        elif observed is Residency.HOT:
            if self._host.inside[slm_id]:
                self._draining.add(slm_id)
            else:
                self._draining.discard(slm_id)
                self._observed[slm_id] = Residency.ASLEEP

    def _wake_finished(self, slm_id: str) -> None:
        self._observed[slm_id] = Residency.HOT
        self._release(slm_id)
        self.step()

    def _release(self, slm_id: str) -> None:
        now = self._host.clock.now_s
        for since, call in self._waiting.pop(slm_id, ()):
            self._host.resume(call, slm_id, queued_s=max(now - since, 1e-6))

    def _expire(self, slm_id: str, call: Any) -> None:
        waiting = self._waiting.get(slm_id, [])
        for entry in waiting:
            if entry[1] is call:
                waiting.remove(entry)
                self._host.expire(call)
                return

    def _footprints(self) -> list[ModelFootprint]:
        found = []
        for slm_id, spec in self._host.selector.specs.items():
            speed = self._host.answers.speeds[slm_id]
            found.append(
                ModelFootprint(
                    slm_id,
                    {NODE: spec.declared_bytes},
                    observed=self._observed.get(slm_id, Residency.ASLEEP),
                    wake_s=speed.wake_s,
                    wake_j=speed.wake_j,
                    answer_s=speed.first_s + speed.tpot_s * spec.priors.output_tokens,
                    running=self._host.inside[slm_id],
                )
            )
        return found


def half_of_fleet(answers: Answers) -> int:
    """A memory budget for half of the SLMs: the declared bytes of the largest half.

    Any half of the SLMs fits into it, as with equal places.
    """
    sizes = sorted((s.declared_bytes for s in answers.fleet.slms), reverse=True)
    return sum(sizes[: len(sizes) // 2])
