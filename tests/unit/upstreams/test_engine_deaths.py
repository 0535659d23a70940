"""Which requests killed engines: remembered for a while, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.testing import FakeClock
from calm_serve.upstreams import EngineDeaths, engine_deaths
from calm_serve.upstreams.engine_deaths import LIFETIME_S, POISON_DEATHS

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5}


def test_deaths_are_counted_by_request() -> None:
    deaths = EngineDeaths(FakeClock())
    assert deaths.count(CHAT, BODY) == 0
    deaths.add(CHAT, BODY)
    assert deaths.count(CHAT, BODY) == 1
    for _ in range(5):
        deaths.add(CHAT, BODY)
    assert deaths.count(CHAT, BODY) == POISON_DEATHS


@pytest.mark.parametrize(
    ("path", "change", "same"),
    [
        (CHAT, {"model": "other"}, True),
        (CHAT, {"stream": True, "stream_options": {"include_usage": True}}, True),
        (CHAT, {"user": "someone"}, True),
        (CHAT, {"temperature": 0.6}, False),
        (CHAT, {"messages": [{"role": "user", "content": "ho"}]}, False),
        ("/v1/completions", {}, False),
    ],
)
def test_what_an_engine_computes_makes_the_request(
    path: str, change: dict[str, Any], same: bool
) -> None:
    deaths = EngineDeaths(FakeClock())
    deaths.add(CHAT, BODY)
    assert deaths.count(path, {**BODY, **change}) == int(same)


def test_any_parsed_body_can_be_counted() -> None:
    deaths = EngineDeaths(FakeClock())
    odd = {"messages": "\ud800", "top_p": float("nan")}
    deaths.add(CHAT, odd)
    assert deaths.count(CHAT, odd) == 1


def test_a_death_is_forgotten_after_its_lifetime() -> None:
    clock = FakeClock()
    deaths = EngineDeaths(clock)
    deaths.add(CHAT, BODY)
    clock.advance(LIFETIME_S / 2)
    deaths.add(CHAT, BODY)
    clock.advance(LIFETIME_S / 2)
    assert deaths.count(CHAT, BODY) == 1
    clock.advance(LIFETIME_S / 2)
    assert deaths.count(CHAT, BODY) == 0


def test_the_memory_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_deaths, "MAX_REQUESTS", 3)
    deaths = EngineDeaths(FakeClock())
    for number in range(5):
        deaths.add(CHAT, {"seed": number})
    assert [deaths.count(CHAT, {"seed": n}) for n in range(5)] == [0, 0, 1, 1, 1]
