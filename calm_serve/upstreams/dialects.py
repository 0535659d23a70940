"""Dialects: an upstream's own form of a request, and what its stream needs to become ours.

A field that the upstream does not know is dropped if the answer means the same without it, and
refused by its name if not; then another SLM may take the request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from calm_serve.config import Dialect, Remote
from calm_serve.upstreams.anthropic import messages_body
from calm_serve.upstreams.failures import Failure, FailureKind, UpstreamError
from calm_serve.upstreams.fields import for_reasoning, known_fields
from calm_serve.upstreams.kinds import Api

# Of Anthropic's API; newer features come by headers of their own, not by a newer version.
ANTHROPIC_VERSION = "2023-06-01"
MAX_HEADER_CHARS = 512
# The client's headers that travel. Its authorization, cookies and addresses never do.
CLIENT_HEADERS = ("traceparent", "tracestate", "x-request-id")


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """A request as it goes out: POST to `url`."""

    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the key
    body: bytes = field(repr=False)
    api: Api  # of the upstream's answer
    translated: bool = False  # the answer is Anthropic's and the client's API is chat
    # The client did not ask for the event that has nothing but usage: it is taken off.
    hides_usage: bool = False
    dropped: tuple[str, ...] = ()  # names of fields


def build_request(
    remote: Remote,
    model: str,
    api: Api,
    body: Mapping[str, Any],
    *,
    slm_id: str,
    key: str = "",
    client_headers: Mapping[str, str] | None = None,
) -> UpstreamRequest:
    """Return the request for a remote SLM.

    Args:
        remote: the SLM's upstream.
        model: the model's name there.
        api: the interface that the client uses.
        body: the client's body.
        slm_id: for messages.
        key: the API key; blanks and line ends around it are removed.
        client_headers: by lower-case name.

    Raises:
        UpstreamError: UNSUPPORTED if the upstream lacks something, INVALID_REQUEST if no upstream
            can take the body, MISCONFIGURED if the key is no header value.
    """
    upstream_api = _upstream_api(remote.dialect, api, slm_id)
    translated = upstream_api is not api
    streams = bool(body.get("stream"))
    sent, dropped = _fields({**body, "model": model}, api, remote.dialect, slm_id)
    hides_usage = False
    if streams and not translated and api in (Api.CHAT, Api.COMPLETIONS):
        hides_usage = _ask_for_usage(sent)
    headers = _headers(remote, key, streams, slm_id)
    native = upstream_api is Api.MESSAGES and not translated
    headers.update(_client_headers(client_headers or {}, native))
    return UpstreamRequest(
        url=_url(remote, model, upstream_api),
        headers=headers,
        body=encoded(sent),
        api=upstream_api,
        translated=translated,
        hides_usage=hides_usage,
        dropped=tuple(dropped),
    )


def _fields(
    body: dict[str, Any], api: Api, dialect: Dialect, slm_id: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the body in the dialect's fields, and the names of those that were dropped."""
    if dialect is Dialect.VLLM:
        return body, []  # it ignores what it does not know
    if dialect is Dialect.ANTHROPIC and api is Api.CHAT:
        return messages_body(body, slm_id)
    sent, dropped = known_fields(body, api, slm_id)
    if dialect is Dialect.OPENAI_REASONING:
        dropped += for_reasoning(sent, slm_id)
    return sent, dropped


def encoded(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON. Raises UpstreamError for NaN and infinity, naming the field."""
    try:
        # Half a surrogate pair stays an escape: it has no bytes.
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        path = next(_not_finite(body, ""), None)
        raise UpstreamError(
            Failure(FailureKind.INVALID_REQUEST, f"{path!r} must be a finite number", param=path)
        ) from None


def _not_finite(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _not_finite(inner, f"{path}[{position}]")


_APIS: Mapping[Dialect, tuple[Api, ...]] = {
    Dialect.OPENAI: (Api.CHAT, Api.COMPLETIONS, Api.RESPONSES),
    Dialect.OPENAI_REASONING: (Api.CHAT, Api.RESPONSES),
    Dialect.AZURE: (Api.CHAT, Api.COMPLETIONS, Api.RESPONSES),
    Dialect.VLLM: tuple(Api),
    Dialect.ANTHROPIC: (Api.MESSAGES,),
}


def _upstream_api(dialect: Dialect, api: Api, slm_id: str) -> Api:
    if api in _APIS[dialect]:
        return api
    if dialect is Dialect.ANTHROPIC and api is Api.CHAT:
        return Api.MESSAGES
    message = f"the upstream of {slm_id!r} has no {api}"
    raise UpstreamError(Failure(FailureKind.UNSUPPORTED, message))


def _ask_for_usage(sent: dict[str, Any]) -> bool:
    """Ask for usage in the stream; return True if the client did not."""
    options = sent.get("stream_options")
    options = dict(options) if isinstance(options, Mapping) else {}
    asked = bool(options.get("include_usage"))
    sent["stream_options"] = {**options, "include_usage": True}
    return not asked


def _url(remote: Remote, model: str, api: Api) -> str:
    base = remote.base_url.rstrip("/")
    if remote.dialect is not Dialect.AZURE:
        return f"{base}/{api}"
    # Responses has no deployment in its path.
    if not base.endswith("/v1") and "/deployments/" not in base and api is not Api.RESPONSES:
        base += f"/deployments/{quote(model, safe='')}"
    version = f"?api-version={remote.api_version}" if remote.api_version else ""
    return f"{base}/{api}{version}"


_KEY = re.compile(r"[\x21-\x7e]+")


def _headers(remote: Remote, key: str, streams: bool, slm_id: str) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream" if streams else "application/json",
    }
    key = key.strip()
    if key and not _KEY.fullmatch(key):
        message = f"the API key of {slm_id!r} ({remote.api_key_env}) cannot be sent in a header"
        raise UpstreamError(Failure(FailureKind.MISCONFIGURED, message))
    if remote.dialect is Dialect.ANTHROPIC:
        headers["anthropic-version"] = remote.api_version or ANTHROPIC_VERSION
    if not key:
        return headers
    if remote.dialect is Dialect.ANTHROPIC:
        headers["x-api-key"] = key
    elif remote.dialect is Dialect.AZURE:
        headers["api-key"] = key
    else:
        headers["authorization"] = f"Bearer {key}"
    return headers


def _client_headers(given: Mapping[str, str], native: bool) -> dict[str, str]:
    """Return those of the client's headers that travel; `native` is Anthropic's API unchanged."""
    allowed = (*CLIENT_HEADERS, "anthropic-beta") if native else CLIENT_HEADERS
    found = {name: given[name] for name in allowed if given.get(name)}
    # Line ends would be headers of the client's own.
    return {
        name: value
        for name, value in found.items()
        if len(value) <= MAX_HEADER_CHARS and value.isascii() and value.isprintable()
    }
