"""Dialects: what an upstream is sent, and what is never sent to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as TextParams,
)
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from calm_serve.config import Dialect, Remote
from calm_serve.upstreams.dialects import UpstreamRequest, build_request
from calm_serve.upstreams.failures import FailureKind, UpstreamError
from calm_serve.upstreams.fields import _KNOWN, MEANINGFUL
from calm_serve.upstreams.kinds import Api

CHAT, COMPLETIONS, RESPONSES, MESSAGES = Api
USER = {"role": "user", "content": "hi"}
BODY = {"model": "auto", "messages": [USER]}
OPENAI_DIALECTS = [Dialect.OPENAI, Dialect.OPENAI_REASONING, Dialect.AZURE]


def remote(dialect: Dialect = Dialect.OPENAI, **fields: Any) -> Remote:
    base = "https://x.openai.azure.com/openai" if dialect is Dialect.AZURE else "https://up/v1"
    if dialect is Dialect.AZURE:
        fields.setdefault("api_version", "2024-10-21")
    return Remote(**{"base_url": base, "dialect": dialect, "api_key_env": "CLOUD_KEY", **fields})


def built(
    body: dict[str, Any], to: Dialect | Remote = Dialect.OPENAI, api: Api = CHAT, **options: Any
) -> UpstreamRequest:
    upstream = to if isinstance(to, Remote) else remote(to)
    options = {"slm_id": "cloud", "key": "sk-1", **options}
    return build_request(upstream, "small-one", api, body, **options)


def sent(body: dict[str, Any], to: Dialect = Dialect.OPENAI, api: Api = CHAT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(built({**BODY, **body}, to, api).body)
    return found


def refused(body: dict[str, Any], to: Dialect = Dialect.OPENAI, api: Api = CHAT) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        built(body, to, api)
    return caught.value


@pytest.mark.parametrize(
    ("upstream", "api", "url"),
    [
        (remote(), CHAT, "https://up/v1/chat/completions"),
        (remote(base_url="https://up/v1/"), COMPLETIONS, "https://up/v1/completions"),
        (remote(), RESPONSES, "https://up/v1/responses"),
        (remote(Dialect.VLLM), MESSAGES, "https://up/v1/messages"),
        (remote(Dialect.ANTHROPIC), CHAT, "https://up/v1/messages"),
        (
            remote(Dialect.AZURE),
            CHAT,
            "https://x.openai.azure.com/openai/deployments/small-one/chat/completions"
            "?api-version=2024-10-21",
        ),
        (
            remote(Dialect.AZURE),
            RESPONSES,
            "https://x.openai.azure.com/openai/responses?api-version=2024-10-21",
        ),
        (
            remote(Dialect.AZURE, base_url="https://x/openai/v1", api_version=""),
            CHAT,
            "https://x/openai/v1/chat/completions",
        ),
        (
            remote(Dialect.AZURE, base_url="https://x/openai/deployments/d"),
            CHAT,
            "https://x/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
    ],
)
def test_the_address_of_each_dialect(upstream: Remote, api: Api, url: str) -> None:
    assert built(BODY, upstream, api).url == url


@pytest.mark.parametrize(
    ("dialect", "header", "value"),
    [
        (Dialect.OPENAI, "authorization", "Bearer sk-1"),
        (Dialect.VLLM, "authorization", "Bearer sk-1"),
        (Dialect.AZURE, "api-key", "sk-1"),
        (Dialect.ANTHROPIC, "x-api-key", "sk-1"),
    ],
)
def test_the_key_goes_where_the_dialect_has_it(dialect: Dialect, header: str, value: str) -> None:
    request = built(BODY, dialect, key=" sk-1\r\n")
    assert request.headers[header] == value
    assert not {"authorization", "api-key", "x-api-key"} - {header} & set(request.headers)
    assert "sk-1" not in repr(request)
    assert header not in built(BODY, dialect, key="").headers


@pytest.mark.parametrize("key", ["sk 1", "sk-1\nx-other: 1", "schlüssel"])
def test_a_key_that_is_no_header_value_is_the_operators_mistake(key: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        built(BODY, key=key)
    assert caught.value.failure.kind is FailureKind.MISCONFIGURED
    assert "CLOUD_KEY" in str(caught.value)
    assert key not in str(caught.value)


def test_anthropics_version_can_be_chosen() -> None:
    assert built(BODY, Dialect.ANTHROPIC).headers["anthropic-version"] == "2023-06-01"
    chosen = remote(Dialect.ANTHROPIC, api_version="2030-01-01")
    assert built(BODY, chosen).headers["anthropic-version"] == "2030-01-01"


def test_only_the_listed_headers_of_the_client_travel() -> None:
    given = {
        "authorization": "Bearer the-clients-own",
        "cookie": "a=b",
        "x-forwarded-for": "10.0.0.1",
        "x-calm-task": "t",
        "anthropic-beta": "b",
        "traceparent": "00-1-2-01",
        "x-request-id": "r\r\nx-evil: 1",
        "tracestate": "s" * 600,
    }
    headers = built(BODY, client_headers=given).headers
    assert set(headers) == {"content-type", "accept", "authorization", "traceparent"}
    assert headers["authorization"] == "Bearer sk-1"
    native = built({**BODY, "max_tokens": 5}, Dialect.ANTHROPIC, MESSAGES, client_headers=given)
    assert native.headers["anthropic-beta"] == "b"
    assert "anthropic-beta" not in built(BODY, Dialect.ANTHROPIC, client_headers=given).headers


def test_the_model_is_the_upstreams() -> None:
    assert sent({})["model"] == "small-one"


def test_vllm_gets_every_field() -> None:
    extras = dict.fromkeys(MEANINGFUL, 3) | {"top_k": 5, "unheard_of": 1}
    assert sent(extras, Dialect.VLLM) == {**BODY, **extras, "model": "small-one"}


@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_fields_that_only_flavour_an_answer_are_dropped(dialect: Dialect) -> None:
    extras = {"top_k": 5, "min_p": 0.1, "chat_template_kwargs": {"x": 1}, "unheard_of": 1}
    request = built({**BODY, **extras, "seed": 7}, dialect)
    assert json.loads(request.body) == {**BODY, "model": "small-one", "seed": 7}
    assert sorted(request.dropped) == sorted(extras)


@pytest.mark.parametrize("dialect", [*OPENAI_DIALECTS, Dialect.ANTHROPIC])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"regex": "a"}),
        ("min_tokens", 5),
        ("ignore_eos", True),
        ("prompt_logprobs", 0),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("stop_token_ids", [2]),
        ("best_of", 3),
    ],
)
def test_fields_that_change_an_answer_are_refused_by_name(
    dialect: Dialect, name: str, value: Any
) -> None:
    error = refused({**BODY, name: value}, dialect)
    assert (error.failure.kind, error.param) == (FailureKind.UNSUPPORTED, name)
    assert name in str(error)


@pytest.mark.parametrize("dialect", [*OPENAI_DIALECTS, Dialect.ANTHROPIC])
@pytest.mark.parametrize("name", sorted(MEANINGFUL - {"echo"}))
def test_their_defaults_are_not(dialect: Dialect, name: str) -> None:
    assert built({**BODY, name: None}, dialect).body
    harmless = {"add_generation_prompt": True, "best_of": 1, "prompt_logprobs": None}
    assert built({**BODY, name: harmless.get(name, False)}, dialect).body


def test_completions_have_echo_and_best_of() -> None:
    body = {"prompt": "p", "echo": True, "best_of": 2, "max_tokens": 0}
    assert json.loads(built(body, api=COMPLETIONS).body) == {**body, "model": "small-one"}


def test_reasoning_models_get_their_own_limit_and_no_sampling() -> None:
    request = built(
        {**BODY, "max_tokens": 9, "temperature": 0.1, "top_p": 1, "logprobs": False},
        Dialect.OPENAI_REASONING,
    )
    assert json.loads(request.body) == {**BODY, "model": "small-one", "max_completion_tokens": 9}
    assert set(request.dropped) == {"temperature", "top_p"}
    both = sent({"max_tokens": 9, "max_completion_tokens": 7}, Dialect.OPENAI_REASONING)
    assert both["max_completion_tokens"] == 7
    for name, value in {"logprobs": True, "logit_bias": {"1": 5}, "stop": ["x"]}.items():
        assert refused({**BODY, name: value}, Dialect.OPENAI_REASONING).param == name


@pytest.mark.parametrize(
    ("dialect", "api"),
    [
        (Dialect.OPENAI, MESSAGES),
        (Dialect.AZURE, MESSAGES),
        (Dialect.OPENAI_REASONING, COMPLETIONS),
        (Dialect.ANTHROPIC, COMPLETIONS),
        (Dialect.ANTHROPIC, RESPONSES),
    ],
)
def test_an_interface_that_the_upstream_lacks_is_for_another_slm(
    dialect: Dialect, api: Api
) -> None:
    assert refused(BODY, dialect, api).failure.kind is FailureKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("options", "hides"),
    [
        (None, True),
        ({}, True),
        ({"include_usage": False}, True),
        ({"include_usage": True}, False),
        ({"continuous_usage_stats": True, "include_usage": True}, False),
    ],
)
@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.VLLM])
def test_usage_is_always_asked_for_and_hidden_from_clients_that_did_not(
    options: Any, hides: bool, dialect: Dialect
) -> None:
    request = built({**BODY, "stream": True, "stream_options": options}, dialect)
    asked = json.loads(request.body)["stream_options"]
    assert asked == {**(options or {}), "include_usage": True}
    assert request.hides_usage is hides
    assert request.headers["accept"] == "text/event-stream"


@pytest.mark.parametrize("api", [RESPONSES, CHAT])
def test_usage_is_not_asked_for_where_it_comes_anyway(api: Api) -> None:
    request = built({**BODY, "input": "x", "stream": api is RESPONSES}, api=api)
    assert b"include_usage" not in request.body
    assert not request.hides_usage


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"logit_bias": {"5": float("inf")}}, "logit_bias.5"),
        (
            {"messages": [{"role": "user", "content": [{"x": float("-inf")}]}]},
            "messages[0].content[0].x",
        ),
    ],
)
@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.VLLM])
def test_numbers_that_are_not_finite_are_the_clients_mistake(
    body: Any, path: str, dialect: Dialect
) -> None:
    error = refused({**BODY, **body}, dialect)
    assert (error.failure.kind, error.param) == (FailureKind.INVALID_REQUEST, path)


def test_half_a_surrogate_pair_can_be_sent() -> None:
    assert sent({"messages": [{**USER, "content": "a \ud83d b"}]})["messages"][0]["content"] == (
        "a \ud83d b"
    )


@pytest.mark.parametrize(
    ("api", "params"),
    [
        (CHAT, CompletionCreateParamsNonStreaming),
        (COMPLETIONS, TextParams),
        (RESPONSES, ResponseCreateParamsNonStreaming),
    ],
)
def test_every_field_that_is_sent_is_one_of_openais(api: Api, params: Any) -> None:
    bases = (getattr(base, "__annotations__", {}) for base in params.__orig_bases__)
    fields = {"stream", *params.__annotations__}.union(*bases)
    assert fields >= _KNOWN[api]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "function", "image_url", "tool_calls", "url"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted({*_KNOWN[CHAT], *MEANINGFUL, "top_k"} - {"model"}))


@given(st.dictionaries(NAMES, VALUES, max_size=6), st.sampled_from(Dialect), st.sampled_from(Api))
def test_every_body_gives_a_request_or_a_failure(
    body: dict[str, Any], dialect: Dialect, api: Api
) -> None:
    try:
        request = built(body, dialect, api)
    except UpstreamError as error:
        assert error.failure.kind in (FailureKind.UNSUPPORTED, FailureKind.INVALID_REQUEST)
    else:
        assert json.loads(request.body)["model"] == "small-one"
