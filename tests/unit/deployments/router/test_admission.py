"""How many requests one router works on: bounded, given back once, with a time for the others."""

from __future__ import annotations

import pytest

from calm_serve.errors import RouterFullError
from calm_serve.testing import FakeClock
from deployments.router.admission import Admission


def test_requests_beyond_the_limit_are_refused_until_one_ends() -> None:
    admission = Admission(2, FakeClock(), lambda: 0.0)
    places = [admission.enter() for _ in range(2)]
    with pytest.raises(RouterFullError) as caught:
        admission.enter()
    assert (caught.value.http_status, caught.value.code) == (429, "router_saturated")
    assert caught.value.retry_after_s > 0
    places[0].release()
    admission.enter()


def test_a_place_is_given_back_once() -> None:
    admission = Admission(2, FakeClock(), lambda: 0.0)
    first, second = admission.enter(), admission.enter()
    first.release()
    first.release()
    assert admission.in_work == 1
    second.release()
    assert admission.in_work == 0


def test_a_place_that_is_dropped_is_given_back() -> None:
    admission = Admission(1, FakeClock(), lambda: 0.0)
    place = admission.enter()
    del place
    assert admission.in_work == 0


def test_refused_clients_are_spread_over_the_time_in_which_places_get_free() -> None:
    clock = FakeClock()
    admission = Admission(4, clock, lambda: 0.0)
    for _ in range(20):  # each answer takes two seconds
        places = [admission.enter() for _ in range(4)]
        clock.advance(2.0)
        for place in places:
            place.release()
    held = [admission.enter() for _ in range(4)]
    times_s = []
    for _ in range(10):
        with pytest.raises(RouterFullError) as caught:
            admission.enter()
        times_s.append(caught.value.retry_after_s)
    assert times_s == sorted(times_s)
    assert times_s[-1] - times_s[0] == pytest.approx(9 * 0.5, rel=0.2)
    assert len(held) == 4
