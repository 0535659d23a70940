"""Retraining: when one is due, one at a time, and the verdict of the last.

`retrain` is a pure function; the knowledge actor runs it in a child process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from pydantic import Base64Bytes

from calm_serve.config import Learning
from calm_serve.learning.evaluation import Verdict, VerdictReason, promotion_test
from calm_serve.learning.promotion import Promotion
from calm_serve.learning.training import TRAINED_UNTIL, refitted, train, without_prompts
from calm_serve.prediction import Artifact
from calm_serve.protocol.formats import RecordFormat
from calm_serve.types import Outcome

TRAINED_AT = "trained_at"  # the store's key of `labelled_total` at the last training

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetrainJob:
    """Input of a training: the log, the SLMs, and the champion to compare with."""

    store_url: str
    slm_ids: tuple[str, ...]
    champion: Base64Bytes | None
    holdout_ratio: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RetrainResult:
    """Verdict of the promotion test, the challenger's metrics, and its artifact if it passed."""

    verdict: Verdict
    metrics: dict[str, Any]  # those of the artifact
    version: str
    blob: Base64Bytes | None

    def document(self, against: str) -> dict[str, Any]:
        """Verdict, version and metrics as plain data; `against` is the version of the champion."""
        return {
            **asdict(self.verdict),
            "reason": str(self.verdict.reason),
            "version": self.version,
            "against": against or "base_rate",
            "metrics": self.metrics,
        }


@dataclass(frozen=True, slots=True)
class RetrainReply:
    """What the training child writes: a result, or an error if there is none."""

    result: RetrainResult | None = None
    error: str = ""


RETRAIN_JOB: RecordFormat[RetrainJob] = RecordFormat("retrain_job", 1, RetrainJob)
RETRAIN_REPLY: RecordFormat[RetrainReply] = RecordFormat("retrain_reply", 1, RetrainReply)


def retrain(
    job: RetrainJob, outcomes: Sequence[Outcome], clock: Callable[[], float]
) -> RetrainResult:
    """Train on `outcomes` and run the promotion test. Blocks for seconds; raises KnowledgeError.

    What passed is trained once more on all outcomes, the held-out ones too. Where the SLMs' means
    are as good as the challenger, they are tested in its place.
    """
    champion = None if job.champion is None else Artifact.from_bytes(job.champion)
    training = train(
        outcomes,
        job.slm_ids,
        seed=job.seed,
        holdout_ratio=job.holdout_ratio,
        clock=clock,
        seen_until=None if champion is None else champion.metrics.get(TRAINED_UNTIL),
    )
    rivals, base_rate = (training.holdout, champion), training.base_rate
    verdict = promotion_test(
        *rivals, training.artifact, base_rate=base_rate, seed=job.seed, means=training.mean_labels
    )
    means_only = False
    if verdict.reason is VerdictReason.MEANS_AS_GOOD:
        means = without_prompts(training)
        found = promotion_test(*rivals, means, base_rate=base_rate, seed=job.seed)
        if means_only := found.publish:
            verdict = found
            training = replace(training, artifact=means)
    if not verdict.publish:
        return RetrainResult(verdict, dict(training.metrics), training.artifact.version, None)
    final = refitted(training, outcomes, seed=job.seed, clock=clock, means_only=means_only)
    return RetrainResult(verdict, dict(final.metrics), final.version, final.to_bytes())


class TrainingLog(Protocol):
    """The store of outcomes, as the scheduler uses it; all methods block."""

    def labelled_count(self) -> int:
        """Outcomes with a quality label in the store."""
        ...

    def labelled_total(self) -> int:
        """Outcomes that ever got a label; it never falls."""
        ...

    def meta(self, key: str) -> str | None:
        """A stored value, None when it was never set."""
        ...

    def set_meta(self, key: str, value: str) -> None:
        """Store a value under a key."""
        ...


class RetrainingScheduler:
    """Starts trainings when they are due, one at a time. Used from one event loop.

    `trainer` runs a training; `learning` may be replaced at any time; `slm_ids` returns the SLMs to
    train for.
    """

    def __init__(
        self,
        store: TrainingLog,
        store_url: str,
        promotion: Promotion,
        trainer: Callable[[RetrainJob], Awaitable[RetrainResult]],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        slm_ids: Callable[[], tuple[str, ...]],
        learning: Learning,
    ) -> None:
        self.learning = learning
        self.last_verdict: dict[str, Any] = {}
        self._store, self._store_url, self._promotion = store, store_url, promotion
        self._trainer, self._in_thread, self._slm_ids = trainer, in_thread, slm_ids
        self._training: asyncio.Task[dict[str, Any]] | None = None
        self._after_drift: asyncio.Task[dict[str, Any]] | None = None

    @property
    def running(self) -> bool:
        """Whether a training is running."""
        return self._training is not None and not self._training.done()

    async def retrain(self, force: bool = False) -> dict[str, Any]:
        """As `KnowledgeService.retrain`."""
        if not self.running:
            labelled = await self._in_thread(self._store.labelled_count)
            if not force and labelled < self.learning.min_outcomes:
                return {"publish": False, "reason": "too_few_outcomes", "labelled": labelled}
        # Shielded: cancelling the caller does not cancel the training.
        return await asyncio.shield(self._start())

    async def start_if_due(self) -> None:
        """Start a training when enough labels have arrived since the last one."""
        if self.running:
            return
        total = await self._in_thread(self._store.labelled_total)
        trained_at = int(await self._in_thread(lambda: self._store.meta(TRAINED_AT)) or 0)
        due = self.learning.retrain_every if trained_at else self.learning.min_outcomes
        if total - trained_at >= due:
            self._start()

    def on_drift(self) -> None:
        """Start a training before `retrain_every` is reached, given `min_outcomes` labels."""
        self._after_drift = asyncio.create_task(self.retrain())
        self._after_drift.add_done_callback(_log_failure)

    async def settled(self) -> None:
        """Wait until no training is running, however it ended."""
        tasks = [t for t in (self._after_drift, self._training) if t is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cancel a running training."""
        for task in (self._after_drift, self._training):
            if task is not None:
                task.cancel()
        await self.settled()

    def _start(self) -> asyncio.Task[dict[str, Any]]:
        """The running training; a new one when there is none."""
        if self._training is None or self._training.done():
            self._training = asyncio.create_task(self._train())
            self._training.add_done_callback(_log_failure)
        return self._training

    async def _train(self) -> dict[str, Any]:
        """Train once. A failure counts, or every batch of outcomes would start another."""
        total = await self._in_thread(self._store.labelled_total)
        await self._in_thread(lambda: self._store.set_meta(TRAINED_AT, str(total)))
        champion = self._promotion.champion
        job = RetrainJob(
            store_url=self._store_url,
            slm_ids=self._slm_ids(),
            champion=champion.blob if champion else None,
            holdout_ratio=self.learning.holdout_ratio,
        )
        try:
            result = await self._trainer(job)
        except (
            Exception
        ) as error:  # of any kind: last_verdict must not be that of an older training
            self.last_verdict = {"publish": False, "reason": "failed", "detail": str(error)}
            raise
        against = champion.artifact.version if champion else ""
        found = result.document(against)
        if result.blob is not None:
            found["then"] = await self._promotion.offer(result.blob, against)
        self.last_verdict = found
        return found


def _log_failure(task: asyncio.Task[dict[str, Any]]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("retraining failed: %s", error)
