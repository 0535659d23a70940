"""Autoscaling of SLMs: by the requests in their replicas, and down to none for the cold tier.

Serve's own policy counts what goes through handles. Requests go to the replicas' own ports here, so
each replica reports how many it has (`record_autoscaling_stats`), and `LoadPolicy` adds them up.
`ColdTierPolicy` also stops all replicas of SLMs that are to be cold:

    applications:
      - name: calm
        autoscaling_policy:
          policy_function: deployments.slm.autoscaling:ColdTierPolicy

It is needed only with `residency.cold_after_s`. Serve runs policies in its controller, ten times a
second, for all deployments that have an `autoscaling_config`. They must never block there, and an
exception would stop the scaling of every application. So a thread follows the desired residency
that the knowledge actor publishes, and any failure leaves all replica counts as they are.
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
ONGOING = "ongoing"  # name of the replicas' report
_PREFIX = "slm-"  # of deployment names; see wire.deployment_name

Counts = dict[Any, int]
States = dict[Any, dict[str, Any]]


def record_ongoing(ongoing: int) -> dict[str, int]:
    """Return a replica's report for the policies of this module."""
    return {ONGOING: ongoing}


def requests_of(context: Any) -> float:
    """Requests in an SLM's replicas, and those that wait in a handle for a first replica."""
    reports = (context.aggregated_metrics or {}).get(ONGOING, {})
    return float(sum(reports.values()) + (context.total_queued_requests or 0.0))


def replicas_for_load(context: Any) -> int:
    """Return the replicas that the load asks for, 0 without any."""
    return int(-(-requests_of(context) // context.config.get_target_ongoing_requests()))


class LoadPolicy:
    """As many replicas as the load asks for; bounds, factors and delays are Serve's."""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state."""
        return replicas_for_load(context), {}


class ColdTierPolicy:
    """No replica for an SLM that is to be cold; at least one, and what the load needs, for others.

    Bounds and delays are Serve's, from each SLM's `scaling`. An SLM without replicas is started
    only when the planner has memory for it; one that sleeps keeps the replicas that it has.
    """

    def __init__(self, app_name: str = "calm", follow: bool = True) -> None:
        """`follow` starts the thread that follows the desired residency."""
        self._app_name = app_name
        self._desired: Mapping[str, str] = {}
        if follow:
            threading.Thread(target=self._follow, daemon=True, name="desired-residency").start()

    def set_desired(self, desired: Mapping[str, str]) -> None:
        """Take the desired residency, SLM to tier; {} without a memory budget."""
        self._desired = desired

    def __call__(self, contexts: dict[Any, Any]) -> tuple[Counts, States]:
        """Deployment id to replicas; those left out stay as they are."""
        try:
            found = {i: self._replicas(i.name, context) for i, context in contexts.items()}
        except Exception:  # Serve would stop scaling every application
            log.exception("the residency policy failed; replica counts stay as they are")
            return {}, {}
        return {i: count for i, count in found.items() if count is not None}, {}

    def _replicas(self, deployment: str, context: Any) -> int | None:
        by_load = replicas_for_load(context)
        if not self._desired or not deployment.startswith(_PREFIX):
            return by_load
        desired = self._desired.get(deployment.removeprefix(_PREFIX), Residency.HOT)
        if desired != Residency.HOT and not context.current_num_replicas:
            return None  # left out: otherwise Serve starts a replica at the first sign of a request
        if desired == Residency.COLD:
            return 0
        if desired == Residency.ASLEEP:
            return None
        return max(by_load, 1)

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
                    self.set_desired(decode(Topic.RESIDENCY, update).tiers)
            except (RayError, ValueError, KnowledgeError) as error:
                log.info("no desired residency: %s", error)
                time.sleep(RETRY_S)
