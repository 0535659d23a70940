"""How a replica hears from the residency planner: the knowledge actor's board."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.types import Residency
from deployments.knowledge import NAMESPACE, actor_name
from deployments.tier import Tier

log = logging.getLogger("ray.serve")

KEY = "residency"
ANEW = "registry"  # an actor that has restarted publishes it again, with another version
POLL_S = 30.0
RETRY_S = 1.0


async def follow_orders(app_name: str, slm_id: str, tier: Tier) -> None:
    """Pass on to `tier`, for ever, what the board orders for the SLM; no word means hot.

    While the actor is away the last order stays. One that restarted has forgotten what its replicas
    reported, so they say it again.
    """
    actor: Any = None
    have: dict[str, int] = {}
    while True:
        try:
            actor = actor or ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
            news = await actor.board.remote(have, POLL_S, [KEY, ANEW])
        except (RayActorError, RayTaskError, ValueError) as error:
            log.warning("no orders for SLM %s, it stays as it is: %s", slm_id, error)
            actor = None
            await asyncio.sleep(RETRY_S)
            continue
        have |= {key: entry["version"] for key, entry in news.items()}
        if ANEW in news:
            tier.repeat()
        if entry := news.get(KEY):
            tier.order(entry["value"]["tiers"].get(slm_id, Residency.HOT), entry["version"])
