"""Live view: the state of the SLMs' replicas as this process knows it, without remote calls.

The router deployment and the `RequestRouter` classes of its handles both import this module, so
they share one `VIEW` per process. It is not in the `RequestRouter`'s module, because Serve pickles
that by value: its globals are private copies, reset with every configuration broadcast.

Serve may run the request router on a thread of its own (`RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP`).
That thread writes membership and prefixes, the deployment's thread engine facts; each write
replaces one dictionary entry or one tuple, so readers need no lock.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from threading import Lock

from calm_serve.replicas import FirstTokenEstimator
from calm_serve.types import Decision, EngineFacts, PromptEnd, ReplicaState
from deployments.router.chosen import ReplicaChooser
from deployments.wire import Hints

FACTS_LIFETIME_S = 10.0
"""Seconds for which the engine load of a reply is used; Serve caches queue lengths for as long.
`load_tests scale` measures the effect of stale load."""

CACHED_RATIO_GAIN = 0.1
"""Weight of the newest reply in the mean share of prompt tokens found in the prefix cache."""

# Bounds of memory.
BLOCKS_PER_REPLICA = 8_192  # of a deployment's prefix index; `load_tests prefix` notices too few
MAX_DEPLOYMENTS = 256
MAX_ROUTED = 8_192  # decisions whose preferred replica is known
MAX_DEAD = 8_192  # replica ids


def hints_of(decision: Decision) -> Hints:
    """Return the hints that belong to a decision."""
    context = decision.context
    return Hints(
        decision_id=decision.decision_id,
        prefix_family=context.prefix_family,
        prefix_chain=context.prefix_chain,
        prompt_tokens=context.prompt_tokens,
        session_key=context.session_key,
        adapter=decision.adapter,
    )


@dataclass(frozen=True, slots=True)
class _LastReport:
    """Engine load in the last reply of one replica."""

    at_s: float
    running: int
    waiting: int
    kv_usage_ratio: float
    cached_prefix_ratio: float


def _unknown_queue_length(_replica_id: str) -> int | None:
    return None


@dataclass(slots=True)
class _Deployment:
    estimator: FirstTokenEstimator
    states: tuple[ReplicaState, ...] = ()  # as last described by Serve's controller
    reports: dict[str, _LastReport] = field(default_factory=dict)
    queue_length: Callable[[str], int | None] = _unknown_queue_length
    chooser: ReplicaChooser | None = None


class LiveView:
    """Replicas, engine load, prefixes and routed requests, per SLM deployment of this process.

    Deployments are addressed by name: a process only talks to those of its own application.
    Everything is bounded; `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()  # guards the ordered maps, because adding to one may evict from it
        self._deployments: OrderedDict[str, _Deployment] = OrderedDict()
        self._routed: OrderedDict[str, str] = OrderedDict()
        self._dead: OrderedDict[str, None] = OrderedDict()  # replica ids, oldest first

    def __reduce__(self) -> str:
        # Serve pickles deployment classes by value, with the globals they use. The view is pickled
        # by name, so that it is never copied.
        return "VIEW"

    def attach(self, deployment: str, queue_length: Callable[[str], int | None]) -> None:
        """Read queue lengths (requests in a replica, None if unknown) through `queue_length`."""
        self._of(deployment).queue_length = queue_length

    def attach_chooser(self, deployment: str, chooser: ReplicaChooser) -> None:
        """Choose the deployment's replicas through `chooser`."""
        self._of(deployment).chooser = chooser

    def chooser(self, deployment: str) -> ReplicaChooser | None:
        """Return what chooses the deployment's replicas; None before its handle has started."""
        record = self._deployments.get(deployment)
        return None if record is None else record.chooser

    def update_replicas(self, deployment: str, states: Iterable[ReplicaState]) -> None:
        """Replace the deployment's replicas and their polled load; drop those that are gone."""
        record = self._of(deployment)
        before = {s.replica_id: s for s in record.states}
        record.states = tuple(states)
        reports: dict[str, _LastReport] = {}
        for state in record.states:
            last = record.reports.get(state.replica_id)
            if last is None:
                continue
            # Broadcasts repeat old statistics; only changed ones are newer than the last reply.
            old = before.get(state.replica_id)
            if old is not None and _load(old) != _load(state):
                last = replace(
                    last,
                    at_s=self._clock(),
                    running=state.running,
                    waiting=state.waiting,
                    kv_usage_ratio=state.kv_usage_ratio,
                )
            reports[state.replica_id] = last
        record.reports = reports
        record.estimator.retain(s.replica_id for s in record.states)
        for state in record.states:
            old = before.get(state.replica_id)
            if old is None or _report(old) != _report(state):
                seen = frozenset(old.recent_prompts) if old else frozenset()
                new = [prompt for prompt in state.recent_prompts if prompt not in seen]
                record.estimator.reported(state, new)

    def replicas(self, deployment: str) -> tuple[ReplicaState, ...]:
        """Return the deployment's replicas with their load as of now; () when it has none.

        Replicas known to be dead are left out, even while the controller still lists them.
        Queue lengths come from the attached reader; when it returns None, the engine's running and
        waiting requests are used.
        """
        record = self._deployments.get(deployment)
        if record is None:
            return ()
        now_s = self._clock()
        return tuple(
            _merge(state, record.reports.get(state.replica_id), record.queue_length, now_s)
            for state in record.states
            if state.replica_id not in self._dead
        )

    def observe(self, deployment: str, facts: EngineFacts, decision_id: str = "") -> None:
        """Take the engine load and times of a reply; ignored for a replica that is gone."""
        record = self._deployments.get(deployment)
        if record is None:
            return
        state = next((s for s in record.states if s.replica_id == facts.replica_id), None)
        if state is None:
            return
        last = record.reports.get(facts.replica_id)
        cached_ratio = state.cached_prefix_ratio if last is None else last.cached_prefix_ratio
        if facts.prompt_tokens > 0:
            newest = min(facts.cached_tokens / facts.prompt_tokens, 1.0)
            cached_ratio += CACHED_RATIO_GAIN * (newest - cached_ratio)
        record.reports[facts.replica_id] = _LastReport(
            self._clock(), facts.running, facts.waiting, facts.kv_usage_ratio, cached_ratio
        )
        record.estimator.answered(decision_id, facts)

    def routed(self, decision_id: str, replica_id: str) -> None:
        """Store the replica that was preferred for a decision; the oldest entries are dropped."""
        with self._lock:
            self._routed[decision_id] = replica_id
            while len(self._routed) > MAX_ROUTED:
                self._routed.popitem(last=False)

    def take_routed(self, decision_id: str) -> str:
        """Return and drop the replica preferred for a decision; "" when none is known."""
        with self._lock:
            return self._routed.pop(decision_id, "")

    def estimator(self, deployment: str) -> FirstTokenEstimator:
        """Return the deployment's estimator of seconds to the first token."""
        return self._of(deployment).estimator

    def died(self, deployment: str, replica_id: str) -> None:
        """Leave out a dead replica from now on, also while the controller still lists it.

        Replica ids are not used twice, so a later list that still contains it is out of date.
        """
        with self._lock:
            if replica_id in self._dead:
                return
            self._dead[replica_id] = None
            while len(self._dead) > MAX_DEAD:
                self._dead.popitem(last=False)
        self.estimator(deployment).emptied(replica_id)

    def is_dead(self, replica_id: str) -> bool:
        """Whether the replica is known to be dead, even if the controller still lists it."""
        return replica_id in self._dead

    def _of(self, deployment: str) -> _Deployment:
        record = self._deployments.get(deployment)
        if record is None:
            with self._lock:
                made = _Deployment(FirstTokenEstimator(BLOCKS_PER_REPLICA, self._clock))
                record = self._deployments.setdefault(deployment, made)
                while len(self._deployments) > MAX_DEPLOYMENTS:
                    self._deployments.popitem(last=False)
        return record


def _load(state: ReplicaState) -> tuple[int, int, float]:
    return state.running, state.waiting, state.kv_usage_ratio


def _report(state: ReplicaState) -> tuple[int, int, tuple[PromptEnd, ...]]:
    return state.running, state.waiting, state.recent_prompts


def _merge(
    state: ReplicaState,
    report: _LastReport | None,
    queue_length: Callable[[str], int | None],
    now_s: float,
) -> ReplicaState:
    running, waiting, kv_usage_ratio = _load(state)
    cached_ratio = state.cached_prefix_ratio
    if report is not None:
        cached_ratio = report.cached_prefix_ratio
        if now_s - report.at_s <= FACTS_LIFETIME_S:
            running, waiting, kv_usage_ratio = (
                report.running,
                report.waiting,
                report.kv_usage_ratio,
            )
    queued = queue_length(state.replica_id)
    return ReplicaState(
        replica_id=state.replica_id,
        node_id=state.node_id,
        queue_length=running + waiting if queued is None else queued,
        max_queue_length=state.max_queue_length,
        running=running,
        waiting=waiting,
        kv_usage_ratio=kv_usage_ratio,
        cached_prefix_ratio=cached_ratio,
        memory_bytes=state.memory_bytes,
        adapters=state.adapters,
    )


VIEW = LiveView(time.monotonic)
