"""Score tables: read, fit, evaluate, probe. Owner: command line. May block.

Takes JSON lines with every model's score on every prompt, gives predictors and figures. `probe`
makes such a table from a running service, over a transport that it is given.
"""

from calm_serve.datasets.evaluation import Evaluation, Evaluator
from calm_serve.datasets.fitting import (
    LabelledPrompts,
    fit_prompts,
    fit_table,
    labelled_prompts,
    predict_prompts,
)
from calm_serve.datasets.plots import draw
from calm_serve.datasets.policies import prompt_chars
from calm_serve.datasets.probing import Probe, ProbeReport, read_prompts
from calm_serve.datasets.table import ScoreTable, TableRow, read_table, table_of
from calm_serve.datasets.tradeoff import (
    deferral_curve,
    recovered,
    recovered_figures,
    stronger_gain,
)

__all__ = [
    "Evaluation",
    "Evaluator",
    "LabelledPrompts",
    "Probe",
    "ProbeReport",
    "ScoreTable",
    "TableRow",
    "deferral_curve",
    "draw",
    "fit_prompts",
    "fit_table",
    "labelled_prompts",
    "predict_prompts",
    "prompt_chars",
    "read_prompts",
    "read_table",
    "recovered",
    "recovered_figures",
    "stronger_gain",
    "table_of",
]
