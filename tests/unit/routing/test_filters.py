"""Hard filters: each removes what it should, for pinned and for free requests."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.routing.filters import (
    ESTIMATE_TOLERANCE,
    FILTERS,
    PINNED_FILTERS,
    excluded_by,
)
from calm_serve.testing import make_context, make_spec, make_state
from calm_serve.types import Task

OWN_SPACE = make_spec(task="embed").embedding_space
REMOTE = {"locality": "remote", "remote": {"base_url": "http://x/v1"}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("other_task", {"task": Task.EMBED}, {}, {}),
    ("other_task", {"task": Task.RERANK}, {}, {}),
    ("other_task", {}, {"task": "embed"}, {}),
    ("other_task", {}, {"task": "rerank"}, {}),
    ("other_task", {"task": Task.EMBED}, {"task": "rerank"}, {}),
    ("other_task", {"task": Task.RERANK}, {"task": "embed"}, {}),
    ("other_space", {"task": Task.EMBED, "embedding_space": "others"}, {"task": "embed"}, {}),
    ("no_route", {"route": "/v1/messages"}, REMOTE, {}),
    ("ignored_field", {"ignored_fields": ("guided_json",)}, {}, {}),
    ("no_chat_template", {"needs": ("chat",)}, {"capabilities": {"chat": False}}, {}),
    ("no_tools", {"needs": ("chat", "tools")}, {}, {}),
    ("no_json_output", {"needs": ("json_output",)}, {"capabilities": {"json_output": False}}, {}),
    ("no_vision", {"needs": ("vision",)}, {}, {}),
    ("no_video", {"needs": ("video",)}, {"capabilities": {"vision": True}}, {}),
    ("no_audio", {"needs": ("audio",)}, {}, {}),
    ("context_length", {"prompt_tokens": 5000}, {"context_tokens": 2048}, {}),
    ("context_length", {"max_output_tokens": 2000}, {"context_tokens": 2048}, {}),
    ("context_length", {"sequence_tokens": 5000}, {"context_tokens": 2048}, {}),
    (
        "context_length",
        {"prompt_tokens": 2049, "is_token_ids": True},
        {"context_tokens": 2048},
        {},
    ),
    ("adapter", {"requested_model": "small:sql"}, {}, {}),
    ("language", {"language": "de", "language_ratio": 0.9}, {"languages": ["en", "fr"]}, {}),
    ("data_policy", {"local_only": True}, REMOTE, {}),
    ("breaker", {}, {}, {"breaker_open": True}),
    ("available", {}, {}, {"replicas": 0}),
]


@pytest.mark.parametrize(("name", "fields", "slm", "state"), CASES)
def test_a_filter_removes_what_cannot_or_must_not_serve(
    name: str, fields: dict[str, Any], slm: dict[str, Any], state: dict[str, Any]
) -> None:
    context, spec, live = make_context(**fields), make_spec(**slm), make_state(**state)
    assert excluded_by(context, spec, live) == name
    assert excluded_by(context, spec, live, pinned=True) == (name if name in PINNED_FILTERS else "")


def test_every_filter_has_a_case_above() -> None:
    assert {name for name, *_ in CASES} == set(FILTERS)


@pytest.mark.parametrize(
    ("fields", "slm", "state"),
    [
        ({}, {}, {}),
        ({"needs": ("vision",)}, {"capabilities": {"vision": True}}, {}),
        ({"needs": ("chat", "tools")}, {"capabilities": {"tools": True}}, {}),
        ({"needs": ("chat", "json_output")}, {}, {}),
        ({"task": Task.EMBED}, {"task": "embed"}, {}),
        ({"task": Task.RERANK}, {"task": "rerank"}, {}),
        ({"task": Task.RERANK, "requested_model": "small"}, {"task": "embed"}, {}),
        ({"task": Task.ANY}, {"task": "embed"}, {}),
        ({"task": Task.ANY}, {}, {}),
        ({"task": Task.EMBED, "embedding_space": OWN_SPACE}, {"task": "embed"}, {}),
        ({"route": "/v1/messages"}, {}, {}),
        ({"route": "/v1/embeddings", "task": Task.EMBED}, {**REMOTE, "task": "embed"}, {}),
        ({"ignored_fields": ("guided_json",)}, REMOTE, {}),
        ({"prompt_tokens": 90_000, "truncates_prompt": True}, {}, {}),
        ({"prompt_tokens": 90_000, "sequence_tokens": 500}, {}, {}),
        ({"requested_model": "small:sql"}, {"adapters": [{"name": "sql", "path": "x"}]}, {}),
        ({"language": "und"}, {"languages": ["de"]}, {}),
        ({"language": "ja", "language_ratio": 1.0}, {"languages": []}, {}),
        ({"language": "de", "language_ratio": 0.7}, {"languages": ["en"]}, {}),
        ({"local_only": True}, {}, {}),
        ({}, {"residency": "on_demand", "scaling": {"min_replicas": 0}}, {"replicas": 0}),
        ({}, REMOTE, {"replicas": 0}),
    ],
)
def test_what_can_serve_stays(
    fields: dict[str, Any], slm: dict[str, Any], state: dict[str, Any]
) -> None:
    assert excluded_by(make_context(**fields), make_spec(**slm), make_state(**state)) == ""


def test_the_token_estimate_is_given_the_benefit_of_the_doubt() -> None:
    spec = make_spec(context_tokens=1000)
    edge = round(1000 * ESTIMATE_TOLERANCE)
    assert excluded_by(make_context(prompt_tokens=edge), spec, make_state()) == ""
    assert excluded_by(make_context(prompt_tokens=edge + 1), spec, make_state()) != ""


def test_no_pinned_request_escapes_the_data_policy() -> None:
    assert "data_policy" in PINNED_FILTERS
    assert set(PINNED_FILTERS) <= set(FILTERS)
