"""A remote SLM in Serve: what the routers need to reach its upstream."""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from calm_serve.config import SLMSpec
from deployments.slm.state_reporter import StateReporter
from deployments.wire import ReplicaAddress


class RemoteSLM:
    """Holds the address and the key of an upstream. The routers send the requests themselves."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, spec: SLMSpec, app_name: str
    ) -> None:
        """Read the key and report "ready". Raises ValueError when the SLM is not remote."""
        if spec.remote is None:
            raise ValueError(f"SLM {spec.id!r} is not remote")
        name = spec.remote.api_key_env
        self._address = ReplicaAddress(
            url=spec.remote.base_url, secret=os.environ.get(name, "") if name else ""
        )
        replica_id = serve.get_replica_context().replica_id.unique_id
        StateReporter(app_name, spec.id, replica_id).report("ready", {"total": 0.0})

    def record_replica_metadata(self) -> dict[str, Any]:
        """Read once by Serve, which tells every handle: where the upstream is, and its key."""
        return dict(self._address)

    async def ready(self) -> None:
        """Return. A call waits in Serve until there is a replica, and so lets Serve start one."""
