"""The connections of a router: what a failed replica still works on is broken off."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from calm_serve.testing import make_spec
from deployments.router.upstream import Upstream, connections


class Reply:
    """A reply that a replica works on."""

    def __init__(self) -> None:
        self.others: list[int] = []

    def break_off(self, others: int) -> None:
        self.others.append(others)


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(connections, "FAILED_GRACE_S", 0.0)
    made = Upstream(
        spec=make_spec, start_replica=lambda _slm: None, clock=lambda: 0.0, random=lambda: 0.0
    )
    yield made
    await made.close()


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_replies_of_a_failed_replica_are_broken_off(upstream: Any) -> None:
    one, two, elsewhere, over = (Reply() for _ in range(4))
    for reply in (one, two, over):
        upstream.begun("r1", reply)
    upstream.begun("r2", elsewhere)
    upstream.ended("r1", over)
    upstream.replica_failed("r1")
    await turns()
    assert [r.others for r in (one, two, elsewhere, over)] == [[1], [1], [], []]


async def test_replies_that_the_replica_ends_itself_are_left_alone(upstream: Any) -> None:
    one = Reply()
    upstream.begun("r1", one)
    upstream.replica_failed("r1")
    upstream.ended("r1", one)
    await turns()
    assert one.others == []


async def test_a_reply_that_was_dropped_is_not_kept(upstream: Any) -> None:
    upstream.begun("r1", Reply())
    gc.collect()
    upstream.replica_failed("r1")
    await turns()


async def test_each_slm_has_one_queue(upstream: Any) -> None:
    small, large = make_spec("small"), make_spec("large")
    assert upstream.queue(small) is upstream.queue(small)
    assert upstream.queue(small) is not upstream.queue(large)
