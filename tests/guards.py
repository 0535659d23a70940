"""What the unit and contract tiers must not do, and how many examples Hypothesis tries there.

Both conftests take the fixture from here.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn

import pytest
import ray
from hypothesis import settings

# No deadline: the machine may be busy, and the first example may pay for an import.
settings.register_profile("calm", max_examples=50, deadline=None)
settings.load_profile("calm")

_sleep = asyncio.sleep


def _forbid(what: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        pytest.fail(f"unit tests must not {what}")

    return refuse


def _yield_only(delay: float, result: Any = None) -> Coroutine[Any, Any, Any]:
    # Ray backs off between replicas; the rule is for this project's own code.
    ours = "site-packages" not in sys._getframe(1).f_code.co_filename
    if ours and delay > 0:
        pytest.fail(f"unit tests must not sleep ({delay} s): pass a clock or shrink the constant")
    return _sleep(delay, result)


@pytest.fixture(autouse=True)
def no_outside_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starting Ray, opening a connection or sleeping fails the test that does it."""
    # Ray's API starts Ray on first use, through this very name.
    monkeypatch.setattr(ray, "init", _forbid("start Ray"))
    # Event loops make socket pairs, so sockets as such stay allowed.
    for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, _forbid("use the network"))
    monkeypatch.setattr(socket, "getaddrinfo", _forbid("use the network"))
    monkeypatch.setattr(time, "sleep", _forbid("sleep"))
    monkeypatch.setattr(asyncio, "sleep", _yield_only)
    yield
    assert not ray.is_initialized(), "unit tests must not start Ray"
