"""Off-policy estimates on bandits whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calm_serve.learning.decision_log import read_decision, redecide, rescore
from calm_serve.learning.off_policy import (
    Log,
    PolicyLog,
    estimate,
    mean_estimate,
    measured,
)
from calm_serve.testing import make_outcome
from calm_serve.types import (
    DecisionTerms,
    LoggedCandidate,
    Prediction,
    QualitySignal,
    Weights,
)

# Two kinds of prompt and three SLMs: P(success). The best choice depends on the kind.
TRUTH = np.array([[0.9, 0.4, 0.6], [0.2, 0.8, 0.6]])
TARGET = np.array([0, 1])  # what the evaluated policy chooses for each kind
TRUE_VALUE = float(TRUTH[[0, 1], TARGET].mean())
# The logging policy prefers the third SLM and tries the others.
LOGGING = np.array([0.2, 0.2, 0.6])


def bandit(rows: int, seed: int, model: np.ndarray[Any, Any] = TRUTH) -> Log:
    random = np.random.default_rng(seed)
    kind = random.integers(2, size=rows)
    action = random.choice(3, size=rows, p=LOGGING)
    reward = (random.random(rows) < TRUTH[kind, action]).astype(float)
    target = TARGET[kind]
    return Log(reward, LOGGING[action], action == target, model[kind, action], model[kind, target])


WRONG = np.full((2, 3), 0.5)


@pytest.mark.parametrize("name", ["ips", "self_normalised", "doubly_robust"])
def test_estimators_find_the_truth_with_a_wrong_model_too(name: str) -> None:
    found = getattr(estimate(bandit(20_000, 0, WRONG), seed=0), name)
    low, high = found.ci95
    assert low < TRUE_VALUE < high
    assert high - low < 0.06
    assert low < found.value < high


def test_the_direct_method_is_as_right_as_its_model() -> None:
    right, wrong = (estimate(bandit(5000, 0, m), seed=0).direct for m in (TRUTH, WRONG))
    assert right.value == pytest.approx(TRUE_VALUE, abs=0.01)
    assert wrong.value == pytest.approx(0.5)


def test_doubly_robust_varies_less_than_ips_with_a_good_model() -> None:
    found = [estimate(bandit(400, seed), seed=0) for seed in range(40)]
    spread = {
        name: np.std([getattr(f, name).value for f in found])
        for name in ("ips", "self_normalised", "doubly_robust")
    }
    assert spread["doubly_robust"] < 0.8 * spread["ips"]
    assert spread["self_normalised"] < spread["ips"]


def test_intervals_cover_the_truth_about_as_often_as_stated() -> None:
    trials = 120
    hits = dict.fromkeys(("ips", "self_normalised", "doubly_robust"), 0)
    for seed in range(trials):
        found = estimate(bandit(300, seed, WRONG), seed=seed)
        for name in hits:
            low, high = getattr(found, name).ci95
            hits[name] += low <= TRUE_VALUE <= high
    # Binomial(120, 0.95) is below 106 less than once in a hundred.
    assert min(hits.values()) >= 106
    assert sum(hits.values()) < 3 * trials  # an interval that always covers is too wide


def test_weights_are_clipped_and_the_clip_is_reported() -> None:
    log = Log(
        value=np.ones(100),
        propensity=np.full(100, 0.001),
        matched=np.arange(100) < 10,
        model_logged=np.ones(100),
        model_target=np.ones(100),
    )
    found = estimate(log, seed=0)
    assert (found.clip, found.clipped_rows) == (10.0, 10)
    assert found.ips.value == pytest.approx(1.0)
    assert found.effective_rows == pytest.approx(10.0)
    assert found.matched_rows == 10


def test_a_policy_that_never_agrees_has_no_weight_and_only_a_model() -> None:
    log = Log(np.ones(50), np.ones(50), np.zeros(50, dtype=bool), np.ones(50), np.zeros(50))
    found = estimate(log, seed=0)
    assert (found.effective_rows, found.mean_weight) == (0.0, 0.0)
    assert found.doubly_robust.value == found.direct.value == 0.0


def test_an_empty_log_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        estimate(bandit(0, 0), seed=0)


def test_equal_terms_have_an_interval_without_width() -> None:
    assert mean_estimate(np.full(20, 0.25), seed=1).ci95 == (0.25, 0.25)


def test_the_reward_weighs_what_was_measured() -> None:
    outcome = make_outcome(e2e_s=2.0, energy_j=10.0, signals=(QualitySignal("feedback", 1.0, 1.0),))
    found = measured(outcome, Weights(0.1, 0.02, 0.5, quality=2.0))
    assert found["reward"] == pytest.approx(2.0 - 0.2 - 0.2)
    assert (found["quality"], found["e2e_s"], found["energy_j"]) == (1.0, 2.0, 10.0)
    late = measured(outcome, Weights(0.0, 0.0, 0.0, late_e2e_per_s=0.5, late_e2e_after_s=1.5))
    assert late["reward"] == pytest.approx(1.0 - 0.25)


@pytest.mark.parametrize("status", ["rejected", "cancelled"])
def test_a_rejected_or_cancelled_request_measures_nothing(
    status: str,
) -> None:
    found = measured(make_outcome(status=status), Weights(0.1, 0.02, 0.5))
    assert all(np.isnan(v) for v in found.values())


def test_a_failed_answer_has_no_quality_but_its_latency_counts() -> None:
    failed = make_outcome(status="error", e2e_s=2.0, energy_j=None, signals=())
    found = measured(failed, Weights(0.1, 0.02, 0.5))
    assert (found["quality"], found["reward"]) == (0.0, pytest.approx(-0.2))
    assert np.isnan(found["e2e_s"])


def two_slms(i: int, *, other_is_right: bool, explored: bool) -> Any:
    """ "small" was predicted better; the truth about "large" is in its labels."""
    candidates = tuple(
        LoggedCandidate(Prediction(slm_id, success_ratio, 10.0, 0.05, 0.01, 1.0), True, 1.0)
        for slm_id, success_ratio in (("small", 0.9), ("large", 0.6))
    )
    chosen_first = candidates[::-1] if explored else candidates
    good = other_is_right if explored else not other_is_right
    return make_outcome(
        f"o{i}",
        slm_id=chosen_first[0].prediction.slm_id,
        propensity=0.2 if explored else 0.8,
        signals=(QualitySignal("feedback", float(good), 1.0),),
        terms=DecisionTerms(chosen_first, Weights(0.1, 0.002, 0.05)),
    )


def test_a_policy_log_prefers_the_policy_that_explored_outcomes_favour() -> None:
    log = PolicyLog(["best", "other"])
    for i in range(300):
        logged = read_decision(two_slms(i, other_is_right=True, explored=i % 5 == 0))
        assert logged is not None
        ranked = rescore(logged)
        choices = {"best": redecide(logged, ranked), "other": "large"}
        assert choices["best"] == "small"
        log.add(logged, ranked, choices, logged.weights)
    gain = log.difference("reward", "other", "best", seed=0)
    assert gain.ci95[0] > 0.5  # by the model alone it loses 0.3
    assert estimate(log.metric("quality", "other"), seed=0).doubly_robust.value > 0.9
    assert log.difference("quality", "best", None, seed=0).value < -0.1


def test_a_metric_that_was_never_measured_is_an_error() -> None:
    log = PolicyLog(["best"])
    with pytest.raises(ValueError, match="reward"):
        log.difference("reward", "best", None, seed=0)
