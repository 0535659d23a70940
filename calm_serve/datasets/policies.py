"""What the router is compared with on a score table: policies as probabilities of each model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calm_serve.datasets.table import ScoreTable, Values

ROUTER = "router"
BEST_SINGLE = "best_single"
SHARE_MATCHED = "share_matched"
TASK_BEST = "task_best"
ORACLE = "oracle"
# Groups of equal size by prompt length: enough for a threshold between any two models, and a few
# dozen prompts in each group of a small table.
LENGTH_GROUPS = 8
# Prefers, among equally good predictions, the model that is better on the mean, and among equally
# good answers the cheaper model; too small to change anything else.
_TIE = 1e-9


def policies(test: ScoreTable, train: ScoreTable, predicted: Values) -> dict[str, Values]:
    """Each policy's probability of each model for each test prompt, [rows, models].

    The best single model is that of the test prompts, known in hindsight, which no operator has:
    a router must not win by a wrong choice of its rival. All that depends on a prompt is learned
    from the train prompts. Without tasks there is no policy TASK_BEST.
    """
    one_hot = np.eye(len(test.models))
    router = one_hot[(predicted + _TIE * train.scores.mean(axis=0)).argmax(axis=1)]
    best = int(test.scores.mean(axis=0).argmax())
    amounts = test.costs if test.costs is not None else np.zeros_like(test.scores)
    cheapness = -amounts / max(float(amounts.max()), 1.0)
    found = {
        ROUTER: router,
        BEST_SINGLE: np.tile(one_hot[best], (len(test.rows), 1)),
        "random": np.full_like(test.scores, 1.0 / len(test.models)),
        SHARE_MATCHED: np.tile(router.mean(axis=0), (len(test.rows), 1)),
        "prompt_length": one_hot[_by_length(test, train)],
        ORACLE: one_hot[(test.scores + _TIE * cheapness).argmax(axis=1)],
    }
    if test.tasks is not None and train.tasks is not None:
        found[TASK_BEST] = one_hot[_by_group(test.tasks, train.tasks, train.scores)]
    return found


def prompt_chars(table: ScoreTable) -> Values:
    """Length of each prompt, of shape [rows]."""
    return np.array([row.chars for row in table.rows], dtype=np.float64)


def _by_length(test: ScoreTable, train: ScoreTable) -> NDArray[np.intp]:
    lengths = prompt_chars(train)
    edges = np.quantile(lengths, np.linspace(0.0, 1.0, LENGTH_GROUPS + 1)[1:-1])

    def groups(values: Values) -> list[str]:
        return [str(group) for group in np.searchsorted(edges, values).tolist()]

    return _by_group(groups(prompt_chars(test)), groups(lengths), train.scores)


def _by_group(test: Sequence[str], train: Sequence[str], scores: Values) -> NDArray[np.intp]:
    """Index of the model that is best on the train prompts of each test prompt's group.

    A group without train prompts gets the model that is best on all of them.
    """
    names = np.array(train)
    overall = int(scores.mean(axis=0).argmax())
    best = {name: int(scores[names == name].mean(axis=0).argmax()) for name in set(train)}
    return np.array([best.get(name, overall) for name in test])
