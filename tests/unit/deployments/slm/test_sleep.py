"""A replica sleeps and wakes by order, never cuts an answer, and never refuses for a race."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from calm_serve.errors import AsleepError, ComponentError
from calm_serve.testing import FakeClock
from deployments.slm.sleep import LINGER_S, RETRY_S, Tier


class Engine:
    """Sleeps and wakes when `gate` is open; counts what it is told."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.calls: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.asleep = False

    async def sleep(self) -> None:
        await self._do("sleep")
        self.asleep = True

    async def wake(self) -> None:
        await self._do("wake")
        self.asleep = False

    async def _do(self, what: str) -> None:
        self.calls.append(what)
        await self.gate.wait()
        self._clock.advance(0.25)
        if self.failure is not None:
            raise self.failure


class Timer:
    """A call that is due when the test says so."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.cancelled = seconds, call, False

    def cancel(self) -> None:
        self.cancelled = True


class World:
    """A tier over an engine, what it reported, and requests."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.timers: list[Timer] = []
        self.engine = Engine(clock)
        self.reports: list[str] = []
        self.times: dict[str, float] = {}
        self.detail = ""
        self.tier = Tier(self.engine, self._report, clock, self._call_later)

    def _call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, call))
        return self.timers[-1]

    def _report(self, state: str, times: Mapping[str, float], detail: str) -> None:
        self.reports.append(state)
        self.times, self.detail = dict(times), detail

    async def time_out(self) -> float:
        """Let the only timer run out; return what it was set to."""
        (timer,) = [t for t in self.timers if not t.cancelled]
        self.timers.clear()
        timer.call()
        await settle()
        return timer.seconds

    async def answer(self, until: asyncio.Event | None = None) -> bool:
        """Run one request to its end; return whether the engine was awake all the time."""
        async with self.tier.awake():
            awake = not self.engine.asleep
            if until is not None:
                await until.wait()
            return awake and not self.engine.asleep


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_order_puts_an_idle_replica_to_sleep_and_wakes_it_again() -> None:
    world = World()
    world.tier.order("asleep")
    await settle()
    assert world.engine.asleep
    world.tier.order("hot")
    await settle()
    assert world.reports == ["asleep", "waking", "ready"]
    assert world.times == {"sleep": 0.25, "wake": 0.25}
    assert await world.answer()


async def test_without_an_order_nothing_changes() -> None:
    world = World()
    assert await world.answer()
    world.tier.order("hot")
    await settle()
    assert world.engine.calls == []
    assert world.reports == []


async def test_a_cold_order_gives_the_memory_back_at_once() -> None:
    world = World()
    world.tier.order("cold")
    await settle()
    assert world.engine.asleep


async def test_sleep_waits_until_the_last_answer_has_ended() -> None:
    world, end = World(), asyncio.Event()
    first, second = (asyncio.create_task(world.answer(end)) for _ in range(2))
    await settle()
    world.tier.order("asleep")
    await settle()
    late = asyncio.create_task(world.answer())  # sent by a router that had not heard the order
    await settle()
    assert world.engine.calls == []
    end.set()
    assert await asyncio.gather(first, second, late) == [True] * 3
    await settle()
    assert world.engine.calls == ["sleep"]


async def test_a_request_that_meets_a_sleeping_replica_wakes_it_and_is_answered() -> None:
    world = World()
    world.tier.order("asleep")
    await settle()
    assert await world.answer()
    assert await world.answer()
    await settle()
    assert world.engine.calls == ["sleep", "wake"]  # it waits a moment for more of them
    assert await world.time_out() == LINGER_S
    assert world.engine.calls == ["sleep", "wake", "sleep"]  # the order still stands


async def test_a_request_during_falling_asleep_is_held_and_answered() -> None:
    world = World()
    world.engine.gate.clear()
    world.tier.order("asleep")
    await settle()
    requests = [asyncio.create_task(world.answer()) for _ in range(3)]
    await settle()
    assert not any(r.done() for r in requests)
    assert world.reports == []  # its memory is still taken
    world.engine.gate.set()
    assert await asyncio.gather(*requests) == [True] * 3
    assert world.engine.calls == ["sleep", "wake"]


async def test_the_last_of_several_orders_wins() -> None:
    world = World()
    world.engine.gate.clear()
    for order in ("asleep", "hot", "asleep", "hot"):
        world.tier.order(order)
        await settle()
    world.engine.gate.set()
    await settle()
    assert world.engine.calls == ["sleep", "wake"]
    assert not world.engine.asleep
    for order in ("asleep", "hot", "asleep"):
        world.tier.order(order)
    await settle()
    assert world.engine.calls == ["sleep", "wake", "sleep"]


async def test_a_held_request_that_gives_up_leaves_the_order_in_force() -> None:
    world = World()
    world.tier.order("asleep")
    await settle()
    world.engine.gate.clear()
    request = asyncio.create_task(world.answer())
    await settle()
    request.cancel()
    await settle()
    world.engine.gate.set()
    await world.time_out()
    assert world.engine.calls == ["sleep", "wake", "sleep"]
    assert world.engine.asleep


async def test_an_engine_that_cannot_sleep_stays_awake_and_tries_again() -> None:
    world = World()
    world.engine.failure = OSError("disk full")
    world.tier.order("asleep")
    await settle()
    assert world.reports[0] == "ready"
    assert "disk full" in world.detail
    assert await world.answer()
    world.tier.check_health()
    world.engine.failure = None
    assert await world.time_out() == RETRY_S
    assert world.engine.asleep
    assert world.reports[-1] == "asleep"


async def test_an_engine_that_does_not_wake_fails_what_waits_and_the_health_check() -> None:
    world = World()
    world.tier.order("asleep")
    await settle()
    world.engine.failure = RuntimeError("no memory")
    requests = [asyncio.create_task(world.answer()) for _ in range(2)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(r) for r in results] == [ComponentError] * 2
    with pytest.raises(ComponentError, match="no memory"):
        world.tier.check_health()
    with pytest.raises(ComponentError, match="no memory"):
        await world.answer()
    world.tier.order("hot")
    await settle()
    assert world.engine.calls == ["sleep", "wake"]
    assert (world.reports[-1], "no memory" in world.detail) == ("failed", True)


async def test_a_state_is_reported_again_to_somebody_who_forgot_it() -> None:
    world = World()
    world.tier.order("asleep")
    await settle()
    world.tier.repeat()
    assert world.reports == ["asleep", "asleep"]


@pytest.mark.parametrize("known", [4, 5])
async def test_a_sender_that_had_not_heard_of_the_order_to_sleep_wakes_nobody(known: int) -> None:
    world = World()
    world.tier.order("asleep", 5)
    await settle()
    with pytest.raises(AsleepError):
        async with world.tier.awake(known):
            raise AssertionError("not reached")
    assert world.engine.calls == ["sleep"]


async def test_a_sender_that_has_heard_of_a_newer_order_wakes_the_engine() -> None:
    world = World()
    world.tier.order("asleep", 5)
    await settle()
    async with world.tier.awake(6):
        assert not world.engine.asleep
    world.tier.order("hot", 6)
    await settle()
    assert world.engine.calls == ["sleep", "wake"]


async def test_what_comes_before_the_engine_has_fallen_asleep_is_answered() -> None:
    world = World()
    async with world.tier.awake(4):
        world.tier.order("asleep", 5)
        async with world.tier.awake(4):
            assert not world.engine.asleep
    await settle()
    assert world.engine.asleep
