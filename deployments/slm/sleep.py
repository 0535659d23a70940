"""Sleep and wake-up of one SLM replica, by the desired residency and by requests.

`ReplicaResidency` is the state machine around the engine. Its inputs are the desired residency, the
running requests, and the engine's failures to sleep or wake. `follow_desired_residency` long-polls
the knowledge actor for the desired residency of the SLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.errors import AsleepError, ComponentError, KnowledgeError
from calm_serve.protocol.topics import DesiredResidency, Topic, Update, decode
from calm_serve.types import Residency
from deployments.knowledge.address import NAMESPACE, actor_name

log = logging.getLogger("ray.serve")

LINGER_S = 1.0
"""Idle seconds before a replica that a request woke against the desired residency sleeps again."""

RETRY_S = 5.0
"""Seconds before an engine that could not sleep tries again."""

POLL_S = 30.0
POLL_RETRY_S = 1.0


class Sleeper(Protocol):
    """What is put to sleep: an engine."""

    async def sleep(self) -> None:
        """Give memory back. If this raises, the engine is still awake."""

    async def wake(self) -> None:
        """Take memory again. If this raises, the engine is unusable."""


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> object:
        """Do not make the call."""


def _call_later(seconds: float, call: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, call)


class ReplicaResidency:
    """Residency of one replica. Used on one event loop.

    Changes run one at a time; after each, the newest desired residency counts. Requests are never
    cut: sleep waits until none runs. A request that arrives while the engine sleeps wakes it and
    waits. The exception is a request that its router sent before it knew that the SLM is to sleep:
    it gets AsleepError, and the router queues it.

    `state` is "ready", "falling asleep", "asleep", "waking" or "failed".

    Args:
        engine: what sleeps and wakes.
        report: called with "asleep", "waking", "ready" or "failed", the seconds of the last
            "sleep" and "wake" so far, and a reason.
        clock: seconds, for the reported times.
        call_later: schedules a call after so many seconds.
    """

    def __init__(
        self,
        engine: Sleeper,
        report: Callable[[str, Mapping[str, float], str], None],
        clock: Callable[[], float] = time.perf_counter,
        call_later: Callable[[float, Callable[[], None]], Timer] = _call_later,
    ) -> None:
        self._engine = engine
        self._report = report
        self._clock, self._call_later = clock, call_later
        self._desired_awake = True
        self._revision = 0  # of the desired residency
        self._requests = 0
        self._woken_by_request = False  # although the desired residency is to sleep
        self._stay_awake: Timer | None = None  # no sleep before it ends
        self._change: asyncio.Task[None] | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        self._failure = ""
        self._times: dict[str, float] = {}
        self.state = "ready"

    def set_desired(self, residency: str, revision: int = 0) -> None:
        """Wake for "hot"; for any other tier sleep as soon as no request runs.

        `revision` grows with every publication of desired residency.
        """
        self._revision = revision
        if (residency == Residency.HOT) != self._desired_awake:
            self._desired_awake = not self._desired_awake
            self._woken_by_request = False
            self._end_stay_awake()
            self._start_change()

    @contextlib.asynccontextmanager
    async def awake(self, known_revision: int | None = None) -> AsyncIterator[None]:
        """Keep the engine awake for one request, after waking it if necessary.

        Args:
            known_revision: of the desired residency that the router acted on. If it is not
                newer than this replica's and the replica is to sleep, waking could exceed the
                memory budget: raises AsleepError. A newer one says that the replica is to wake.
                None (no memory budget) always wakes.

        Raises ComponentError when the engine does not wake.
        """
        self._requests += 1
        try:
            while self.state != "ready":
                self.check_health()
                newer = known_revision is None or known_revision > self._revision
                if not newer and not self._desired_awake:
                    raise AsleepError("the SLM is asleep under the present memory plan")
                self._woken_by_request = not self._desired_awake
                self._start_change()
                await self._awake.wait()
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._on_idle()

    def on_engine_death(self, reason: str) -> None:
        """Report that the engine has died; requests that wait or arrive raise ComponentError."""
        self._fail(f"died: {reason}")

    def check_health(self) -> None:
        """Raise ComponentError when the engine died or did not wake."""
        if self.state == "failed":
            raise ComponentError(f"the engine {self._failure}")

    def report_again(self) -> None:
        """Repeat the last report, for a knowledge actor that has restarted."""
        self._send_report(self._failure)

    def stop(self) -> None:
        """Make no further change."""
        self._end_stay_awake()
        if self._change is not None:
            self._change.cancel()

    def _on_idle(self) -> None:
        if self._desired_awake or self.state == "failed":
            return
        if self._woken_by_request:
            self._start_stay_awake(LINGER_S)
        self._start_change()

    def _start_stay_awake(self, seconds: float) -> None:
        self._end_stay_awake()
        self._stay_awake = self._call_later(seconds, self._on_stay_awake_over)

    def _on_stay_awake_over(self) -> None:
        self._stay_awake = None
        if not self._requests:
            self._woken_by_request = False
        self._start_change()

    def _end_stay_awake(self) -> None:
        if self._stay_awake is not None:
            self._stay_awake.cancel()
            self._stay_awake = None

    @property
    def _should_be_awake(self) -> bool:
        return bool(self._desired_awake or self._requests or self._stay_awake is not None)

    @property
    def _settled(self) -> bool:
        return self.state == "failed" or (self.state == "ready") == self._should_be_awake

    def _start_change(self) -> None:
        if not self._settled and (self._change is None or self._change.done()):
            self._change = asyncio.create_task(self._run_changes())

    async def _run_changes(self) -> None:
        while not self._settled:
            if self._should_be_awake:
                await self._wake()
            else:
                await self._sleep()

    async def _sleep(self) -> None:
        self.state = "falling asleep"  # requests wait from here on
        self._awake.clear()
        started = self._clock()
        try:
            await self._engine.sleep()
        except Exception as error:  # noqa: BLE001  # of any type: the engine is still awake
            log.error("does not sleep, stays awake: %r", error)
            self._start_stay_awake(RETRY_S)
            self._enter("ready", f"does not sleep: {error!r}")
            return
        self._times["sleep"] = self._clock() - started
        self._enter("asleep")

    async def _wake(self) -> None:
        self._enter("waking")
        started = self._clock()
        try:
            await self._engine.wake()
        except Exception as error:  # noqa: BLE001  # of any type: Serve replaces the replica
            self._fail(f"does not wake: {error!r}")
            return
        self._times["wake"] = self._clock() - started
        self._enter("ready")

    def _fail(self, failure: str) -> None:
        if self.state != "failed":
            self._failure = failure
            log.error("the engine %s", failure)
            self._enter("failed", failure)

    def _enter(self, state: str, detail: str = "") -> None:
        if self.state == "failed":
            return  # "failed" is final, also for a change that is under way
        self.state = state
        if state in ("ready", "failed"):
            self._awake.set()
        self._send_report(detail)

    def _send_report(self, detail: str = "") -> None:
        # The residency coordinator plans memory, and the memory is in use until "asleep".
        state = "ready" if self.state == "falling asleep" else self.state
        self._report(state, self._times, detail)


async def follow_desired_residency(app_name: str, slm_id: str, residency: ReplicaResidency) -> None:
    """Pass the SLM's desired residency on to `residency`, for ever; hot when none is published.

    While the knowledge actor is unreachable the last desired residency stays. A restarted actor
    has lost the replicas' reports, so the replica repeats its own.
    """
    actor: Any = None
    seen: dict[str, int] = {}
    # A restarted actor publishes the SLMs again, with another revision.
    topics = [Topic.RESIDENCY, Topic.SLMS]
    while True:
        try:
            actor = actor or ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
            updates: dict[str, Update] = await actor.follow.remote(seen, POLL_S, topics)
        except (RayActorError, RayTaskError, ValueError) as error:
            log.warning("SLM %s: desired residency not received, stays as it is: %s", slm_id, error)
            actor = None
            await asyncio.sleep(POLL_RETRY_S)
            continue
        seen |= {topic: update.revision for topic, update in updates.items()}
        if Topic.SLMS in updates:
            residency.report_again()
        if update := updates.get(Topic.RESIDENCY):
            try:
                desired: DesiredResidency = decode(Topic.RESIDENCY, update)
            except KnowledgeError as error:
                log.error("SLM %s stays as it is: %s", slm_id, error)
                continue
            residency.set_desired(desired.tiers.get(slm_id, Residency.HOT), update.revision)
