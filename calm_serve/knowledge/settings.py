"""What a deployment configured, kept for a restart of the actor.

Whoever restarts an actor has the arguments of its first start, which a redeployment has replaced.
"""

from __future__ import annotations

import json
import logging

from pydantic import ValidationError

from calm_serve.config import Fleet, Learning
from calm_serve.errors import ConfigError
from calm_serve.knowledge.store import OutcomeStore

META = "settings"
_log = logging.getLogger(__name__)


def check(present: Learning, new: Learning) -> None:
    """Raise ConfigError when the log would have to move."""
    for name in ("store_url", "state_dir"):
        if getattr(new, name) != getattr(present, name):
            raise ConfigError(
                f"learning.{name} cannot change while the knowledge actor runs; shut it down"
            )


def keep(store: OutcomeStore, fleet: Fleet, learning: Learning) -> None:
    """Write both down; durable when this returns. Raises KnowledgeError."""
    data = {"fleet": fleet.model_dump(mode="json"), "learning": learning.model_dump(mode="json")}
    store.set_meta(META, json.dumps(data))


def kept(store: OutcomeStore) -> tuple[Fleet, Learning] | None:
    """What was last written down, None when there is nothing that is still valid."""
    text = store.meta(META)
    if text is None:
        return None
    try:
        data = json.loads(text)
        return Fleet.model_validate(data["fleet"]), Learning.model_validate(data["learning"])
    except ValidationError as error:
        _log.warning("stored settings passed over: %s", error)
        return None
