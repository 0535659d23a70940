"""LightGBM over prompt and live state: P(success), answer length, correction of the TTFT model.

Boosters share one row layout (`COLUMNS`): numbers, presence of hashed words, live load, and the
SLM's index as a category. Answer length and TTFT are one booster each over all SLMs. P(success) is
one small booster per SLM: which words an SLM is good at is an interaction of everything with the
SLM, and one booster for all was worse at it on the same outcomes. A head that could not be
trained is absent, and the prior answers for it; so it does for an SLM that was never seen.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from calm_serve.analyze.features import BUCKETS, LOAD_NAMES, NUMBER_NAMES, load_vector
from calm_serve.analyze.latency import analytic_tpot_s, analytic_ttft_s, energy_j
from calm_serve.analyze.one_row import (
    COLUMNS,
    FIRST_BUCKET,
    FIRST_LOAD,
    SLM_COLUMN,
    OneRow,
    SparseRow,
)
from calm_serve.analyze.predictor import Predictor
from calm_serve.config import SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.types import Outcome, Prediction, Residency, RoutingContext, SLMState

FORMAT = 1
# exp(3) is a factor of 20: beyond it an observation is an accident, not a property of the load.
MAX_LOG_RESIDUAL = 3.0
SHARED_HEADS = ("output_tokens", "ttft_residual")

Rows = NDArray[np.float32]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One trained predictor as it is stored and sent: plain data, JSON inside zlib."""

    version: str
    slm_ids: tuple[str, ...]  # the category of an SLM is its index here
    boosters: Mapping[str, str]  # head, or success_head(slm), to a text model
    metrics: Mapping[str, Any]
    trained_on: int  # labelled outcomes
    created_at: float  # Unix time in seconds

    def to_bytes(self) -> bytes:
        """Serialise; equal artifacts give equal bytes."""
        data = {"format": FORMAT, "features": _layout(), **asdict(self)}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return zlib.compress(text.encode(), 6)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Artifact:
        """Read what `to_bytes` wrote. Raises KnowledgeError for anything else."""
        try:
            data = json.loads(zlib.decompress(blob))
            if data["format"] != FORMAT:
                raise KnowledgeError(f"predictor format {data['format']!r}, expected {FORMAT}")
            if data["features"] != _layout():
                raise KnowledgeError("the predictor was trained on another feature layout")
            return cls(
                version=str(data["version"]),
                slm_ids=tuple(map(str, data["slm_ids"])),
                boosters={str(k): str(v) for k, v in data["boosters"].items()},
                metrics=dict(data["metrics"]),
                trained_on=int(data["trained_on"]),
                created_at=float(data["created_at"]),
            )
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KnowledgeError(f"not a predictor artifact: {error!r}") from error


def load_artifact(path: Path) -> Artifact:
    """Read an artifact file. Raises KnowledgeError with the file's name."""
    try:
        return Artifact.from_bytes(path.read_bytes())
    except OSError as error:
        raise KnowledgeError(f"{path.name}: cannot be read: {error.strerror}") from error
    except KnowledgeError as error:
        raise KnowledgeError(f"{path.name}: {error.message}") from error


def success_head(slm_id: str) -> str:
    """Key of an SLM's P(success) booster in `Artifact.boosters`."""
    return f"success:{slm_id}"


class Heads:
    """The boosters of an artifact, for many rows of `COLUMNS` columns at once.

    One thread each: with more, the tail of a call this small is a thousand times its median.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Parse the text models: about 1 ms each, so not on the event loop."""
        texts = artifact.boosters
        self.shared = {h: _booster(h, texts[h]) for h in SHARED_HEADS if h in texts}
        self.by_slm = {
            index: _booster(success_head(slm), texts[success_head(slm)])
            for index, slm in enumerate(artifact.slm_ids)
            if success_head(slm) in texts
        }

    def run(self, head: str, rows: Rows) -> Values | None:
        """LightGBM's own output for a shared head, None when the artifact lacks it."""
        booster = self.shared.get(head)
        if booster is None:
            return None
        return np.asarray(booster.predict(rows, num_threads=1), dtype=np.float64)

    def success(self, rows: Rows) -> Values:
        """P(success) of each row's own SLM by its own booster; NaN where there is none."""
        found = np.full(len(rows), np.nan)
        columns = rows[:, SLM_COLUMN]
        for index, booster in self.by_slm.items():
            mine = columns == index
            if mine.any():
                found[mine] = booster.predict(rows[mine], num_threads=1)
        return found


