"""Predictions for SLMs that the champion does not know, from boosters of their own.

They stand in for the champion's prior, so no other SLM's prediction changes; how they are trained
is in `learning/cold_start.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calm_serve.config import SLMSpec
from calm_serve.prediction.artifact import OWN_HEADS, Artifact, own_head
from calm_serve.prediction.base import Predictor
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.types import Prediction, PredictorVersion, RoutingContext, SLMState

LABELLED = "labelled_answers"  # of each SLM, among an artifact's metrics

# P(success) is raised by so many standard errors of a rate after this many answers: what is not
# known yet is tried where it may well be best, and nowhere else (upper confidence bounds; Auer,
# Journal of Machine Learning Research 3, 2002). The examples count as the first answers.
OPTIMISM, EXAMPLE_ANSWERS = 1.0, 8.0


class UcbPredictor:
    """Predictions of cold-start SLMs with an upper confidence bound for P(success)."""

    def __init__(self, artifact: Artifact, prior: Predictor) -> None:
        self.version = PredictorVersion(cold_start=artifact.version)
        self._inner = LightGBMPredictor(artifact, prior)
        answers = artifact.metrics[LABELLED]
        self._spread = {
            slm: OPTIMISM / math.sqrt(EXAMPLE_ANSWERS + answers[slm])
            for slm in known_slms(artifact)
        }

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        return [
            replace(p, success_ratio=min(p.success_ratio + self._hope(p), 1.0))
            for p in self._inner.predict(context, specs, states)
        ]

    def _hope(self, prediction: Prediction) -> float:
        success = prediction.success_ratio
        return self._spread.get(prediction.slm_id, 0.0) * math.sqrt(success * (1.0 - success))


def with_cold_start(
    champion: Artifact, cold_start: Artifact | None, prior: Predictor
) -> LightGBMPredictor:
    """The champion's predictions for SLMs that it knows, else `cold_start`'s, else `prior`'s."""
    if cold_start is None:
        return LightGBMPredictor(champion, prior)
    predictor = LightGBMPredictor(champion, UcbPredictor(cold_start, prior))
    predictor.version = PredictorVersion(champion.version, cold_start.version)
    return predictor


def known_slms(champion: Artifact) -> set[str]:
    """SLMs whose P(success) the champion predicts."""
    return {s for s in champion.slm_ids if own_head(OWN_HEADS[0], s) in champion.boosters}
