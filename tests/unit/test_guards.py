"""The unit tier's own limits hold."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.request

import pytest
import ray


def test_starting_ray_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="start Ray"):
        ray.init()


def test_starting_ray_by_using_it_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="start Ray"):
        ray.get_actor("anybody")


def test_the_network_fails() -> None:
    with (
        socket.socket() as outside,
        pytest.raises(pytest.fail.Exception, match="use the network"),
    ):
        outside.connect(("127.0.0.1", 9))
    with pytest.raises(pytest.fail.Exception, match="use the network"):
        urllib.request.urlopen("http://localhost:9/")


def test_sleeping_fails_in_threads_and_on_the_event_loop() -> None:
    with pytest.raises(pytest.fail.Exception, match="sleep"):
        time.sleep(0.01)
    with pytest.raises(pytest.fail.Exception, match="sleep"):
        asyncio.run(asyncio.sleep(0.01))


def test_yielding_to_the_event_loop_works() -> None:
    assert asyncio.run(asyncio.sleep(0, "awake")) == "awake"
