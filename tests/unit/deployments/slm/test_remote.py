"""A remote SLM in Serve: the address and the key of its upstream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.config import SLMSpec
from calm_serve.testing import make_spec
from deployments.slm import remote
from deployments.slm.remote import RemoteSLM


class Reporter:
    """What the replica reported."""

    reports: list[str] = []

    def __init__(self, *_about: str) -> None:
        self.reports.clear()

    def report(self, state: str, _ready_s: Any = None) -> None:
        self.reports.append(state)


@pytest.fixture(autouse=True)
def _serve(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(remote.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(remote, "StateReporter", Reporter)


def spec(**fields: str) -> SLMSpec:
    upstream = {"base_url": "https://provider/v1", **fields}
    about = {"id": "cloud", "model": "gpt-x", "locality": "remote", "remote": upstream}
    return SLMSpec.model_validate(about)


async def start(one: SLMSpec) -> RemoteSLM:
    slm = RemoteSLM.__new__(RemoteSLM)
    await slm.__init__(one, "calm")  # type: ignore[misc]
    return slm


async def test_the_routers_get_the_address_and_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "sk-1")
    slm = await start(spec(api_key_env="PROVIDER_KEY"))
    assert slm.record_replica_metadata() == {"url": "https://provider/v1", "secret": "sk-1"}
    assert Reporter.reports == ["ready"]


async def test_an_upstream_may_need_no_key() -> None:
    assert (await start(spec())).record_replica_metadata()["secret"] == ""


async def test_a_local_slm_cannot_be_started_as_a_remote_one() -> None:
    with pytest.raises(ValueError, match="not remote"):
        await start(make_spec("small"))
