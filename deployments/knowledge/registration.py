"""Registration: ingress of an SLM's own application; registers the SLM with the knowledge actor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from calm_serve.config import SLMSpec
from calm_serve.protocol.topics import REGISTRATION, RegisteredSLM
from deployments.knowledge.address import NAMESPACE, OLDER_ACTOR, actor_name

log = logging.getLogger("ray.serve")

HEARTBEAT_S = 5.0  # a sixth of the registry's expiry


class Registration:
    """Keeps the SLM registered while its application runs; serves no requests.

    The SLM cannot be the ingress itself: with HAProxy in front, Serve refuses a custom request
    router for the ingress.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, spec: SLMSpec, app_name: str, slm: DeploymentHandle
    ) -> None:
        del slm  # an argument, so that Serve deploys it
        self._spec = spec
        self._knowledge = actor_name(app_name)
        self._own_app = serve.get_replica_context().app_name
        self._task = asyncio.create_task(self._heartbeat())

    async def check_health(self) -> None:
        """Raise when the heartbeats have ended; Serve then replaces this replica."""
        if self._task.done():
            raise RuntimeError(f"heartbeats ended: {self._task}")

    async def __del__(self) -> None:
        self._task.cancel()
        await self._call("unregister", self._spec.id)

    async def _heartbeat(self) -> None:
        while True:
            await self._register()
            await asyncio.sleep(HEARTBEAT_S)

    async def _register(self) -> None:
        record = RegisteredSLM(self._spec.model_dump(mode="json"), self._own_app)
        await self._call("register_slm", REGISTRATION.encode(record))

    async def _call(self, method: str, *args: Any) -> None:
        # An actor that is missing or restarting gets the next heartbeat.
        with contextlib.suppress(ValueError, RayError):
            actor = ray.get_actor(self._knowledge, namespace=NAMESPACE)
            call = getattr(actor, method, None)
            if call is None:
                log.error("%r is not registered: %s", self._spec.id, OLDER_ACTOR)
                return
            await call.remote(*args)
