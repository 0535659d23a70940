"""The ingress of an SLM's own application: makes the SLM known to another application's routers."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from calm_serve.config import SLMSpec
from deployments.knowledge.address import NAMESPACE, actor_name

HEARTBEAT_S = 5.0


class Registration:
    """Registers the SLM as long as its application exists, replicas or none; takes no requests.

    The SLM cannot be the ingress itself: Serve refuses a request router of one's own there when
    HAProxy is in front.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, spec: SLMSpec, app_name: str, slm: DeploymentHandle
    ) -> None:
        del slm  # bound, so that Serve deploys it
        self._spec = spec
        self._knowledge = actor_name(app_name)
        self._own_app = serve.get_replica_context().app_name
        self._task = asyncio.create_task(self._announce())

    async def check_health(self) -> None:
        """Raise when the announcements have ended; Serve then replaces this replica."""
        if self._task.done():
            raise RuntimeError(f"announcing ended: {self._task}")

    async def __del__(self) -> None:
        self._task.cancel()
        await self._tell("unregister", self._spec.id)

    async def _announce(self) -> None:
        while True:
            await self._tell("register", self._spec.model_dump_json(), self._own_app)
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell(self, method: str, *args: Any) -> None:
        # An actor that is missing or restarting hears the next heartbeat.
        with contextlib.suppress(ValueError, RayError):
            actor = ray.get_actor(self._knowledge, namespace=NAMESPACE)
            await getattr(actor, method).remote(*args)
