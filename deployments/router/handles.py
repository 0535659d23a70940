"""Handles of the SLMs' deployments, in this application or in applications of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ray import serve
from ray.serve.handle import DeploymentHandle

from calm_serve.config import Fleet
from deployments.wire import deployment_name

log = logging.getLogger("ray.serve")


class Handles:
    """SLM id -> handle. A handle's request router starts with its first call, or with `connect`."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self._own = dict(handles)
        self._added: dict[str, tuple[str, DeploymentHandle]] = {}
        self._connected: set[str] = set()

    def get(self, slm_id: str) -> DeploymentHandle:
        """Return the handle; KeyError for an SLM that is in no application."""
        return self._own.get(slm_id) or self._added[slm_id][1]

    def set_added(self, apps: Mapping[str, str]) -> None:
        """Take the SLMs of other applications: SLM id -> application name."""
        for slm_id in set(self._added) - set(apps):
            del self._added[slm_id]
            self._connected.discard(slm_id)
        for slm_id, app in apps.items():
            if slm_id in self._own or self._added.get(slm_id, ("",))[0] == app:
                continue
            handle = serve.get_deployment_handle(deployment_name(slm_id), app, _check_exists=False)
            self._added[slm_id] = (app, handle)

    async def connect(self, fleet: Fleet) -> None:
        """Start the request router of every handle, so that it has replicas before a call."""
        for spec in fleet.slms:
            if spec.id in self._connected:
                continue
            handle = self.get(spec.id)
            if not handle.is_initialized:
                handle._init()
            self._connected.add(spec.id)
