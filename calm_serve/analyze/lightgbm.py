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

from calm_serve.analyze.features import BUCKETS, LOAD_NAMES, NUMBER_NAMES
from calm_serve.analyze.latency import analytic_tpot_s, analytic_ttft_s, energy_j
from calm_serve.analyze.predictor import Predictor, live_load
from calm_serve.config import SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.types import Outcome, Prediction, Residency, RoutingContext, SLMState

FORMAT = 1
FIRST_BUCKET = len(NUMBER_NAMES)
FIRST_LOAD = FIRST_BUCKET + BUCKETS
SLM_COLUMN = FIRST_LOAD + len(LOAD_NAMES)
COLUMNS = SLM_COLUMN + 1
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
    """The boosters of an artifact, ready to run on rows of `COLUMNS` columns.

    One thread each: with more, the tail of a call this small is a thousand times its median.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Parse the text models: about 1 ms each, so not on the event loop."""
        texts = artifact.boosters
        self._shared = {h: _booster(h, texts[h]) for h in SHARED_HEADS if h in texts}
        self._success = {
            index: _booster(success_head(slm), texts[success_head(slm)])
            for index, slm in enumerate(artifact.slm_ids)
            if success_head(slm) in texts
        }

    def run(self, head: str, rows: Rows) -> Values | None:
        """LightGBM's own output for a shared head, None when the artifact lacks it."""
        booster = self._shared.get(head)
        if booster is None:
            return None
        return np.asarray(booster.predict(rows, num_threads=1), dtype=np.float64)

    def success(self, rows: Rows) -> Values:
        """P(success) of each row's own SLM by its own booster; NaN where there is none."""
        found = np.full(len(rows), np.nan)
        columns = rows[:, SLM_COLUMN]
        for index, booster in self._success.items():
            mine = columns == index
            if mine.any():
                found[mine] = booster.predict(rows[mine], num_threads=1)
        return found


class LightGBMPredictor:
    """Predictions from an artifact; `prior` answers for what the artifact does not know.

    Not safe for threads: the row matrix is reused by every call. The router calls it from its one
    event loop; anybody else builds a predictor of their own.
    """

    def __init__(self, artifact: Artifact, prior: Predictor) -> None:
        self.version = artifact.version
        self._prior = prior
        self._heads = Heads(artifact)
        self._index = {slm: i for i, slm in enumerate(artifact.slm_ids)}
        self._rows: Rows = np.zeros((len(self._index), COLUMNS), dtype=np.float32)

    @classmethod
    def from_bytes(cls, blob: bytes, prior: Predictor) -> LightGBMPredictor:
        """Build from a serialised artifact (milliseconds). Raises KnowledgeError."""
        return cls(Artifact.from_bytes(blob), prior)

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order; the shared heads take all rows in one call."""
        predictions = self._prior.predict(context, specs, states)
        known = [i for i, spec in enumerate(specs) if spec.id in self._index]
        if not known:
            return predictions
        # A sleeping SLM is scored as if awake and its wake-up is added afterwards: the correction
        # was learned on answers of awake SLMs and must not scale the time to start one.
        awake = [_awake(states[i]) for i in known]
        rows = self._fill(context, [specs[i] for i in known], awake)
        success = self._heads.success(rows)
        log_tokens = self._heads.run("output_tokens", rows)
        residual = self._heads.run("ttft_residual", rows)
        for row, i in enumerate(known):
            predictions[i] = _corrected(
                predictions[i],
                context,
                (specs[i], states[i], awake[row]),
                None if math.isnan(success[row]) else float(success[row]),
                None if log_tokens is None else float(log_tokens[row]),
                None if residual is None else float(residual[row]),
            )
        return predictions

    def _fill(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> Rows:
        rows = self._rows[: len(specs)]
        first = rows[0]
        first[:] = 0.0
        first[:FIRST_BUCKET] = context.numbers
        first[[FIRST_BUCKET + b for b in context.buckets]] = 1.0
        rows[1:] = first
        for row, spec, state in zip(rows, specs, states, strict=True):
            row[FIRST_LOAD:SLM_COLUMN] = live_load(context, spec, state)
            row[SLM_COLUMN] = self._index[spec.id]
        return rows


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


def _corrected(
    prior: Prediction,
    context: RoutingContext,
    place: tuple[SLMSpec, SLMState, SLMState],
    success: float | None,
    log_tokens: float | None,
    residual: float | None,
) -> Prediction:
    spec, state, awake = place
    tokens = prior.output_tokens if log_tokens is None else max(math.expm1(log_tokens), 1.0)
    if context.max_output_tokens is not None:
        tokens = min(tokens, float(context.max_output_tokens))
    ttft = analytic_ttft_s(spec, awake, context.prompt_tokens, state.cached_prefix_ratio)
    wake = 0.0
    if awake is not state:
        asleep = analytic_ttft_s(spec, state, context.prompt_tokens, state.cached_prefix_ratio)
        wake = asleep - ttft
    if residual is not None:
        ttft *= math.exp(min(max(residual, -MAX_LOG_RESIDUAL), MAX_LOG_RESIDUAL))
    return Prediction(
        slm_id=spec.id,
        success_ratio=prior.success_ratio if success is None else success,
        output_tokens=tokens,
        ttft_s=ttft + wake,
        tpot_s=analytic_tpot_s(spec, state),
        energy_j=energy_j(spec, state, tokens),
    )


def _awake(state: SLMState) -> SLMState:
    if state.residency is Residency.HOT:
        return state
    return replace(state, residency=Residency.HOT)


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
