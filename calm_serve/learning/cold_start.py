"""P(success) of cold-start SLMs: fitted from the fleet file's examples, then from first answers.

A champion that was trained before an SLM joined predicts only the metadata prior for it: one number
for every prompt without a marker. The next champion needs hundreds of labels and minutes. Because
P(success) has one small booster per SLM, the booster of a cold-start SLM can be fitted alone. The
first fit uses the prompts that the fleet file lists as examples: the SLM's own are labelled with
its `skill_quality`, those of other SLMs with its `quality`. Each time the number of its labelled
answers has doubled, another fit uses these as well. For an SLM without examples, the prompts that a
rule sends to it are its examples.

The artifact contains only cold-start SLMs and replaces the champion's prior for them
(`with_cold_start`). No other SLM's prediction changes, and the artifact is unused once a champion
knows the SLM. There is no promotion test: recalibration (`learning/quality.py`) corrects a wrong
example within tens of answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from calm_serve.config import Fleet, SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.learning.labels import quality_label
from calm_serve.learning.training import fit_heads
from calm_serve.prediction import (
    LABELLED,
    LOAD_NAMES,
    OWN_HEADS,
    Artifact,
    fits_layout,
    known_slms,
    own_head,
)
from calm_serve.protocol.topics import PublishedPredictor
from calm_serve.requests import ContextBuilder, Overrides, fill_features, parse_chat
from calm_serve.types import (
    FEEDBACK,
    DecisionPath,
    DecisionSummary,
    EngineFacts,
    Outcome,
    QualitySignal,
    Task,
    Timing,
)

# `load_tests paper` notices a change of these two (new_slm_adoption_requests).
FIRST_LABELS = 10  # labelled answers before the second fit; each further fit needs twice as many
MAX_EXAMPLES = 512  # of all SLMs together; bounds the time of a fit
# Bounds of memory. The next champion knows an SLM with so many answers.
MAX_ANSWERS = 640  # kept of one SLM
MAX_COLD_START_SLMS = 16
SEED = 0  # of the boosters: equal jobs give equal artifacts

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _ColdStartSLM:
    has_examples: bool
    answers: OrderedDict[str, Outcome] = field(default_factory=OrderedDict)
    usable: int = 0  # answers that a fit can use
    due_at: int = 0  # usable answers at which the next fit is due

    def is_usable(self, outcome: Outcome) -> bool:
        """Whether a fit can use an answer."""
        return quality_label(outcome.signals) is not None or self.is_example(outcome)

    def is_example(self, outcome: Outcome) -> bool:
        """Whether an unlabelled answer counts as an example, because a rule named the SLM."""
        labelled = quality_label(outcome.signals) is not None
        return not self.has_examples and not labelled and outcome.decision.path == DecisionPath.RULE


@dataclass(frozen=True, slots=True)
class ColdStartJob:
    """Input of `fit_cold_start`."""

    rows: tuple[tuple[str, tuple[Outcome, ...]], ...]  # SLM -> outcomes of examples and answers
    labelled: tuple[tuple[str, int], ...]  # SLM -> labelled answers among them


class ColdStartSLMs:
    """Answers of the SLMs that the champion does not know. Used from one event loop; bounded."""

    def __init__(self) -> None:
        self._fleet: Fleet | None = None
        self._new: dict[str, _ColdStartSLM] = {}

    def follow(self, fleet: Fleet, known: Collection[str]) -> None:
        """Take the fleet and the ids that the champion knows; its other SLMs are new."""
        self._fleet = fleet
        specs = [s for s in fleet.slms if s.id not in known][:MAX_COLD_START_SLMS]
        self._new = {s.id: self._new.get(s.id) or _ColdStartSLM(bool(s.examples)) for s in specs}

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count answers of cold-start SLMs; those of other SLMs are ignored."""
        for outcome in outcomes:
            new = self._new.get(outcome.slm_id)
            if new is None or outcome.status != "ok" or not fits_layout(outcome):
                continue
            if outcome.outcome_id not in new.answers:
                new.usable += new.is_usable(outcome)
                new.answers[outcome.outcome_id] = outcome
            if len(new.answers) > MAX_ANSWERS:
                new.answers.popitem(last=False)

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count feedback on an answer of a cold-start SLM."""
        for new in self._new.values():
            if (outcome := new.answers.get(outcome_id)) is not None:
                before = new.is_usable(outcome)
                outcome = replace(outcome, signals=(*outcome.signals, *signals))
                new.answers[outcome_id] = outcome
                new.usable += new.is_usable(outcome) - before

    def job(self) -> ColdStartJob | None:
        """The fit that is due, of all cold-start SLMs at once; None when none is due."""
        if self._fleet is None or all(n.usable < n.due_at for n in self._new.values()):
            return None
        rows, counts = [], []
        for slm_id, new in self._new.items():
            spec = next(s for s in self._fleet.slms if s.id == slm_id)
            new.due_at = max(2 * new.usable, FIRST_LABELS)
            answers = new.answers.values()
            assumed = (QualitySignal(FEEDBACK, spec.priors.skill_quality),)
            by_rule = [replace(o, signals=assumed) for o in answers if new.is_example(o)]
            labelled = [o for o in answers if quality_label(o.signals)]
            rows.append((slm_id, (*example_outcomes(self._fleet, spec), *by_rule, *labelled)))
            counts.append((slm_id, len(labelled)))
        return ColdStartJob(tuple(rows), tuple(counts))


def example_outcomes(fleet: Fleet, spec: SLMSpec) -> list[Outcome]:
    """The examples of all SLMs as outcomes of `spec`, labelled with its priors."""
    builder, priors, found = ContextBuilder(fleet), spec.priors, []
    texts = [(s.id, text) for s in fleet.slms for text in s.examples][:MAX_EXAMPLES]
    for number, (slm_id, text) in enumerate(texts):
        request = parse_chat({"messages": [{"role": "user", "content": text}]})
        context = builder.build(request, Overrides(), f"example-{number}")
        fill_features(context, request)
        quality = priors.skill_quality if slm_id == spec.id else priors.quality
        found.append(
            Outcome(
                outcome_id=context.request_id,
                slm_id=spec.id,
                features=context.features,
                timing=Timing(cold=True),  # keeps it out of the TTFT residuals
                engine=EngineFacts(output_tokens=max(round(priors.output_tokens), 1)),
                decision=DecisionSummary(load_features=(0.0,) * len(LOAD_NAMES)),
                signals=(QualitySignal(FEEDBACK, quality),),
            )
        )
    return found


def fit_cold_start(job: ColdStartJob, created_at: float) -> Artifact | None:
    """Fit an artifact of the cold-start SLMs alone; None when no booster can be fitted.

    Blocks for about 0.1 s per SLM. Equal jobs give equal boosters. Raises KnowledgeError.
    """
    boosters: dict[str, str] = {}
    starts: dict[str, tuple[float, ...]] = {}
    for slm_id, rows in job.rows:
        if rows:
            heads = fit_heads(rows, (slm_id,), SEED, grouped=False)
            own = {own_head(head, slm_id) for head in OWN_HEADS}
            boosters |= {key: text for key, text in heads.boosters.items() if key in own}
            starts |= heads.starts
    if not boosters and not starts:
        return None
    artifact = Artifact(
        version="",
        slm_ids=tuple(slm_id for slm_id, _ in job.rows),
        boosters=boosters,
        metrics={LABELLED: dict(job.labelled)},
        trained_on=sum(len(rows) for _, rows in job.rows),
        created_at=created_at,
        starts=starts,
    )
    return replace(artifact, version=f"new-{artifact.content_hash()}")


class ColdStartTrainer:
    """Fits and publishes boosters of cold-start SLMs; one fit at a time, in a thread.

    Used from one event loop. `publish` takes the boosters, or None once the champion knows every
    SLM; `clock` returns Unix seconds. Without a champion all SLMs have the prior, and none is
    fitted.
    """

    def __init__(
        self, publish: Callable[[PublishedPredictor | None], None], clock: Callable[[], float]
    ) -> None:
        self._publish, self._clock = publish, clock
        self._slms = ColdStartSLMs()
        self._new_ids: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes with their signals."""
        if self._new_ids:
            self._slms.observe(outcomes)

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count feedback on an answer."""
        if self._new_ids:
            self._slms.feedback(outcome_id, signals)

    async def fit_if_due(
        self, fleet: Fleet, joined: Sequence[SLMSpec], champion: Artifact | None
    ) -> None:
        """Follow fleet and champion; fit and publish when a fit is due."""
        if self._lock.locked():
            return  # a fit is running; the next batch of outcomes calls this again within seconds
        async with self._lock:
            # Nothing is predicted of SLMs that embed or rerank.
            specs = tuple(s for s in (*fleet.slms, *joined) if s.task is Task.GENERATE)
            ids = frozenset(s.id for s in specs)
            new = ids - known_slms(champion) if champion is not None else frozenset[str]()
            if new != self._new_ids:
                whole = fleet.model_copy(update={"slms": specs})
                self._slms.follow(whole, ids - new)
                if not new:
                    self._publish(None)
                self._new_ids = new
            job = self._slms.job() if new else None
            if job is None:
                return
            try:
                artifact = await asyncio.to_thread(fit_cold_start, job, self._clock())
            except KnowledgeError as error:
                _log.warning("cold-start SLMs not fitted: %s", error.message)
                return
            if artifact is not None:
                self._publish(
                    PublishedPredictor(artifact.version, "cold_start", artifact.to_bytes())
                )
                _log.info("cold-start SLMs %s fitted as %s", sorted(new), artifact.version)
