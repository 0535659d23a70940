"""The routes: an allow-list, each with its task, its parser and its form of errors."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from calm_serve.errors import CapacityError, RequestError, SLMUnavailableError
from calm_serve.requests.routes import ROUTES, ErrorFormat, find_route
from calm_serve.types import Task

USER = {"role": "user", "content": "hello"}
# The least body of each route.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [USER], "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/embeddings": {"input": "hello"},
    "/v1/rerank": {"query": "hello", "documents": ["a", "b"]},
    "/v2/rerank": {"query": "hello", "documents": ["a", "b"]},
    "/rerank": {"query": "hello", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "hello", "text_2": ["a", "b"]},
    "/score": {"text_1": "hello", "text_2": ["a", "b"]},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2]},
}
# What vLLM serves beside, and must not be reached: control of an engine first.
CONTROL = """
    /v1/load_lora_adapter /v1/unload_lora_adapter /sleep /wake_up /is_sleeping /reset_prefix_cache
    /reset_mm_cache /start_profile /stop_profile /collective_rpc /server_info /pause /resume
    /update_weights /abort_requests /scale_elastic_ep /fault_tolerance/apply /inference/v1/generate
    /invocations /pooling /classify /v1/responses/resp_1 /v1/responses/resp_1/cancel
    /v1/chat/completions/render /v1/chat/completions/batch /metrics /version /load"""


def test_every_route_has_a_body_here() -> None:
    assert set(BODIES) == set(ROUTES)


@pytest.mark.parametrize("path", ROUTES)
def test_the_least_body_of_a_route_is_read(path: str) -> None:
    route = ROUTES[path]
    parsed = route.parse(BODIES[path])
    assert parsed.task is route.task
    assert parsed.model == "auto"
    assert not parsed.stream
    assert parsed.route in ROUTES
    assert ROUTES[parsed.route].parse is route.parse
    assert parsed.text or parsed.is_token_ids


@pytest.mark.parametrize("path", ROUTES)
def test_a_route_streams_only_where_it_may(path: str) -> None:
    route = ROUTES[path]
    assert route.parse({**BODIES[path], "stream": True}).stream == route.may_stream


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", [None, [], "x", 5, {}, {"model": 7}])
def test_a_wrong_body_is_refused_on_every_route(path: str, body: Any) -> None:
    with pytest.raises(RequestError):
        ROUTES[path].parse(body)


@pytest.mark.parametrize("path", CONTROL.split())
def test_control_of_an_engine_is_not_reachable(path: str) -> None:
    assert find_route(path) is None


@pytest.mark.parametrize(
    "path",
    ["", "/", "/v1", "/v1//embeddings", "/V1/embeddings", "/v1/embeddings//", "v1/embeddings",
     "/v1/embeddings/../../sleep", "/v1/embeddings%2f..%2fsleep", "/tokenize?x=1"],
)  # fmt: skip
def test_only_the_exact_path_is_a_route(path: str) -> None:
    assert find_route(path) is None


def test_a_slash_at_the_end_is_passed_over() -> None:
    assert find_route("/v1/embeddings/") is ROUTES["/v1/embeddings"]


def test_tasks_are_those_of_the_engine() -> None:
    assert {p: r.task for p, r in ROUTES.items() if r.task is not Task.GENERATE} == {
        "/v1/embeddings": Task.EMBED,
        **dict.fromkeys(
            ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"), Task.RERANK
        ),
        "/tokenize": Task.ANY,
        "/detokenize": Task.ANY,
    }


def test_messages_have_anthropics_errors_and_all_else_openais() -> None:
    error = RequestError("'max_tokens' is missing", param="max_tokens")
    for path, route in ROUTES.items():
        body = route.error_body(error)
        if path.startswith("/v1/messages"):
            assert route.error_format is ErrorFormat.ANTHROPIC
            assert body == {
                "type": "error",
                "error": {"type": "invalid_request_error", "message": "'max_tokens' is missing"},
            }
        else:
            assert body["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CapacityError("full"), "rate_limit_error"),
        (SLMUnavailableError("gone"), "overloaded_error"),
    ],
)
def test_an_anthropic_error_is_typed_by_its_status(error: Any, kind: str) -> None:
    assert error.to_anthropic()["error"]["type"] == kind


def test_vllm_serves_every_route() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None  # `make install` installs it
    sources = (Path(spec.origin).parent / "entrypoints").rglob("api_router.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    served = set(re.findall(r'@router\.post\(\s*"([^"]+)"', text))
    assert set(ROUTES) <= served
    assert {p for p in CONTROL.split() if p.startswith("/v1/") and "resp_" not in p} <= served
