"""An alarm for choices that do not depend on the prompt."""

from __future__ import annotations

from random import Random

from calm_serve.telemetry.content_gain import MIN_DECISIONS, WINDOW_DECISIONS, ContentGainMonitor
from calm_serve.testing import make_context, make_decision, make_prediction
from calm_serve.types import Candidate, Decision, DecisionPath


def decision(
    scores: dict[str, tuple[float, float]], path: DecisionPath = DecisionPath.SCORED
) -> Decision:
    """The best score wins; scores are (score, quality) by SLM."""
    candidates = tuple(
        Candidate(i, prediction=make_prediction(i), quality=quality, score=score)
        for i, (score, quality) in scores.items()
    )
    best = max(candidates, key=lambda c: c.score)
    return make_decision(best.slm_id, candidates=candidates, path=path, context=make_context())


def test_choices_that_follow_the_prompt_gain_over_both_blind_rivals() -> None:
    draw, monitor = Random(1), ContentGainMonitor()
    for _ in range(400):
        sql, chat = (0.9, 0.2) if draw.random() < 0.5 else (0.2, 0.9)
        monitor.observe(decision({"sql": (sql, sql), "chat": (chat, chat)}))
    gains = monitor.gains()
    assert gains is not None
    assert gains.gain_best_single > 0.3
    assert gains.gain_share_matched > 0.3
    assert gains.entropy_ratio > 0.95
    assert gains.verdict == ""


def test_one_slm_for_everything_is_an_alarm_that_states_whether_others_are_better() -> None:
    draw, best, costly = Random(2), ContentGainMonitor(), ContentGainMonitor()
    for _ in range(300):
        other = 0.5 + 0.2 * draw.random()
        best.observe(decision({"a": (0.8, 0.8), "b": (other, other)}))
        # b would be right more often, but its price decides every time.
        costly.observe(decision({"a": (0.5, 0.5), "b": (0.1, 0.3 + other)}))
    found, dear = best.gains(), costly.gains()
    assert found is not None and dear is not None
    assert (found.gain_best_single, found.entropy_ratio) == (0.0, 0.0)
    assert found.verdict == "a is best for every prompt"
    assert "although others are predicted better" in dear.verdict


def test_choices_by_chance_alone_are_an_alarm() -> None:
    draw, monitor = Random(3), ContentGainMonitor()
    for _ in range(400):
        tilt = 0.001 * draw.random()
        monitor.observe(decision({"a": (0.5 + tilt, 0.5), "b": (0.5005, 0.5)}))
    gains = monitor.gains()
    assert gains is not None
    assert gains.verdict == "choices vary, but not with the prompt"


def test_there_is_no_early_verdict_and_pinned_decisions_do_not_count() -> None:
    monitor = ContentGainMonitor()
    for _ in range(MIN_DECISIONS + 5):
        monitor.observe(decision({"a": (0.5, 0.5), "b": (0.1, 0.1)}, DecisionPath.PINNED))
    assert monitor.gains() is None
    for _ in range(MIN_DECISIONS - 1):
        monitor.observe(decision({"a": (0.5, 0.5), "b": (0.1, 0.1)}))
    gains = monitor.gains()
    assert gains is not None
    assert gains.verdict == ""


def test_old_decisions_and_slms_that_left_are_forgotten() -> None:
    monitor = ContentGainMonitor()
    for _ in range(50):
        monitor.observe(decision({"a": (0.9, 0.9), "gone": (0.1, 0.1)}))
    for _ in range(WINDOW_DECISIONS):
        monitor.observe(decision({"a": (0.1, 0.1), "b": (0.9, 0.9)}))
    gains = monitor.gains()
    assert gains is not None
    assert gains.decisions == WINDOW_DECISIONS
    assert gains.shares == {"b": 1.0}
