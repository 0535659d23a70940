"""Evaluation of the router on a score table: fitted on train rows, measured on test rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from calm_serve.config import Fleet, Goals, SLMSpec
from calm_serve.datasets.fitting import (
    MIN_TRAIN_PROMPTS,
    fit_prompts,
    labelled_prompts,
    predict_prompts,
    success_metrics,
)
from calm_serve.datasets.policies import (
    BEST_SINGLE,
    ROUTER,
    SHARE_MATCHED,
    TASK_BEST,
    policies,
    prompt_chars,
)
from calm_serve.datasets.table import ScoreTable, Values
from calm_serve.datasets.tradeoff import Tradeoff, recovered_figures, stronger_gain, tradeoff
from calm_serve.errors import ConfigError
from calm_serve.learning import ci95, resampled
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior
from calm_serve.requests import Overrides, parse_chat
from calm_serve.routing import ModelSelector

MIN_TEST_PROMPTS = 20  # with fewer an interval of the mean spans most of what there is
SEED = 0  # of the bootstrap and of the order of prompts
RIVALS = (BEST_SINGLE, SHARE_MATCHED, TASK_BEST)  # whose difference to the router is reported
MAX_TIMED_PROMPTS = 1000
WARM_UP_PROMPTS = 50
CONTEXT_TOKENS = 10_000_000  # the most that a fleet file takes: no prompt is too long

Figures = dict[str, Any]
Progress = Callable[[int, int], None]  # (fits done, fits in all)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures by name, as `calm eval --json` writes them, and what a picture shows besides."""

    figures: Figures
    tradeoff: Tradeoff | None  # None when nothing says what a model costs


@dataclass(frozen=True, slots=True)
class Trial:
    """One predictor on the test rows: P(success), of shape [rows, models], and the policies."""

    artifact: Artifact
    predicted: Values
    policies: Mapping[str, Values]


