"""Whether a replica's engine is awake: orders, requests and failures brought into one line."""

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
"""Seconds without a request before a replica that a request woke against its order sleeps again."""

RETRY_S = 5.0
"""Seconds before an engine that could not sleep tries again."""


class Sleeper(Protocol):
    """What is put to sleep: an engine."""

    async def sleep(self) -> None:
        """Give memory back. Raises when it cannot, and is awake then."""

    async def wake(self) -> None:
        """Take memory again. Raises when it cannot, and is lost then."""


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> object:
        """Forget it."""


def _call_later(seconds: float, call: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, call)


class Tier:
    """The residency tier of one replica. Used on one event loop.

    One change at a time, and after it the newest word counts, so the last order wins. Requests are
    never cut: sleep waits until nothing runs. One that arrives while the engine sleeps wakes it and
    waits, unless its sender had not heard of the order to sleep: that one is sent back to hear it.

    Args:
        engine: what sleeps and wakes.
        report: told "asleep", "waking", "ready" or "failed", with the seconds of the last "sleep"
            and "wake" so far, and a reason.
        clock: seconds, for the times that are reported.
        call_later: runs a call after so many seconds.
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
        self._ordered_awake = True
        self._version = 0  # of the last order
        self._requests = 0
        self._against_order = False  # a request woke it
        self._pause: Timer | None = None  # no sleep before it is over
        self._change: asyncio.Task[None] | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        self._failure = ""
        self._times: dict[str, float] = {}
        self.state = "ready"

    def order(self, tier: str, version: int = 0) -> None:
        """Follow the planner: hot is awake, anything else asleep as soon as nothing runs.

        `version` grows with every order.
        """
        self._version = version
        if (tier == Residency.HOT) != self._ordered_awake:
            self._ordered_awake = not self._ordered_awake
            self._against_order = False
            self._end_pause()
            self._settle()

    @contextlib.asynccontextmanager
    async def awake(self, orders: int | None = None) -> AsyncIterator[None]:
        """Hold the engine awake for one request, after waking it if need be.

        `orders` is the version that the sender knew. One that had not heard yet of the order to
        sleep is told so by AsleepError: waking for it could exceed the memory budget. One that
        knows a newer order than this replica has heard is right. None is nobody's order: wake.
        Raises ComponentError when the engine does not wake.
        """
        self._requests += 1
        try:
            while self.state != "ready":
                self._refuse_if_failed()
                if orders is not None and not self._ordered_awake and orders <= self._version:
                    raise AsleepError("asleep by order")
                self._against_order = not self._ordered_awake
                self._settle()
                await self._awake.wait()
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle()

    def check_health(self) -> None:
        """Raise ComponentError when the engine did not wake."""
        self._refuse_if_failed()

    def repeat(self) -> None:
        """Report the present state again, to somebody who has forgotten it."""
        self._tell(self._failure)

    def stop(self) -> None:
        """Change nothing any more."""
        self._end_pause()
        if self._change is not None:
            self._change.cancel()

    def _idle(self) -> None:
        if self._ordered_awake or self.state == "failed":
            return
        if self._against_order:
            self._start_pause(LINGER_S)
        self._settle()

    def _start_pause(self, seconds: float) -> None:
        self._end_pause()
        self._pause = self._call_later(seconds, self._pause_over)

    def _pause_over(self) -> None:
        self._pause = None
        if not self._requests:
            self._against_order = False
        self._settle()

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    @property
    def _wanted_awake(self) -> bool:
        return bool(self._ordered_awake or self._requests or self._pause is not None)

    @property
    def _settled(self) -> bool:
        return self.state == "failed" or (self.state == "ready") == self._wanted_awake

    def _settle(self) -> None:
        if not self._settled and (self._change is None or self._change.done()):
            self._change = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while not self._settled:
            if self._wanted_awake:
                await self._wake()
            else:
                await self._sleep()

    async def _sleep(self) -> None:
        self.state = "falling asleep"  # requests wait from here on
        self._awake.clear()
        started = self._clock()
        try:
            await self._engine.sleep()
        except Exception as error:  # noqa: BLE001  # whatever it was, the engine is still awake
            log.error("does not sleep, stays awake: %r", error)
            self._start_pause(RETRY_S)
            self._become("ready", f"does not sleep: {error!r}")
            return
        self._times["sleep"] = self._clock() - started
        self._become("asleep")

    async def _wake(self) -> None:
        self._become("waking")
        started = self._clock()
        try:
            await self._engine.wake()
        except Exception as error:  # noqa: BLE001  # whatever it was, the replica is replaced
            self._failure = f"does not wake: {error!r}"
            log.error("%s", self._failure)
            self._become("failed", self._failure)
            return
        self._times["wake"] = self._clock() - started
        self._become("ready")

    def _become(self, state: str, detail: str = "") -> None:
        self.state = state
        if state in ("ready", "failed"):
            self._awake.set()
        self._tell(detail)

    def _tell(self, detail: str = "") -> None:
        # Until it sleeps it takes its memory, which is what others want to know.
        state = "ready" if self.state == "falling asleep" else self.state
        self._report(state, self._times, detail)

    def _refuse_if_failed(self) -> None:
        if self.state == "failed":
            raise ComponentError(f"the engine {self._failure}")


log = logging.getLogger("ray.serve")

POLL_S = 30.0
POLL_RETRY_S = 1.0


async def follow_orders(app_name: str, slm_id: str, tier: Tier) -> None:
    """Pass on to `tier`, for ever, what the board orders for the SLM; no word means hot.

    While the actor is away the last order stays. One that restarted has forgotten what its replicas
    reported, so they say it again.
    """
    actor: Any = None
    seen: dict[str, int] = {}
    # An actor that has restarted publishes the SLMs again, with another revision.
    topics = [Topic.RESIDENCY, Topic.SLMS]
    while True:
        try:
            actor = actor or ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
            updates: dict[str, Update] = await actor.follow.remote(seen, POLL_S, topics)
        except (RayActorError, RayTaskError, ValueError) as error:
            log.warning("no orders for SLM %s, it stays as it is: %s", slm_id, error)
            actor = None
            await asyncio.sleep(POLL_RETRY_S)
            continue
        seen |= {topic: update.revision for topic, update in updates.items()}
        if Topic.SLMS in updates:
            tier.repeat()
        if update := updates.get(Topic.RESIDENCY):
            try:
                desired: DesiredResidency = decode(Topic.RESIDENCY, update)
            except KnowledgeError as error:
                log.error("SLM %s stays as it is: %s", slm_id, error)
                continue
            tier.order(desired.tiers.get(slm_id, Residency.HOT), update.revision)
