"""A resident adapter is unloaded once, and not before its last request has ended."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from deployments.slm.adapters import ResidentAdapter


class Engine:
    """Keeps the names of unloaded adapters."""

    def __init__(self) -> None:
        self.unloaded: list[str] = []

    async def unload_adapter(self, name: str) -> None:
        self.unloaded.append(name)


class Idle(threading.Event):
    """An event that shows when a thread has begun to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.set()
        return super().wait(timeout)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def resident(engine: Engine) -> tuple[Any, Idle]:
    adapter: Any = ResidentAdapter("small:sql", engine, asyncio.get_running_loop())
    adapter._idle = idle = Idle()
    idle.set()
    return adapter, idle


async def test_dropping_an_idle_adapter_unloads_it(engine: Engine) -> None:
    adapter, _ = resident(engine)
    await asyncio.to_thread(adapter.__del__)
    assert engine.unloaded == ["small:sql"]


async def test_dropping_a_busy_adapter_waits_for_its_last_request(engine: Engine) -> None:
    adapter, idle = resident(engine)
    with adapter.in_use():
        with adapter.in_use():
            dropping = asyncio.create_task(asyncio.to_thread(adapter.__del__))
            await asyncio.to_thread(idle.asked.wait, 20)
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.unloaded == []
        assert not dropping.done()
    await dropping
    assert engine.unloaded == ["small:sql"]


async def test_a_request_that_fails_lets_go_of_the_adapter(engine: Engine) -> None:
    adapter, _ = resident(engine)
    with pytest.raises(RuntimeError, match="broken"), adapter.in_use():
        raise RuntimeError("broken")
    await asyncio.to_thread(adapter.__del__)
    assert engine.unloaded == ["small:sql"]


async def test_an_adapter_is_unloaded_once_although_it_is_dropped_twice(engine: Engine) -> None:
    adapter, _ = resident(engine)
    await asyncio.to_thread(adapter.__del__)
    await asyncio.to_thread(adapter.__del__)
    assert engine.unloaded == ["small:sql"]


async def test_an_adapter_collected_on_the_event_loop_does_not_block_it(engine: Engine) -> None:
    adapter, idle = resident(engine)
    with adapter.in_use():
        adapter.__del__()
    assert not idle.asked.is_set()
    assert engine.unloaded == []


def test_an_adapter_that_outlives_its_event_loop_is_left_alone(engine: Engine) -> None:
    async def make() -> Any:
        return resident(engine)[0]

    adapter = asyncio.run(make())
    adapter.__del__()
    assert engine.unloaded == []
