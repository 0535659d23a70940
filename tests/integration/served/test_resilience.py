"""Parts die while requests flow: the others go on, clients get answers, and the parts come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.integration.served_fleet import READY_S, TWO_REPLICAS, ServedFleet, eventually

BACK_S = READY_S / 2

# A replica takes 15 to 40 s to come back on two cores, and more beside other work.
pytestmark = pytest.mark.timeout(300)


@contextmanager
def traffic(send: Callable[[int], httpx.Response]) -> Iterator[list[httpx.Response | Exception]]:
    """Two clients that send one request after the other while the block runs."""
    answers: list[httpx.Response | Exception] = []
    stop = threading.Event()

    def client(number: int) -> None:
        sent = number
        while not stop.is_set():
            try:
                answers.append(send(sent))
            except httpx.HTTPError as error:
                answers.append(error)
            sent += 2
            stop.wait(0.05)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(60.0)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"


def statuses(answers: list[httpx.Response | Exception]) -> dict[object, int]:
    kinds = [a.status_code if isinstance(a, httpx.Response) else type(a).__name__ for a in answers]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_when_an_engine_dies_routed_requests_fail_over_and_pinned_ones_get_503(
    fleet: ServedFleet,
) -> None:
    (engine,) = fleet.engine_pids("shell")
    routed = "Write a bash command: list all files"
    assert fleet.chat(routed, max_tokens=2).headers["x-calm-model"] == "shell"
    with traffic(lambda i: fleet.chat(f"{routed} {i}", max_tokens=4)) as answers:
        os.kill(engine, signal.SIGKILL)
        pinned = eventually(
            "a pinned request is refused",
            lambda: refused(fleet.chat("list files", "shell", max_tokens=2)),
            30.0,
        )
        eventually("every router shows it", lambda: states(fleet, "shell") == {"dead"}, 10.0)
        for _ in range(4):
            assert httpx.get(f"{fleet.url}/health", timeout=10.0).status_code == 200
        elsewhere = fleet.chat(routed, max_tokens=2)
        eventually("it is hot again", lambda: states(fleet, "shell") == {"hot"}, BACK_S)
    assert pinned.json()["error"]["type"] == "service_unavailable"
    assert pinned.headers["x-calm-decision-id"]
    assert elsewhere.status_code == 200
    assert elsewhere.headers["x-calm-model"] != "shell"
    assert set(statuses(answers)) == {200}, statuses(answers)
    assert len(answers) > 20
    # Through either router: neither sends to the replica whose engine is dead.
    assert fleet.chat("list files", "shell", max_tokens=2).status_code == 200
    assert engine not in fleet.engine_pids("shell")


def refused(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code == 503 else None


def states(fleet: ServedFleet, slm_id: str) -> set[str]:
    """The SLM's states in /v1/fleet, one of each router."""
    documents = fleet.each_router("/v1/fleet")
    return {s["state"] for d in documents for s in d["slms"] if s["id"] == slm_id}


def test_when_one_of_two_replicas_dies_the_other_one_answers_even_pinned_requests(
    fleet: ServedFleet,
) -> None:
    victim = fleet.replicas()[f"slm-{TWO_REPLICAS}"][0]["pid"]

    def send(number: int) -> httpx.Response:
        return fleet.chat(f"Say {number}", TWO_REPLICAS, max_tokens=4)

    with traffic(send) as answers:
        eventually("requests flow", lambda: len(answers) > 10)
        psutil.Process(victim).kill()
        eventually(
            "both replicas are up again",
            lambda: (
                fleet.slm(TWO_REPLICAS)["replicas"] == 2
                and victim not in [r["pid"] for r in fleet.replicas()[f"slm-{TWO_REPLICAS}"]]
            ),
            BACK_S,
        )
    assert set(statuses(answers)) == {200}, statuses(answers)


def test_a_stream_whose_engine_dies_ends_with_an_error_event(fleet: ServedFleet) -> None:
    body = {
        "model": "intent",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 1800,
        "min_tokens": 1800,
        "ignore_eos": True,
    }
    url = f"{fleet.url}/v1/chat/completions"
    (engine,) = fleet.engine_pids("intent")
    with httpx.stream("POST", url, json=body, timeout=60.0) as answer:
        lines = (line for line in answer.iter_lines() if line)
        decision_id = answer.headers["x-calm-decision-id"]
        for _ in range(10):
            next(lines)
        os.kill(engine, signal.SIGKILL)
        last = list(lines)[-1]
    assert "error" in last and "[DONE]" not in last
    assert fleet.outcome(decision_id).status == "error"
    eventually("every router shows it", lambda: states(fleet, "intent") == {"dead"}, 10.0)
    eventually("it is hot again", lambda: states(fleet, "intent") == {"hot"}, BACK_S)


def test_a_router_that_dies_is_replaced_by_one_with_what_was_learned(
    fleet: ServedFleet,
) -> None:
    version = fleet.get("/v1/fleet")["predictor"]["version"]
    victim = fleet.replicas()["router"][0]["pid"]
    knowledge = [p for p in fleet.processes() if "KnowledgeActor" in " ".join(p.cmdline())]
    for process in knowledge:
        process.kill()  # so that what is published comes from its files
    psutil.Process(victim).kill()
    eventually(
        "two routers answer",
        lambda: len(urls := fleet.router_urls()) == 2 and all(map(answers_200, urls)),
    )
    eventually(
        "both know the predictor",
        lambda: {d["predictor"]["version"] for d in fleet.each_router("/v1/fleet")} == {version},
        30.0,
    )
    for _ in range(10):
        assert fleet.chat("list files", "shell", max_tokens=2).status_code == 200


def answers_200(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
