"""A replica sleeps and wakes as desired, and never cuts an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from calm_serve.errors import AsleepError, ComponentError
from calm_serve.testing import FakeClock
from deployments.slm.sleep import LINGER_S, RETRY_S, ReplicaResidency


class Engine:
    """Sleeps and wakes when `released` is set; keeps the calls."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.calls: list[str] = []
        self.released = asyncio.Event()
        self.released.set()
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
        await self.released.wait()
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
    """A replica's residency over an engine, its reports, and requests."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.timers: list[Timer] = []
        self.engine = Engine(clock)
        self.reports: list[str] = []
        self.times: dict[str, float] = {}
        self.detail = ""
        self.residency = ReplicaResidency(self.engine, self._report, clock, self._call_later)

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
        async with self.residency.awake():
            awake = not self.engine.asleep
            if until is not None:
                await until.wait()
            return awake and not self.engine.asleep


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_idle_replica_sleeps_and_wakes_as_desired() -> None:
    world = World()
    world.residency.set_desired("asleep")
    await settle()
    assert world.engine.asleep
    world.residency.set_desired("hot")
    await settle()
    assert world.reports == ["asleep", "waking", "ready"]
    assert world.times == {"sleep": 0.25, "wake": 0.25}
    assert await world.answer()


async def test_without_a_change_nothing_happens() -> None:
    world = World()
    assert await world.answer()
    world.residency.set_desired("hot")
    await settle()
    assert world.engine.calls == []
    assert world.reports == []


async def test_a_replica_that_is_to_go_cold_gives_its_memory_back_at_once() -> None:
    world = World()
    world.residency.set_desired("cold")
    await settle()
    assert world.engine.asleep


async def test_sleep_waits_until_the_last_answer_has_ended() -> None:
    world, end = World(), asyncio.Event()
    first, second = (asyncio.create_task(world.answer(end)) for _ in range(2))
    await settle()
    world.residency.set_desired("asleep")
    await settle()
    late = asyncio.create_task(world.answer())  # sent by a router that does not know it yet
    await settle()
    assert world.engine.calls == []
    end.set()
    assert await asyncio.gather(first, second, late) == [True] * 3
    await settle()
    assert world.engine.calls == ["sleep"]


async def test_a_request_wakes_a_sleeping_replica_and_is_answered() -> None:
    world = World()
    world.residency.set_desired("asleep")
    await settle()
    assert await world.answer()
    assert await world.answer()
    await settle()
    assert world.engine.calls == ["sleep", "wake"]  # it lingers for more of them
    assert await world.time_out() == LINGER_S
    assert world.engine.calls == ["sleep", "wake", "sleep"]  # still desired


async def test_a_request_while_the_engine_falls_asleep_waits_and_is_answered() -> None:
    world = World()
    world.engine.released.clear()
    world.residency.set_desired("asleep")
    await settle()
    requests = [asyncio.create_task(world.answer()) for _ in range(3)]
    await settle()
    assert not any(r.done() for r in requests)
    assert world.reports == []  # its memory is still taken
    world.engine.released.set()
    assert await asyncio.gather(*requests) == [True] * 3
    assert world.engine.calls == ["sleep", "wake"]


async def test_the_newest_desired_residency_wins() -> None:
    world = World()
    world.engine.released.clear()
    for desired in ("asleep", "hot", "asleep", "hot"):
        world.residency.set_desired(desired)
        await settle()
    world.engine.released.set()
    await settle()
    assert world.engine.calls == ["sleep", "wake"]
    assert not world.engine.asleep
    for desired in ("asleep", "hot", "asleep"):
        world.residency.set_desired(desired)
    await settle()
    assert world.engine.calls == ["sleep", "wake", "sleep"]


async def test_a_waiting_request_that_is_cancelled_lets_the_replica_sleep_again() -> None:
    world = World()
    world.residency.set_desired("asleep")
    await settle()
    world.engine.released.clear()
    request = asyncio.create_task(world.answer())
    await settle()
    request.cancel()
    await settle()
    world.engine.released.set()
    await world.time_out()
    assert world.engine.calls == ["sleep", "wake", "sleep"]
    assert world.engine.asleep


async def test_an_engine_that_cannot_sleep_stays_awake_and_tries_again() -> None:
    world = World()
    world.engine.failure = OSError("disk full")
    world.residency.set_desired("asleep")
    await settle()
    assert world.reports[0] == "ready"
    assert "disk full" in world.detail
    assert await world.answer()
    world.residency.check_health()
    world.engine.failure = None
    assert await world.time_out() == RETRY_S
    assert world.engine.asleep
    assert world.reports[-1] == "asleep"


async def test_an_engine_that_does_not_wake_fails_what_waits_and_the_health_check() -> None:
    world = World()
    world.residency.set_desired("asleep")
    await settle()
    world.engine.failure = RuntimeError("no memory")
    requests = [asyncio.create_task(world.answer()) for _ in range(2)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(r) for r in results] == [ComponentError] * 2
    with pytest.raises(ComponentError, match="no memory"):
        world.residency.check_health()
    with pytest.raises(ComponentError, match="no memory"):
        await world.answer()
    world.residency.set_desired("hot")
    await settle()
    assert world.engine.calls == ["sleep", "wake"]
    assert (world.reports[-1], "no memory" in world.detail) == ("failed", True)


async def test_a_dead_engine_is_reported_at_once_and_refuses_every_request() -> None:
    world = World()
    world.residency.on_engine_death("killed")
    world.residency.on_engine_death("killed again")
    assert (world.reports, world.detail) == (["failed"], "died: killed")
    with pytest.raises(ComponentError, match="the engine died: killed"):
        await world.answer()
    with pytest.raises(ComponentError, match="killed"):
        world.residency.check_health()
    world.residency.set_desired("asleep")
    await settle()
    assert world.engine.calls == []


@pytest.mark.parametrize("failure", [None, RuntimeError("no answer")])
async def test_an_engine_that_dies_while_it_falls_asleep_stays_dead(
    failure: Exception | None,
) -> None:
    world = World()
    world.engine.released.clear()
    world.residency.set_desired("asleep")
    await settle()
    waiting = asyncio.create_task(world.answer())
    await settle()
    world.residency.on_engine_death("killed")
    with pytest.raises(ComponentError, match="killed"):
        await waiting
    world.engine.failure = failure
    world.engine.released.set()
    await settle()
    assert (world.residency.state, world.reports) == ("failed", ["failed"])


async def test_the_last_report_is_repeated_when_asked_for() -> None:
    world = World()
    world.residency.set_desired("asleep")
    await settle()
    world.residency.report_again()
    assert world.reports == ["asleep", "asleep"]


@pytest.mark.parametrize("known", [4, 5])
async def test_a_router_that_does_not_know_that_the_replica_is_to_sleep_is_refused(
    known: int,
) -> None:
    world = World()
    world.residency.set_desired("asleep", 5)
    await settle()
    with pytest.raises(AsleepError):
        async with world.residency.awake(known):
            raise AssertionError("not reached")
    assert world.engine.calls == ["sleep"]


async def test_a_router_that_knows_a_newer_desired_residency_wakes_the_engine() -> None:
    world = World()
    world.residency.set_desired("asleep", 5)
    await settle()
    async with world.residency.awake(6):
        assert not world.engine.asleep
    world.residency.set_desired("hot", 6)
    await settle()
    assert world.engine.calls == ["sleep", "wake"]


async def test_a_request_before_the_engine_falls_asleep_is_answered() -> None:
    world = World()
    async with world.residency.awake(4):
        world.residency.set_desired("asleep", 5)
        async with world.residency.awake(4):
            assert not world.engine.asleep
    await settle()
    assert world.engine.asleep
