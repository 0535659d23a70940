"""Routing headers: what is read, and what is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.errors import RequestError
from calm_serve.requests.overrides import parse_overrides


@given(st.dictionaries(st.sampled_from(["x-slo-ttft-ms", "x-calm-labels"]) | st.text(), st.text()))
def test_any_headers_parse_or_raise_a_request_error(headers: dict[str, str]) -> None:
    try:
        overrides = parse_overrides(headers)
    except RequestError as error:
        assert error.param
    else:
        assert all(label == label.strip() != "" for label in overrides.labels)


def test_headers_become_overrides() -> None:
    overrides = parse_overrides(
        {
            "x-session-id": "s" * 300,
            "x-slo-ttft-ms": "250",
            "x-slo-tpot-ms": "12.5",
            "x-calm-deadline-s": "3",
            "x-calm-quality-floor": "0.7",
            "x-calm-data-policy": "local",
            "x-calm-task": "t" * 100,
            "x-calm-validate": "label",
            "x-calm-labels": " yes, no,,",
            "accept": "*/*",
        }
    )
    assert len(overrides.session_id) == 256
    assert (overrides.slo_ttft_ms, overrides.slo_tpot_ms) == (250.0, 12.5)
    assert (overrides.deadline_s, overrides.quality_floor) == (3.0, 0.7)
    assert overrides.local_only
    assert len(overrides.task) == 64
    assert (overrides.validate, overrides.labels) == ("label", ("yes", "no"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-ttft-ms", "-1"),
        ("x-slo-tpot-ms", "inf"),
        ("x-calm-deadline-s", "nan"),
        ("x-calm-quality-floor", "1.1"),
        ("x-calm-data-policy", "secret"),
        ("x-calm-validate", "poem"),
    ],
)
def test_a_header_out_of_range_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_overrides({name: value})
    assert caught.value.param == name


def test_an_unknown_routing_header_names_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="nearest is 'x-calm-quality-floor'"):
        parse_overrides({"x-calm-quality": "0.5"})


@pytest.mark.parametrize("labels", [{}, {"x-calm-labels": ""}, {"x-calm-labels": " , "}])
def test_a_check_against_labels_needs_labels(labels: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="x-calm-labels") as caught:
        parse_overrides({"x-calm-validate": "label", **labels})
    assert (caught.value.param, caught.value.http_status) == ("x-calm-labels", 400)
