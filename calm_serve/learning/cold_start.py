"""P(success) of SLMs that no champion knows: from their examples, then from their first answers.

A champion that was trained before an SLM came leaves it to the metadata prior, which is one number
for every prompt without a marker, and another champion takes hundreds of labels and minutes. But
P(success) is one small booster per SLM, so a cold-start SLM's can be fitted alone: at first on the
prompts that the fleet file names as examples (its own succeed at its `skill_quality`, those of
others at its `quality`), then with its labelled answers too, whenever these have doubled. Where it
names none, the prompts that a rule gives it stand in for them: a rule promises as much.

The artifact holds cold-start SLMs alone and stands in for the champion's prior (`with_cold_start`).
So no other SLM's prediction changes, and it is unused once a champion knows the SLM. It needs no
promotion test: `learning/quality.py` corrects a wrong example within tens of answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
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
    Timing,
)

FIRST_LABELS = 10  # answers before the second fit; every further one needs twice as many
MAX_ANSWERS = 640  # of one SLM; by then a retraining has learned it
MAX_SLMS = 16
MAX_EXAMPLES = 512  # of all SLMs
SEED = 0


@dataclass(slots=True)
class _ColdStartSLM:
    has_examples: bool
    answers: OrderedDict[str, Outcome] = field(default_factory=OrderedDict)
    count: int = 0  # answers that say something
    due_at: int = 0

    def says(self, outcome: Outcome) -> bool:
        """Whether there is anything to learn from an answer."""
        return quality_label(outcome.signals) is not None or self.is_example(outcome)

    def is_example(self, outcome: Outcome) -> bool:
        """Whether a rule's word is all there is."""
        labelled = quality_label(outcome.signals) is not None
        return not self.has_examples and not labelled and outcome.decision.path == DecisionPath.RULE


@dataclass(frozen=True, slots=True)
class Job:
    """What `fit` needs: cold-start SLMs with the outcomes of their examples and answers."""

    rows: tuple[tuple[str, tuple[Outcome, ...]], ...]
    labelled: tuple[tuple[str, int], ...]  # answers among them


class ColdStartSLMs:
    """Which SLMs are new, and what is known of them. Used from one event loop; bounded."""

    def __init__(self) -> None:
        self._fleet: Fleet | None = None
        self._new: dict[str, _ColdStartSLM] = {}

    def follow(self, fleet: Fleet, known: Collection[str]) -> None:
        """Take the fleet and the SLMs that the champion knows; the others are cold-start SLMs."""
        self._fleet = fleet
        specs = [s for s in fleet.slms if s.id not in known][:MAX_SLMS]
        self._new = {s.id: self._new.get(s.id) or _ColdStartSLM(bool(s.examples)) for s in specs}

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count answers of cold-start SLMs; those of other SLMs are ignored."""
        for outcome in outcomes:
            new = self._new.get(outcome.slm_id)
            if new is None or outcome.status != "ok" or not fits_layout(outcome):
                continue
            if outcome.outcome_id not in new.answers:
                new.count += new.says(outcome)
                new.answers[outcome.outcome_id] = outcome
            if len(new.answers) > MAX_ANSWERS:
                new.answers.popitem(last=False)

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count the signals of a cold-start SLM's answer."""
        for new in self._new.values():
            if (outcome := new.answers.get(outcome_id)) is not None:
                before = new.says(outcome)
                outcome = replace(outcome, signals=(*outcome.signals, *signals))
                new.answers[outcome_id] = outcome
                new.count += new.says(outcome) - before

    def job(self) -> Job | None:
        """The fit that is due, for all cold-start SLMs at once; None without new answers."""
        if self._fleet is None or all(n.count < n.due_at for n in self._new.values()):
            return None
        rows, counts = [], []
        for slm_id, new in self._new.items():
            spec = next(s for s in self._fleet.slms if s.id == slm_id)
            new.due_at = max(2 * new.count, FIRST_LABELS)
            answers = new.answers.values()
            promised = (QualitySignal(FEEDBACK, spec.priors.skill_quality),)
            named = [replace(o, signals=promised) for o in answers if new.is_example(o)]
            labelled = [o for o in answers if quality_label(o.signals)]
            rows.append((slm_id, (*example_outcomes(self._fleet, spec), *named, *labelled)))
            counts.append((slm_id, len(labelled)))
        return Job(tuple(rows), tuple(counts))


def example_outcomes(fleet: Fleet, spec: SLMSpec) -> list[Outcome]:
    """The examples of all SLMs as if the SLM of `spec` had answered them with its priors."""
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
                timing=Timing(cold=True),  # it was not timed
                engine=EngineFacts(output_tokens=max(round(priors.output_tokens), 1)),
                decision=DecisionSummary(load_features=(0.0,) * len(LOAD_NAMES)),
                signals=(QualitySignal(FEEDBACK, quality),),
            )
        )
    return found


def fit(job: Job, created_at: float) -> Artifact | None:
    """An artifact of the cold-start SLMs, in about 0.1 s each; None without anything to learn.

    Equal jobs give equal boosters.
    """
    boosters: dict[str, str] = {}
    for slm_id, rows in job.rows:
        heads = fit_heads(rows, (slm_id,), SEED) if rows else {}
        own = {own_head(head, slm_id) for head in OWN_HEADS}
        boosters |= {key: text for key, text in heads.items() if key in own}
    if not boosters:
        return None
    content = json.dumps(boosters, sort_keys=True).encode()
    return Artifact(
        version=f"new-{hashlib.sha256(content).hexdigest()[:12]}",
        slm_ids=tuple(slm_id for slm_id, _ in job.rows),
        boosters=boosters,
        metrics={LABELLED: dict(job.labelled)},
        trained_on=sum(len(rows) for _, rows in job.rows),
        created_at=created_at,
    )


_log = logging.getLogger(__name__)


class ColdStartTrainer:
    """Used from one event loop; fits happen in a thread, one at a time.

    `publish` gets the boosters, or None once no SLM is new any more; `clock` returns Unix
    seconds. Without a champion nobody is new: there is nobody who knows the others either.
    """

    def __init__(
        self, publish: Callable[[PublishedPredictor | None], None], clock: Callable[[], float]
    ) -> None:
        self._publish, self._clock = publish, clock
        self._slms = ColdStartSLMs()
        self._new: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes with their signals."""
        if self._new:
            self._slms.observe(outcomes)

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count the signals of an answer."""
        if self._new:
            self._slms.feedback(outcome_id, signals)

    async def fit_if_due(
        self, fleet: Fleet, joined: Sequence[SLMSpec], champion: Artifact | None
    ) -> None:
        """Follow fleet and champion, fit what is due and publish it; cheap when nothing is."""
        if self._lock.locked():
            return  # the next batch comes within seconds
        async with self._lock:
            specs = (*fleet.slms, *joined)
            ids = frozenset(s.id for s in specs)
            new = ids - known_slms(champion) if champion is not None else frozenset[str]()
            if new != self._new:
                whole = fleet.model_copy(update={"slms": specs})
                self._slms.follow(whole, ids - new)
                if not new:
                    self._publish(None)
                self._new = new
            job = self._slms.job() if new else None
            if job is None:
                return
            try:
                artifact = await asyncio.to_thread(fit, job, self._clock())
            except KnowledgeError as error:
                _log.warning("cold-start SLMs not learned: %s", error.message)
                return
            if artifact is not None:
                self._publish(
                    PublishedPredictor(artifact.version, "cold_start", artifact.to_bytes())
                )
                _log.info("cold-start SLMs %s learned as %s", sorted(new), artifact.version)
