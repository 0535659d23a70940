"""Half of the memory, on simulated time: the real residency planner, and SLMs that sleep and wake.

What a deployment does with a plan happens here in simulated time: an SLM that is told to sleep
first ends what it is answering, one that is told to wake takes its measured time, and requests for
one that is not awake wait for it, as long as the hold allows.
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

POLL_S = 0.25  # the planner is asked at least this often while requests wait
NODE = "node"


class Host(Protocol):
    """What the memory needs of its world."""

    answers: Answers
    clock: FakeClock
    loop: ModelSelector
    inside: dict[str, int]

    def at(self, at_s: float, event: Callable[[], None]) -> None:
        """Let something happen at a time."""

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's state as the router sees it."""

    def forget_states(self) -> None:
        """Residency changed."""

    def resume(self, call: Any, slm_id: str, *, held_s: float) -> None:
        """A held request may go on."""

    def give_up(self, call: Any) -> None:
        """A held request has waited too long."""


class Memory:
    """Which SLMs are awake, and who waits for one that is not."""

    def __init__(self, host: Host, options: ResidencyOptions) -> None:
        self._host, self._options = host, options
        self._budget = int(options.memory_budget_bytes or 0)
        goals = host.loop.goals
        self.planner = build(
            options,
            latency_per_s=goals.latency_weight_per_s,
            energy_per_j=goals.energy_weight_per_j,
        )
        self.wake_j = 0.0  # spent on waking so far
        self._tiers: dict[str, Residency] = {}
        self._draining: set[str] = set()
        self._published: dict[str, Residency] = {}
        self._waits: dict[str, float] = {}
        self._waiting: dict[str, list[tuple[float, Any]]] = {}
        self._arrivals: list[str] = []
        self._polling = False

    def is_hot(self, slm_id: str) -> bool:
        """Whether the SLM takes requests now."""
        return self._tiers.get(slm_id) is Residency.HOT and slm_id not in self._draining

    def held(self, slm_id: str) -> int:
        """Requests that wait for the SLM to wake."""
        return len(self._waiting.get(slm_id, ()))

    def seen(self, state: SLMState) -> SLMState:
        """The state with its residency, and with the time until the SLM could answer."""
        if self.is_hot(state.slm_id):
            return state
        wait_s = self._waits.get(state.slm_id, state.wake_s)
        wake_s = min(wait_s, self._options.hold_s)
        return replace(state, residency=Residency.ASLEEP, wake_s=wake_s)

    def wanted(self, slm_id: str) -> None:
        """A request prefers the SLM."""
        self._arrivals.append(slm_id)

    def hold(self, slm_id: str, call: Any) -> None:
        """Let a request wait for the SLM."""
        now = self._host.clock.now_s
        self._waiting.setdefault(slm_id, []).append((now, call))
        self._host.at(now + self._options.hold_s, lambda: self._expire(slm_id, call))

    def step(self) -> None:
        """Ask the planner, and begin to do what it says."""
        now = self._host.clock.now_s
        arrivals, self._arrivals = tuple(self._arrivals), []
        held = {i: len(w) for i, w in self._waiting.items() if w}
        plan = self.planner.step(now, Demand(arrivals, held), self._footprints())
        self._waits = dict(plan.wait_s)
        if not self._tiers:  # before the first request: whatever the planner wants is awake
            self._tiers = dict(plan.desired)
            self._published = dict(plan.desired)
            return
        # Twice, because what falls asleep at once makes room for what wakes.
        for _ in range(2):
            desired = within_budget(plan, self._footprints(), self._published, self._budget)
            for slm_id, tier in desired.items():
                self._obey(slm_id, tier, now)
            self._published = desired
        self._host.forget_states()
        if held and not self._polling:
            self._polling = True
            self._host.at(now + POLL_S, self._poll)

    def _poll(self) -> None:
        self._polling = False
        self.step()

    def _obey(self, slm_id: str, tier: Residency, now: float) -> None:
        is_now = self._tiers[slm_id]
        if tier is Residency.HOT:
            self._draining.discard(slm_id)
            if is_now is Residency.HOT:
                self._release(slm_id)
            elif is_now is not Residency.STARTING:
                self._tiers[slm_id] = Residency.STARTING
                speed = self._host.answers.speeds[slm_id]
                self.wake_j += speed.wake_j
                self._host.at(now + speed.wake_s, lambda: self._woke(slm_id))
        elif is_now is Residency.HOT:
            if self._host.inside[slm_id]:
                self._draining.add(slm_id)
            else:
                self._draining.discard(slm_id)
                self._tiers[slm_id] = Residency.ASLEEP

    def _woke(self, slm_id: str) -> None:
        self._tiers[slm_id] = Residency.HOT
        self._release(slm_id)
        self.step()

    def _release(self, slm_id: str) -> None:
        now = self._host.clock.now_s
        for since, call in self._waiting.pop(slm_id, ()):
            self._host.resume(call, slm_id, held_s=max(now - since, 1e-6))

    def _expire(self, slm_id: str, call: Any) -> None:
        waiting = self._waiting.get(slm_id, [])
        for entry in waiting:
            if entry[1] is call:
                waiting.remove(entry)
                self._host.give_up(call)
                return

    def _footprints(self) -> list[ModelFootprint]:
        found = []
        for slm_id, spec in self._host.loop.specs.items():
            speed = self._host.answers.speeds[slm_id]
            found.append(
                ModelFootprint(
                    slm_id,
                    {NODE: spec.declared_bytes},
                    observed=self._tiers.get(slm_id, Residency.ASLEEP),
                    wake_s=speed.wake_s,
                    wake_j=speed.wake_j,
                    answer_s=speed.first_s + speed.tpot_s * spec.priors.output_tokens,
                    running=self._host.inside[slm_id],
                )
            )
        return found


def half(answers: Answers) -> int:
    """A budget for about half of the fleet: the declared bytes of the largest and of half the rest.

    So any half of the SLMs fit together, as with equal places.
    """
    sizes = sorted((s.declared_bytes for s in answers.fleet.slms), reverse=True)
    return sum(sizes[: len(sizes) // 2])
