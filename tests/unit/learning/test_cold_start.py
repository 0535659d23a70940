"""An SLM that no champion knows gets P(success) from its examples, then from its answers."""

from __future__ import annotations

from calm_serve.config import Fleet
from calm_serve.learning.cold_start import (
    FIRST_LABELS,
    MAX_ANSWERS,
    ColdStartSLMs,
    example_outcomes,
    fit,
)
from calm_serve.prediction.base import MetadataPrior
from calm_serve.prediction.cold_start import UcbPredictor, known_slms, with_cold_start
from calm_serve.requests.context import ContextBuilder
from calm_serve.requests.features import fill_features
from calm_serve.requests.openai import Overrides, parse_chat
from calm_serve.testing import change_outcome, make_fleet, make_outcome, make_spec, make_state
from calm_serve.types import Outcome, QualitySignal, RoutingContext

SQL = [f"how many {thing} are in the table of {place}" for thing in "abcde" for place in "uvwxyz"]
SHELL = [f"list files named {name} below /{folder}" for name in "abcde" for folder in "uvwxyz"]
PRIORS = {"quality": 0.05, "skill_quality": 0.9}


def make_two() -> Fleet:
    return make_fleet(
        make_spec("sql", examples=tuple(SQL[:16]), priors=PRIORS),
        make_spec("shell", examples=tuple(SHELL[:16]), priors=PRIORS),
    )


def context_of(fleet: Fleet, text: str) -> RoutingContext:
    request = parse_chat({"messages": [{"role": "user", "content": text}]})
    context = ContextBuilder(fleet).build(request, Overrides(), "id")
    fill_features(context, request)
    return context


def answer_of(fleet: Fleet, text: str, number: int, score: float | None) -> Outcome:
    context = context_of(fleet, text)
    signals = () if score is None else (QualitySignal("feedback", score),)
    return make_outcome(
        f"o{number}",
        slm_id="sql",
        numbers=context.features.numbers,
        buckets=context.features.buckets,
        signals=signals,
    )


def success(fleet: Fleet, newcomers: ColdStartSLMs, text: str) -> float:
    job = newcomers.job()
    assert job is not None
    artifact = fit(job, 0.0)
    assert artifact is not None
    predictor = UcbPredictor(artifact, MetadataPrior())
    specs = [s for s in fleet.slms if s.id == "sql"]
    (found,) = predictor.predict(context_of(fleet, text), specs, [make_state("sql")])
    return found.success_ratio


def test_examples_alone_tell_its_prompts_from_others() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    own = success(fleet, newcomers, SQL[-1])
    newcomers = ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    assert own > 0.7
    assert success(fleet, newcomers, SHELL[-1]) < 0.4


def test_its_answers_overrule_what_the_examples_promised() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    before = success(fleet, newcomers, SQL[-1])
    newcomers.observe(answer_of(fleet, text, n, 0.0) for n, text in enumerate(SQL * 3))
    assert success(fleet, newcomers, SQL[-1]) < before - 0.3


def test_a_fit_is_due_at_once_then_whenever_the_labels_have_doubled() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    due = []
    for number in range(4 * FIRST_LABELS + 1):
        if newcomers.job() is not None:
            due.append(number)
        newcomers.observe([answer_of(fleet, SQL[0], number, 1.0)])
    assert due == [0, FIRST_LABELS, 2 * FIRST_LABELS, 4 * FIRST_LABELS]


def test_feedback_that_comes_later_counts_once() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    newcomers.job()
    for number in range(FIRST_LABELS):
        newcomers.observe([answer_of(fleet, SQL[0], number, None)])
        assert newcomers.job() is None
        newcomers.feedback(f"o{number}", [QualitySignal("feedback", 1.0)])
        newcomers.feedback("unknown", [QualitySignal("feedback", 1.0)])
    assert newcomers.job() is not None


def test_a_champion_that_knows_the_slm_ends_its_being_new() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"sql", "shell"})
    newcomers.observe([answer_of(fleet, SQL[0], 1, 1.0)])
    assert newcomers.job() is None


def test_what_is_kept_of_a_newcomer_is_bounded() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    row = answer_of(fleet, SQL[0], 0, 1.0)
    for number in range(MAX_ANSWERS + 50):
        newcomers.observe([make_outcome(f"o{number}", slm_id="sql", numbers=row.features.numbers)])
    job = newcomers.job()
    assert job is not None
    assert len(dict(job.rows)["sql"]) <= MAX_ANSWERS + len(example_outcomes(fleet, fleet.slms[0]))


def test_the_champions_own_predictions_stay_as_they_are() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known=set())
    job = newcomers.job()
    assert job is not None
    champion = fit(job, 0.0)
    assert champion is not None
    assert known_slms(champion) == {"sql", "shell"}
    grown = make_fleet(*fleet.slms, make_spec("new", examples=("bake a cake",), priors=PRIORS))
    newcomers.follow(grown, known_slms(champion))
    job = newcomers.job()
    assert job is not None
    both = with_cold_start(champion, fit(job, 0.0), MetadataPrior())
    alone = with_cold_start(champion, None, MetadataPrior())
    states = [make_state(s.id) for s in fleet.slms]
    context = context_of(grown, SQL[0])
    assert both.predict(context, fleet.slms, states) == alone.predict(context, fleet.slms, states)
    assert str(both.version).startswith(f"{champion.version}+new-")


def test_equal_jobs_give_equal_artifacts() -> None:
    fleet = make_two()
    found = []
    for _ in range(2):
        newcomers = ColdStartSLMs()
        newcomers.follow(fleet, known=set())
        job = newcomers.job()
        assert job is not None
        found.append(fit(job, 0.0))
    assert found[0] == found[1]


def test_prompts_that_a_rule_gives_it_stand_in_for_examples_that_its_entry_does_not_name() -> None:
    fleet = make_fleet(
        make_spec("sql", priors=PRIORS),
        make_spec("shell", examples=tuple(SHELL[:16]), priors=PRIORS),
    )
    newcomers = ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    newcomers.job()
    named = [
        change_outcome(answer_of(fleet, t, n, None), path="rule") for n, t in enumerate(SQL[:16])
    ]
    newcomers.observe(named)
    assert success(fleet, newcomers, SQL[-1]) > 0.7
    # What is said of such an answer counts instead of the promise.
    for outcome in named:
        newcomers.feedback(outcome.outcome_id, [QualitySignal("feedback", 0.0)])
    newcomers.observe(
        change_outcome(answer_of(fleet, text, 100 + n, 0.0), path="rule")
        for n, text in enumerate(SQL)
    )
    assert success(fleet, newcomers, SQL[-1]) < 0.4


def test_a_rules_word_adds_nothing_where_there_are_examples() -> None:
    fleet, newcomers = make_two(), ColdStartSLMs()
    newcomers.follow(fleet, known={"shell"})
    newcomers.job()
    newcomers.observe(
        change_outcome(answer_of(fleet, text, n, None), path="rule") for n, text in enumerate(SQL)
    )
    assert newcomers.job() is None
