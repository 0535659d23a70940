"""A router's side of residency: who waits, for how long, and what the client hears meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions, RouterOptions
from calm_serve.errors import AsleepError, KnowledgeError
from calm_serve.testing import (
    make_context,
    make_decision,
    make_facts,
    make_fleet,
    make_replica,
    make_state,
)
from calm_serve.types import Residency
from deployments.router import dispatch, wakeup_queue
from deployments.router.dispatch import Call
from deployments.router.live_state import LiveView
from deployments.router.outcome import outcome_of
from deployments.router.residency_view import ResidencyView
from deployments.router.wakeup_queue import WakeupQueue
from deployments.wire import ErrorReply, ReplyEnd

VERSION = 7
OPTIONS = ResidencyOptions(memory_budget_bytes=1, hold_s=20.0)


def order(tiers: ResidencyView, orders: dict[str, str]) -> None:
    tiers.set_orders({"tiers": orders, "options": OPTIONS.model_dump(mode="json")}, VERSION)


def call(slm_id: str = "small", deadline_s: float | None = None) -> Call:
    context = make_context(deadline_s=deadline_s)
    return Call(make_decision(slm_id, preferred=slm_id, context=context), make_state(slm_id), ())


@pytest.fixture
def tiers() -> ResidencyView:
    tiers = ResidencyView()
    order(tiers, {"small": "asleep", "large": "hot"})
    return tiers


@pytest.fixture
def client(tiers: ResidencyView, monkeypatch: pytest.MonkeyPatch) -> WakeupQueue:
    monkeypatch.setattr(wakeup_queue, "VIEW", LiveView(lambda: 0.0))
    return WakeupQueue(tiers, RouterOptions(), "router")


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_request_for_a_hot_slm_goes_at_once(client: WakeupQueue) -> None:
    one = call("large")
    await client.admit(one, "large")
    assert (one.held, one.inside) == (False, "large")


async def test_a_request_for_a_sleeping_slm_waits_until_it_may_be_woken(
    client: WakeupQueue, tiers: ResidencyView
) -> None:
    one = call()
    waiting = asyncio.create_task(client.admit(one, "small"))
    await turns()
    assert client._say(make_fleet())["held"] == {"small": 1}
    order(tiers, {"small": "hot", "large": "asleep"})
    await waiting
    assert one.held
    assert client._say(make_fleet())["held"] == {}
    assert client._say(make_fleet())["running"] == {"small": 1}
    client.left(one)
    client.left(one)
    assert client._say(make_fleet())["running"] == {}


async def test_a_client_that_leaves_releases_its_hold(client: WakeupQueue) -> None:
    waiting = asyncio.create_task(client.admit(call(), "small"))
    await turns()
    waiting.cancel()
    await turns()
    assert client._say(make_fleet())["held"] == {}


@pytest.mark.parametrize(
    ("expected_s", "deadline_s"), [(30.0, None), (5.0, 2.0), (float("inf"), None)]
)
async def test_a_wait_beyond_the_limit_is_refused_at_once_with_an_honest_estimate(
    client: WakeupQueue, tiers: ResidencyView, expected_s: float, deadline_s: float | None
) -> None:
    tiers.waits = {"small": expected_s}
    with pytest.raises(AsleepError) as refused:
        await client.admit(call(deadline_s=deadline_s), "small")
    assert refused.value.http_status == 503
    longest = wakeup_queue.LONGEST_RETRY_S
    assert refused.value.retry_after_s == min(expected_s, longest)
    # Who was told to come again is expected, unless that would be never.
    expected = {"small": 1} if expected_s < longest else {}
    assert client._say(make_fleet())["held"] == expected


async def test_a_hold_ends_at_its_limit(client: WakeupQueue) -> None:
    one = call(deadline_s=0.01)
    with pytest.raises(AsleepError):
        await client.admit(one, "small")
    assert client._say(make_fleet())["held"] == {}


async def test_demand_is_told_once_and_not_lost_when_nobody_listens(
    client: WakeupQueue, tiers: ResidencyView
) -> None:
    said: list[dict[str, Any]] = []
    answers: list[Any] = [KnowledgeError("away"), {"waits": {"small": 3.0}, "swaps": 1}]

    async def ask(_router: str, what: Any) -> Any:
        said.append(dict(what))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client.wanted(call("small"), hit=False)
    client.wanted(call("large"), hit=True)
    client._pause = lambda _s: asyncio.sleep(0)  # type: ignore[method-assign]
    with pytest.raises(IndexError):  # nobody is left to answer a third word
        await client.run(ask, make_fleet)
    del said[2:]
    assert [s["wanted"] for s in said] == [["small", "large"]] * 2
    assert [(s["hits"], s["misses"]) for s in said] == [(1, 1)] * 2
    assert (tiers.waits, tiers.summary) == ({"small": 3.0}, {"swaps": 1})
    assert client._say(make_fleet())["wanted"] == []


async def test_a_first_hold_is_told_without_waiting_for_the_next_word(
    client: WakeupQueue,
) -> None:
    pause = asyncio.create_task(client._pause(60.0))
    await turns()
    waiting = asyncio.create_task(client.admit(call(), "small"))
    await turns()
    assert pause.done()
    waiting.cancel()


async def test_a_router_without_a_budget_holds_nothing_and_says_nothing() -> None:
    plain = ResidencyView()
    client = WakeupQueue(plain, RouterOptions(), "router")
    told = asyncio.create_task(client.run(None, make_fleet))  # type: ignore[arg-type]
    await turns()
    assert not told.done()
    told.cancel()
    one = call()
    await client.admit(one, "small")
    assert one.inside == ""


def test_the_state_says_asleep_waking_or_hot_and_how_long_it_takes(tiers: ResidencyView) -> None:
    small, replicas = make_state("small", wake_s=15.0), [make_replica("r1")]
    assert tiers.state(make_state("large"), replicas) == make_state("large")
    assert tiers.state(small, replicas).residency is Residency.ASLEEP
    tiers.set_reports({"small": {"r1": {"state": "asleep", "ready_s": {"wake": 0.3}}}})
    assert tiers.state(small, replicas).wake_s == 0.3
    tiers.waits = {"small": 1.5}
    assert tiers.state(small, replicas).wake_s == 1.5
    order(tiers, {"small": "hot"})
    assert tiers.state(small, replicas).residency is Residency.STARTING
    # A dead replica's last word says nothing of the living.
    assert tiers.state(small, [make_replica("r2")]) is small
    tiers.set_reports({"small": {"r1": {"state": "ready", "ready_s": {}}}})
    assert tiers.state(small, replicas) is small


def test_an_slm_without_replicas_is_not_asleep(tiers: ResidencyView) -> None:
    cold = make_state("small", residency=Residency.COLD, replicas=0)
    assert tiers.state(cold, []) is cold


class Scripted:
    """A handle whose calls answer with one item each; the last one is for all further calls."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items) or [ReplyEnd(b"done", make_facts("r1"))]
        self.calls = 0
        self.orders: list[int | None] = []

    def options(self, **_options: Any) -> Scripted:
        return self

    def remote(self, _body: Any, *, hints: Any) -> Any:
        self.orders.append(hints.get("orders"))
        self.calls += 1
        item = self.items.pop(0) if len(self.items) > 1 else self.items[0]

        async def play() -> Any:
            yield item

        return play()


