"""Error documents: the kind of each failure, by the words of the servers that are out there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.upstreams.error_documents import (
    MAX_MESSAGE_CHARS,
    Origin,
    classify_error,
    classify_response,
    context_length_message,
    read_error,
    retry_after_s,
    sanitised,
)
from calm_serve.upstreams.failures import MAX_COOL_DOWN_S, MIN_COOL_DOWN_S, Failure, FailureKind

REMOTE = Origin("cloud", local=False, context_tokens=4096)
LOCAL = Origin("small", local=True, context_tokens=2048)
HTML = (
    b"<html><head><title>502 Bad Gateway</title></head><body>nginx on web-3.internal</body></html>"
)
NOW_S = 1_800_000_000.0


def openai(message: str = "m", type_: str = "invalid_request_error", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": None, "code": None, **more}}


def vllm(message: str, code: int = 400, type_: str = "BadRequestError") -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": None, "code": code}}


def anthropic(type_: str, message: str = "m") -> dict[str, Any]:
    return {"type": "error", "error": {"type": type_, "message": message}, "request_id": "req_1"}


def classified(
    status: int, document: Any = b"", origin: Origin = REMOTE, **headers: str
) -> Failure:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return classify_response(status, names, body, origin, NOW_S)


@pytest.mark.parametrize(
    ("kind", "status", "document"),
    [
        # keys, accounts, addresses, names
        ("misconfigured", 401, openai("Incorrect API key provided: sk-ab***yz.")),
        ("misconfigured", 401, anthropic("authentication_error", "invalid x-api-key")),
        ("misconfigured", 401, {"statusCode": 401, "message": "Access denied"}),
        ("misconfigured", 402, openai("Insufficient credits", code=402)),
        ("misconfigured", 403, anthropic("permission_error")),
        ("misconfigured", 403, b"<html>forbidden</html>"),
        ("misconfigured", 404, openai("The model `x` does not exist", code="model_not_found")),
        ("misconfigured", 404, {"error": {"code": "DeploymentNotFound", "message": "m"}}),
        ("misconfigured", 404, {"detail": "Not Found"}),
        ("misconfigured", 404, HTML),
        ("misconfigured", 405, {"detail": "Method Not Allowed"}),
        ("misconfigured", 307, b"<html>moved</html>"),
        ("misconfigured", 301, b""),
        ("misconfigured", 429, openai("You exceeded your current quota", "insufficient_quota")),
        (
            "misconfigured",
            400,
            anthropic("invalid_request_error", "Your credit balance is too low"),
        ),
        # limits
        ("rate_limited", 429, openai("Rate limit reached for gpt in organization org-1")),
        ("rate_limited", 429, anthropic("rate_limit_error")),
        ("rate_limited", 429, {"statusCode": 429, "message": "Rate limit is exceeded."}),
        ("rate_limited", 429, b"slow down"),
        ("unsupported", 429, openai("Request too large for gpt-4o on tokens per min (TPM)")),
        ("full", 529, anthropic("overloaded_error", "Overloaded")),
        ("full", 503, openai("The engine is currently overloaded", "server_error")),
        ("full", 503, vllm("The engine is currently busy and cannot accept new requests.", 503)),
        ("full", 503, vllm("has reached its prefill token backlog limit.", 503)),
        # the upstream itself
        ("server_error", 500, openai("The server had an error", "server_error")),
        ("server_error", 502, HTML),
        ("server_error", 503, b"<html>no healthy upstream</html>"),
        ("server_error", 520, b""),
        ("timed_out", 504, HTML),
        ("timed_out", 408, b""),
        ("timed_out", 524, b"error code: 524"),
        ("engine_died", 500, vllm("EngineCore encountered an issue. See stack trace", 500)),
        # the request
        ("invalid_request", 400, openai("bad", code="invalid_type", param="messages")),
        ("invalid_request", 400, openai("bad", code="missing_required_parameter")),
        ("invalid_request", 400, openai("Invalid 'n'", code="integer_above_max_value", param="n")),
        ("invalid_request", 400, openai("flagged", code="content_policy_violation")),
        (
            "invalid_request",
            400,
            {"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicy"}}},
        ),
        (
            "invalid_request",
            403,
            openai("Input was flagged", metadata={"reasons": ["violence"], "flagged_input": "x"}),
        ),
        ("invalid_request", 404, openai("Previous response with id 'resp_1' not found.")),
        ("unsupported", 400, openai("Unrecognized request argument supplied: top_k")),
        (
            "unsupported",
            400,
            openai("Unsupported parameter: 'max_tokens'", code="unsupported_parameter"),
        ),
        ("unsupported", 400, openai("Unsupported value", code="unsupported_value")),
        (
            "unsupported",
            400,
            anthropic("invalid_request_error", "top_x: Extra inputs are not permitted"),
        ),
        ("unsupported", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "min_p"]}]}),
        ("unsupported", 404, openai("No endpoints found that support tool use", code=404)),
        ("unsupported", 400, openai("max_tokens is too large: 100000. This model supports 16384")),
        ("unsupported", 400, openai("something unheard of")),
        ("unsupported", 413, HTML),
        ("unsupported", 413, anthropic("request_too_large")),
        ("unsupported", 415, b""),
        ("unsupported", 501, vllm("The model does not support Chat Completions API", 501)),
    ],
)
def test_kinds_of_remote_failures(kind: str, status: int, document: Any) -> None:
    assert classified(status, document).kind == kind


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("invalid_request", 400, "temperature must be non-negative, got -1.0."),
        ("invalid_request", 400, "something unheard of"),
        ("invalid_request", 422, "m"),
        (
            "unsupported",
            400,
            '"auto" tool choice requires --enable-auto-tool-choice and '
            "--tool-call-parser to be set",
        ),
        ("unsupported", 400, "small is not a multimodal model"),
        ("unsupported", 400, "At most 1 image(s) may be provided in one prompt."),
        ("unsupported", 400, "default chat template is no longer allowed, so you must provide one"),
        ("unsupported", 400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("unsupported", 501, "The model does not support Responses API"),
        ("full", 429, "queue full"),
        ("misconfigured", 404, "The model `other` does not exist."),
    ],
)
def test_kinds_of_what_an_engine_refuses(kind: str, status: int, message: str) -> None:
    assert classified(status, vllm(message, status), LOCAL).kind == kind


def test_an_overload_differs_from_a_dead_proxy_by_the_wait_that_is_named() -> None:
    assert classified(503, b"", retry_after="5").kind is FailureKind.FULL
    assert classified(503, b"").kind is FailureKind.SERVER_ERROR


TOO_LONG = [
    (vllm("This model's maximum context length is 2048 tokens. However, your prompt contains at "
          "least 2049 input tokens, which exceeds this limit even without any output tokens. "
          "Please reduce the length of the input prompt."), 2048, 2049),
    (vllm("This model's maximum context length is 2048 tokens. However, your prompt contains 9000 "
          "characters (more than 8192 characters, which is the upper bound for 2048 input "
          "tokens). Please reduce the length of the input prompt."), 2048, 0),
    (vllm("max_completion_tokens=5000 cannot be greater than max_model_len=max_total_tokens=2048. "
          "Please request fewer output tokens."), 2048, 5000),
    (vllm("max_tokens=5000 cannot be greater than max_model_len=2048."), 2048, 5000),
    (vllm("Input length (3000) exceeds model's maximum context length (2048)."), 2048, 3000),
    (vllm("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
          "(4000 in the messages, 1000 in the completion)."), 4096, 5000),
    (vllm("'max_tokens' or 'max_completion_tokens' is too large: 4000. This model's maximum "
          "context length is 4096 tokens and your request has 100 input tokens (4000 > 3996)."),
     4096, 4100),
    (openai("This model's maximum context length is 8,192 tokens. However, your messages resulted "
            "in 10,000 tokens.", code="context_length_exceeded"), 8192, 10000),
    (openai("Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in "
            "300000 tokens.", code="context_length_exceeded"), 272000, 300000),
    (openai("Your input exceeds the context window of this model."), 4096, 0),
    (openai("Please reduce the length.", code="context_length_exceeded"), 4096, 0),
    (anthropic("invalid_request_error", "prompt is too long: 208000 tokens > 200000 maximum"),
     200000, 208000),
    (anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: "
               "190000 + 20000 > 200000, decrease input length or `max_tokens`"), 200000, 210000),
    ([{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "The input token count "
       "(1200000) exceeds the maximum number of tokens allowed (1048576)."}}], 1048576, 1200000),
    ({"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too large "
      "for model with 32768 maximum context length"}, 32768, 40000),
    (openai("The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
     4096, 5000),
    ({"error": {"code": 400, "message": "the request exceeds the available context size",
                "type": "exceed_context_size_error"}}, 4096, 0),
]  # fmt: skip


@pytest.mark.parametrize(("document", "limit", "asked"), TOO_LONG)
def test_a_prompt_that_is_too_long_gives_the_sentence_that_agents_know(
    document: Any, limit: int, asked: int
) -> None:
    failure = classified(400, document)
    assert failure.kind is FailureKind.TOO_LONG
    assert failure.message == context_length_message(limit, asked)
    assert failure.message.startswith(f"This model's maximum context length is {limit} tokens. ")
    assert failure.to_openai()["error"]["code"] == "context_length_exceeded"
    assert f"you requested {asked} tokens" in failure.message or not asked
    # LangChain and clients of Anthropic's API know it by these words.
    assert "prompt is too long" in failure.to_anthropic()["error"]["message"]
    # It is recognised again, by a calm_serve in front of this one.
    again = classified(failure.http_status, failure.to_openai())
    assert (again.kind, again.message) == (failure.kind, failure.message)


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        (openai("Provider returned error", code=502), "server_error"),
        ({"error": {"message": "Provider returned error", "code": 429}}, "rate_limited"),
        (vllm("Internal server error", 500, "InternalServerError"), "server_error"),
        (vllm("EngineCore encountered an issue.", 500, "InternalServerError"), "engine_died"),
        (anthropic("overloaded_error"), "full"),
        (anthropic("api_error"), "server_error"),
        ({"error": "text"}, "bad_answer"),
        ({"choices": [{"error": {"message": "m", "code": 504}}]}, "timed_out"),
        (
            {"type": "response.failed", "response": {"error": {"code": "server_error"}}},
            "server_error",
        ),
        (
            {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded"}}},
            "rate_limited",
        ),
        ({"type": "error", "code": "server_error", "message": "m"}, "server_error"),
        (None, "bad_answer"),
    ],
)
def test_kinds_of_errors_inside_a_200(document: Any, kind: str) -> None:
    assert classify_error(document, REMOTE).kind == kind


@pytest.mark.parametrize(
    "document",
    [
        {"error": {"message": "why", "type": "t", "code": "c", "param": "p"}},
        {"object": "error", "message": "why", "type": "t", "code": "c", "param": "p"},
        {"error": "why", "type": "t", "code": "c", "param": "p"},
    ],
)
def test_an_error_is_read_in_every_form(document: dict[str, Any]) -> None:
    error = read_error(document)
    assert (error.message, error.type, error.code, error.param) == ("why", "t", "c", "p")


@pytest.mark.parametrize(
    ("headers", "message", "wait_s"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"retry-after": " 7.5 "}, "", 7.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
        ({"retry-after": "Fri, 15 Jan 2027 08:00:20 GMT"}, "", 20.0),
        ({"retry-after": "Fri, 15 Jan 2027 07:00:00 GMT"}, "", MIN_COOL_DOWN_S),
        ({"retry-after": "0"}, "", MIN_COOL_DOWN_S),
        ({"retry-after": "-5"}, "", MIN_COOL_DOWN_S),
        ({"retry-after": "86400"}, "", MAX_COOL_DOWN_S),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "nan"}, "", None),
        ({"retry-after": "inf"}, "", None),
        ({"anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:12Z"}, "", 12.0),
        ({}, "Please try again in 7.2s.", 7.2),
        ({}, "Please try again in 360ms.", 0.36),
        ({}, "Try again in 9 seconds.", 9.0),
        ({}, "no number", None),
    ],
)
def test_the_wait_that_an_upstream_names(
    headers: dict[str, str], message: str, wait_s: float | None
) -> None:
    assert retry_after_s(headers, message, NOW_S) == (
        pytest.approx(wait_s) if wait_s is not None else None
    )


SECRETS = [
    "sk-proj-abcDEF123456",
    "sk-ab***********yz12",
    "org-Ab12Cd34Ef56",
    "Bearer abc.def",
    "https://vllm-3.prod.internal:8000/v1",
    "10.2.3.4:8000",
    "10.2.3.4",
    "[fe80:0:0:0:1:2:3:4]:80",
    "vllm-3.models.svc.cluster.local",
    "localhost:8000",
    "gpu7.example.com:9000",
    "engine:8000",
    "ops@example.com",
    "/usr/lib/python3/site-packages/x.py",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIi",
    "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdef",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_organisations_and_hosts_never_reach_a_client(secret: str) -> None:
    cleaned = sanitised(f"Limit reached for {secret}, see the docs ({secret}).")
    assert secret not in cleaned
    assert cleaned.startswith("Limit reached for ")
    assert "see the docs" in cleaned


@pytest.mark.parametrize(
    "message",
    [
        "'temperature' must be between 0 and 2, got 3.5",
        "Invalid value for messages[0].content: expected a string (code: 400)",
        "organization keyboard-interrupt user-provided projection and/or tokens: 40000",
        "'top_logprobs' must be at most 20; max_completion_tokens is 16384",
    ],
)
def test_ordinary_messages_stay_as_they_are(message: str) -> None:
    assert sanitised(message) == message


def test_the_key_that_was_sent_is_removed_whatever_it_looks_like() -> None:
    assert sanitised("key hunter2 is wrong", ["hunter2", ""]) == "key [redacted] is wrong"


@given(st.text(max_size=6000), st.sampled_from(SECRETS))
def test_a_clean_message_is_short_and_in_one_line(text: str, secret: str) -> None:
    cleaned = sanitised(f"{text} {secret} {text}")
    assert len(cleaned) <= MAX_MESSAGE_CHARS
    assert not any(c < " " for c in cleaned)
    assert secret not in cleaned or secret in text


def test_our_account_is_no_business_of_the_client() -> None:
    words = "Rate limit reached for gpt in organization org-Ab12Cd34 on tokens per min"
    failure = classified(429, openai(words), retry_after="20")
    assert failure.message == "'cloud' has reached the rate limit of its upstream"
    assert failure.headers() == {"retry-after": "20"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "code", "type", "param", "detail", "metadata", "choices"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.integers(300, 599), JSON.map(lambda j: json.dumps(j).encode()) | st.binary(max_size=60))
def test_every_body_gives_a_failure_with_a_message(status: int, body: bytes) -> None:
    for origin in (LOCAL, REMOTE):
        failure = classify_response(status, {}, body, origin, NOW_S)
        assert failure.message
        assert 400 <= failure.http_status < 600


@given(JSON)
def test_every_document_in_a_200_gives_a_failure(document: Any) -> None:
    assert classify_error(document if isinstance(document, dict) else None, REMOTE).message
