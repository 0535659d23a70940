"""The per-process live view: whose number wins, when it expires, and its bounds."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from calm_serve.types import (
    Decision,
    DecisionPath,
    DecisionReason,
    EngineFacts,
    OutputShape,
    PromptEnd,
    ReplicaState,
    RoutingContext,
    Versions,
)
from deployments.router import live_state
from deployments.router.live_state import FACTS_LIFETIME_S, LiveView, hints_of


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def polled(name: str, running: int = 0, waiting: int = 0) -> ReplicaState:
    return ReplicaState(name, max_queue_length=8, running=running, waiting=waiting)


def facts(name: str, running: int, waiting: int = 0) -> EngineFacts:
    return EngineFacts(name, running=running, waiting=waiting, kv_usage_ratio=0.5)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> LiveView:
    return LiveView(clock)


def test_an_unknown_deployment_has_no_replicas(view: LiveView) -> None:
    assert view.replicas("slm") == ()


def test_replicas_are_those_of_the_last_update(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a"), polled("b")])
    view.update_replicas("slm", [polled("b")])
    assert [r.replica_id for r in view.replicas("slm")] == ["b"]


def test_deployments_do_not_see_each_other(view: LiveView) -> None:
    view.update_replicas("one", [polled("a")])
    view.update_replicas("two", [polled("b")])
    view.observe("one", facts("b", running=5))
    assert view.replicas("two") == (polled("b"),)


def test_the_last_answer_overrides_polled_statistics(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a", running=1)])
    view.observe("slm", facts("a", running=4, waiting=2))
    (state,) = view.replicas("slm")
    assert (state.running, state.waiting, state.kv_usage_ratio) == (4, 2, 0.5)


def test_polled_statistics_that_changed_after_the_last_answer_are_newer(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a", running=1)])
    view.observe("slm", facts("a", running=4))
    view.update_replicas("slm", [polled("a", running=2)])
    assert view.replicas("slm")[0].running == 2


def test_a_broadcast_that_repeats_old_statistics_does_not_override_an_answer(
    view: LiveView,
) -> None:
    view.update_replicas("slm", [polled("a", running=1)])
    view.observe("slm", facts("a", running=4))
    view.update_replicas("slm", [polled("a", running=1), polled("b")])
    assert view.replicas("slm")[0].running == 4


def test_an_old_answer_gives_way_to_polled_statistics(view: LiveView, clock: Clock) -> None:
    view.update_replicas("slm", [polled("a", running=1)])
    view.observe("slm", facts("a", running=4))
    clock.now_s += FACTS_LIFETIME_S + 0.1
    assert view.replicas("slm")[0].running == 1


def test_queue_lengths_come_from_the_reader_and_else_from_the_engine(view: LiveView) -> None:
    view.attach("slm", {"a": 7}.get)
    view.update_replicas("slm", [polled("a", running=1), polled("b", running=2, waiting=3)])
    assert [r.queue_length for r in view.replicas("slm")] == [7, 5]


def test_the_cached_share_of_prompts_is_a_running_mean(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a")])
    for _ in range(100):
        view.observe("slm", EngineFacts("a", prompt_tokens=100, cached_tokens=40))
    view.observe("slm", EngineFacts("a"))  # no prompt, no statement about the cache
    assert view.replicas("slm")[0].cached_prefix_ratio == pytest.approx(0.4, abs=1e-3)


def test_facts_of_a_replica_that_is_gone_are_ignored(view: LiveView) -> None:
    view.observe("slm", facts("a", running=4))
    view.update_replicas("slm", [polled("a")])
    view.update_replicas("slm", [])
    view.observe("slm", facts("a", running=4))
    view.update_replicas("slm", [polled("a")])
    assert view.replicas("slm") == (polled("a"),)


def test_a_dead_replica_leaves_the_view_and_the_index(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a"), polled("b")])
    view.estimator("slm").index.add((1, 2), "a")
    view.died("slm", "a")
    assert [r.replica_id for r in view.replicas("slm")] == ["b"]
    assert view.estimator("slm").index.match((1, 2)) == {}


def test_a_dead_replica_does_not_come_back_with_a_broadcast_that_still_lists_it(
    view: LiveView,
) -> None:
    view.died("slm", "a")  # reported before the controller listed it
    view.update_replicas("slm", [polled("a"), polled("b")])
    assert [r.replica_id for r in view.replicas("slm")] == ["b"]
    assert (view.is_dead("a"), view.is_dead("b")) == (True, False)
    view.update_replicas("slm", [polled("c")])
    assert [r.replica_id for r in view.replicas("slm")] == ["c"]


def test_the_list_of_dead_replicas_is_bounded(
    view: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_state, "MAX_DEAD", 2)
    for name in "abc":
        view.died("slm", name)
    assert [view.is_dead(name) for name in "abc"] == [False, True, True]


def test_the_index_survives_membership_updates(view: LiveView) -> None:
    view.update_replicas("slm", [polled("a")])
    view.estimator("slm").index.add((1, 2), "a")
    view.update_replicas("slm", [polled("a"), polled("b")])
    assert view.estimator("slm").index.match((1, 2)) == {"a": 2}


def test_a_routed_replica_is_taken_once(view: LiveView) -> None:
    view.routed("d", "a")
    view.routed("d", "b")
    assert view.take_routed("d") == "b"
    assert view.take_routed("d") == ""


def test_routed_decisions_that_are_never_taken_are_dropped(
    view: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_state, "MAX_ROUTED", 3)
    for i in range(5):
        view.routed(f"d{i}", "a")
    assert [view.take_routed(f"d{i}") for i in range(5)] == ["", "", "a", "a", "a"]


def test_deployments_beyond_the_bound_are_forgotten(
    view: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_state, "MAX_DEPLOYMENTS", 2)
    for name in ("one", "two", "three"):
        view.update_replicas(name, [polled("a")])
    assert [len(view.replicas(n)) for n in ("one", "two", "three")] == [0, 1, 1]


def test_readers_and_writers_on_different_threads_do_not_disturb_each_other(
    view: LiveView,
) -> None:
    stop = threading.Event()

    def answer() -> int:
        rounds = 0
        while not stop.is_set():
            view.observe("slm", facts("a", running=1))
            view.routed("d", "a")
            view.take_routed("d")
            view.estimator("slm").index.match((1, 2, 3))
            assert len(view.replicas("slm")) in (0, 1, 2)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        rounds = pool.submit(answer)
        for i in range(2000):
            view.update_replicas("slm", [polled("a", i % 3)] + [polled("b")] * (i % 2))
            view.estimator("slm").index.add((1, 2, i), "a")
        stop.set()
    assert rounds.result() > 0
    view.estimator("slm").index.check_integrity()


def test_answers_and_reports_reach_the_estimator(view: LiveView) -> None:
    ends = (PromptEnd((7, 8), 64), PromptEnd((9,), 32))
    view.update_replicas("slm", [replace(polled("a"), recent_prompts=ends[:1])])
    estimator = view.estimator("slm")
    estimator.index.emptied("a")
    view.update_replicas("slm", [replace(polled("a", waiting=9), recent_prompts=ends)])
    assert estimator.index.match((7, 8)) == {}  # known from the report before
    assert estimator.index.match((9,)) == {"a": 1}
    assert estimator.estimates((), 0, 1, [polled("a")])[0].wait_s > 0.1
    before_s = estimator.request_s
    for number in range(50):
        estimator.sent(f"d{number}", (), 100 + number, "a")
        answer = EngineFacts("a", prompt_tokens=100 + number, queue_s=0.0, ttft_s=number / 10)
        view.observe("slm", answer, f"d{number}")
    assert estimator.request_s > 10 * before_s


def test_the_view_is_pickled_by_name_so_no_process_gets_a_copy(view: LiveView) -> None:
    assert pickle.loads(pickle.dumps(live_state.VIEW)) is live_state.VIEW
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(view)


def test_hints_carry_what_replica_selection_reads() -> None:
    context = RoutingContext(
        request_id="r",
        requested_model="slm:sql",
        prompt_chars=1,
        prompt_tokens=1,
        max_output_tokens=None,
        output_shape=OutputShape.TEXT,
        turns=1,
        stream=True,
        language="en",
        has_code=False,
        safety_class="none",
        markers=(),
        session_key="s",
        prefix_family="f",
        prefix_chain=(1, 2),
    )
    decision = Decision(
        decision_id="d",
        slm_id="slm",
        adapter="sql",
        path=DecisionPath.PINNED,
        reason=DecisionReason.REQUESTED,
        rule="",
        propensity=1.0,
        candidates=(),
        ranking=("slm",),
        context=context,
        versions=Versions(),
    )
    assert hints_of(decision) == {
        "decision_id": "d",
        "prefix_family": "f",
        "prefix_chain": (1, 2),
        "prompt_tokens": 1,
        "session_key": "s",
        "adapter": "sql",
    }
