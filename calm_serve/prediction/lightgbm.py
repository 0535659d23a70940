"""LightGBM over prompt and live state: P(success), answer length, correction of the analytic TTFT.

Boosters share one row layout (`COLUMNS`): numbers, presence of hashed words, live load, and the
SLM's index as a category. P(success) and answer length have one small booster each per SLM: the
effect of every word depends on the SLM, and one booster for all SLMs had a higher loss on the same
outcomes (decision 0009). These boosters read the prompt alone, so one call predicts for all SLMs.
The correction of TTFT is one booster over all SLMs and reads everything except the words. The prior
predicts where a head could not be trained, and for an SLM that the artifact does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

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
from calm_serve.prediction.single_row import (
    COLUMNS,
    FIRST_BUCKET,
    FIRST_LOAD,
    SLM_COLUMN,
    SingleRow,
    SparseRow,
    joined,
)
from calm_serve.types import (
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
Rows = NDArray[np.float32]
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

    def of_own(self, head: str, rows: Rows) -> Values:
        """Each row's output of its own SLM's booster, (n,) for n rows; NaN where there is none.

        An unknown `head` gives NaN everywhere.
        """
        found = np.full(len(rows), np.nan)
        columns = rows[:, SLM_COLUMN]
        for (booster_head, index), booster in self.own.items():
            own_rows = columns == index
            if booster_head == head and own_rows.any():
                found[own_rows] = booster.predict(rows[own_rows], num_threads=1)
        return found


class LightGBMPredictor:
    """Predictions from an artifact; `prior` predicts what the artifact does not.

    Not thread-safe: every call reuses one row. The router calls it from its one event loop; another
    thread needs a predictor of its own.
    """

    def __init__(self, artifact: Artifact, prior: Predictor) -> None:
        self.version = PredictorVersion(artifact.version)
        self._prior = prior
        heads = Heads(artifact)
        self._prompt_row, self._load_row = SparseRow(), SparseRow()  # with words; without
        self._own: SingleRow | None = None
        place: dict[tuple[str, int], slice] = {}
        if heads.own:
            keys = [own_head(head, artifact.slm_ids[index]) for head, index in heads.own]
            text, places = joined([artifact.boosters[key] for key in keys])
            self._own = SingleRow(_booster("of all SLMs", text), self._prompt_row)
            place = dict(zip(heads.own, places, strict=True))
        self._residual = heads.residual and SingleRow(heads.residual, self._load_row)
        self._known = {
            slm: (i, place.get((SUCCESS, i)), place.get((OUTPUT_TOKENS, i)))
            for i, slm in enumerate(artifact.slm_ids)
        }

    @classmethod
    def from_bytes(cls, blob: bytes, prior: Predictor) -> LightGBMPredictor:
        """Build from a serialised artifact (milliseconds). Raises KnowledgeError."""
        return cls(Artifact.from_bytes(blob), prior)

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        own: Sequence[float] = ()
        if self._own is not None:
            self._prompt_row.set_prompt(context.features.numbers, context.features.buckets)
            own = self._own.predict()
        self._load_row.set_prompt(context.features.numbers, ())
        return [
            self._predict_one(context, own, spec, state)
            for spec, state in zip(specs, states, strict=True)
        ]

    def of_prompt(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> dict[str, tuple[float | None, float | None]]:
        """P(success) and output tokens of each known SLM; None where the prior would predict.

        This part of a prediction needs no live state, so it can be made from the log.
        """
        if self._own is None:
            return {}
        self._prompt_row.set_prompt(numbers, buckets)
        own = self._own.predict()
        return {
            slm: (
                None if success_at is None else _sigmoid(sum(own[success_at])),
                None
                if tokens_at is None
                else max(math.expm1(sum(own[tokens_at])), MIN_OUTPUT_TOKENS),
            )
            for slm, (_, success_at, tokens_at) in self._known.items()
        }

    def _predict_one(
        self, context: RoutingContext, own: Sequence[float], spec: SLMSpec, state: SLMState
    ) -> Prediction:
        known = self._known.get(spec.id)
        if known is None:
            return self._prior.predict(context, [spec], [state])[0]
        index, success_at, tokens_at = known
        if success_at is None or tokens_at is None:
            prior = self._prior.predict(context, [spec], [state])[0]
        success = prior.success_ratio if success_at is None else _sigmoid(sum(own[success_at]))
        tokens = (
            prior.output_tokens
            if tokens_at is None
            else max(math.expm1(sum(own[tokens_at])), MIN_OUTPUT_TOKENS)
        )
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
            (residual,) = self._residual.predict()
            ttft_s *= math.exp(min(max(residual, -MAX_LOG_RESIDUAL), MAX_LOG_RESIDUAL))
        ttft_s *= state.ttft_ratio
        return ttft_s if state.residency is Residency.HOT else ttft_s + wake_s(spec, state)


def _sigmoid(value: float) -> float:
    """As in LightGBM: 0 where the exponential would overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value > MIN_LOGIT else 0.0


def outcome_rows(outcomes: Sequence[Outcome], slm_ids: Sequence[str]) -> Rows:
    """The rows of logged predictions, rebuilt from the log.

    An SLM outside `slm_ids` gets the category -1, which LightGBM treats as missing.
    """
    index = {slm: i for i, slm in enumerate(slm_ids)}
    rows: Rows = np.zeros((len(outcomes), COLUMNS), dtype=np.float32)
    for row, outcome in zip(rows, outcomes, strict=True):
        row[:FIRST_BUCKET] = outcome.features.numbers
        row[[FIRST_BUCKET + b for b in outcome.features.buckets]] = 1.0
        row[FIRST_LOAD:SLM_COLUMN] = outcome.decision.load_features
        row[SLM_COLUMN] = index.get(outcome.slm_id, -1)
    return rows


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