async def open_call(client: WakeupQueue, handles: dict[str, Scripted], one: Call) -> Any:
    dispatcher = dispatch.Dispatcher(
        handles.__getitem__,  # type: ignore[arg-type]
        retries=2,
        attempt_failed=lambda _slm: None,
        admit=client.admit,
    )
    return await dispatcher.open(one, "chat", {}, {})


async def test_a_sleeping_slm_is_sent_nothing_before_its_time(
    client: WakeupQueue, tiers: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    handles = {"small": Scripted(), "large": Scripted()}
    opening = asyncio.create_task(open_call(client, handles, call()))
    await turns()
    assert handles["small"].calls == 0
    order(tiers, {})
    await opening
    assert (handles["small"].calls, handles["large"].calls) == (1, 0)


async def test_what_would_wake_too_late_is_answered_by_the_next_best(
    client: WakeupQueue, tiers: ResidencyView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    tiers.waits = {"small": 100.0}
    handles = {"small": Scripted(), "large": Scripted()}
    one = Call(make_decision("small", "large"), make_state("small"), ())
    await open_call(client, handles, one)
    assert (handles["small"].calls, handles["large"].calls, one.slm_id) == (0, 1, "large")
    with pytest.raises(AsleepError):
        await open_call(client, handles, call())


async def test_what_crosses_an_order_to_sleep_is_held_and_sent_again(
    client: WakeupQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "VIEW", LiveView(lambda: 0.0))
    monkeypatch.setattr(dispatch, "ORDERS_S", 0.0)
    asleep = ErrorReply(503, b"{}", asleep=True)
    large = Scripted(asleep, asleep, ReplyEnd(b"done", make_facts("r1")))
    one = call("large")
    answer = await open_call(client, {"large": large}, one)
    assert [part async for part in answer] == [b"done"]
    assert (large.calls, large.orders) == (3, [VERSION] * 3)
    assert one.held
    assert one.retries == 0


def test_an_outcome_tells_what_was_preferred_and_whether_it_was_hot() -> None:
    one = call()
    assert "preferred" not in outcome_of(one, at=1.0, task="", prompt=None).extra
    one.preferred_hot, one.held = False, True
    outcome = outcome_of(one, at=1.0, task="", prompt=None)
    assert outcome.timing.cold
    assert (outcome.extra["preferred"], outcome.extra["preferred_hot"]) == ("small", False)


async def test_comments_are_sent_until_the_answer_is_there() -> None:
    opening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    heard = wakeup_queue.comments(opening, period_s=0.001)
    assert await anext(heard) == wakeup_queue.COMMENT
    assert await anext(heard) == wakeup_queue.COMMENT
    opening.set_result("answer")
    assert [c async for c in heard] == []


async def test_an_opening_that_nobody_reads_is_given_up() -> None:
    opening = asyncio.ensure_future(asyncio.Event().wait())

    async def stream() -> Any:
        yield b""

    abandoned = wakeup_queue.abandoned_with(stream(), opening)
    await turns()
    del abandoned
    await turns()
    assert opening.cancelled()


async def test_an_opening_ends_with_its_caller() -> None:
    started = asyncio.Event()
    ended = asyncio.Event()

    async def opening() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    caller = asyncio.create_task(wakeup_queue.within(opening(), 60.0))
    await started.wait()
    caller.cancel()
    await ended.wait()
