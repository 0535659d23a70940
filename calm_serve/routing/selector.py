"""The decision on the hot path: context, rules, filters, predictions, score, record.

`ModelSelector` composes the stages and owns no policy. It does no I/O and makes no remote call:
everything it reads is in memory. `predictor` and `goals` are each replaced by one assignment, so a
decision never sees half of a change.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol
from zlib import crc32

from calm_serve.config import DECISION_LOG, Fleet, Goals, SLMSpec
from calm_serve.errors import UnknownModelError
from calm_serve.prediction import MetadataPrior, Predictor
from calm_serve.requests import (
    ContextBuilder,
    Overrides,
    ParsedRequest,
    fill_features,
    text_buckets,
)
from calm_serve.routing import exclusions, filters, rules, scoring, unfamiliar, without_text
from calm_serve.routing.baselines import Baseline
from calm_serve.routing.choice import Choice, choice_terms, floor_of, plain, record, score_all
from calm_serve.routing.conversations import MAX_CONVERSATIONS, ConversationMemory
from calm_serve.routing.factory import BaselineRegistry, rules_of
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    DecisionReason,
    GoalStatus,
    Novelty,
    Outcome,
    Residency,
    RoutingContext,
    SLMState,
    Versions,
    Weights,
)

StateReader = Callable[[SLMSpec], SLMState]


def assume_hot(spec: SLMSpec) -> SLMState:
    """Return the state of an idle SLM; `calm route` uses it without a running service."""
    return SLMState(
        slm_id=spec.id, residency=Residency.HOT, replicas=1, capacity=spec.limits.max_num_seqs
    )


def config_version(*sections: Any) -> str:
    """Return a short stable hash of validated configuration, for decision records."""
    text = json.dumps([s.model_dump(mode="json") for s in sections], sort_keys=True)
    return f"{crc32(text.encode()):08x}"


class WeightController(Protocol):
    """What moves the weights at run time: `goals.GoalController` or `StatedWeights`."""

    weights: Weights

    def set_goals(self, goals: Goals) -> None:
        """Swap the goals; the weights return to the stated ones at once."""
        ...

    def retain(self, slm_ids: Iterable[str]) -> None:
        """Forget SLMs that left the fleet."""
        ...

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Learn from a finished request."""
        ...

    def step(self) -> Weights:
        """Move the weights by the outcomes since the last step, and return them."""
        ...

    def status(self) -> list[GoalStatus]:
        """Return the status of each target that is set."""
        ...


class StatedWeights:
    """The weights that the operator configured, unchanged."""

    def __init__(self, goals: Goals) -> None:
        self.set_goals(goals)

    def set_goals(self, goals: Goals) -> None:
        """Swap the goals."""
        self.weights: Weights = scoring.weights_of(goals)

    def retain(self, slm_ids: Iterable[str]) -> None:
        """Do nothing: no state per SLM."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Do nothing."""

    def step(self) -> Weights:
        """Return the configured weights."""
        return self.weights

    def status(self) -> list[GoalStatus]:
        """Return no status: without a controller no target is pursued."""
        return []


