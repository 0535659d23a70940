"""One router process on simulated time, with every part that decides or keeps state.

The parts are those of the router deployment: model selector, live view, fleet statistics, metrics
and, per handle, replica ranking and its estimator. There is no Ray; `QueueCache` keeps queue
lengths as Ray Serve's handle does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import Random

from pydantic_core import from_json

from calm_serve.config import Fleet, Goals, SLMSpec
from calm_serve.prediction import Predictor
from calm_serve.replicas import ReplicaRequest, rank_for_prompt
from calm_serve.requests import parse_chat, parse_overrides
from calm_serve.routing import ModelSelector
from calm_serve.telemetry import FleetStats
from calm_serve.types import Decision, EngineFacts, Outcome, ReplicaState, SLMState
from deployments.observability.catalogue import Metric
from deployments.observability.exporters import RouterMetrics
from deployments.router.fleet_view import STATE_LIFETIME_S
from deployments.router.live_state import FACTS_LIFETIME_S, LiveView
from deployments.wire import deployment_name

Clock = Callable[[], float]


class QueueCache:
    """Queue lengths as cached by one Ray Serve handle: replicas' reports and its own calls.

    A replica reports its queue length when it accepts or rejects a request. In between, the handle
    counts its own calls; calls of other processes are unknown to it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}

    def get(self, replica_id: str) -> int | None:
        """The cached length, or None if it has expired."""
        at_s, length = self._known.get(replica_id, (float("-inf"), 0))
        return length if self._clock() - at_s <= FACTS_LIFETIME_S else None

    def report(self, replica_id: str, length: int) -> None:
        """Store the queue length that the replica has reported."""
        self._known[replica_id] = (self._clock(), length)

    def finished(self, replica_id: str) -> None:
        """Count the end of one of this process's own requests."""
        length = self.get(replica_id)
        if length is not None:
            self.report(replica_id, max(length - 1, 0))


class RouterProcess:
    """Decides, ranks replicas and learns from outcomes, wired like the router deployment."""

    def __init__(
        self,
        fleet: Fleet,
        predictor: Predictor,
        replicas: Mapping[str, Iterable[ReplicaState]],
        clock: Clock,
        random: Random,
    ) -> None:
        self.view = LiveView(clock)
        self.stats = FleetStats([s.id for s in fleet.slms], clock)
        self.metrics = RouterMetrics(clock, [s.id for s in fleet.slms], _no_outlet)
        self.selector = ModelSelector(fleet, Goals(), read_state=self.state, predictor=predictor)
        self.queues = QueueCache(clock)
        self._clock, self._random = clock, random
        self._states: dict[str, tuple[float, SLMState]] = {}
        for slm_id, states in replicas.items():
            self.view.attach(deployment_name(slm_id), self.queues.get)
            self.view.update_replicas(deployment_name(slm_id), states)

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's state, at most `STATE_LIFETIME_S` old, as in `FleetView.state`."""
        now = self._clock()
        kept = self._states.get(spec.id)
        if kept is not None and now - kept[0] < STATE_LIFETIME_S:
            return kept[1]
        state = self.stats.state(spec, self.view.replicas(deployment_name(spec.id)), now)
        self._states[spec.id] = (now, state)
        return state

    def decide(self, raw: bytes, headers: Mapping[str, str], decision_id: str) -> Decision:
        """Choose the SLM for a request's body."""
        return self.selector.decide(
            parse_chat(from_json(raw)), parse_overrides(headers), decision_id
        )

    def rank(self, decision: Decision) -> list[list[str]]:
        """Rank the chosen SLM's replicas in groups, as `ReplicaRouter` does."""
        context, name = decision.context, deployment_name(decision.slm_id)
        request = ReplicaRequest(
            decision.decision_id,
            context.prefix_family,
            context.session_key,
            decision.adapter,
            prompt_tokens=context.prompt_tokens,
        )
        groups = rank_for_prompt(
            request,
            context.prefix_chain,
            self.view.replicas(name),
            self.view.estimator(name),
            local_node_id="",
            random=self._random,
        )
        self.view.routed(decision.decision_id, groups[0][0])
        return groups

    def accepted(self, decision: Decision, replica_id: str, length: int) -> None:
        """Record that a replica has accepted the request and reports `length` requests."""
        self.queues.report(replica_id, length)
        name = deployment_name(decision.slm_id)
        context = decision.context
        self.view.estimator(name).sent(
            decision.decision_id, context.prefix_chain, context.prompt_tokens, replica_id, length
        )
        self.view.take_routed(decision.decision_id)

    def finished(self, outcome: Outcome, facts: EngineFacts) -> None:
        """Record the end of the answer."""
        self.queues.finished(facts.replica_id)
        self.view.observe(deployment_name(outcome.slm_id), facts, outcome.outcome_id)
        self.stats.observe(outcome)
        self.metrics.observe(outcome)


def _no_outlet(_metric: Metric) -> Callable[[float, dict[str, str]], None]:
    return lambda _value, _labels: None
