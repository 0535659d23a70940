"""An SLM that no champion knows gets P(success) from its examples, then from its answers."""

from __future__ import annotations

from calm_serve.config import Fleet
from calm_serve.learning.cold_start import (
    FIRST_LABELS,
    MAX_ANSWERS,
    ColdStartSLMs,
    ColdStartTrainer,
    example_outcomes,
    fit_cold_start,
)
from calm_serve.prediction.base import MetadataPrior
from calm_serve.prediction.cold_start import UcbPredictor, known_slms, with_cold_start
from calm_serve.requests import Overrides, parse_chat
from calm_serve.requests.context import ContextBuilder
from calm_serve.requests.features import fill_features
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


def success(fleet: Fleet, new_slms: ColdStartSLMs, text: str) -> float:
    job = new_slms.job()
    assert job is not None
    artifact = fit_cold_start(job, 0.0)
    assert artifact is not None
    predictor = UcbPredictor(artifact, MetadataPrior())
    specs = [s for s in fleet.slms if s.id == "sql"]
    (found,) = predictor.predict(context_of(fleet, text), specs, [make_state("sql")])
    return found.success_ratio


def test_examples_alone_separate_its_prompts_from_others() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    own = success(fleet, new_slms, SQL[-1])
    new_slms = ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    assert own > 0.7
    assert success(fleet, new_slms, SHELL[-1]) < 0.4


def test_labelled_answers_outweigh_the_examples() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    before = success(fleet, new_slms, SQL[-1])
    new_slms.observe(answer_of(fleet, text, n, 0.0) for n, text in enumerate(SQL * 3))
    assert success(fleet, new_slms, SQL[-1]) < before - 0.3


def test_a_fit_is_due_at_once_then_whenever_the_labels_have_doubled() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    due = []
    for number in range(4 * FIRST_LABELS + 1):
        if new_slms.job() is not None:
            due.append(number)
        new_slms.observe([answer_of(fleet, SQL[0], number, 1.0)])
    assert due == [0, FIRST_LABELS, 2 * FIRST_LABELS, 4 * FIRST_LABELS]


def test_feedback_that_comes_later_counts_once() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    new_slms.job()
    for number in range(FIRST_LABELS):
        new_slms.observe([answer_of(fleet, SQL[0], number, None)])
        assert new_slms.job() is None
        new_slms.feedback(f"o{number}", [QualitySignal("feedback", 1.0)])
        new_slms.feedback("unknown", [QualitySignal("feedback", 1.0)])
    assert new_slms.job() is not None


def test_an_slm_that_the_champion_knows_is_not_fitted() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"sql", "shell"})
    new_slms.observe([answer_of(fleet, SQL[0], 1, 1.0)])
    assert new_slms.job() is None


def test_the_answers_kept_of_a_cold_start_slm_are_bounded() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    row = answer_of(fleet, SQL[0], 0, 1.0)
    for number in range(MAX_ANSWERS + 50):
        new_slms.observe([make_outcome(f"o{number}", slm_id="sql", numbers=row.features.numbers)])
    job = new_slms.job()
    assert job is not None
    assert len(dict(job.rows)["sql"]) <= MAX_ANSWERS + len(example_outcomes(fleet, fleet.slms[0]))


def test_the_champions_own_predictions_stay_as_they_are() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known=set())
    job = new_slms.job()
    assert job is not None
    champion = fit_cold_start(job, 0.0)
    assert champion is not None
    assert known_slms(champion) == {"sql", "shell"}
    grown = make_fleet(*fleet.slms, make_spec("new", examples=("bake a cake",), priors=PRIORS))
    new_slms.follow(grown, known_slms(champion))
    job = new_slms.job()
    assert job is not None
    both = with_cold_start(champion, fit_cold_start(job, 0.0), MetadataPrior())
    alone = with_cold_start(champion, None, MetadataPrior())
    states = [make_state(s.id) for s in fleet.slms]
    context = context_of(grown, SQL[0])
    assert both.predict(context, fleet.slms, states) == alone.predict(context, fleet.slms, states)
    assert both.version.champion == champion.version
    assert both.version.cold_start.startswith("new-")


def test_equal_jobs_give_equal_artifacts() -> None:
    fleet = make_two()
    found = []
    for _ in range(2):
        new_slms = ColdStartSLMs()
        new_slms.follow(fleet, known=set())
        job = new_slms.job()
        assert job is not None
        found.append(fit_cold_start(job, 0.0))
    assert found[0] == found[1]


def test_without_examples_the_prompts_that_a_rule_gives_it_are_examples() -> None:
    fleet = make_fleet(
        make_spec("sql", priors=PRIORS),
        make_spec("shell", examples=tuple(SHELL[:16]), priors=PRIORS),
    )
    new_slms = ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    new_slms.job()
    named = [
        change_outcome(answer_of(fleet, t, n, None), path="rule") for n, t in enumerate(SQL[:16])
    ]
    new_slms.observe(named)
    assert success(fleet, new_slms, SQL[-1]) > 0.7
    # Feedback on such an answer replaces the assumed label.
    for outcome in named:
        new_slms.feedback(outcome.outcome_id, [QualitySignal("feedback", 0.0)])
    new_slms.observe(
        change_outcome(answer_of(fleet, text, 100 + n, 0.0), path="rule")
        for n, text in enumerate(SQL)
    )
    assert success(fleet, new_slms, SQL[-1]) < 0.4


def test_with_examples_the_prompts_of_a_rule_add_nothing() -> None:
    fleet, new_slms = make_two(), ColdStartSLMs()
    new_slms.follow(fleet, known={"shell"})
    new_slms.job()
    new_slms.observe(
        change_outcome(answer_of(fleet, text, n, None), path="rule") for n, text in enumerate(SQL)
    )
    assert new_slms.job() is None


async def test_an_slm_that_embeds_is_not_one_to_learn() -> None:
    fleet = make_fleet(
        make_spec("sql", examples=tuple(SQL[:16]), priors=PRIORS),
        make_spec("shell", examples=tuple(SHELL[:16]), priors=PRIORS),
        make_spec("vectors", task="embed"),
    )
    new_slms = ColdStartSLMs()
    new_slms.follow(fleet, known={"vectors"})
    job = new_slms.job()
    assert job is not None
    champion = fit_cold_start(job, 0.0)
    assert champion is not None and known_slms(champion) == {"sql", "shell"}
    published: list[object] = []
    await ColdStartTrainer(published.append, lambda: 0.0).fit_if_due(fleet, (), champion)
    assert published == []
