"""Router side of residency: which requests queue, for how long, and what their clients get."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions, RouterOptions
from calm_serve.errors import AsleepError, KnowledgeError
from calm_serve.protocol.answers import AnswerRequest
from calm_serve.protocol.reports import (
    DemandReply,
    DemandReport,
    ReplicaReport,
    ResidencySummary,
)
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.testing import (
    make_context,
    make_decision,
    make_facts,
    make_fleet,
    make_replica,
    make_state,
)
from calm_serve.types import Residency, ServiceLevel
from deployments.router import dispatch, wakeup_queue
from deployments.router.dispatch import Call
from deployments.router.live_state import LiveView
from deployments.router.outcome import outcome_of
from deployments.router.residency_view import ResidencyView
from deployments.router.wakeup_queue import WakeupQueue
from deployments.wire import AsleepReply, ReplyEnd

REVISION = 7
OPTIONS = ResidencyOptions(memory_budget_bytes=1, hold_s=20.0)


def desire(view: ResidencyView, tiers: dict[str, str]) -> None:
    desired = {slm_id: Residency(tier) for slm_id, tier in tiers.items()}
    view.set_desired(DesiredResidency(desired, OPTIONS), REVISION)


def call(slm_id: str = "small", deadline_s: float | None = None) -> Call:
    context = make_context(slo=ServiceLevel(deadline_s=deadline_s))
    return Call(make_decision(slm_id, preferred=slm_id, context=context), make_state(slm_id), ())


@pytest.fixture
def view() -> ResidencyView:
    view = ResidencyView()
    desire(view, {"small": "asleep", "large": "hot"})
    return view


@pytest.fixture
def queue(view: ResidencyView, monkeypatch: pytest.MonkeyPatch) -> WakeupQueue:
    monkeypatch.setattr(wakeup_queue, "VIEW", LiveView(lambda: 0.0))
    return WakeupQueue(view, RouterOptions(), "router")


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_request_for_a_hot_slm_is_admitted_at_once(queue: WakeupQueue) -> None:
    one = call("large")
    await queue.admit(one, "large")
    assert (one.queued_for_wakeup, one.running_on) == (False, "large")


async def test_a_request_for_a_sleeping_slm_waits_until_it_may_be_woken(
    queue: WakeupQueue, view: ResidencyView
) -> None:
    one = call()
    waiting = asyncio.create_task(queue.admit(one, "small"))
    await turns()
    assert queue._take_demand(make_fleet()).queued == {"small": 1}
    desire(view, {"small": "hot", "large": "asleep"})
    await waiting
    assert one.queued_for_wakeup
    assert queue._take_demand(make_fleet()).queued == {}
    assert queue._take_demand(make_fleet()).running == {"small": 1}
    queue.release(one)
    queue.release(one)
    assert queue._take_demand(make_fleet()).running == {}


async def test_a_client_that_leaves_leaves_the_queue(queue: WakeupQueue) -> None:
    waiting = asyncio.create_task(queue.admit(call(), "small"))
    await turns()
    waiting.cancel()
    await turns()
    assert queue._take_demand(make_fleet()).queued == {}


@pytest.mark.parametrize(
    ("expected_s", "deadline_s"), [(30.0, None), (5.0, 2.0), (float("inf"), None)]
)
async def test_a_wait_beyond_the_limit_is_refused_at_once_with_the_estimate(
    queue: WakeupQueue, view: ResidencyView, expected_s: float, deadline_s: float | None
) -> None:
    view.wait_s = {"small": expected_s}
    with pytest.raises(AsleepError) as refused:
        await queue.admit(call(deadline_s=deadline_s), "small")
    assert refused.value.http_status == 503
    longest = wakeup_queue.MAX_RETRY_AFTER_S
    assert refused.value.retry_after_s == min(expected_s, longest)
    # A client that got Retry-After counts as queued, unless the wait has no end.
    expected = {"small": 1} if expected_s < longest else {}
    assert queue._take_demand(make_fleet()).queued == expected


async def test_a_wait_ends_at_its_limit(queue: WakeupQueue) -> None:
    one = call(deadline_s=0.01)
    with pytest.raises(AsleepError):
        await queue.admit(one, "small")
    assert queue._take_demand(make_fleet()).queued == {}


async def test_demand_is_reported_once_and_kept_when_the_actor_does_not_answer(
    queue: WakeupQueue, view: ResidencyView
) -> None:
    reports: list[DemandReport] = []
    summary = ResidencySummary("calm", 1, 1, 1, 1, 1, 1, 0.5, 0.5, 0)
    answers: list[Any] = [KnowledgeError("away"), DemandReply({"small": 3.0}, summary)]

    async def report(_router: str, demand: DemandReport) -> Any:
        reports.append(demand)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    queue.count_demand(call("small"), hit=False)
    queue.count_demand(call("large"), hit=True)
    queue._pause = lambda _s: asyncio.sleep(0)  # type: ignore[method-assign]
    with pytest.raises(IndexError):  # there is no answer to a third report
        await queue.run(report, make_fleet)
    del reports[2:]
    assert [r.arrivals for r in reports] == [("small", "large")] * 2
    assert [(r.hits, r.misses) for r in reports] == [(1, 1)] * 2
    assert (view.wait_s, view.summary) == ({"small": 3.0}, summary)
    assert queue._take_demand(make_fleet()).arrivals == ()


async def test_the_first_queued_request_is_reported_at_once(
    queue: WakeupQueue,
) -> None:
    pause = asyncio.create_task(queue._pause(60.0))
    await turns()
    waiting = asyncio.create_task(queue.admit(call(), "small"))
    await turns()
    assert pause.done()
    waiting.cancel()


async def test_without_a_budget_nothing_is_queued_or_reported() -> None:
    plain = ResidencyView()
    queue = WakeupQueue(plain, RouterOptions(), "router")
    running = asyncio.create_task(queue.run(None, make_fleet))  # type: ignore[arg-type]
    await turns()
    assert not running.done()
    running.cancel()
    one = call()
    await queue.admit(one, "small")
    assert one.running_on == ""


def test_the_state_is_asleep_waking_or_hot_with_its_wake_up_time(view: ResidencyView) -> None:
    small, replicas = make_state("small", wake_s=15.0), [make_replica("r1")]
    assert view.with_residency(make_state("large"), replicas) == make_state("large")
    assert view.with_residency(small, replicas).residency is Residency.ASLEEP
    view.set_reports({"small": {"r1": ReplicaReport("asleep", {"wake": 0.3})}})
    assert view.with_residency(small, replicas).wake_s == 0.3
    view.wait_s = {"small": 1.5}
    assert view.with_residency(small, replicas).wake_s == 1.5
    desire(view, {"small": "hot"})
    assert view.with_residency(small, replicas).residency is Residency.STARTING
    # A dead replica's last report does not count for the others.
    assert view.with_residency(small, [make_replica("r2")]) is small
    view.set_reports({"small": {"r1": ReplicaReport("ready")}})
    assert view.with_residency(small, replicas) is small


def test_an_slm_without_replicas_is_not_asleep(view: ResidencyView) -> None:
    cold = make_state("small", residency=Residency.COLD, replicas=0)
    assert view.with_residency(cold, []) is cold


class Scripted:
    """An SLM whose calls answer with one item each; the last one is for all further calls."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items) or [ReplyEnd(b"done", make_facts("r1"))]
        self.calls = 0
        self.revisions: list[int | None] = []

    def call(self, asked: AnswerRequest) -> Any:
        self.revisions.append(asked.residency_revision)
        self.calls += 1
        item = self.items.pop(0) if len(self.items) > 1 else self.items[0]

        async def play() -> Any:
            yield item

        return play()


