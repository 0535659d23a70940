"""Fakes and factories for tests of this project and of code that uses it.

Every factory returns a valid record when called without arguments; keyword arguments replace
fields by name, and a wrong name is a TypeError. Nothing here sleeps, reads a clock or touches Ray.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from calm_serve.config import Fleet, Goals, SLMSpec
from calm_serve.prediction import LOAD_NAMES
from calm_serve.requests import NUMBER_NAMES
from calm_serve.routing import ModelSelector
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    DecisionReason,
    DecisionSummary,
    EngineFacts,
    Outcome,
    OutputShape,
    Prediction,
    PredictorVersion,
    PromptFeatures,
    ReplicaState,
    Residency,
    RoutingContext,
    SLMState,
    Timing,
    Versions,
)

__all__ = [
    "EngineSimulator",
    "FakeClock",
    "Served",
    "change_outcome",
    "decision_for",
    "make_context",
    "make_decision",
    "make_facts",
    "make_fleet",
    "make_goals",
    "make_outcome",
    "make_prediction",
    "make_replica",
    "make_spec",
    "make_state",
]


VERSIONS = Versions(PredictorVersion("prior"), "goals", "fleet")


class FakeClock:
    """A clock in seconds that moves only in `advance`. Call it to read it."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move forwards. Raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back: {seconds}")
        self.now_s += seconds


def make_spec(slm_id: str = "small", **fields: Any) -> SLMSpec:
    """An SLM of the fleet file; `fields` are those of SLMSpec, nested ones as mappings."""
    return SLMSpec.model_validate({"id": slm_id, "model": "example/model", **fields})


def make_fleet(*slms: SLMSpec, **fields: Any) -> Fleet:
    """A fleet of `slms`, or of "small" and "large"; `fields` are those of Fleet."""
    return Fleet.model_validate(
        {"slms": slms or (make_spec("small"), make_spec("large")), **fields}
    )


def make_goals(**fields: Any) -> Goals:
    """Goals without exploration, so that a decision is the best one."""
    return Goals(**{"exploration_ratio": 0.0, **fields})


def make_context(**fields: Any) -> RoutingContext:
    """A short English chat request without a pinned SLM."""
    return RoutingContext(
        **{
            "request_id": "request",
            "requested_model": "auto",
            "prompt_chars": 400,
            "prompt_tokens": 100,
            "max_output_tokens": None,
            "output_shape": OutputShape.TEXT,
            "turns": 1,
            "stream": False,
            "language": "en",
            "has_code": False,
            "safety_class": "none",
            "markers": (),
            "session_key": "",
            "prefix_family": "00000001",
            "prefix_chain": (1,),
            "features": PromptFeatures((1.0,) * len(NUMBER_NAMES), (1203, 1207)),
            **fields,
        }
    )


def make_state(slm_id: str = "small", **fields: Any) -> SLMState:
    """A hot, idle SLM with one replica of 16 slots."""
    return SLMState(slm_id, **{"residency": Residency.HOT, "replicas": 1, "capacity": 16, **fields})


def make_replica(replica_id: str = "replica", **fields: Any) -> ReplicaState:
    """An idle replica with room for 20 requests."""
    return ReplicaState(replica_id, **{"max_queue_length": 20, **fields})


def make_prediction(slm_id: str = "small", **fields: Any) -> Prediction:
    """The prediction of the metadata priors for an idle SLM."""
    values = {
        "success_ratio": 0.5,
        "output_tokens": 64.0,
        "ttft_s": 0.05,
        "tpot_s": 0.01,
        "energy_j": 6.4,
    }
    return Prediction(slm_id, **{**values, **fields})


def decision_for(selector: ModelSelector, context: RoutingContext) -> Decision:
    """Decide for a context alone; it must have its features, unless a rule decides."""
    return selector._decide(context, None)


def make_decision(slm_id: str = "small", *others: str, **fields: Any) -> Decision:
    """A scored decision for `slm_id`, with `others` as failover targets in this order."""
    context = fields.pop("context", None) or make_context(
        request_id=fields.get("decision_id", "request")
    )
    ranking = (slm_id, *others)
    return Decision(
        **{
            "decision_id": context.request_id,
            "slm_id": slm_id,
            "adapter": "",
            "path": DecisionPath.SCORED,
            "reason": DecisionReason.BEST_SCORE,
            "rule": "",
            "propensity": 1.0,
            "candidates": tuple(
                Candidate(i, prediction=make_prediction(i), quality=0.5, score=0.5) for i in ranking
            ),
            "ranking": ranking,
            "context": context,
            "versions": VERSIONS,
            **fields,
        }
    )


def make_facts(replica_id: str = "replica", **fields: Any) -> EngineFacts:
    """Engine facts of an answer of 10 tokens."""
    values = {"prompt_tokens": 100, "output_tokens": 10, "ttft_s": 0.05, "energy_j": 1.0}
    return EngineFacts(replica_id, **{**values, **fields})


