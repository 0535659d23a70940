"""The cold tier: the residency planner's word on replica counts, through Serve's autoscaling.

    applications:
      - name: calm
        autoscaling_policy:
          policy_function: deployments.slm.autoscaling:ColdTierPolicy

Needed only with `residency.cold_after_s`. Serve runs it in its controller, ten times a second, for
all deployments that have an `autoscaling_config`. It must never block there, and an exception would
stop the scaling of every application. So a thread reads the knowledge actor's board, and whatever
goes wrong leaves everything as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from calm_serve.errors import KnowledgeError
from calm_serve.protocol.topics import Topic, decode
from calm_serve.types import Residency

log = logging.getLogger("ray.serve")

POLL_S = 30.0
RETRY_S = 2.0
_PREFIX = "slm-"  # of deployment names; see wire.deployment_name

Counts = dict[Any, int]
States = dict[Any, dict[str, Any]]


class ColdTierPolicy:
    """0 replicas for an SLM that is cold, at least one for any other, and what its load asks for.

    Bounds and delays are Serve's, from each SLM's `scaling`. An SLM without replicas is started
    only when the planner has room for it; one that sleeps keeps the replicas that it has.
    """

    def __init__(self, app_name: str = "calm", follow: bool = True) -> None:
        """`follow` starts the thread that reads the board."""
        self._app_name = app_name
        self._tiers: Mapping[str, str] = {}
        if follow:
            threading.Thread(target=self._follow, daemon=True, name="residency-orders").start()

    def set_orders(self, tiers: Mapping[str, str]) -> None:
        """Take the board's tiers."""
        self._tiers = tiers

    def __call__(self, contexts: dict[Any, Any]) -> tuple[Counts, States]:
        """Deployment id to replicas; those left out stay as they are."""
        try:
            found = {i: self._replicas(i.name, context) for i, context in contexts.items()}
        except Exception:  # Serve would scale nothing any more, in any application
            log.exception("the residency policy failed; replica counts stay as they are")
            return {}, {}
        return {i: count for i, count in found.items() if count is not None}, {}

    def _replicas(self, deployment: str, context: Any) -> int | None:
        by_load = -(-context.total_num_requests // context.config.get_target_ongoing_requests())
        if not self._tiers or not deployment.startswith(_PREFIX):
            return int(by_load)
        tier = self._tiers.get(deployment.removeprefix(_PREFIX), Residency.HOT)
        if tier != Residency.HOT and not context.current_num_replicas:
            return None  # left out: otherwise Serve starts one for any trace of a request
        if tier == Residency.COLD:
            return 0
        if tier == Residency.ASLEEP:
            return None
        return max(int(by_load), 1)

    def _follow(self) -> None:
        import ray
        from ray.exceptions import RayError

        from deployments.knowledge.address import NAMESPACE, actor_name

        seen: dict[str, int] = {}
        while True:
            try:
                actor = ray.get_actor(actor_name(self._app_name), namespace=NAMESPACE)
                followed = actor.follow.remote(seen, POLL_S, [Topic.RESIDENCY])
                updates = ray.get(followed, timeout=2 * POLL_S)
                if update := updates.get(Topic.RESIDENCY):
                    seen = {Topic.RESIDENCY: update.revision}
                    self.set_orders(decode(Topic.RESIDENCY, update).tiers)
            except (RayError, ValueError, KnowledgeError) as error:
                log.info("no residency orders: %s", error)
                time.sleep(RETRY_S)