class Healthy:
    """Every SLM is well."""

    def can_take(self, _slm_id: str) -> bool:
        return True

    def has_replica(self, _slm_id: str) -> bool:
        return True

    def attempt_failed(self, _slm_id: str, _took_s: float) -> None:
        """Not counted here."""

    def cool_down(self, _slm_id: str, _seconds: float) -> None:
        """Not counted here."""


async def open_call(queue: WakeupQueue, handles: dict[str, Scripted], one: Call) -> Any:
    dispatcher = dispatch.Dispatcher(
        lambda slm_id, _path, _body, asked, _hints: handles[slm_id].call(asked),
        health=Healthy(),
        retries=2,
        admit=queue.admit,
    )
    return await dispatcher.open(one, "/v1/x", {}, AnswerRequest())


async def test_a_sleeping_slm_is_sent_nothing_before_it_may_wake(
    queue: WakeupQueue, view: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    handles = {"small": Scripted(), "large": Scripted()}
    opening = asyncio.create_task(open_call(queue, handles, call()))
    await turns()
    assert handles["small"].calls == 0
    desire(view, {})
    await opening
    assert (handles["small"].calls, handles["large"].calls) == (1, 0)


async def test_a_request_whose_slm_wakes_too_late_goes_to_the_next_best(
    queue: WakeupQueue, view: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    view.wait_s = {"small": 100.0}
    handles = {"small": Scripted(), "large": Scripted()}
    one = Call(make_decision("small", "large"), make_state("small"), ())
    await open_call(queue, handles, one)
    assert (handles["small"].calls, handles["large"].calls, one.slm_id) == (0, 1, "large")
    with pytest.raises(AsleepError):
        await open_call(queue, handles, call())


async def test_a_request_refused_as_asleep_is_queued_and_sent_again(
    queue: WakeupQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    monkeypatch.setattr(dispatch, "RESIDENCY_LAG_S", 0.0)
    asleep = AsleepReply()
    large = Scripted(asleep, asleep, ReplyEnd(b"done", make_facts("r1")))
    one = call("large")
    answer = await open_call(queue, {"large": large}, one)
    assert [part async for part in answer] == [b"done"]
    assert (large.calls, large.revisions) == (3, [REVISION] * 3)
    assert one.queued_for_wakeup
    assert one.retries == 0


def test_an_outcome_has_the_preferred_slm_and_whether_it_was_hot() -> None:
    one = call()
    assert outcome_of(one, at=1.0, task="", prompt=None).decision.preferred == ""
    one.preferred_hot, one.queued_for_wakeup = False, True
    outcome = outcome_of(one, at=1.0, task="", prompt=None)
    assert outcome.timing.cold
    assert (outcome.decision.preferred, outcome.decision.preferred_hot) == ("small", False)


async def test_comments_are_sent_until_the_answer_is_there() -> None:
    opening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    comments = wakeup_queue.keepalives(opening, period_s=0.001)
    assert await anext(comments) == wakeup_queue.KEEPALIVE
    assert await anext(comments) == wakeup_queue.KEEPALIVE
    opening.set_result("answer")
    assert [c async for c in comments] == []


async def test_the_opening_of_a_stream_that_is_never_read_is_cancelled() -> None:
    opening = asyncio.ensure_future(asyncio.Event().wait())

    async def stream() -> Any:
        yield b""

    abandoned = wakeup_queue.cancel_with(stream(), opening)
    await turns()
    del abandoned
    await turns()
    assert opening.cancelled()


async def test_an_opening_is_cancelled_with_its_caller() -> None:
    started = asyncio.Event()
    ended = asyncio.Event()

    async def opening() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    caller = asyncio.create_task(wakeup_queue.wait_briefly(opening(), 60.0))
    await started.wait()
    caller.cancel()
    await ended.wait()


async def test_requests_that_wait_for_wake_ups_leave_places_for_others(
    view: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeup_queue, "VIEW", LiveView(lambda: 0.0))
    options = RouterOptions(max_ongoing_requests=8, max_wakeup_ratio=0.25)
    queue = WakeupQueue(view, options, "router")
    waiting = [asyncio.create_task(queue.admit(call(), "small")) for _ in range(2)]
    await turns()
    with pytest.raises(AsleepError, match="as many as may") as caught:
        await queue.admit(call(), "small")
    assert caught.value.retry_after_s > 0
    with pytest.raises(AsleepError), queue.place("cold"):  # nor does the start of a replica
        pass
    await queue.admit(call("large"), "large")
    desire(view, {"small": "hot", "large": "hot"})
    await asyncio.gather(*waiting)
    with queue.place("cold"):
        pass


async def test_a_request_that_finds_no_place_wakes_its_slm_all_the_same(
    view: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeup_queue, "VIEW", LiveView(lambda: 0.0))
    queue = WakeupQueue(view, RouterOptions(max_wakeup_ratio=0.0), "router")
    with pytest.raises(AsleepError):
        await queue.admit(call(), "small")
    assert queue._take_demand(make_fleet()).queued == {"small": 1}
