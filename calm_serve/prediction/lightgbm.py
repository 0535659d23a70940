"""LightGBM over prompt and live state: P(success), answer length, correction of the analytic TTFT.

Boosters share one row layout (`COLUMNS`): numbers, presence of hashed words, live load, and the
SLM's index as a category. P(success) and answer length have one small booster each per SLM: the
effect of every word depends on the SLM, and one booster for all SLMs had a higher loss on the same
outcomes (decision 0009). These boosters read the prompt alone, so one call predicts for all SLMs.
The correction of TTFT is one booster over all SLMs and reads everything except the words. The prior
predicts where a head could not be trained, and for an SLM that the artifact does not know; its
P(success) is then at most the mean of those SLMs that have labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from calm_serve.config import SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.prediction.artifact import (
    OUTPUT_TOKENS,
    OWN_HEADS,
    SUCCESS,
    TTFT_RESIDUAL,
    Artifact,
    own_head,
)
from calm_serve.prediction.base import Predictor, load_vector
from calm_serve.prediction.latency import analytic_tpot_s, awake_ttft_s, energy_j, wake_s
from calm_serve.prediction.novelty import NoveltyDetector
from calm_serve.prediction.single_row import (
    BUCKET_OFFSET,
    COLUMNS,
    FIRST_BUCKET,
    FIRST_LOAD,
    SingleRow,
    SparseRow,
    joined,
)
from calm_serve.types import (
    Novelty,
    Outcome,
    Prediction,
    PredictorVersion,
    Residency,
    RoutingContext,
    SLMState,
)

# A factor of exp(3) = 20: a larger deviation of TTFT is an accident, not an effect of the load.
MAX_LOG_RESIDUAL = 3.0
MIN_OUTPUT_TOKENS = 1.0  # of a predicted answer
MIN_LOGIT = -700.0  # below it exp overflows, and the probability is 0
Rows: TypeAlias = (
    sparse.csr_matrix
)  # of COLUMNS columns, single precision; a prompt sets 1 % of them
Places = NDArray[np.int32]
Values = NDArray[np.float64]


class Heads:
    """The boosters of an artifact, for many rows of `COLUMNS` columns at once.

    A call uses one thread: with more, the slowest of such small calls takes a thousand times the
    median.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Parse the text models: about 1 ms each, so not on the event loop."""
        texts = artifact.boosters
        residual = texts.get(TTFT_RESIDUAL)
        self.residual = None if residual is None else _booster(TTFT_RESIDUAL, residual)
        self._starts = {
            index: np.array(start)
            for index, slm in enumerate(artifact.slm_ids)
            if (start := artifact.starts.get(slm)) is not None
        }
        self._tasks = artifact.pseudo_tasks
        self.own = {
            (head, index): _booster(own_head(head, slm), texts[own_head(head, slm)])
            for index, slm in enumerate(artifact.slm_ids)
            for head in OWN_HEADS
            if own_head(head, slm) in texts
        }

    def residuals(self, rows: Rows) -> Values | None:
        """Logarithms of the correction of TTFT, None when the artifact has none."""
        if self.residual is None:
            return None
        return np.asarray(self.residual.predict(rows, num_threads=1), dtype=np.float64)

    def success_logits(self, rows: Rows, slms: Places) -> Values:
        """Logit of each row's P(success), as of its own SLM; NaN where the SLM has no start."""
        groups = np.zeros(len(slms), dtype=np.int64)
        if self._tasks is not None and len(slms):
            groups = self._tasks.of_rows(rows)
        found = np.full(len(slms), np.nan)
        for index, start in self._starts.items():
            found[slms == index] = start[groups[slms == index]]
        added = self.of_own(SUCCESS, rows, slms)
        return np.where(np.isnan(added), found, found + added)

    def of_own(self, head: str, rows: Rows, slms: Places) -> Values:
        """Each row's sum of its own SLM's trees, (n,) for n rows; NaN where there is no booster.

        `slms` are the rows' indices in the artifact's `slm_ids`. An unknown `head` gives NaN
        everywhere.
        """
        found = np.full(len(slms), np.nan)
        for (booster_head, index), booster in self.own.items():
            own_rows = slms == index
            if booster_head == head and own_rows.any():
                found[own_rows] = booster.predict(rows[own_rows], raw_score=True, num_threads=1)
        return found


