"""What follows from each kind of failure, and what the client is told."""

from __future__ import annotations

import pytest

from calm_serve.upstreams.failures import (
    CONSEQUENCES,
    Failure,
    FailureKind,
    UpstreamError,
    engine_death,
)

KINDS = list(FailureKind)
COUNTED = {"transport", "timed_out", "engine_died", "server_error", "bad_answer"}


def test_every_kind_has_its_consequence() -> None:
    assert set(CONSEQUENCES) == set(FailureKind)


def test_only_what_no_request_can_cause_counts_for_the_breaker() -> None:
    assert {k for k, c in CONSEQUENCES.items() if c.breaker} == COUNTED


def test_another_slm_is_tried_unless_it_cannot_help_or_would_come_to_harm() -> None:
    final = {k for k, c in CONSEQUENCES.items() if not c.next_slm}
    assert final == {FailureKind.INVALID_REQUEST, FailureKind.POISON, FailureKind.OUT_OF_TIME}


def test_an_operator_is_called_for_a_wrong_configuration_only() -> None:
    assert {k for k, c in CONSEQUENCES.items() if c.alarm} == {FailureKind.MISCONFIGURED}


def test_only_an_empty_answer_is_given_to_the_client_when_there_is_no_other() -> None:
    assert {k for k, c in CONSEQUENCES.items() if c.deliver} == {FailureKind.EMPTY_ANSWER}


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_has_a_status_and_a_code_in_both_formats(kind: FailureKind) -> None:
    failure = Failure(kind, "m", param="p")
    error = failure.to_openai()["error"]
    assert (error["message"], error["param"], error["code"]) == ("m", "p", CONSEQUENCES[kind].code)
    assert 400 <= failure.http_status < 600
    assert (error["type"] == "invalid_request_error") == (failure.http_status == 400)
    assert failure.to_anthropic()["error"]["message"] == "m"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 404, 413, 422])
def test_the_upstreams_status_is_passed_on_only_where_it_speaks_of_the_request(
    kind: FailureKind, status: int
) -> None:
    failure = Failure(kind, "m", code="its_code", upstream_status=status)
    shown = (failure.http_status, failure.to_openai()["error"]["code"])
    consequence = CONSEQUENCES[kind]
    if kind in (FailureKind.INVALID_REQUEST, FailureKind.UNSUPPORTED):
        assert shown == (status, "its_code")
    else:
        assert shown == (consequence.http_status, consequence.code)


def test_an_upstreams_5xx_is_never_passed_on_as_the_clients() -> None:
    assert Failure(FailureKind.UNSUPPORTED, "m", upstream_status=501).http_status == 400


@pytest.mark.parametrize(("named", "sent"), [(None, "1"), (7.0, "7"), (0.2, "1"), (7.2, "8")])
def test_the_wait_of_a_rate_limit_reaches_the_client_rounded_up(
    named: float | None, sent: str
) -> None:
    failure = Failure(FailureKind.RATE_LIMITED, "m", retry_after_s=named)
    assert failure.headers() == {"retry-after": sent}
    assert failure.cool_down_s == (named or 1.0)


def test_an_slm_cools_down_after_a_full_queue_only_if_its_upstream_says_so() -> None:
    assert Failure(FailureKind.FULL, "m").cool_down_s is None
    assert Failure(FailureKind.FULL, "m", retry_after_s=3.0).cool_down_s == 3.0


def test_a_poison_request_is_not_to_be_repeated() -> None:
    failure = Failure(FailureKind.POISON, "m")
    assert failure.headers() == {"x-should-retry": "false"}
    assert failure.http_status == 500


@pytest.mark.parametrize(
    ("was_running", "others", "deaths", "kind"),
    [
        (False, 0, 0, FailureKind.ENGINE_DIED),  # found dead
        (True, 3, 0, FailureKind.ENGINE_DIED),  # any of four
        (True, 0, 0, FailureKind.ENGINE_DIED),  # killed from outside, perhaps
        (True, 0, 1, FailureKind.POISON),
        (True, 3, 1, FailureKind.POISON),  # it was there twice
        (False, 0, 1, FailureKind.ENGINE_DIED),
    ],
)
def test_a_request_that_was_in_two_engines_that_died_gets_no_third_one(
    was_running: bool, others: int, deaths: int, kind: FailureKind
) -> None:
    failure = engine_death("small", was_running=was_running, others=others, deaths=deaths)
    assert failure.kind is kind
    assert failure.died_beside == (others if was_running else None)


def test_the_error_is_the_failures() -> None:
    error = UpstreamError(Failure(FailureKind.TIMED_OUT, "m"))
    assert (error.http_status, str(error)) == (504, "m")
    assert error.to_openai() == error.failure.to_openai()