class Evaluator:
    """Fits and measures on one table. Blocks for seconds to minutes.

    `clock` counts seconds, for decisions per second alone. Raises ConfigError when there are fewer
    than two models, MIN_TRAIN_PROMPTS train rows or MIN_TEST_PROMPTS test rows.
    """

    def __init__(self, table: ScoreTable, clock: Callable[[], float]) -> None:
        if len(table.models) < 2:
            raise ConfigError(f"one model, {table.models[0]!r}: there is nothing to choose")
        self.train, self.test, self._clock = table.train, table.test, clock
        if len(self.test.rows) < MIN_TEST_PROMPTS:
            raise ConfigError(
                f"{len(self.test.rows)} prompts to test on, an evaluation needs at least "
                f"{MIN_TEST_PROMPTS}"
            )
        if len(self.train.rows) < MIN_TRAIN_PROMPTS:
            raise ConfigError(
                f"{len(self.train.rows)} prompts to learn from, a fit needs at least "
                f"{MIN_TRAIN_PROMPTS}"
            )
        # Ids that any fleet may have: a table's names need not be valid ones.
        self.slm_ids = tuple(f"model-{i}" for i in range(len(table.models)))
        self._train, self._test = labelled_prompts(self.train), labelled_prompts(self.test)
        self._order = np.random.default_rng(SEED).permutation(len(self.train.rows))

    def run(self, progress: Progress) -> Evaluation:
        """Fit, measure, draw the learning curve. `progress` is called before each fit."""
        sizes = learning_sizes(len(self.train.rows))
        learning: list[Figures] = []
        for step, size in enumerate(sizes):
            progress(step, len(sizes))
            trial = self.trial(size)
            learning.append(self._learned(size, trial))
        progress(len(sizes), len(sizes))
        curve = self._tradeoff(trial.predicted)
        figures = {
            "models": list(self.test.models),
            "train_prompts": len(self.train.rows),
            "test_prompts": len(self.test.rows),
            **self.scores(trial),
            **self.between_two(trial),
            **success_metrics(trial.predicted, self._test, self._train),
            "router_shares": dict(
                zip(self.test.models, trial.policies[ROUTER].mean(axis=0).tolist(), strict=True)
            ),
            "cost": curve and curve.cost_name,
            "curve": curve and [list(p) for p in zip(*astuple(curve.curve), strict=True)],
            "learning_curve": learning,
            "prompts_needed": prompts_needed(learning),
            "decisions_per_s": self._decisions_per_s(trial.artifact),
        }
        return Evaluation(figures, curve)

    def between_two(self, trial: Trial) -> Figures:
        """APGR and CPT of the router and of the prompt's length, None unless there are two models.

        The stronger model is that of the test prompts.
        """
        scores = self.test.scores
        by_length = recovered_figures(prompt_chars(self.test), scores)
        return {
            **recovered_figures(stronger_gain(trial.predicted, scores), scores),
            **{f"length_{name}": value for name, value in by_length.items()},
        }

    def trial(self, size: int) -> Trial:
        """Fit on `size` train rows, drawn once for all sizes, and predict for the test rows."""
        places = self._order[:size].tolist()
        train = self._train.part(places)
        artifact = fit_prompts(train, self.slm_ids, created_at=0.0)
        predicted = predict_prompts(artifact, self.slm_ids, self._test.features, train.means)
        found = policies(self.test, self.train.part(places), predicted)
        return Trial(artifact, predicted, found)

    def scores(self, trial: Trial) -> Figures:
        """Mean score of each policy, costs and latencies if the table has them, differences.

        Intervals are of the test prompts, resampled together for all policies.
        """
        each = {
            name: (self.test.scores * chosen).sum(axis=1) for name, chosen in trial.policies.items()
        }
        figures: Figures = {f"{TASK_BEST}_score": None, f"{TASK_BEST}_score_ci95": None}
        for name, values in each.items():
            figures[f"{name}_score"] = float(values.mean())
            chosen = trial.policies[name]
            for unit, table in (("cost", self.test.costs), ("latency_s", self.test.latencies_s)):
                if table is not None:
                    figures[f"{name}_{unit}"] = float((table * chosen).sum(axis=1).mean())
        names = list(each)
        drawn = resampled(
            np.stack(list(each.values()), axis=1), _means(len(each[ROUTER])), seed=SEED
        )
        for place, name in enumerate(names):
            figures[f"{name}_score_ci95"] = list(ci95(drawn[:, place]))
        for rival in RIVALS:
            key = f"router_minus_{rival}"
            if rival not in each:
                figures |= {key: None, f"{key}_ci95": None}
                continue
            figures[key] = float((each[ROUTER] - each[rival]).mean())
            paired = drawn[:, names.index(ROUTER)] - drawn[:, names.index(rival)]
            figures[f"{key}_ci95"] = list(ci95(paired))
        return figures

    def _learned(self, size: int, trial: Trial) -> Figures:
        """One point of the learning curve."""
        scores = self.scores(trial)
        names = ("router_score", "router_score_ci95", "router_minus_best_single_ci95")
        return {"prompts": size, **{name: scores[name] for name in names}}

    def _tradeoff(self, predicted: Values) -> Tradeoff | None:
        costs = self.train.costs if self.train.costs is not None else self.train.latencies_s
        return tradeoff(predicted, self.test, None if costs is None else costs.mean(axis=0))

    def _decisions_per_s(self, artifact: Artifact) -> float | None:
        """Whole decisions, from the parsed JSON on, in one thread; None by a clock that stands."""
        specs = [SLMSpec(id=i, model="any", context_tokens=CONTEXT_TOKENS) for i in self.slm_ids]
        selector = ModelSelector(
            Fleet(slms=tuple(specs)),
            Goals(exploration_ratio=0.0),
            predictor=LightGBMPredictor(artifact, MetadataPrior()),
        )
        bodies = [row.body() for row in self.test.rows[:MAX_TIMED_PROMPTS]]
        for number, body in enumerate(bodies[:WARM_UP_PROMPTS]):
            selector.decide(parse_chat(body), Overrides(), f"warm-up-{number}")
        started = self._clock()
        for number, body in enumerate(bodies):
            selector.decide(parse_chat(body), Overrides(), f"timed-{number}")
        took_s = self._clock() - started
        return len(bodies) / took_s if took_s > 0.0 else None


def learning_sizes(count: int) -> list[int]:
    """Numbers of train prompts to fit on: all of them, and halves down to the smallest fit."""
    sizes = [count]
    while sizes[-1] // 2 >= MIN_TRAIN_PROMPTS:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def prompts_needed(learning: Sequence[Figures]) -> int | None:
    """Least number of train prompts from which on the router surely beats the best single model.

    None when it does not with all of them.
    """
    needed = None
    for point in reversed(learning):
        if point["router_minus_best_single_ci95"][0] <= 0.0:
            break
        needed = point["prompts"]
    return needed


def _means(count: int) -> Callable[[Values], Values]:
    return lambda sums: sums / count