class ModelSelector:
    """Decides for one fleet. Single-threaded: one instance per event loop."""

    def __init__(
        self,
        fleet: Fleet,
        goals: Goals,
        *,
        read_state: StateReader = assume_hot,
        predictor: Predictor | None = None,
        timer: Callable[[], float] = time.perf_counter,
        decision_log: int = DECISION_LOG,
        conversations: int = MAX_CONVERSATIONS,
        controller: WeightController | None = None,
    ) -> None:
        """Without a `controller` the weights stay as the goals state them."""
        self.predictor: Predictor = predictor or MetadataPrior()
        self._embedding_space = ""  # of `auto`; stays, so that a client's vectors can be compared
        self._read_state = read_state
        self._timer = timer
        self._log: OrderedDict[str, Decision] = OrderedDict()
        self._log_size = decision_log
        self._conversations = ConversationMemory(conversations)
        self.goals = goals
        self._baseline: Baseline | None = None
        self._baselines = BaselineRegistry(text_buckets)
        self.controller: WeightController = controller or StatedWeights(goals)
        self.set_fleet(fleet)
        self.set_goals(goals)

    def set_fleet(self, fleet: Fleet) -> None:
        """Swap the fleet: SLMs were added or removed. Decisions in flight keep their records."""
        self.fleet = fleet
        self.specs: dict[str, SLMSpec] = {s.id: s for s in fleet.slms}
        self._generality = {s.id: fleet.generality(s) for s in fleet.slms}
        self._pins = {s.name: s.slm for s in fleet.safety}
        self._embedding_space = self._embedding_space or without_text.first_space(fleet)
        self._builder = ContextBuilder(fleet, self._embedding_space, self._conversations.find)
        self._fleet_version = config_version(fleet)
        self._rules = rules_of(self.goals, fleet)
        if self._baseline is not None:
            self._baseline.set_fleet(fleet)
        self.controller.retain(self.specs)

    def set_goals(self, goals: Goals) -> None:
        """Swap the goals; the next decision uses them. Baselines keep their memory."""
        self._baseline = self._baselines.take(goals, self.fleet)
        self._rules = rules_of(goals, self.fleet)
        self.goals = goals
        self.controller.set_goals(goals)
        self.weights = self.controller.weights
        self._goals_version = config_version(goals)

    @property
    def versions(self) -> Versions:
        """Versions that the next decision records."""
        return Versions(self.predictor.version, self._goals_version, self._fleet_version)

    def decide(self, request: ParsedRequest, overrides: Overrides, decision_id: str) -> Decision:
        """Choose the SLM for a parsed request.

        Raises UnknownModelError, NoCandidateError, SLMUnavailableError when an SLM could take it
        later, and RequestError for token ids that do not name their SLM.
        """
        started = self._timer()
        context = self._builder.build(request, overrides, decision_id)
        decision = self._decide(context, request)
        # Written in place: no other code has the record yet, and a copy would take as long as the
        # filters.
        object.__setattr__(decision, "decided_in_s", self._timer() - started)
        if context.generates:
            self._conversations.note(context, decision.slm_id)
        self._log[decision_id] = decision
        while len(self._log) > self._log_size:
            self._log.popitem(last=False)
        return decision

    def _decide(self, context: RoutingContext, request: ParsedRequest | None) -> Decision:
        """Return the decision; without a `request` the context has its features already."""
        if context.generates and context.safety_class in self._pins:
            why = DecisionReason.SAFETY_PIN, context.safety_class
            return self._pinned(context, request, self._pins[context.safety_class], *why)
        if context.slm_id or context.adapter:
            if context.slm_id not in self.specs:
                raise _unknown(self.fleet, context.requested_model)
            return self._pinned(context, request, context.slm_id, DecisionReason.REQUESTED)
        if context.is_token_ids:
            without_text.check_tokenizer(context, self.specs)
        states = {i: self._read_state(s) for i, s in self.specs.items()}
        allowed, excluded = filters.split(context, self.specs, states)
        if not context.generates:
            found = without_text.choose(context, self.specs, allowed, states, self.weights)
            return self._record(context, found, excluded)
        for named in rules.claims(self._rules, context, may_stay=self._baseline is None):
            usable = [i for i in named.slms if i in allowed and named.may_answer(states[i])]
            choice = self._by_name(context, request, named, usable, states)
            if choice is not None:
                others = tuple(i for i in allowed if i not in usable)
                return self._record(context, choice, excluded, rule=named.rule, unscored=others)
        return self._record(context, self._scored(context, request, allowed, states), excluded)

    def recall(self, decision_id: str) -> Decision | None:
        """Return a recent decision, None when it is unknown or too old."""
        return self._log.get(decision_id)

    def complete(self, decision: Decision, request: ParsedRequest) -> None:
        """Add what a rule did not need: features, and the novelty if the predictor is the same."""
        fill_features(decision.context, request)
        if decision.novelty is None and decision.versions.predictor == self.predictor.version:
            novelty = self.predictor.novelty(decision.context.features.bits)
            object.__setattr__(decision, "novelty", novelty)

    def explain(self, decision: Decision) -> dict[str, Any]:
        """Return the decision as plain data for JSON."""
        return plain(decision)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Pass a finished request to the controller and the baseline, if it generated text."""
        if not decision.context.generates:
            return
        if outcome.status == "ok":
            self._conversations.note(decision.context, outcome.slm_id)
        self.controller.learn(decision, outcome)
        if self._baseline is not None:
            self._baseline.observe(outcome)

    def rank_unscored(
        self, decision: Decision, request: ParsedRequest | None = None
    ) -> tuple[str, ...]:
        """Return a decision's `unscored` SLMs, best first by score in their states of now.

        For a failover only: a rule decides without predictions. The quality floor holds here too.
        """
        ids = [i for i in decision.unscored if i in self.specs]
        if not ids:
            return ()
        states = {i: self._read_state(self.specs[i]) for i in ids}
        scored = self._scores(decision.context, request, ids, states)
        floor = floor_of(decision.context, self.goals)
        return tuple(c.slm_id for c in scoring.above_floor(scoring.ranked(scored), floor))

    def tick(self) -> None:
        """Let the controller move the weights; call it a few times a second, between requests."""
        self.weights = self.controller.step()

    def _pinned(
        self,
        context: RoutingContext,
        request: ParsedRequest | None,
        slm_id: str,
        reason: DecisionReason,
        rule: str = "",
    ) -> Decision:
        spec = self.specs[slm_id]
        adapter = context.adapter if reason is DecisionReason.REQUESTED else ""
        if adapter and not any(a.name == adapter for a in spec.adapters):
            raise _unknown(self.fleet, context.requested_model)
        state = self._read_state(spec)
        # A safety pin replaces the model and adapter that the client named.
        named = context.requested_model == slm_id or adapter
        filtered = context if named else replace(context, requested_model=slm_id)
        excluded_by = filters.excluded_by(filtered, spec, state, pinned=True)
        if excluded_by:
            raise exclusions.explain_pinned(context, spec, excluded_by)
        if context.generates:
            if request is not None:
                fill_features(context, request)
            (candidate,) = self._scores(context, None, [slm_id], {slm_id: state})
        else:
            candidate = without_text.evaluate(context, spec, state, self.weights)
        choice = Choice(DecisionPath.PINNED, reason, (candidate,), (slm_id,))
        return self._record(context, choice, rule=rule, adapter=adapter)

    def _by_name(
        self,
        context: RoutingContext,
        request: ParsedRequest | None,
        named: rules.Named,
        usable: list[str],
        states: Mapping[str, SLMState],
    ) -> Choice | None:
        """Choose among the usable SLMs that are named; None when none reaches the quality floor.

        One SLM without a floor needs no prediction, which makes this the fast path.
        """
        if not usable:
            return None
        floor = 0.0 if named.in_tool_loop else floor_of(context, self.goals)
        why = named.path, named.reason
        if self._baseline is not None or (len(usable) == 1 and floor <= 0.0):
            return Choice(*why, (Candidate(slm_id=usable[0], score=1.0),), tuple(usable))
        scored = self._scores(context, request, usable, states)
        if all(c.quality < floor for c in scored):
            return None
        if len(usable) == 1:
            return Choice(*why, tuple(scored), tuple(usable))
        return self._best(context, scored, states)

    def _scored(
        self,
        context: RoutingContext,
        request: ParsedRequest | None,
        allowed: list[str],
        states: Mapping[str, SLMState],
    ) -> Choice:
        scored = self._scores(context, request, allowed, states)
        if self._baseline is None:
            novelty = self.predictor.novelty(context.features.bits)
            return replace(self._best(context, scored, states, novelty), novelty=novelty)
        ids, propensity = self._baseline.choose(context, scored, states)
        why = DecisionPath.BASELINE, DecisionReason.BASELINE
        return Choice(*why, tuple(scoring.ranked(scored)), tuple(ids), propensity)

    def _scores(
        self,
        context: RoutingContext,
        request: ParsedRequest | None,
        ids: Sequence[str],
        states: Mapping[str, SLMState],
    ) -> list[Candidate]:
        """Predict and score SLMs; without a `request` the context has its features already."""
        if request is not None:
            fill_features(context, request)
        specs = [self.specs[i] for i in ids]
        own = [states[i] for i in ids]
        predictions = self.predictor.predict(context, specs, own)
        general = unfamiliar.general_terms(context, specs, own, self._generality)
        return score_all(context, predictions, specs, states, self.weights, general)

    def _best(
        self,
        context: RoutingContext,
        scored: list[Candidate],
        states: Mapping[str, SLMState],
        novelty: Novelty | None = None,
    ) -> Choice:
        """Choose by score, or by generality for an unfamiliar prompt; a rule gives no `novelty`."""
        terms = choice_terms(context, self.goals, self.weights, self.predictor)
        return unfamiliar.choose(context, scored, self.specs, states, terms, novelty)

    def _record(
        self,
        context: RoutingContext,
        choice: Choice,
        excluded: Sequence[Candidate] = (),
        **about: Any,
    ) -> Decision:
        if choice.novelty is None:
            choice = replace(choice, novelty=self.predictor.novelty(context.features.bits))
        return record(context, choice, excluded, self.versions, self.weights, **about)


def _unknown(fleet: Fleet, requested: str) -> UnknownModelError:
    adapters = [f"{s.id}:{a.name}" for s in fleet.slms for a in s.adapters]
    known = sorted([*(s.id for s in fleet.slms), *adapters])
    message = f"model {requested!r} not found; known: auto, {', '.join(known)}"
    return UnknownModelError(message, param="model")
