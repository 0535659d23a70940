"""The router deployment without Ray: every end of a call leaves exactly one outcome."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response

from calm_serve.errors import CapacityError
from calm_serve.learning.decision_log import read_decision, redecide, rescore
from calm_serve.testing import make_decision, make_facts, make_replica, make_state
from calm_serve.upstreams import Failure, FailureKind, UpstreamError
from deployments.router import (
    deployment,
    dispatch,
    fleet_view,
    outcome,
)
from deployments.router.live_state import LiveView
from deployments.wire import ReplyEnd, deployment_name
from tests.router_harness import Knowledge, Metrics, Service

CHAT = {"messages": [{"role": "user", "content": "good morning"}]}
END = ReplyEnd(b"data: [DONE]\n\n", make_facts("r1"))
FULL = CapacityError("full", retry_after_s=1.0)
DIED = UpstreamError(Failure(FailureKind.TRANSPORT, "connection reset"))
REFUSED = UpstreamError(
    Failure(FailureKind.INVALID_REQUEST, "no such parameter", upstream_status=422)
)


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> LiveView:
    view = LiveView(lambda: 0.0)
    for module in (dispatch, fleet_view):
        monkeypatch.setattr(module, "VIEW", view)
    for slm_id in ("small", "large"):
        view.update_replicas(deployment_name(slm_id), [make_replica("r1")])
    replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id="router-1"))
    monkeypatch.setattr(deployment.serve, "get_replica_context", lambda: replica)
    monkeypatch.setattr(deployment, "KnowledgeClient", Knowledge)
    monkeypatch.setattr(deployment, "RouterMetrics", Metrics)
    # The refresh task then only gives way to the test.
    monkeypatch.setattr(deployment, "REFRESH_S", 0.0)
    return view


async def body_of(response: Any) -> bytes:
    if not hasattr(response, "body_iterator"):
        return bytes(response.body)
    return b"".join([part async for part in response.body_iterator])


@pytest.mark.parametrize(
    ("items", "options", "status", "logged"),
    [
        ((b'{"a":', ReplyEnd(b"1}", make_facts("r1"))), {}, 200, "ok"),
        ((REFUSED,), {}, 422, "rejected"),
        ((DIED,), {}, 503, "error"),
        ((FULL,), {}, 429, "rejected"),
        ((b"x", DIED), {}, 503, "error"),
        (("hang",), {"request_timeout_s": 0.01}, 504, "error"),
    ],
    ids=["answered", "refused", "dead", "full", "died while answering", "too slow"],
)
async def test_every_end_of_a_reply_in_one_piece_leaves_one_outcome(
    view: LiveView,
    tmp_path: Path,
    items: Any,
    options: dict[str, Any],
    status: int,
    logged: str,
) -> None:
    async with Service(tmp_path, *items, **options) as service:
        response = await service.post(CHAT)
        (outcome,) = await service.outcomes()
    assert response.status_code == status
    assert outcome.status == logged
    assert outcome.outcome_id == response.headers["x-calm-decision-id"]


@pytest.mark.parametrize(
    ("items", "options"),
    [((b"x", DIED), {}), (("hang",), {"request_timeout_s": 0.01})],
    ids=["died while answering", "too slow"],
)
async def test_the_outcome_has_the_status_that_the_client_saw(
    view: LiveView, tmp_path: Path, items: Any, options: dict[str, Any]
) -> None:
    async with Service(tmp_path, *items, **options) as service:
        response = await service.post(CHAT)
        (outcome,) = await service.outcomes()
    assert outcome.http_status == response.status_code


@pytest.mark.parametrize(
    ("items", "options", "end", "logged"),
    [
        ((b"data: 1\n\n", END), {}, b"[DONE]\n\n", ("ok", 200)),
        ((b"data: 1\n\n", DIED), {}, b"}\n\n", ("error", 503)),
        ((b"data: 1\n\n", "hang"), {"request_timeout_s": 0.02}, b"}\n\n", ("error", 504)),
    ],
    ids=["answered", "died while answering", "too slow"],
)
async def test_every_end_of_a_stream_leaves_one_outcome(
    view: LiveView,
    tmp_path: Path,
    items: Any,
    options: dict[str, Any],
    end: bytes,
    logged: tuple[str, int],
) -> None:
    async with Service(tmp_path, *items, **options) as service:
        response = await service.post({**CHAT, "stream": True})
        content = await body_of(response)
        (outcome,) = await service.outcomes()
    assert response.status_code == 200
    assert content.startswith(b"data: 1\n\n")
    assert content.endswith(end)
    assert (outcome.status, outcome.http_status) == logged


async def test_a_client_that_leaves_a_stream_stops_the_slm_and_leaves_one_outcome(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, b"data: 1\n\n", "hang") as service:
        response: Any = await service.post({**CHAT, "stream": True})
        stream = response.body_iterator
        assert await anext(stream) == b"data: 1\n\n"
        await stream.aclose()
        (outcome,) = await service.outcomes()
    assert (outcome.status, outcome.http_status) == ("cancelled", 499)
    assert service.slms.cancelled == 1


async def test_a_client_that_leaves_before_the_first_byte_leaves_one_outcome(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, "hang") as service:
        waiting = asyncio.create_task(service.post(CHAT))
        for _ in range(10):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (outcome,) = await service.outcomes()
    assert (outcome.status, outcome.http_status) == ("cancelled", 499)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "bad_request"),
        ({"messages": []}, "bad_request"),
        ({**CHAT, "model": "nobody"}, "unknown_model"),
    ],
)
async def test_a_request_that_is_wrong_is_counted_and_leaves_no_outcome(
    view: LiveView, tmp_path: Path, body: Any, kind: str
) -> None:
    async with Service(tmp_path, END) as service:
        response = await service.post(body)
        assert await service.outcomes() == []
        assert service.router._metrics.turned_away == [kind]
    assert response.status_code in (400, 404)
    assert response.headers["x-calm-reason"] == "refused"


async def test_a_tokenizer_that_does_not_answer_is_counted_and_leaves_no_outcome(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, FULL) as service:
        response = await service.post({"prompt": "good morning"}, "/tokenize")
        assert await service.outcomes() == []
        assert service.router._metrics.turned_away == ["full"]
    assert response.status_code == 429


async def test_a_request_that_no_slm_can_take_leaves_an_outcome_and_a_log_line(
    view: LiveView, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    body = {"messages": [{"role": "user", "content": [image]}]}
    with caplog.at_level("WARNING"):
        async with Service(tmp_path, END) as service:
            response = await service.post(body, **{"x-calm-task": "pictures"})
            (outcome,) = await service.outcomes()
    assert (outcome.slm_id, outcome.status, outcome.failure) == ("", "rejected", "no_capable_slm")
    assert (outcome.http_status, outcome.task) == (response.status_code, "pictures")
    assert outcome.outcome_id == response.headers["x-calm-decision-id"]
    assert outcome.outcome_id in caplog.text


async def test_when_no_slm_is_available_the_outcome_says_so(view: LiveView, tmp_path: Path) -> None:
    for slm_id in ("small", "large"):
        view.update_replicas(deployment_name(slm_id), [])
    async with Service(tmp_path, END) as service:
        response = await service.post(CHAT)
        (outcome,) = await service.outcomes()
    assert (response.status_code, outcome.http_status) == (503, 503)
    assert (outcome.slm_id, outcome.failure) == ("", "no_slm")


async def test_a_full_router_refuses_requests_for_slms_and_answers_the_others(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, "hang", max_ongoing_requests=2) as service:
        working = [asyncio.create_task(service.post(CHAT)) for _ in range(2)]
        for _ in range(10):
            await asyncio.sleep(0)
        refused = await service.post(CHAT)
        others = [await service.request("GET", path) for path in ("/health", "/v1/fleet")]
        others.append(await service.post(CHAT, "/v1/route"))
        assert service.router._metrics.turned_away == ["router_full"]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        assert service.router._admission.in_work == 0
    assert refused.status_code == 429
    assert json.loads(bytes(refused.body))["error"]["code"] == "router_saturated"
    assert int(refused.headers["retry-after"]) >= 1
    assert [response.status_code for response in others] == [200, 200, 200]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("items", [(b"{}", END), (b"x", DIED), (DIED,), (FULL,), (REFUSED,)])
async def test_every_request_gives_its_place_back(
    view: LiveView, tmp_path: Path, items: Any, stream: bool
) -> None:
    async with Service(tmp_path, *items) as service:
        await body_of(await service.post({**CHAT, "stream": stream}))
        await service.post(b"{")
        assert service.router._admission.in_work == 0


async def test_a_stream_that_is_dropped_unread_gives_its_place_back(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, b"data: 1\n\n", END) as service:
        response = await service.post({**CHAT, "stream": True})
        assert service.router._admission.in_work == 1
        del response
        assert service.router._admission.in_work == 0


async def test_an_answer_that_was_still_coming_when_its_time_was_over_is_not_the_slms_failure(
    view: LiveView, tmp_path: Path
) -> None:
    async def tokens() -> AsyncIterator[bytes]:
        while True:
            yield b"data: 1\n\n"
            await asyncio.sleep(0)

    async with Service(tmp_path, request_timeout_s=0.05) as service:
        service.slms.play = tokens
        content = await body_of(await service.post({**CHAT, "stream": True}))
        (outcome,) = await service.outcomes()
    assert b"request_timeout" in content
    assert (outcome.status, outcome.http_status, outcome.failure) == (
        "rejected",
        504,
        "out_of_time",
    )


async def test_headers_name_the_slm_the_reason_and_the_decision(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, END) as service:
        response = await service.post({**CHAT, "model": "large"})
        decision_id = response.headers["x-calm-decision-id"]
        record = await service.request("GET", f"/v1/decisions/{decision_id}")
    assert response.headers["x-calm-model"] == "large"
    assert response.headers["x-calm-reason"] == "pinned:requested"
    assert json.loads(bytes(record.body))["slm_id"] == "large"


async def test_prompts_are_stored_only_when_configured(view: LiveView, tmp_path: Path) -> None:
    async with Service(tmp_path, END) as service:
        await service.post(CHAT)
        (outcome,) = await service.outcomes()
    assert outcome.prompt_text is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/", 200),
        ("GET", "/v1/models/small", 200),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/decisions/unknown", 404),
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/ping", 200),
        ("GET", "/load", 200),
        ("GET", "/version", 200),
        ("GET", "/docs", 200),
        ("OPTIONS", "/v1/chat/completions", 204),
        ("OPTIONS", "/nowhere", 404),
    ],
)
async def test_paths_lead_to_their_endpoints(
    view: LiveView, tmp_path: Path, method: str, path: str, status: int
) -> None:
    async with Service(tmp_path, END) as service:
        assert (await service.request(method, path)).status_code == status


async def test_every_endpoint_is_documented(view: LiveView, tmp_path: Path) -> None:
    async with Service(tmp_path, END) as service:
        found = json.loads(bytes((await service.request("GET", "/openapi.json")).body))
    assert {"/v1/chat/completions", "/v1/goals", "/docs"} <= set(found["paths"])
    summaries = [one["summary"] for path in found["paths"].values() for one in path.values()]
    assert all(summaries)


async def test_a_web_page_may_call_when_its_origin_is_configured(
    view: LiveView, tmp_path: Path
) -> None:
    page = {"origin": "https://page.example", "access-control-request-headers": "x-calm-task"}
    async with Service(tmp_path, END, cors_origins=["https://page.example"]) as service:
        asked = await service.request("OPTIONS", "/v1/chat/completions", headers=page)
        answered = await service.post({**CHAT, "stream": True}, **page)
        other = await service.post(CHAT, origin="https://other.example")
    assert asked.headers["access-control-allow-headers"] == "x-calm-task"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert answered.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other.headers


async def test_a_dry_run_decides_and_calls_no_slm(view: LiveView, tmp_path: Path) -> None:
    async with Service(tmp_path, DIED) as service:
        response = await service.post({"prompt": "good morning"}, "/v1/route")
        assert await service.outcomes() == []
    assert json.loads(bytes(response.body))["slm_id"] in ("small", "large")


def test_a_call_is_recorded_once_in_any_order_of_events() -> None:
    rows: list[dispatch.Call] = []
    call = dispatch.Call(make_decision("small"), make_state("small"), ())
    finish = outcome.Finish(call, lambda: rows.append(call))
    finish()
    finish()
    assert rows == [call]


def test_a_call_that_cannot_be_written_down_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise KeyError("window")

    call = dispatch.Call(make_decision("small"), make_state("small"), ())
    answer = Response("here", 200)
    with caplog.at_level("ERROR"):
        assert outcome.Finish(call, broken)(answer) is answer
    assert call.decision.decision_id in caplog.text


async def test_a_scored_choice_can_be_made_again_from_its_outcome(
    view: LiveView, tmp_path: Path
) -> None:
    async with Service(tmp_path, ReplyEnd(b"{}", make_facts("r1"))) as service:
        await service.post(CHAT)
        await service.post({**CHAT, "model": "large"})
        scored, pinned = await service.outcomes()
    logged = read_decision(scored)
    assert logged is not None
    assert redecide(logged, rescore(logged)) == scored.slm_id
    assert pinned.decision.terms is None
