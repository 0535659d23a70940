"""Prediction of success, length, latency, joules. Owner: router. Blocks only to load an artifact.

Takes contexts and live states, gives a `Prediction` per SLM without blocking. Making a predictor
from an artifact blocks: LightGBM parses its boosters. The training child of the knowledge actor
writes the artifacts.
"""

from calm_serve.prediction.artifact import (
    OUTPUT_TOKENS,
    OWN_HEADS,
    SUCCESS,
    TTFT_RESIDUAL,
    Artifact,
    fits_layout,
    load_artifact,
    own_head,
)
from calm_serve.prediction.base import (
    LOAD_NAMES,
    MetadataPrior,
    Predictor,
    live_load,
    prior_prediction,
    prior_quality,
)
from calm_serve.prediction.cold_start import LABELLED, known_slms, with_cold_start
from calm_serve.prediction.latency import cached_prefill_s, wake_s
from calm_serve.prediction.lightgbm import (
    MAX_LOG_RESIDUAL,
    Heads,
    LightGBMPredictor,
    Places,
    Rows,
    Values,
    load_rows,
    probabilities,
    prompt_rows,
    slm_places,
)
from calm_serve.prediction.novelty import SeenPrompts, fit_seen_prompts
from calm_serve.prediction.pseudo_tasks import PseudoTasks, find_pseudo_tasks
from calm_serve.prediction.single_row import (
    COLUMNS,
    FIRST_BUCKET,
    FIRST_LOAD,
    SLM_COLUMN,
    SingleRow,
    SparseRow,
    joined,
)

__all__ = [
    "COLUMNS",
    "FIRST_BUCKET",
    "FIRST_LOAD",
    "LABELLED",
    "LOAD_NAMES",
    "MAX_LOG_RESIDUAL",
    "OUTPUT_TOKENS",
    "OWN_HEADS",
    "SLM_COLUMN",
    "SUCCESS",
    "TTFT_RESIDUAL",
    "Artifact",
    "Heads",
    "LightGBMPredictor",
    "MetadataPrior",
    "Places",
    "Predictor",
    "PseudoTasks",
    "Rows",
    "SeenPrompts",
    "SingleRow",
    "SparseRow",
    "Values",
    "cached_prefill_s",
    "find_pseudo_tasks",
    "fit_seen_prompts",
    "fits_layout",
    "joined",
    "known_slms",
    "live_load",
    "load_artifact",
    "load_rows",
    "own_head",
    "prior_prediction",
    "prior_quality",
    "probabilities",
    "prompt_rows",
    "slm_places",
    "wake_s",
    "with_cold_start",
]
