"""Seconds until a request's first token on each replica, predicted from what answers report."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import NamedTuple, TypeVar

from calm_serve.replicas.backlog import REPORT_DELAY_S, Backlog, MeanPrompt
from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.replicas.recent_work import RecentWork
from calm_serve.telemetry import DecayedPlane, decay
from calm_serve.types import EngineFacts, PromptEnd, ReplicaState

BLOCK_TOKENS = 32.0  # of a full block of a prefix chain, as estimated from its characters
MAX_SESSIONS = 8192  # of this process; the oldest are dropped
MAX_IN_FLIGHT = 8192  # requests of this process whose answers are awaited; the oldest are dropped

# What is assumed before any answer. The rates are those of a small model on a small GPU; they only
# have to be above 0, because `PRIOR_ANSWERS` answers outweigh them.
PRIOR_ANSWERS = 4.0
PRIOR_S_PER_TOKEN = 1e-4
PRIOR_S_PER_REQUEST = 2e-3  # of delay by a request that shares the engine
PRIOR_PROMPT_TOKENS = 512.0
PRIOR_OUTPUT_TOKENS = 64.0
# Sums of squares that the assumed slopes are worth: spreads of tokens, waiting seconds, requests.
TOKENS_RIDGE = PRIOR_ANSWERS * 256.0**2
WAIT_RIDGE = PRIOR_ANSWERS * 1.0**2
REQUESTS_RIDGE = PRIOR_ANSWERS * 4.0**2

EVEN_REQUESTS = 16.0
"""Mean requests that are added to the work of a replica: a few more are not yet uneven."""

RATE_HALF_LIFE = 64.0  # answers of one replica: its rates follow another clock of its GPU
MEAN_HALF_LIFE = 256.0  # requests or answers of all replicas
MIN_S_PER_TOKEN = 1e-8
MAX_WAIT_SLOPE = 2.0

T = TypeVar("T")

_KEEP = decay(1.0, MEAN_HALF_LIFE)
_PRIOR_RATE = (PRIOR_S_PER_TOKEN, PRIOR_S_PER_REQUEST)
_RATE_RIDGES = (TOKENS_RIDGE, REQUESTS_RIDGE)


class Estimate(NamedTuple):
    """What one replica would need for one request, in seconds."""

    wait_s: float  # until the work ahead of it is done
    prefill_s: float  # of the tokens that the replica has not cached
    own_s: float  # the part of `prefill_s` that only this conversation can use again
    excess: float  # recent work of the replica above the mean, as a share of it


class _Replica:
    __slots__ = ("backlog", "plane", "rate")

    def __init__(self, rate: tuple[float, float]) -> None:
        self.backlog = Backlog()
        self.plane = DecayedPlane(RATE_HALF_LIFE)
        self.rate = rate  # seconds per token and per request in the engine


class _InFlight(NamedTuple):
    replica_id: str
    prompt_tokens: int  # estimated
    work_tokens: float  # counted so far
    work_s: float  # predicted, of the prefill
    wait_s: float  # predicted
    queue_length: int


class _Mean:
    """A decayed mean that starts from a prior."""

    __slots__ = ("_sum", "_weight", "value")

    def __init__(self, prior: float) -> None:
        self._weight = PRIOR_ANSWERS
        self._sum = PRIOR_ANSWERS * prior
        self.value = prior

    def add(self, value: float) -> None:
        self._weight = self._weight * _KEEP + 1.0
        self._sum = self._sum * _KEEP + value
        self.value = self._sum / self._weight


class FirstTokenEstimator:
    """Learns rates from answers, and follows the work ahead in every replica of one SLM.

    A first token comes after the work ahead is done and the prompt's uncached tokens are computed.
    Rates are learned per replica; a replica without answers has those of all. How much of a
    predicted wait becomes a measured one is learned too, because several routers know little of
    each other's requests: the less predictions come true, the less they count.

    `clock` returns monotonic seconds. `answered` and `estimates` may be called from any thread, the
    others by the one that routes. Everything is bounded, nothing blocks but for microseconds.
    """

    def __init__(self, blocks_per_replica: int, clock: Callable[[], float]) -> None:
        """Start without replicas; ValueError unless `blocks_per_replica` is at least 1."""
        self.index = PrefixIndex(blocks_per_replica)
        self._clock = clock
        self._lock = Lock()
        self._replicas: dict[str, _Replica] = {}
        self._work = RecentWork()
        self._in_flight: OrderedDict[str, _InFlight] = OrderedDict()
        self._sessions: OrderedDict[str, str] = OrderedDict()  # to the last replica
        self._plane = DecayedPlane(MEAN_HALF_LIFE)  # of all replicas
        self._rate = _PRIOR_RATE
        self._waits = DecayedPlane(MEAN_HALF_LIFE)  # measured, over predicted and queue length
        self._wait_slopes = (1.0, PRIOR_S_PER_REQUEST)
        self._wait_error = _Mean(0.0)  # squared
        self._length = _Mean(PRIOR_PROMPT_TOKENS)
        self._uncached = _Mean(PRIOR_PROMPT_TOKENS)
        self._output = _Mean(PRIOR_OUTPUT_TOKENS)
        self._estimated = _Mean(PRIOR_PROMPT_TOKENS)  # prompt tokens, as routers estimate them
        self._counted = _Mean(PRIOR_PROMPT_TOKENS)  # prompt tokens, as engines count them

    @property
    def request_s(self) -> float:
        """Mean prefill seconds of a request, above 0."""
        return self._rate[0] * self._uncached.value

    @property
    def wait_error_s(self) -> float:
        """Root mean square of measured less predicted waiting."""
        return math.sqrt(self._wait_error.value)

    def served_session(self, session_key: str) -> str:
        """Return the replica to which this process sent the session last; "" if unknown."""
        return self._sessions.get(session_key, "")

    def estimates(
        self,
        chain: Sequence[int],
        shared: int,
        prompt_tokens: int,
        replicas: Sequence[ReplicaState],
    ) -> list[Estimate]:
        """Return an estimate per replica; `shared` is `PrefixIndex.shared` of the chain."""
        now_s = self._clock()
        tokens, block_tokens = self._sizes(chain, prompt_tokens)
        matches, lengths = self.index.match(chain), self.index.lengths(chain)
        start_tokens = EVEN_REQUESTS * (self._uncached.value + self._output.value)
        with self._lock:
            excess = self._work.excess([r.replica_id for r in replicas], start_tokens)
            known = [self._replicas.get(r.replica_id) for r in replicas]
            waits = [0.0 if k is None else k.backlog.wait_s(now_s) for k in known]
        per_wait, per_request = self._wait_slopes
        depth = len(chain)
        found = []
        for state, one, wait_s, more in zip(replicas, known, waits, excess, strict=True):
            blocks = matches.get(state.replica_id, 0)
            cached = blocks * block_tokens
            if blocks == depth and lengths:
                cached = max(cached, lengths.get(state.replica_id, 0))
            uncached = max(tokens - cached, 1.0)
            shared_missing = max(shared - blocks, 0) * block_tokens
            per_token, per_neighbour = self._rate if one is None else one.rate
            found.append(
                Estimate(
                    per_wait * wait_s + (per_request + per_neighbour) * state.queue_length,
                    per_token * uncached,
                    per_token * max(uncached - shared_missing, 0.0),
                    more,
                )
            )
        return found

    def sent(
        self,
        decision_id: str,
        chain: Sequence[int],
        prompt_tokens: int,
        replica_id: str,
        queue_length: int = 0,
        session_key: str = "",
    ) -> None:
        """Count a request as it is sent to a replica; `prompt_tokens` is an estimate.

        Then, because a replica's answer begins only after the prefill.
        """
        now_s = self._clock()
        tokens, block_tokens = self._sizes(chain, prompt_tokens)
        blocks = self.index.match(chain).get(replica_id, 0)
        cached = blocks * block_tokens
        if blocks == len(chain):
            cached = max(cached, self.index.lengths(chain).get(replica_id, 0))
        uncached = max(tokens - cached, 1.0)
        self.index.add(chain, replica_id, round(tokens))
        with self._lock:
            one = self._replicas.get(replica_id)
            if one is None:
                return
            if session_key:
                _put(self._sessions, session_key, replica_id, MAX_SESSIONS)
            wait_s = one.backlog.wait_s(now_s)
            work_s = one.rate[0] * uncached
            one.backlog.add(work_s, tokens, now_s)
            self._length.add(tokens)
            self._uncached.add(uncached)
            work_tokens = uncached + self._output.value
            self._work.add(replica_id, work_tokens)
            sent = _InFlight(replica_id, prompt_tokens, work_tokens, work_s, wait_s, queue_length)
            _put(self._in_flight, decision_id, sent, MAX_IN_FLIGHT)

    def refused(self, decision_id: str) -> None:
        """Take back a request that its replica did not accept.

        Its prefix stays in the index: a full replica is passed over for its load, and has most of
        the prompts that it is preferred for.
        """
        with self._lock:
            sent = self._in_flight.pop(decision_id, None)
            one = self._replicas.get(sent.replica_id) if sent is not None else None
            if sent is None or one is None:
                return
            one.backlog.remove(sent.work_s)
            self._work.add(sent.replica_id, -sent.work_tokens, 0)

    def answered(self, decision_id: str, facts: EngineFacts) -> None:
        """Learn from an answer, and take the engine's load at its end.

        Ignored unless the request was sent to the replica that answered it.
        """
        with self._lock:
            one = self._replicas.get(facts.replica_id)
            sent = self._in_flight.pop(decision_id, None)
            if one is None or sent is None or sent.replica_id != facts.replica_id:
                return
            if facts.prompt_tokens > 0:
                self._learn(one, sent, facts)
            one.backlog.reported(facts.waiting, self._clock(), self._mean_prompt())

    def _learn(self, one: _Replica, sent: _InFlight, facts: EngineFacts) -> None:
        uncached = max(facts.prompt_tokens - facts.cached_tokens, 0)
        self._output.add(facts.output_tokens)
        self._work.add(facts.replica_id, uncached + facts.output_tokens - sent.work_tokens, 0)
        if sent.prompt_tokens > 0:
            self._counted.add(facts.prompt_tokens)
            self._estimated.add(sent.prompt_tokens)
        if facts.queue_s is None:
            return
        prefill_s = facts.ttft_s - facts.queue_s
        if prefill_s > 0.0:
            for plane in (self._plane, one.plane):
                plane.add(uncached, sent.queue_length, prefill_s)
            self._rate = _above_zero(self._plane.slopes(_PRIOR_RATE, _RATE_RIDGES))
            one.rate = _above_zero(one.plane.slopes(self._rate, _RATE_RIDGES))
        self._waits.add(sent.wait_s, sent.queue_length, facts.queue_s)
        per_wait, per_request = self._waits.slopes(
            (1.0, PRIOR_S_PER_REQUEST), (WAIT_RIDGE, REQUESTS_RIDGE)
        )
        per_wait, per_request = min(max(per_wait, 0.0), MAX_WAIT_SLOPE), max(per_request, 0.0)
        self._wait_slopes = per_wait, per_request
        wait_s, queue_length, measured_s = self._waits.means
        error_s = facts.queue_s - measured_s
        error_s -= per_wait * (sent.wait_s - wait_s)
        error_s -= per_request * (sent.queue_length - queue_length)
        self._wait_error.add(error_s * error_s)

    def reported(self, state: ReplicaState, new_prompts: Sequence[PromptEnd]) -> None:
        """Take a replica's polled report; `new_prompts` are those that the last one had not."""
        self.index.reported(state.replica_id, new_prompts)
        with self._lock:
            one = self._replicas.get(state.replica_id)
            if one is not None:
                one.backlog.reported(
                    state.waiting,
                    self._clock(),
                    self._mean_prompt(),
                    delay_s=REPORT_DELAY_S,
                    lengths=[prompt.tokens for prompt in state.recent_prompts],
                )

    def retain(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica."""
        present = tuple(replica_ids)
        self.index.retain(present)
        with self._lock:
            old = self._replicas
            self._replicas = {r: old.get(r) or _Replica(self._rate) for r in present}
            self._work.retain(present)

    def emptied(self, replica_id: str) -> None:
        """Forget what a replica has cached, as after sleep."""
        self.index.emptied(replica_id)

    def _sizes(self, chain: Sequence[int], prompt_tokens: int) -> tuple[float, float]:
        """Return the tokens of the prompt and of one block, as the engine would count them."""
        ratio = self._counted.value / self._estimated.value
        # The last block may be partial. A prompt of unknown length has what its chain covers.
        tokens = max(float(prompt_tokens), (len(chain) - 1) * BLOCK_TOKENS, 1.0)
        return tokens * ratio, min(BLOCK_TOKENS, tokens / max(len(chain), 1)) * ratio

    def _mean_prompt(self) -> MeanPrompt:
        return MeanPrompt(self._length.value, self.request_s)


def _put(kept: OrderedDict[str, T], key: str, value: T, most: int) -> None:
    """Set a value as the newest; the oldest are dropped beyond `most`."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)


def _above_zero(rate: tuple[float, float]) -> tuple[float, float]:
    return max(rate[0], MIN_S_PER_TOKEN), max(rate[1], 0.0)