class LightGBMPredictor:
    """Predictions from an artifact; `prior` answers for what the artifact does not know.

    Not safe for threads: one row is reused by every call. The router calls it from its one event
    loop; anybody else builds a predictor of their own.
    """

    def __init__(self, artifact: Artifact, prior: Predictor) -> None:
        self.version = artifact.version
        self._prior = prior
        self._row = SparseRow()
        heads = Heads(artifact)
        shared = {h: OneRow(b, self._row) for h, b in heads.shared.items()}
        self._log_tokens, self._residual = (shared.get(h) for h in SHARED_HEADS)
        success = {i: OneRow(b, self._row) for i, b in heads.by_slm.items()}
        self._known = {slm: (i, success.get(i)) for i, slm in enumerate(artifact.slm_ids)}

    @classmethod
    def from_bytes(cls, blob: bytes, prior: Predictor) -> LightGBMPredictor:
        """Build from a serialised artifact (milliseconds). Raises KnowledgeError."""
        return cls(Artifact.from_bytes(blob), prior)

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        self._row.set_prompt(context.numbers, context.buckets)
        return [
            self._predict_one(context, spec, state)
            for spec, state in zip(specs, states, strict=True)
        ]

    def _predict_one(self, context: RoutingContext, spec: SLMSpec, state: SLMState) -> Prediction:
        known = self._known.get(spec.id)
        if known is None:
            return self._prior.predict(context, [spec], [state])[0]
        index, success = known
        # A sleeping SLM is scored as if awake and its wake-up is added afterwards: the correction
        # was learned on answers of awake SLMs and must not scale the time to start one.
        prompt_tokens, cached_ratio = context.prompt_tokens, state.cached_prefix_ratio
        awake, wake_s = state, 0.0
        if state.residency is not Residency.HOT:
            awake = replace(state, residency=Residency.HOT)
        ttft_s = analytic_ttft_s(spec, awake, prompt_tokens, cached_ratio)
        if awake is not state:
            wake_s = analytic_ttft_s(spec, state, prompt_tokens, cached_ratio) - ttft_s
        self._row.set_candidate(index, load_vector(spec, awake, ttft_s))
        if self._residual is not None:
            residual = self._residual.predict()
            ttft_s *= math.exp(min(max(residual, -MAX_LOG_RESIDUAL), MAX_LOG_RESIDUAL))
        if success is None or self._log_tokens is None:
            prior = self._prior.predict(context, [spec], [state])[0]
        tokens = (
            prior.output_tokens
            if self._log_tokens is None
            else max(math.expm1(self._log_tokens.predict()), 1.0)
        )
        if context.max_output_tokens is not None:
            tokens = min(tokens, float(context.max_output_tokens))
        return Prediction(
            slm_id=spec.id,
            success_ratio=prior.success_ratio if success is None else success.predict(),
            output_tokens=tokens,
            ttft_s=ttft_s + wake_s,
            tpot_s=analytic_tpot_s(spec, state),
            energy_j=energy_j(spec, state, tokens),
        )


def outcome_rows(outcomes: Sequence[Outcome], slm_ids: Sequence[str]) -> Rows:
    """The rows that were predicted from, rebuilt from the log.

    An SLM outside `slm_ids` gets the category -1, which LightGBM treats as missing.
    """
    index = {slm: i for i, slm in enumerate(slm_ids)}
    rows: Rows = np.zeros((len(outcomes), COLUMNS), dtype=np.float32)
    for row, outcome in zip(rows, outcomes, strict=True):
        row[:FIRST_BUCKET] = outcome.numbers
        row[[FIRST_BUCKET + b for b in outcome.buckets]] = 1.0
        row[FIRST_LOAD:SLM_COLUMN] = outcome.load
        row[SLM_COLUMN] = index.get(outcome.slm_id, -1)
    return rows


def fits_layout(outcome: Outcome) -> bool:
    """Whether the outcome was logged under the present feature layout."""
    return (
        len(outcome.numbers) == len(NUMBER_NAMES)
        and len(outcome.load) == len(LOAD_NAMES)
        and all(0 <= b < BUCKETS for b in outcome.buckets)
    )


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


def _layout() -> dict[str, Any]:
    return {"numbers": list(NUMBER_NAMES), "buckets": BUCKETS, "load": list(LOAD_NAMES)}
