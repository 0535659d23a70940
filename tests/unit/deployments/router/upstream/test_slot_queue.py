"""Requests wait for a slot in order, none too long, and none waits for one that left."""

from __future__ import annotations

import asyncio
import math

import pytest

from calm_serve.errors import CapacityError
from calm_serve.testing import FakeClock
from deployments.router.upstream.slot_queue import SlotQueue


def make_queue(
    max_waiting: int = 128, hold_s: float = 1.0, clock: FakeClock | None = None
) -> SlotQueue:
    return SlotQueue("small", max_waiting, hold_s, clock or FakeClock(), lambda: 0.5)


async def turns(count: int = 6) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_requests_get_their_turn_in_the_order_in_which_they_came() -> None:
    queue, served = make_queue(), list[int]()

    async def request(number: int) -> None:
        await queue.wait(queue.enter(math.inf))
        served.append(number)

    waiting = [asyncio.create_task(request(n)) for n in range(3)]
    await turns()
    assert len(queue) == 3
    for _ in range(3):
        queue.next()
        await turns()
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2]
    assert len(queue) == 0


async def test_a_request_that_found_no_slot_keeps_its_place() -> None:
    queue, served = make_queue(), list[str]()
    position = queue.enter(math.inf)

    async def unlucky() -> None:
        for attempt in range(2):
            await queue.wait(position)
            served.append(f"first, attempt {attempt}")

    async def later() -> None:
        await queue.wait(queue.enter(math.inf))
        served.append("second")

    waiting = [asyncio.create_task(unlucky()), asyncio.create_task(later())]
    await turns()
    for _ in range(3):
        queue.next()
        await turns()
    await asyncio.gather(*waiting)
    assert served == ["first, attempt 0", "first, attempt 1", "second"]


async def test_the_first_one_tries_again_although_no_own_request_has_ended() -> None:
    queue = make_queue()
    await queue.wait(queue.enter(math.inf))  # another router's request may have ended
    assert len(queue) == 0


async def test_a_client_that_leaves_the_queue_passes_its_turn_on() -> None:
    queue = make_queue()
    first = asyncio.create_task(queue.wait(queue.enter(math.inf)))
    second = asyncio.create_task(queue.wait(queue.enter(math.inf)))
    await turns()
    queue.next()
    first.cancel()  # in the moment of its turn
    await asyncio.gather(first, return_exceptions=True)
    await turns()
    assert second.done()
    assert len(queue) == 0


async def test_a_queue_that_is_full_refuses_with_a_time() -> None:
    queue = make_queue(max_waiting=2)
    waiting = [asyncio.create_task(queue.wait(queue.enter(math.inf))) for _ in range(2)]
    await turns()
    with pytest.raises(CapacityError, match="'small' is at its queue limit: 2 wait") as caught:
        queue.enter(math.inf)
    assert caught.value.retry_after_s > 0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(queue) == 0


@pytest.mark.parametrize(("slots", "limit_s", "enters"), [(1, 5.0, False), (1, 15.0, True)])
async def test_a_wait_that_is_predicted_too_long_is_refused_at_once(
    slots: int, limit_s: float, enters: bool
) -> None:
    queue = make_queue(hold_s=10.0)
    for _ in range(slots):
        queue.take()
    if enters:
        queue.enter(limit_s)
        return
    with pytest.raises(CapacityError) as caught:
        queue.enter(limit_s)
    # 5 s until the wait would be short enough, 10 s for those refused before, and the jitter.
    assert 5.0 < caught.value.retry_after_s < 30.0


async def test_a_faster_slm_lets_more_wait() -> None:
    queue = make_queue(hold_s=10.0)
    for _ in range(8):
        queue.take()
    queue.enter(5.0)


async def test_a_wait_that_turned_out_too_long_ends() -> None:
    clock = FakeClock()
    queue = make_queue(hold_s=0.1, clock=clock)
    first = asyncio.create_task(queue.wait(queue.enter(math.inf)))
    second = asyncio.create_task(queue.wait(queue.enter(5.0)))
    await turns()
    clock.advance(11.0)
    first.cancel()  # wakes the second
    with pytest.raises(CapacityError, match="no free slot in time"):
        await second
    await asyncio.gather(first, return_exceptions=True)