class LightGBMPredictor:
    """Predictions from an artifact; `prior` predicts what the artifact does not.

    Not thread-safe: every call reuses one row. The router calls it from its one event loop; another
    thread needs a predictor of its own.
    """

    def __init__(
        self, artifact: Artifact, prior: Predictor, tried: frozenset[str] = frozenset()
    ) -> None:
        """`tried`: SLMs of whose answers `prior` knows more than the fleet file states."""
        self.version = PredictorVersion(artifact.version)
        self._prior, self._tried = prior, tried
        heads = Heads(artifact)
        self._prompt_row, self._load_row = SparseRow(), SparseRow()  # with words; without
        self._own: SingleRow | None = None
        place: dict[tuple[str, int], int] = {}  # among the sums over a booster's outputs
        if heads.own:
            keys = [own_head(head, artifact.slm_ids[index]) for head, index in heads.own]
            text, places = joined([artifact.boosters[key] for key in keys])
            self._own = SingleRow(_booster("of all SLMs", text), self._prompt_row)
            self._first_outputs = [p.start for p in places]
            place = {key: number for number, key in enumerate(heads.own)}
        self._novelty = None if artifact.seen is None else NoveltyDetector(artifact.seen)
        self._residual = heads.residual and SingleRow(heads.residual, self._load_row)
        self._index = {slm: i for i, slm in enumerate(artifact.slm_ids)}
        self._places = [
            (place.get((SUCCESS, i)), place.get((OUTPUT_TOKENS, i)))
            for i in range(len(artifact.slm_ids))
        ]
        self._tasks = artifact.pseudo_tasks
        starts = [artifact.starts.get(slm) for slm in artifact.slm_ids]
        groups = 1 if self._tasks is None else len(self._tasks)
        # By pseudo-task: each SLM's start; None where the prior predicts.
        self._starts = [
            [None if s is None else s[group] for s in starts] for group in range(groups)
        ]

    @classmethod
    def from_bytes(cls, blob: bytes, prior: Predictor) -> LightGBMPredictor:
        """Build from a serialised artifact (milliseconds). Raises KnowledgeError."""
        return cls(Artifact.from_bytes(blob), prior)

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        numbers = context.features.numbers
        values = self._values(numbers, context.features.buckets)
        self._load_row.set_prompt(numbers, ())
        known = [success for success, _ in values if success is not None]
        # The prior is a statement, not evidence: it wins against no SLM that has labels.
        bound = sum(known) / len(known) if known else 1.0
        return [
            self._predict_one(context, values, spec, state, bound)
            for spec, state in zip(specs, states, strict=True)
        ]

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """Return how unlike the artifact's training prompts a prompt is; None without a bitmap."""
        return None if self._novelty is None else self._novelty.novelty(bits)

    def of_prompt(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> dict[str, tuple[float | None, float | None]]:
        """P(success) and output tokens of each known SLM; None where the prior would predict.

        This part of a prediction needs no live state, so it can be made from the log.
        """
        return dict(zip(self._index, self._values(numbers, buckets), strict=True))

    def _values(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> list[tuple[float | None, float | None]]:
        """P(success) and output tokens in the order of the artifact's SLMs."""
        sums: Sequence[float] = ()
        self._prompt_row.set_prompt(numbers, buckets)
        if self._own is not None:
            sums = np.add.reduceat(self._own.predict(), self._first_outputs).tolist()
        group = 0 if self._tasks is None else self._tasks.of_prompt(self._prompt_row)
        found: list[tuple[float | None, float | None]] = []
        for start, (success_at, tokens_at) in zip(self._starts[group], self._places, strict=True):
            success = tokens = None
            if start is not None:
                success = _sigmoid(start if success_at is None else start + sums[success_at])
            if tokens_at is not None:
                tokens = max(math.expm1(sums[tokens_at]), MIN_OUTPUT_TOKENS)
            found.append((success, tokens))
        return found

    def _predict_one(
        self,
        context: RoutingContext,
        values: Sequence[tuple[float | None, float | None]],
        spec: SLMSpec,
        state: SLMState,
        bound: float,
    ) -> Prediction:
        index = self._index.get(spec.id)
        success, tokens = (None, None) if index is None else values[index]
        if success is None or tokens is None:
            prior = self._prior.predict(context, [spec], [state])[0]
            if success is None:
                stated = prior.success_ratio
                success = stated if spec.id in self._tried else min(stated, bound)
            if index is None:
                return replace(prior, success_ratio=success)
            tokens = prior.output_tokens if tokens is None else tokens
        assert index is not None
        limit = context.max_output_tokens
        if limit is not None and tokens > limit:
            tokens = float(limit)
        return Prediction(
            spec.id,
            success,
            tokens,
            self._ttft_s(context, index, spec, state),
            analytic_tpot_s(spec, state),
            energy_j(spec, state, tokens),
            state.ttft_spread,
            state.e2e_spread,
        )

    def _ttft_s(self, context: RoutingContext, index: int, spec: SLMSpec, state: SLMState) -> float:
        # The corrections were learned from awake SLMs and must not scale the wake-up time.
        ttft_s = awake_ttft_s(spec, state, context.prompt_tokens, state.cached_prefix_ratio)
        if self._residual is not None:
            self._load_row.set_candidate(index, load_vector(state, ttft_s))
            residual = self._residual.predict().item()
            ttft_s *= math.exp(min(max(residual, -MAX_LOG_RESIDUAL), MAX_LOG_RESIDUAL))
        ttft_s *= state.ttft_ratio
        return ttft_s if state.residency is Residency.HOT else ttft_s + wake_s(spec, state)


def _sigmoid(value: float) -> float:
    """As in LightGBM: 0 where the exponential would overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value > MIN_LOGIT else 0.0


def probabilities(logits: Values) -> Values:
    """Probabilities from logits; NaN stays NaN."""
    found: Values = 1.0 / (1.0 + np.exp(-np.maximum(logits, MIN_LOGIT)))
    return found


def slm_places(outcomes: Sequence[Outcome], slm_ids: Sequence[str]) -> Places:
    """The index of each outcome's SLM in `slm_ids`, -1 for another one."""
    index = {slm: i for i, slm in enumerate(slm_ids)}
    return np.array([index.get(o.slm_id, -1) for o in outcomes], dtype=np.int32)


def prompt_rows(outcomes: Sequence[Outcome]) -> Rows:
    """Numbers and words of logged prompts, as the SLMs' own boosters read them."""
    starts = np.zeros(len(outcomes) + 1, dtype=np.int32)
    starts[1:] = np.cumsum([FIRST_BUCKET + len(o.features.buckets) for o in outcomes])
    values = np.ones(starts[-1], dtype=np.float32)
    columns = np.zeros(starts[-1], dtype=np.int32)
    numbers = np.arange(FIRST_BUCKET, dtype=np.int32)
    for start, end, outcome in zip(starts, starts[1:], outcomes, strict=False):
        first_word = start + FIRST_BUCKET
        values[start:first_word] = outcome.features.numbers
        columns[start:first_word] = numbers
        columns[first_word:end] = outcome.features.buckets
        columns[first_word:end] += BUCKET_OFFSET
    return sparse.csr_matrix((values, columns, starts), shape=(len(outcomes), COLUMNS))


def load_rows(outcomes: Sequence[Outcome], slm_ids: Sequence[str]) -> Rows:
    """Numbers, load and SLM of logged predictions: words have no effect on prefill time.

    An SLM outside `slm_ids` gets the category -1, which LightGBM treats as missing.
    """
    kept = [*range(FIRST_BUCKET), *range(FIRST_LOAD, COLUMNS)]
    values = np.empty((len(outcomes), len(kept)), dtype=np.float32)
    for row, outcome in zip(values, outcomes, strict=True):
        row[:FIRST_BUCKET] = outcome.features.numbers
        row[FIRST_BUCKET:-1] = outcome.decision.load_features
    values[:, -1] = slm_places(outcomes, slm_ids)
    columns = np.tile(np.array(kept, dtype=np.int32), len(outcomes))
    starts = np.arange(len(outcomes) + 1, dtype=np.int32) * len(kept)
    return sparse.csr_matrix((values.ravel(), columns, starts), shape=(len(outcomes), COLUMNS))


def _booster(head: str, text: str) -> lgb.Booster:
    try:
        booster = lgb.Booster(model_str=text)
    except lgb.basic.LightGBMError as error:
        raise KnowledgeError(f"predictor head {head!r}: {error}") from error
    if booster.num_feature() != COLUMNS:
        raise KnowledgeError(
            f"predictor head {head!r} has {booster.num_feature()} features, expected {COLUMNS}"
        )
    return booster