# Name of a sub-record's field in the factories -> the sub-record, and the name of its field.
_PARTS: dict[str, tuple[str, str]] = {
    **{f.name: ("decision", f.name) for f in fields(DecisionSummary)},
    **{f.name: ("features", f.name) for f in fields(PromptFeatures)},
    **{f.name: ("timing", f.name) for f in fields(Timing)},
    **{f.name: ("engine", f.name) for f in fields(EngineFacts) if f.name != "ttft_s"},
    "engine_ttft_s": ("engine", "ttft_s"),
}


def make_outcome(outcome_id: str = "request", **values: Any) -> Outcome:
    """One answered request of the SLM "small", without a quality signal.

    `values` may also be of the sub-records' fields, as in `make_outcome(ttft_s=0.2, path="rule")`;
    the engine's own TTFT is `engine_ttft_s`.
    """
    slm_id = values.get("slm_id", "small")
    usual = Outcome(
        outcome_id,
        slm_id,
        at=1000.0,
        predicted_replica="replica",
        decision=DecisionSummary(
            path="scored",
            reason="best_score",
            versions=VERSIONS,
            predicted=make_prediction(slm_id),
            load_features=(0.0,) * len(LOAD_NAMES),
        ),
        features=PromptFeatures((1.0,) * len(NUMBER_NAMES), (1203, 1207)),
        timing=Timing(ttft_s=0.05, e2e_s=0.15, tpot_s=0.01, decision_s=0.0003),
        engine=EngineFacts("replica", prompt_tokens=100, output_tokens=10, energy_j=1.0),
    )
    return change_outcome(usual, **values)


def change_outcome(outcome: Outcome, **values: Any) -> Outcome:
    """A copy with other values, of sub-records too; see `make_outcome`."""
    parts: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        part, field = _PARTS.get(name, ("", name))
        if part:
            parts.setdefault(part, {})[field] = value
        else:
            own[name] = value
    changed = {p: replace(own.pop(p, getattr(outcome, p)), **v) for p, v in parts.items()}
    return replace(outcome, **changed, **own)


@dataclass(frozen=True, slots=True)
class Served:
    """Times of a simulated request: arrival, start in a slot, first token, end (seconds)."""

    arrived_s: float
    started_s: float
    first_token_s: float
    ended_s: float

    @property
    def ttft_s(self) -> float:
        """Time to first token, queueing included."""
        return self.first_token_s - self.arrived_s


class EngineSimulator:
    """One replica's engine as a queue: `slots` requests at once, first come, first served.

    A request occupies a slot during prefill and decoding; without a free slot it waits for the
    first that becomes free. `jitter_ratio` makes service times uneven, from `seed`, so equal
    arguments and submissions give equal answers. Times of submission must not decrease.
    """

    def __init__(
        self,
        spec: SLMSpec,
        *,
        slots: int | None = None,
        prefill_s_per_token: float = 0.0004,
        tpot_s: float = 0.01,
        jitter_ratio: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.spec = spec
        self.slots = slots or spec.limits.max_num_seqs
        self._prefill_s_per_token, self._tpot_s = prefill_s_per_token, tpot_s
        self._jitter_ratio = jitter_ratio
        self._random = Random(seed)
        self._free_at = [0.0] * self.slots  # a heap
        self._open: list[Served] = []
        self._now_s = 0.0

    def submit(
        self, at_s: float, prompt_tokens: int, output_tokens: int, *, pace: float = 1.0
    ) -> Served:
        """Take a request at `at_s`; its service takes `pace` times as long as usual.

        Raises ValueError when `at_s` is before the last one.
        """
        if at_s < self._now_s:
            raise ValueError(f"submitted at {at_s}, the last one was at {self._now_s}")
        self._now_s = at_s
        self._forget(at_s)
        started = max(at_s, heapq.heappop(self._free_at))
        prefill_s = prompt_tokens * self._prefill_s_per_token
        first = started + self._uneven(pace * (prefill_s + self._tpot_s))
        ended = first + self._uneven(pace * max(output_tokens - 1, 0) * self._tpot_s)
        heapq.heappush(self._free_at, ended)
        served = Served(at_s, started, first, ended)
        self._open.append(served)
        return served

    def replica(self, at_s: float, replica_id: str = "replica") -> ReplicaState:
        """The engine's load at `at_s`, as a replica reports it."""
        inside = [s for s in self._open if s.ended_s > at_s]
        running = sum(s.started_s <= at_s for s in inside)
        return make_replica(
            replica_id,
            queue_length=len(inside),
            max_queue_length=self.spec.limits.max_ongoing_requests,
            running=running,
            waiting=len(inside) - running,
        )

    def state(self, at_s: float, **fields: Any) -> SLMState:
        """The load of an SLM that has this engine alone."""
        replica = self.replica(at_s)
        load: Mapping[str, Any] = {
            "running": replica.running,
            "waiting": replica.waiting,
            "capacity": self.slots,
        }
        return make_state(self.spec.id, **{**load, **fields})

    def _forget(self, at_s: float) -> None:
        self._open = [s for s in self._open if s.ended_s > at_s]

    def _uneven(self, seconds: float) -> float:
        return seconds * (1.0 + self._jitter_ratio * (2.0 * self._random.random() - 1.0))
