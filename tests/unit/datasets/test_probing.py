"""Probing a service in this process, over HTTP without a socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from calm_serve.datasets.probing import ATTEMPTS, Probe, ProbeReport, read_prompts
from calm_serve.datasets.table import read_table
from calm_serve.errors import ComponentError, ConfigError, RequestError
from calm_serve.testing import FakeClock
from tests.chat_service import ChatService
from tests.score_tables import write_rows

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "2 + 2", "answers": ["4"], "task": "sum"},
    {"prompt": "3 + 4", "answers": ["7"], "task": "sum"},
    {"prompt": "capital of France", "answers": ["Paris"], "match": "contains", "task": "facts"},
]


class Waits:
    """A clock and a sleep that moves it."""

    def __init__(self) -> None:
        self.clock, self.slept = FakeClock(), list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)


async def probe(
    service: ChatService,
    out: Path,
    prompts: list[dict[str, Any]] = PROMPTS,
    *,
    judge: str = "",
    concurrency: int = 2,
    waits: Waits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ProbeReport:
    waits = waits or Waits()
    rows = read_prompts(write_rows(out.with_suffix(".in"), prompts), has_judge=bool(judge))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(service), base_url="http://service"
    ) as client:
        asking = Probe(client, clock=waits.clock, sleep=waits.sleep, judge=judge)
        return await asking.run(rows, out, concurrency, progress)


async def test_every_slm_answers_every_prompt_and_the_table_reads_back(tmp_path: Path) -> None:
    service, out = ChatService(), tmp_path / "table.jsonl"
    report = await probe(service, out)
    table = read_table(out)
    assert (report.written, report.skipped, report.failed) == (3, 0, [])
    assert table.models == ("adder", "reader")  # not the one that embeds
    scores = {row.prompt: row.scores for row in table.rows}
    assert scores["2 + 2"] == {"adder": 1.0, "reader": 0.0}
    assert scores["capital of France"] == {"adder": 0.0, "reader": 1.0}
    assert sorted(table.tasks or ()) == ["facts", "sum", "sum"]
    assert table.latencies_s is not None


async def test_prompts_in_the_table_are_not_asked_again(tmp_path: Path) -> None:
    service, out = ChatService(), tmp_path / "table.jsonl"
    await probe(service, out, PROMPTS[:2])
    before = out.read_text()
    service.asked.clear()
    report = await probe(service, out)
    assert (report.written, report.skipped) == (1, 2)
    assert {body["messages"][0]["content"] for body in service.asked} == {"capital of France"}
    assert out.read_text().startswith(before)


async def test_an_interrupted_write_is_taken_back(tmp_path: Path) -> None:
    service, out = ChatService(), tmp_path / "table.jsonl"
    await probe(service, out, PROMPTS[:2])
    whole = out.read_text()
    out.write_text(whole + whole.splitlines()[0][:30])
    assert (await probe(service, out)).written == 1
    assert len(read_table(out).rows) == 3


async def test_a_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    service, out = ChatService(), tmp_path / "table.jsonl"
    await probe(service, out, PROMPTS[:2])
    out.write_text(out.read_text().rstrip("\n"))
    assert (await probe(service, out)).skipped == 2
    assert len(read_table(out).rows) == 3


async def test_no_more_prompts_are_in_flight_than_allowed(tmp_path: Path) -> None:
    service = ChatService(delay_turns=5)
    prompts = [{"prompt": f"{i} + 1", "answers": [str(i + 1)]} for i in range(20)]
    await probe(service, tmp_path / "t", prompts, concurrency=3)
    assert service.most_in_flight == 3


async def test_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    out = tmp_path / "table.jsonl"
    report = await probe(ChatService(), out, [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert (report.written, report.skipped) == (2, 1)


async def test_a_busy_service_is_asked_again_after_the_time_it_names(tmp_path: Path) -> None:
    service, waits = ChatService(busy=2, retry_after_s=7), Waits()
    report = await probe(service, tmp_path / "t", PROMPTS[:1], waits=waits)
    assert report.written == 1
    assert waits.slept == [7.0, 7.0]


async def test_waiting_for_a_busy_service_is_no_latency_of_the_slm(tmp_path: Path) -> None:
    service, out = ChatService(busy=1, retry_after_s=9), tmp_path / "t"
    await probe(service, out, PROMPTS[:1])
    assert read_table(out).rows[0].latencies_s == {"adder": 0.0, "reader": 0.0}


async def test_a_service_that_stays_busy_fails_the_prompt_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    service, out = ChatService(busy=ATTEMPTS), tmp_path / "t"
    report = await probe(service, out, concurrency=1)
    assert report.failed == [(1, "adder: queue is full")]
    assert report.written == 2
    assert (await probe(service, out)).written == 1


async def test_an_slm_that_cannot_take_a_prompt_has_the_score_zero(tmp_path: Path) -> None:
    service, out = ChatService(refusing=("reader",)), tmp_path / "t"
    await probe(service, out, PROMPTS[:1])
    assert read_table(out).rows[0].scores == {"adder": 1.0, "reader": 0.0}


async def test_a_prompt_that_every_slm_refuses_has_no_row(tmp_path: Path) -> None:
    service = ChatService(refusing=("adder", "reader"))
    report = await probe(service, tmp_path / "t", PROMPTS[:1])
    assert report.failed == [(1, "every SLM refused it; adder: cannot take this")]


async def test_a_judge_grades_what_nothing_else_can(tmp_path: Path) -> None:
    out = tmp_path / "t"
    await probe(ChatService(), out, [{"prompt": "5 + 5"}], judge="reader")
    assert read_table(out).rows[0].scores == {"adder": 1.0, "reader": pytest.approx(1 / 9)}


async def test_a_judge_without_a_grade_fails_the_prompt(tmp_path: Path) -> None:
    report = await probe(ChatService(), tmp_path / "t", [{"prompt": "5 + 5"}], judge="adder")
    assert report.failed == [(1, "judge on the answer of adder: no grade in 'I cannot add that'")]


async def test_progress_counts_prompts_that_were_there(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "t"
    await probe(ChatService(), out, PROMPTS[:1])
    await probe(ChatService(), out, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


async def test_a_table_of_other_slms_is_not_continued(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "t", [{"prompt": "x", "scores": {"adder": 1.0}, "task": "sum"}])
    with pytest.raises(ConfigError, match="line 1: scores: 'reader' is missing; write to another"):
        await probe(ChatService(), out)


async def test_an_unknown_judge_and_a_service_of_another_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="judge 'me' is not among the SLMs adder, reader"):
        await probe(ChatService(), tmp_path / "t", judge="me")
    with pytest.raises(RequestError, match="not the answer of calm_serve"):
        await probe(ChatService(fleet={"hello": 1}), tmp_path / "t")


async def test_a_service_that_is_gone_ends_the_probe(tmp_path: Path) -> None:
    class Gone(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("connection refused", request=request)

    async with httpx.AsyncClient(transport=Gone(), base_url="http://service") as client:
        with pytest.raises(ComponentError, match="cannot reach http://service: connection refused"):
            await Probe(client, clock=FakeClock()).slms()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], "line 1: answers: no answers, no validator, and --judge names none"),
        ([PROMPTS[0], {"prompt": "x", "answers": ["1"]}], "line 2: task: it is on every line"),
        ([PROMPTS[0], {"prompt": "x", "answer": ["1"]}], "line 2: unknown key 'answer'"),
        ([], "there is no prompt"),
    ],
)
def test_prompts_that_cannot_be_graded_are_named_before_anything_is_asked(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(write_rows(tmp_path / "in.jsonl", rows), has_judge=False)


async def test_a_limit_of_tokens_is_passed_on(tmp_path: Path) -> None:
    service = ChatService()
    await probe(service, tmp_path / "t", [PROMPTS[0] | {"max_tokens": 9}])
    assert {body["max_tokens"] for body in service.asked} == {9}
    assert json.dumps(service.asked[0]["messages"]) == json.dumps(
        [{"role": "user", "content": "2 + 2"}]
    )
