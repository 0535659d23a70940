"""Requests wait for a slot in order, and none waits for one that left."""

from __future__ import annotations

import asyncio

from deployments.router.upstream.slot_queue import SlotQueue


async def test_requests_get_their_turn_in_the_order_in_which_they_came() -> None:
    queue, turns = SlotQueue(), list[int]()

    async def request(number: int) -> None:
        await queue.wait()
        turns.append(number)

    waiting = [asyncio.create_task(request(n)) for n in range(3)]
    await asyncio.sleep(0)
    assert len(queue) == 3
    for _ in range(3):
        queue.next()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert turns == [0, 1, 2]
    assert len(queue) == 0


async def test_the_first_one_tries_again_although_no_own_request_has_ended() -> None:
    queue = SlotQueue()
    await queue.wait()  # another router's request may have ended
    assert len(queue) == 0


async def test_a_client_that_leaves_the_queue_passes_its_turn_on() -> None:
    queue = SlotQueue()
    first = asyncio.create_task(queue.wait())
    second = asyncio.create_task(queue.wait())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    queue.next()
    await second
    assert len(queue) == 0
