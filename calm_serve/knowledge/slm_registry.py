"""SLM registry: SLMs of other applications, and the start-up reports of replicas. Bounded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from calm_serve.config import SLMSpec, first_error
from calm_serve.errors import ConfigError
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.reports import ReplicaReport
from calm_serve.protocol.topics import RegisteredSLM

# An SLM without a heartbeat for this long is dropped; applications send one every few seconds.
EXPIRY_S = 30.0
# Bounds of memory.
MAX_REGISTERED = 256
MAX_REPLICAS_PER_SLM = 32
MAX_SLMS = 512
# The snapshot in the store. The former build wrote version 1 without name and version in front.
REGISTERED_SLMS: RecordFormat[dict[str, RegisteredSLM]] = RecordFormat(
    "registered_slms", 1, dict[str, RegisteredSLM], bare=1
)
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    spec: dict[str, Any]
    app_name: str
    seen_s: float


class SLMRegistry:
    """Registered SLM applications with heartbeat and expiry. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}

    def register(self, spec: dict[str, Any], app_name: str, taken: Collection[str]) -> bool:
        """Add an SLM or renew its heartbeat; return whether anything but the heartbeat changed.

        `taken` are ids of the fleet file. Raises ConfigError for a bad spec or a taken id.
        """
        try:
            found = SLMSpec.model_validate(spec)
        except ValidationError as error:
            raise ConfigError(f"registered SLM: {first_error('', error)}") from error
        old = self._entries.get(found.id)
        if found.id in taken or (old is not None and old.app_name != app_name):
            raise ConfigError(f"SLM id {found.id!r} is taken")
        if old is None and len(self._entries) >= MAX_REGISTERED:
            raise ConfigError(f"{MAX_REGISTERED} SLM applications are registered already")
        plain = found.model_dump(mode="json")
        self._entries[found.id] = _Entry(plain, app_name, self._clock())
        return old is None or old.spec != plain

    def unregister(self, slm_id: str) -> bool:
        """Remove an SLM; return whether it was there."""
        return self._entries.pop(slm_id, None) is not None

    def expire(self) -> bool:
        """Drop SLMs whose heartbeat stopped; return whether there were any."""
        oldest = self._clock() - EXPIRY_S
        late = [i for i, e in self._entries.items() if e.seen_s < oldest]
        for slm_id in late:
            del self._entries[slm_id]
        return bool(late)

    def ids(self) -> tuple[str, ...]:
        """Registered SLM ids."""
        return tuple(self._entries)

    def snapshot(self) -> dict[str, RegisteredSLM]:
        """The registered SLMs by id."""
        return {i: RegisteredSLM(e.spec, e.app_name) for i, e in self._entries.items()}

    def to_json(self) -> str:
        """The snapshot as `restore` reads it after a restart."""
        return REGISTERED_SLMS.encode(self.snapshot()).decode()

    def specs(self) -> tuple[SLMSpec, ...]:
        """The registered SLMs."""
        return tuple(SLMSpec.model_validate(e.spec) for e in self._entries.values())

    def restore(self, text: str) -> None:
        """Take over a snapshot (`to_json`) from before a restart; every heartbeat counts from now.

        An SLM whose entry this program cannot read is ignored and logged. Raises KnowledgeError
        when that holds for the snapshot as a whole.
        """
        for slm_id, slm in REGISTERED_SLMS.decode(text).items():
            try:
                SLMSpec.model_validate(slm.spec)
            except ValidationError as error:
                _log.warning("registered SLM %r ignored: %s", slm_id, first_error("", error))
                continue
            self._entries[slm_id] = _Entry(slm.spec, slm.app_name, self._clock())


class StartupStates:
    """The last start-up report of each replica, by SLM; the oldest are dropped."""

    def __init__(self) -> None:
        self._by_slm: dict[str, dict[str, ReplicaReport]] = {}

    def report(self, slm_id: str, replica_id: str, report: ReplicaReport) -> None:
        """Keep the report as the newest of its replica."""
        replicas = self._by_slm.pop(slm_id, {})
        replicas.pop(replica_id, None)
        replicas[replica_id] = report
        self._by_slm[slm_id] = replicas
        for kept, limit in ((replicas, MAX_REPLICAS_PER_SLM), (self._by_slm, MAX_SLMS)):
            if len(kept) > limit:
                del kept[next(iter(kept))]  # dicts keep insertion order: the oldest is first

    def snapshot(self) -> dict[str, dict[str, ReplicaReport]]:
        """SLM id -> replica id -> report."""
        return {slm: dict(replicas) for slm, replicas in self._by_slm.items()}
