"""Predictions for cold-start SLMs from boosters of their own, with an upper confidence bound.

They replace the champion's prior, so no other SLM's prediction changes. `learning/cold_start.py`
trains them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calm_serve.config import SLMSpec
from calm_serve.prediction.artifact import Artifact
from calm_serve.prediction.base import Predictor
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.types import Novelty, Prediction, PredictorVersion, RoutingContext, SLMState

LABELLED = "labelled_answers"  # metric of an artifact: SLM -> labelled answers it was fitted on

# P(success) is raised by UCB_SIGMAS standard errors of a rate measured on the labelled answers. So
# an SLM with few answers is tried where it may be the best, and only there (upper confidence
# bounds; Auer, Journal of Machine Learning Research 3, 2002). The examples together count as
# EXAMPLE_ANSWERS answers. `load_tests paper` notices a change (new_slm_adoption_requests).
UCB_SIGMAS, EXAMPLE_ANSWERS = 1.0, 8.0


class UcbPredictor:
    """Predictions of cold-start SLMs with an upper confidence bound for P(success)."""

    def __init__(self, artifact: Artifact, prior: Predictor) -> None:
        self.version = PredictorVersion(cold_start=artifact.version)
        self._inner = LightGBMPredictor(artifact, prior)
        answers = artifact.metrics[LABELLED]
        self._bound_scale = {
            slm: UCB_SIGMAS / math.sqrt(EXAMPLE_ANSWERS + answers[slm])
            for slm in known_slms(artifact)
        }

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        return [
            replace(p, success_ratio=min(p.success_ratio + self._bonus(p), 1.0))
            for p in self._inner.predict(context, specs, states)
        ]

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """Return None: an artifact of cold-start SLMs has no bitmap."""
        return self._inner.novelty(bits)

    def _bonus(self, prediction: Prediction) -> float:
        success = prediction.success_ratio
        return self._bound_scale.get(prediction.slm_id, 0.0) * math.sqrt(success * (1.0 - success))


def with_cold_start(
    champion: Artifact, cold_start: Artifact | None, prior: Predictor
) -> LightGBMPredictor:
    """The champion's predictions for SLMs that it knows, else `cold_start`'s, else `prior`'s."""
    if cold_start is None:
        return LightGBMPredictor(champion, prior)
    tried = frozenset(known_slms(cold_start))
    predictor = LightGBMPredictor(champion, UcbPredictor(cold_start, prior), tried)
    predictor.version = PredictorVersion(champion.version, cold_start.version)
    return predictor


def known_slms(champion: Artifact) -> set[str]:
    """SLMs whose P(success) the champion predicts."""
    return {s for s in champion.slm_ids if s in champion.starts}
