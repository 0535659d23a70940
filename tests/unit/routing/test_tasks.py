"""Requests of different tasks: who may answer, and that vector spaces and tokenizers do not mix."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.config import Fleet, SLMSpec
from calm_serve.errors import CalmError, NoCandidateError, RequestError, SLMUnavailableError
from calm_serve.requests import Overrides, find_route
from calm_serve.routing import ModelSelector
from calm_serve.routing.exclusions import _EXCLUSIONS
from calm_serve.routing.filters import FILTERS, RELAXED_IF_NONE_PASSES
from calm_serve.routing.selector import assume_hot
from calm_serve.routing.without_text import first_space
from calm_serve.testing import make_fleet, make_goals, make_outcome, make_spec, make_state
from calm_serve.types import Decision, DecisionPath, DecisionReason, Residency

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}


def embedder(slm_id: str, model: str = "bge", **fields: Any) -> SLMSpec:
    return make_spec(slm_id, task="embed", embedding={"model": model, "dimensions": 8}, **fields)


FLEET = make_fleet(
    make_spec("chat", examples=["hello"]),
    make_spec("base", capabilities={"chat": False}),
    embedder("slow-bge", priors={"ttft_s": 0.5}),
    embedder("e5", "e5", priors={"ttft_s": 0.001}),
    embedder("fast-bge", priors={"ttft_s": 0.01}),
    make_spec("ranker", task="rerank"),
    markers={"greeting": "hello"},
    rules=[{"name": "greets", "marker": "greeting", "slms": ["chat"]}],
    safety=[{"name": "secret", "pattern": "password", "slm": "chat"}],
)


def decide(path: str, body: dict[str, Any], fleet: Fleet = FLEET, **states: Any) -> Decision:
    selector = ModelSelector(
        fleet,
        make_goals(),
        read_state=lambda spec: states.get(spec.id.replace("-", "_"), assume_hot(spec)),
    )
    return _decide(selector, path, body)


def _decide(selector: ModelSelector, path: str, body: dict[str, Any]) -> Decision:
    route = find_route(path)
    assert route is not None
    return selector.decide(route.parse(body), Overrides(), "decision")


def refused(path: str, body: dict[str, Any], fleet: Fleet = FLEET) -> CalmError:
    with pytest.raises(RequestError) as caught:
        decide(path, body, fleet)
    return caught.value


@pytest.mark.parametrize(
    ("path", "body", "capable"),
    [
        ("/v1/chat/completions", CHAT, {"chat"}),
        ("/v1/messages", {**CHAT, "max_tokens": 5}, {"chat"}),
        ("/v1/responses", {"input": "hi"}, {"chat"}),
        ("/v1/completions", {"prompt": "hi"}, {"chat", "base"}),
        ("/v1/embeddings", {"input": "hi"}, {"slow-bge", "fast-bge"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, {"ranker"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, {"ranker"}),
    ],
)
def test_only_slms_of_the_task_answer_and_fail_over(
    path: str, body: dict[str, Any], capable: set[str]
) -> None:
    decision = decide(path, body)
    assert set(decision.ranking) == capable
    excluded = {c.slm_id for c in decision.candidates if c.excluded_by}
    # A rule keeps only the chosen SLM and the excluded ones as candidates.
    assert excluded == {s.id for s in FLEET.slms} - capable


def test_an_embedding_request_goes_by_latency_without_a_predictor() -> None:
    decision = decide("/v1/embeddings", {"input": "hello"})
    assert (decision.path, decision.reason) == (DecisionPath.LOAD, DecisionReason.BEST_PRIOR)
    assert decision.ranking == ("fast-bge", "slow-bge")
    assert decision.context.features.numbers == ()
    chosen = decision.candidates[0].prediction
    assert chosen is not None
    assert chosen.output_tokens == 0.0
    assert chosen.e2e_s == chosen.ttft_s > 0.0
    assert chosen.energy_j == pytest.approx(0.1 * decision.context.prompt_tokens)


def test_an_embedding_request_avoids_a_queue() -> None:
    busy = make_state("fast-bge", running=16, waiting=2000)
    assert decide("/v1/embeddings", {"input": "hi"}, fast_bge=busy).slm_id == "slow-bge"


def test_no_failure_takes_an_embedding_request_to_another_space() -> None:
    down = make_state(replicas=0, residency=Residency.DEAD)
    with pytest.raises(SLMUnavailableError, match="slow-bge, fast-bge: available"):
        decide("/v1/embeddings", {"input": "hi"}, slow_bge=down, fast_bge=down)
    too_long = {"input": "word " * 50_000}
    for space in ("slow-bge", "fast-bge"):
        assert space in refused("/v1/embeddings", too_long).message
    larger = make_fleet(embedder("bge"), embedder("e5", "e5", context_tokens=10**6))
    assert refused("/v1/embeddings", too_long, larger).param == "input"


def test_the_space_of_auto_is_that_of_the_first_embedding_slm_of_the_file() -> None:
    assert first_space(FLEET) == FLEET.slms[2].embedding_space
    assert first_space(make_fleet()) == ""


def test_a_client_may_name_an_slm_of_another_space() -> None:
    decision = decide("/v1/embeddings", {"input": "hi", "model": "e5"})
    assert decision.ranking == ("e5",)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "x"},
        {"revision": "2"},
        {"dimensions": 9},
        {"pooling": "CLS"},
        {"normalised": False},
    ],
)
def test_a_space_is_all_of_its_five_values(changes: dict[str, Any]) -> None:
    space = {"model": "bge", "dimensions": 8}
    other = make_spec("other", task="embed", embedding={**space, **changes})
    decision = decide("/v1/embeddings", {"input": "hi"}, make_fleet(embedder("bge"), other))
    assert decision.ranking == ("bge",)


def test_the_space_of_auto_stays_when_its_slms_leave_or_others_join_before_them() -> None:
    selector = ModelSelector(make_fleet(embedder("bge")), make_goals())
    selector.set_fleet(make_fleet(embedder("e5", "e5"), embedder("bge")))
    assert _decide(selector, "/v1/embeddings", {"input": "hi"}).ranking == ("bge",)
    selector.set_fleet(make_fleet(embedder("e5", "e5")))
    with pytest.raises(NoCandidateError, match="other_space") as caught:
        _decide(selector, "/v1/embeddings", {"input": "hi"})
    assert caught.value.param == "model"
    assert _decide(selector, "/v1/embeddings", {"input": "hi", "model": "e5"}).slm_id == "e5"


def test_a_safety_pattern_moves_no_vectors_but_keeps_them_local() -> None:
    fleet = make_fleet(
        make_spec("chat"),
        embedder("cloud", "c", locality="remote", remote={"base_url": "http://x/v1"}),
        safety=[{"name": "secret", "pattern": "password", "slm": "chat"}],
    )
    assert decide("/v1/embeddings", {"input": "a word"}, fleet).slm_id == "cloud"
    error = refused("/v1/embeddings", {"input": "my password"}, fleet)
    assert "data_policy" in error.message


def test_embedding_slms_score_for_clients_that_name_them() -> None:
    body = {"text_1": "a", "text_2": "b", "model": "e5"}
    assert decide("/v1/score", body).slm_id == "e5"


def test_what_a_tokenizer_answers_always_comes_from_the_same_slm() -> None:
    for path, body in (("/tokenize", {"prompt": "hi"}), ("/v1/messages/count_tokens", CHAT)):
        decision = decide(path, body)
        assert (decision.path, decision.reason) == (DecisionPath.LOAD, DecisionReason.FIRST_LISTED)
        assert decision.ranking == ("chat",)
    pinned = decide("/tokenize", {"prompt": "hi", "model": "e5"})
    assert pinned.ranking == ("e5",)
    # No prediction: the time of a tokenizer would spoil what is learned of the SLM's prefill.
    assert [c.prediction for c in (*decision.candidates[:1], *pinned.candidates)] == [None, None]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": [1, 2]}), ("/detokenize", {"tokens": [1, 2]})],
)
def test_token_ids_need_the_name_of_their_tokenizers_slm(path: str, body: dict[str, Any]) -> None:
    assert refused(path, body).param == "model"
    assert decide(path, {**body, "model": "base"}).slm_id == "base"
    assert decide(path, body, make_fleet(make_spec("chat"))).slm_id == "chat"


def test_one_space_has_one_tokenizer() -> None:
    assert decide("/v1/embeddings", {"input": [1, 2]}).slm_id == "fast-bge"


# ---------------------------------------------------------------- errors name what is missing


@pytest.mark.parametrize(
    ("path", "body", "param", "key"),
    [
        ("/v1/chat/completions", {**CHAT, **TOOLS}, "tools", "capabilities.tools"),
        ("/v1/chat/completions", {**CHAT, **TOOLS, "model": "chat"}, "tools", "capabilities.tools"),
        ("/v1/chat/completions", {**CHAT, "model": "base"}, "messages", "capabilities.chat"),
        ("/v1/responses", {"input": "x", "model": "base"}, "input", "capabilities.chat"),
        ("/v1/chat/completions", {**CHAT, "model": "e5"}, "model", "task"),
        ("/v1/embeddings", {"input": "x", "model": "chat"}, "model", "task"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "e5"}, None, None),
        (
            "/v1/completions",
            {"prompt": "x", "guided_regex": "a"},
            "guided_regex",
            "structured_outputs",
        ),
        ("/v1/chat/completions", {**CHAT, "functions": [{}]}, "functions", "'tools'"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "capabilities.vision",
        ),
    ],
)
def test_an_error_names_the_field_the_slms_and_the_key(
    path: str, body: dict[str, Any], param: str | None, key: str | None
) -> None:
    if param is None:
        assert decide(path, body).slm_id == body["model"]
        return
    error = refused(path, body)
    assert error.param == param
    assert key in error.message
    named = body.get("model", "chat")
    assert named in error.message


def test_a_fleet_without_the_task_says_so() -> None:
    error = refused("/v1/embeddings", {"input": "x"}, make_fleet(make_spec("chat")))
    assert error.param == "model"
    assert "task embed" in error.message


def test_every_filter_that_can_refuse_has_words() -> None:
    assert set(_EXCLUSIONS) == set(FILTERS) - {RELAXED_IF_NONE_PASSES}


def test_an_slm_that_could_take_the_request_later_makes_the_error_a_temporary_one() -> None:
    fleet = make_fleet(make_spec("able", capabilities={"tools": True}), make_spec("unable"))
    open_breaker = make_state("able", breaker_open=True)
    with pytest.raises(SLMUnavailableError, match="able: breaker"):
        decide("/v1/chat/completions", {**CHAT, **TOOLS}, fleet, able=open_breaker)


def test_goals_learn_nothing_from_requests_without_text() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.weights = selector.weights

        def learn(self, decision: Decision, outcome: Any) -> None:
            self.seen.append(decision.slm_id)

    selector = ModelSelector(FLEET, make_goals())
    selector.controller = recorder = Recorder()  # type: ignore[assignment]
    for path, body in (("/v1/embeddings", {"input": "x"}), ("/v1/chat/completions", CHAT)):
        selector.learn(_decide(selector, path, body), make_outcome())
    assert recorder.seen == ["chat"]
