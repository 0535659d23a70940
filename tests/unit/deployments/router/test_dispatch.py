"""Failover before the first byte, never after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from calm_serve.errors import CapacityError
from calm_serve.protocol.answers import AnswerRequest
from calm_serve.testing import (
    make_context,
    make_decision,
    make_facts,
    make_replica,
    make_state,
)
from calm_serve.types import Cost, Decision, DecisionPath, DecisionReason, ServiceLevel
from calm_serve.upstreams import Failure, FailureKind, UpstreamError
from deployments.router import dispatch
from deployments.router.dispatch import (
    Call,
    Dispatcher,
    cancel,
)
from deployments.router.live_state import LiveView
from deployments.router.outcome import outcome_of
from deployments.router.upstream.remote import EmptyAnswerError
from deployments.wire import Hints, ReplyEnd, deployment_name


def failing(kind: FailureKind, **about: Any) -> UpstreamError:
    return UpstreamError(Failure(kind, f"failed: {kind}", **about))


FULL = CapacityError("full", retry_after_s=1.0)
LOST = failing(FailureKind.TRANSPORT)
DIED = failing(FailureKind.ENGINE_DIED)
RAISED = ValueError("broken")
FAILURES = [LOST, DIED, RAISED, "silence"]
END = ReplyEnd(b"end", make_facts("r1"))
ASKED = AnswerRequest(decision_id="d", validate="json")


class Script:
    """An SLM that plays one scripted attempt per call."""

    def __init__(self, slm_id: str, view: LiveView, attempts: list[Any]) -> None:
        self.slm_id = slm_id
        self.calls: list[Hints] = []
        self.cancelled = 0
        self._view = view
        self._attempts = iter(attempts)

    def call(self, hints: Hints) -> Items:
        self.calls.append(hints)
        self._view.routed(hints["decision_id"], f"{self.slm_id}-{len(self.calls)}")
        return Items(self, next(self._attempts))


class Items:
    """A reply: items, an exception among them is raised."""

    def __init__(self, script: Script, items: Any) -> None:
        self._script = script
        self.cost: Cost | None = None
        self._items = iter(
            [] if items == "silence" else items if isinstance(items, list) else [items]
        )

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            return item
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._script.cancelled += 1


class Fleet:
    """A dispatcher over scripted SLMs, of which each has two replicas."""

    def __init__(self, view: LiveView, retries: int, **attempts: list[Any]) -> None:
        self.slms = {i: Script(i, view, a) for i, a in attempts.items()}
        for slm_id in attempts:
            replicas = (make_replica(f"{slm_id}-{n}") for n in (1, 2))
            view.update_replicas(deployment_name(slm_id), replicas)
        self.failed: list[str] = []
        self.took_s: list[float] = []
        self.cooling: dict[str, float] = {}
        self.broken: set[str] = set()
        self.costs: dict[str, Cost] = {}
        self.sent: list[tuple[str, str, AnswerRequest]] = []
        self._view = view
        self.dispatcher = Dispatcher(self.send, health=self, retries=retries)

    def can_take(self, slm_id: str) -> bool:
        return slm_id not in self.broken and self.has_replica(slm_id)

    def has_replica(self, slm_id: str) -> bool:
        return bool(self._view.replicas(deployment_name(slm_id)))

    def attempt_failed(self, slm_id: str, took_s: float) -> None:
        self.failed.append(slm_id)
        self.took_s.append(took_s)

    def cool_down(self, slm_id: str, seconds: float) -> None:
        self.cooling[slm_id] = seconds

    def send(
        self, slm_id: str, path: str, body: dict[str, Any], asked: AnswerRequest, hints: Hints
    ) -> AsyncIterator[Any]:
        del body
        self.sent.append((slm_id, path, asked))
        items = self.slms[slm_id].call(dict(hints))  # type: ignore[arg-type]
        items.cost = self.costs.get(slm_id)
        return items

    async def open(self, call: Call) -> Any:
        return await self.dispatcher.open(call, "/v1/x", {"messages": []}, ASKED)


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveView]:
    view = LiveView(lambda: 0.0)
    monkeypatch.setattr(dispatch, "VIEW", view)
    yield view


def started(decision: Decision | None = None) -> Call:
    return Call(decision or make_decision("a", "b"), make_state("a"), (1.0, 2.0))


async def read(answer: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in answer])


async def test_the_answer_passes_through_in_order(view: LiveView) -> None:
    fleet, call = Fleet(view, 2, a=[[b"one ", b"two ", END]]), started()
    assert await read(await fleet.open(call)) == b"one two end"
    assert (call.slm_id, call.retries, call.status, call.http_status) == ("a", 0, "ok", 200)
    assert call.reason == "scored:best_score"
    assert call.first_byte_s is not None
    assert fleet.failed == []


async def test_an_answer_in_one_piece_is_its_reply_end_alone(view: LiveView) -> None:
    call = started()
    assert await read(await Fleet(view, 2, a=[END]).open(call)) == b"end"
    assert call.end == END


async def test_the_call_carries_path_hints_and_what_the_replica_is_asked(view: LiveView) -> None:
    fleet = Fleet(view, 2, a=[END])
    decision = make_decision("a", adapter="sql", context=make_context(session_key="s"))
    await fleet.open(started(decision))
    assert fleet.sent == [("a", "/v1/x", ASKED)]
    (hints,) = fleet.slms["a"].calls
    assert (hints["session_key"], hints["adapter"]) == ("s", "sql")
    assert "avoid" not in hints


async def test_slms_without_a_score_are_ordered_only_when_all_others_have_failed(
    view: LiveView,
) -> None:
    ranked: list[str] = []

    def rank() -> tuple[str, ...]:
        ranked.append("asked")
        return "c", "b"

    call = started(make_decision("a", unscored=("b", "c")))
    call.rank_unscored = rank
    await Fleet(view, 2, a=[END], b=[], c=[]).open(call)
    assert ranked == []

    fleet = Fleet(view, 3, a=[DIED, FULL], b=[[b"x", END]], c=[FULL])
    call = started(make_decision("a", unscored=("b", "c")))
    call.rank_unscored = rank
    assert await read(await fleet.open(call)) == b"xend"
    assert [slm_id for slm_id, _, _ in fleet.sent] == ["a", "a", "c", "b"]
    assert ranked == ["asked"]
    assert call.fell_back


async def test_when_none_of_the_slms_without_a_score_can_answer_either_all_are_full(
    view: LiveView,
) -> None:
    call = started(make_decision("a", unscored=("b",)))
    call.rank_unscored = lambda: ("b",)
    with pytest.raises(CapacityError, match="a, b"):
        await Fleet(view, 2, a=[FULL], b=[FULL]).open(call)


@pytest.mark.parametrize("failure", FAILURES, ids=str)
async def test_a_failure_before_the_first_byte_is_tried_again_on_another_replica(
    view: LiveView, failure: Any
) -> None:
    fleet, call = Fleet(view, 2, a=[failure, [b"x", END]], b=[]), started()
    assert await read(await fleet.open(call)) == b"xend"
    assert (call.slm_id, call.retries) == ("a", 1)
    assert call.reason == "scored:best_score"
    assert fleet.failed == ["a"]
    assert fleet.slms["a"].calls[1]["avoid"] == "a-1"
    assert call.predicted_replica == "a-2"


@pytest.mark.parametrize("failure", FAILURES, ids=str)
async def test_a_second_failure_goes_to_the_next_slm_with_its_reason(
    view: LiveView, failure: Any
) -> None:
    fleet, call = Fleet(view, 2, a=[failure, failure], b=[END]), started()
    await read(await fleet.open(call))
    assert (call.slm_id, call.retries, call.reason) == ("b", 2, "fallback:failover")
    assert fleet.failed == ["a", "a"]
    outcome = outcome_of(call, at=1.0, task="", prompt=None)
    assert (outcome.slm_id, outcome.decision.path, outcome.decision.reason) == (
        "b",
        "fallback",
        "failover",
    )


@pytest.mark.parametrize("pinned", [False, True])
async def test_an_slm_whose_last_replica_died_is_not_tried_again(
    view: LiveView, pinned: bool
) -> None:
    fleet = Fleet(view, 2, a=[DIED, END], b=[END])
    for replica in ("a-1", "a-2"):
        view.died(deployment_name("a"), replica)
    fleet.can_take = lambda slm_id: True  # type: ignore[method-assign]  # it was fit a moment ago
    path = DecisionPath.PINNED if pinned else DecisionPath.SCORED
    call = started(make_decision("a", "b", path=path))
    if pinned:
        with pytest.raises(UpstreamError):
            await fleet.open(call)
    else:
        await read(await fleet.open(call))
        assert call.slm_id == "b"
    assert len(fleet.slms["a"].calls) == 1


async def test_an_slm_without_a_replica_is_passed_over_at_once(view: LiveView) -> None:
    fleet, call = Fleet(view, 2, a=[END], b=[END]), started()
    for replica in ("a-1", "a-2"):
        view.died(deployment_name("a"), replica)
    await read(await fleet.open(call))
    assert (call.slm_id, fleet.slms["a"].calls) == ("b", [])


@pytest.mark.parametrize(
    "kind", [FailureKind.TOO_LONG, FailureKind.UNSUPPORTED, FailureKind.MISCONFIGURED]
)
async def test_an_slm_that_cannot_take_the_request_is_not_blamed_and_the_next_one_asked(
    view: LiveView, kind: FailureKind
) -> None:
    fleet, call = Fleet(view, 0, a=[failing(kind)], b=[END]), started()
    await read(await fleet.open(call))
    assert (call.slm_id, fleet.failed) == ("b", [])


@pytest.mark.parametrize("kind", [FailureKind.INVALID_REQUEST, FailureKind.POISON])
async def test_what_no_slm_can_cure_is_final(view: LiveView, kind: FailureKind) -> None:
    fleet, call = Fleet(view, 2, a=[failing(kind)], b=[END]), started()
    with pytest.raises(UpstreamError, match=str(kind)):
        await fleet.open(call)
    assert (fleet.failed, fleet.slms["b"].calls) == ([], [])


async def test_a_rate_limited_upstream_cools_down_and_the_next_one_answers(
    view: LiveView,
) -> None:
    limited = failing(FailureKind.RATE_LIMITED, retry_after_s=20.0)
    fleet, call = Fleet(view, 2, a=[limited], b=[END]), started()
    await read(await fleet.open(call))
    assert (call.slm_id, fleet.failed, fleet.cooling) == ("b", [], {"a": 20.0})


async def test_the_time_that_a_failed_attempt_took_begins_when_it_was_sent(view: LiveView) -> None:
    fleet, call = Fleet(view, 1, a=[DIED, END]), started(make_decision("a"))
    call.started = call.sent = call.started - 60.0  # it waited for a wake-up
    await read(await fleet.open(call))
    assert len(fleet.took_s) == 1
    assert max(*fleet.took_s, call.took_s) < 30.0


async def test_a_full_slm_is_left_for_the_next_one_without_asking_twice(view: LiveView) -> None:
    fleet, call = Fleet(view, 2, a=[FULL], b=[END]), started()
    await read(await fleet.open(call))
    assert call.slm_id == "b"
    assert len(fleet.slms["a"].calls) == 1
    assert fleet.failed == []  # a full queue is no evidence about the SLM's health
    assert outcome_of(call, at=1.0, task="", prompt=None).decision.path == "fallback"


async def test_full_slms_use_up_no_attempt(view: LiveView) -> None:
    fleet = Fleet(view, 0, **{i: [FULL] for i in "abcd"}, e=[END])
    call = started(make_decision("a", "b", "c", "d", "e"))
    await read(await fleet.open(call))
    assert call.slm_id == "e"


async def test_a_full_fleet_is_a_capacity_error_with_a_time(view: LiveView) -> None:
    with pytest.raises(CapacityError, match="a, b") as caught:
        await Fleet(view, 2, a=[FULL], b=[FULL]).open(started())
    assert caught.value.retry_after_s > 0


async def test_of_a_dead_fleet_the_last_failure_is_left_to_the_outcome(view: LiveView) -> None:
    fleet = Fleet(view, 2, a=[DIED, LOST], b=[DIED])
    with pytest.raises(UpstreamError):
        await fleet.open(started())
    assert fleet.failed == ["a", "a"]


async def test_an_slm_whose_breaker_opened_meanwhile_is_passed_over(view: LiveView) -> None:
    fleet = Fleet(view, 5, a=[DIED, DIED], b=[END], c=[END])
    fleet.broken = {"b"}
    call = started(make_decision("a", "b", "c"))
    await read(await fleet.open(call))
    assert call.slm_id == "c"


async def test_an_empty_answer_is_delivered_when_no_other_slm_answers(view: LiveView) -> None:
    empty = EmptyAnswerError(Failure(FailureKind.EMPTY_ANSWER, "empty"), END)
    assert await read(await Fleet(view, 2, a=[empty], b=[END]).open(started())) == b"end"
    fleet, call = Fleet(view, 2, a=[empty], b=[FULL]), started()
    assert await read(await fleet.open(call)) == b"end"
    assert call.status == "ok"


@pytest.mark.parametrize("failure", [*FAILURES, FULL], ids=str)
async def test_a_pinned_request_never_leaves_its_slm(view: LiveView, failure: Any) -> None:
    pinned = make_decision("a", "b", path=DecisionPath.PINNED, reason=DecisionReason.REQUESTED)
    fleet, call = Fleet(view, 5, a=[failure, failure], b=[END]), started(pinned)
    with pytest.raises((UpstreamError, CapacityError)):
        await fleet.open(call)
    assert call.slm_id == "a"
    assert fleet.slms["b"].calls == []


async def test_an_slm_that_left_the_fleet_is_passed_over(view: LiveView) -> None:
    fleet, call = Fleet(view, 2, b=[END]), started()
    await read(await fleet.open(call))
    assert call.slm_id == "b"


@pytest.mark.parametrize("retries", range(6))
async def test_attempts_are_bounded_by_the_configured_retries(view: LiveView, retries: int) -> None:
    fleet = Fleet(view, retries, **{i: [DIED] * 9 for i in "abcde"})
    with pytest.raises(UpstreamError):
        await fleet.open(started(make_decision("a", "b", "c", "d", "e")))
    assert sum(len(s.calls) for s in fleet.slms.values()) == retries + 1


@pytest.mark.parametrize("failure", [LOST, RAISED])
async def test_nothing_is_retried_after_the_first_byte(view: LiveView, failure: Exception) -> None:
    fleet, call = Fleet(view, 2, a=[[b"one", failure], END], b=[END]), started()
    answer = await fleet.open(call)
    with pytest.raises(type(failure)):
        await read(answer)
    assert len(fleet.slms["a"].calls) == 1
    assert fleet.slms["b"].calls == []
    outcome = outcome_of(call, at=1.0, task="", prompt=None)
    assert (outcome.status, outcome.http_status, outcome.retries) == ("error", 500, 0)


async def test_engine_facts_reach_the_live_view_once_the_answer_has_ended(view: LiveView) -> None:
    name = deployment_name("a")
    loaded = ReplyEnd(b"", make_facts("a-1", running=3, waiting=2))
    answer = await Fleet(view, 0, a=[[b"x", loaded]]).open(started())
    await anext(answer)
    assert view.replicas(name)[0].running == 0
    await read(answer)
    assert (view.replicas(name)[0].running, view.replicas(name)[0].waiting) == (3, 2)


async def test_an_unread_answer_can_be_cancelled(view: LiveView) -> None:
    fleet = Fleet(view, 0, a=[[b"x", END]])
    cancel(await fleet.open(started()))
    assert fleet.slms["a"].cancelled == 1


async def test_an_engine_that_died_with_a_request_alone_is_followed_by_one_other(
    view: LiveView,
) -> None:
    alone = failing(FailureKind.ENGINE_DIED, died_beside=0)
    fleet, call = Fleet(view, 5, a=[alone, END]), started(make_decision("a"))
    await read(await fleet.open(call))
    assert [hints["engine_deaths"] for hints in fleet.slms["a"].calls] == [0, 1]
    # Another client's equal request is known to have killed an engine, so it gets no second one.
    poison = failing(FailureKind.POISON, died_beside=0)
    fleet.slms["a"] = Script("a", view, [poison, END])
    with pytest.raises(UpstreamError, match="poison"):
        await fleet.open(started(make_decision("a")))
    assert [hints["engine_deaths"] for hints in fleet.slms["a"].calls] == [1]
    # After the second death it is not even sent.
    with pytest.raises(UpstreamError, match="the engine stopped"):
        await fleet.open(started(make_decision("a")))
    assert len(fleet.slms["a"].calls) == 1


async def test_a_death_beside_other_requests_is_held_against_no_equal_request(
    view: LiveView,
) -> None:
    beside = failing(FailureKind.ENGINE_DIED, died_beside=3)
    fleet = Fleet(view, 5, a=[beside, END, END])
    await read(await fleet.open(started(make_decision("a"))))
    await read(await fleet.open(started(make_decision("a"))))
    assert [hints["engine_deaths"] for hints in fleet.slms["a"].calls] == [0, 1, 0]


@pytest.mark.parametrize(
    ("slo", "limit_s"),
    [
        (ServiceLevel(), 30.0),
        (ServiceLevel(ttft_ms=500.0), 0.5),
        (ServiceLevel(deadline_s=10.0), 10.0 - 0.63),  # less what the answer itself takes
        (ServiceLevel(deadline_s=0.1), 0.0),
    ],
)
async def test_a_request_waits_for_a_slot_while_its_answer_can_still_be_in_time(
    view: LiveView, slo: ServiceLevel, limit_s: float
) -> None:
    fleet = Fleet(view, 0, a=[END])
    fleet.dispatcher = Dispatcher(fleet.send, health=fleet, retries=0, queue_wait_s=30.0)
    await fleet.open(started(make_decision("a", context=make_context(slo=slo))))
    (hints,) = fleet.slms["a"].calls
    assert hints["wait_limit_s"] == pytest.approx(limit_s, abs=0.02)


async def test_every_failed_attempt_is_in_the_outcome(view: LiveView) -> None:
    fleet = Fleet(view, 2, a=[FULL], b=[LOST, DIED], c=[END])
    call = started(make_decision("a", "b", "c"))
    await read(await fleet.open(call))
    outcome = outcome_of(call, at=1.0, task="", prompt=None)
    assert [(a.slm_id, a.failure) for a in outcome.failed_attempts] == [
        ("a", "full"),
        ("b", "transport"),
        ("b", "engine_died"),
    ]
    assert (outcome.slm_id, outcome.failure, outcome.status) == ("c", "", "ok")


async def test_the_shortest_time_to_come_back_is_that_of_the_whole_fleet(view: LiveView) -> None:
    soon = CapacityError("full", retry_after_s=0.7)
    with pytest.raises(CapacityError) as caught:
        await Fleet(view, 2, a=[FULL], b=[soon]).open(started())
    assert caught.value.retry_after_s == 0.7


async def test_money_for_failed_attempts_counts_too(view: LiveView) -> None:
    fleet = Fleet(view, 2, a=[failing(FailureKind.BAD_ANSWER)], b=[[b"x", END]])
    fleet.costs = {"a": Cost(0.25, "EUR"), "b": Cost(0.5, "EUR")}
    call = started()
    await read(await fleet.open(call))
    outcome = outcome_of(call, at=1.0, task="", prompt=None)
    assert (outcome.cost, outcome.currency) == (0.75, "EUR")
    assert [a.cost for a in outcome.failed_attempts] == [0.25]


async def test_what_no_upstream_has_named_is_no_cost(view: LiveView) -> None:
    call = started()
    await read(await Fleet(view, 2, a=[LOST, END]).open(call))
    outcome = outcome_of(call, at=1.0, task="", prompt=None)
    assert (outcome.cost, outcome.currency) == (None, "")


async def test_an_engine_that_dies_in_the_middle_of_a_stream_is_remembered(
    view: LiveView,
) -> None:
    alone = failing(FailureKind.ENGINE_DIED, died_beside=0)
    fleet = Fleet(view, 2, a=[[b"one", alone], END])
    answer = await fleet.open(started(make_decision("a")))
    with pytest.raises(UpstreamError):
        await read(answer)
    await fleet.open(started(make_decision("a")))
    assert [hints["engine_deaths"] for hints in fleet.slms["a"].calls] == [0, 1]
