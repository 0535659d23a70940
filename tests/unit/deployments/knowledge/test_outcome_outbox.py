"""Outcomes on their way: batched, kept until acknowledged, spooled, and never lost silently."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from calm_serve.testing import make_outcome
from calm_serve.types import Outcome, QualitySignal
from deployments.knowledge import outcome_outbox
from deployments.knowledge.outcome_outbox import BATCH_ROWS, OutcomeOutbox, read_spool
from load_tests.scale.state import slow_actor_rows


class Actor:
    """The far side: keeps rows by id, as the store does, and can be away."""

    def __init__(self) -> None:
        self.away = False
        self.batches: list[int] = []
        self.attempts = 0
        self.rows: dict[str, Outcome] = {}

    async def log(self, rows: Sequence[Outcome]) -> None:
        self.attempts += 1
        if self.away:
            raise ConnectionError("away")
        self.batches.append(len(rows))
        self.rows |= {row.outcome_id: row for row in rows}


@pytest.fixture
def actor() -> Actor:
    return Actor()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_outbox, "FLUSH_S", 0.0)
    monkeypatch.setattr(outcome_outbox, "RETRY_S", 0.0)


@pytest.fixture
def sender(actor: Actor, tmp_path: Path) -> OutcomeOutbox:
    return OutcomeOutbox(actor.log, tmp_path / "spool" / "me.jsonl")


def rows(count: int) -> list[Outcome]:
    return [make_outcome(f"o{i}") for i in range(count)]


def fill(sender: OutcomeOutbox, count: int) -> None:
    for row in rows(count):
        sender.add(row)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # no event announces a file
            await asyncio.sleep(0)


async def test_rows_arrive_in_bounded_batches(sender: OutcomeOutbox, actor: Actor) -> None:
    fill(sender, 2 * BATCH_ROWS + 5)
    sender.start()
    await until(lambda: not sender.pending_rows)
    assert actor.batches == [BATCH_ROWS, BATCH_ROWS, 5]
    assert list(actor.rows.values()) == rows(2 * BATCH_ROWS + 5)
    await sender.stop()


async def test_a_full_batch_does_not_wait_for_the_timer(
    sender: OutcomeOutbox, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome_outbox, "FLUSH_S", 3600.0)
    sender.start()
    fill(sender, BATCH_ROWS)
    await until(lambda: len(actor.rows) == BATCH_ROWS)
    await sender.stop()


async def test_rows_are_kept_until_they_are_acknowledged(
    sender: OutcomeOutbox, actor: Actor
) -> None:
    actor.away = True
    fill(sender, 3)
    sender.start()
    await until(lambda: actor.attempts >= 3)
    assert sender.pending_rows == 3
    actor.away = False
    await until(lambda: not sender.pending_rows)
    assert sorted(actor.rows) == ["o0", "o1", "o2"]
    await sender.stop()


async def test_rows_added_while_a_batch_is_under_way_are_not_lost(
    tmp_path: Path, actor: Actor
) -> None:
    async def log(batch: Sequence[Outcome]) -> None:
        if not actor.rows:
            outbox.add(make_outcome("late"))
        await actor.log(batch)

    outbox = OutcomeOutbox(log, tmp_path / "me.jsonl")
    fill(outbox, 2)
    outbox.start()
    await until(lambda: "late" in actor.rows)
    assert actor.batches == [2, 1]
    await outbox.stop()


async def test_beyond_memory_the_oldest_rows_are_spooled_and_replayed(
    sender: OutcomeOutbox, actor: Actor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(outcome_outbox, "MEMORY_ROWS", 4)
    actor.away = True
    fill(sender, 10)
    sender.start()
    await until(lambda: sender.pending_rows == 4)
    spool = tmp_path / "spool" / "me.jsonl"
    await until(lambda: spool.exists() and len(read_spool(spool)) == 6)
    assert [r.outcome_id for r in read_spool(spool)] == [f"o{i}" for i in range(6)]
    actor.away = False
    await until(lambda: not spool.exists())
    assert sorted(actor.rows) == [f"o{i}" for i in range(10)]
    assert sender.lost_rows == 0
    await sender.stop()


async def test_a_spool_is_kept_when_its_replay_is_not_acknowledged(
    sender: OutcomeOutbox, actor: Actor, tmp_path: Path
) -> None:
    spool = tmp_path / "spool" / "me.jsonl"
    sender._spill(rows(3))
    actor.away = True
    sender.start()
    await until(lambda: actor.attempts >= 2)
    assert len(read_spool(spool)) == 3
    actor.away = False
    await until(lambda: not spool.exists())
    assert len(actor.rows) == 3
    await sender.stop()


async def test_stopping_delivers_everything_that_waits(sender: OutcomeOutbox, actor: Actor) -> None:
    fill(sender, 2 * BATCH_ROWS + 7)
    await sender.stop()
    assert len(actor.rows) == 2 * BATCH_ROWS + 7
    assert sender.pending_rows == 0


async def test_it_stops_also_when_a_batch_has_just_become_full(
    sender: OutcomeOutbox, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome_outbox, "FLUSH_S", 60.0)
    sender.start()
    await asyncio.sleep(0)  # it waits for the first outcome
    fill(sender, BATCH_ROWS)
    async with asyncio.timeout(20):
        await sender.stop()
    assert len(actor.rows) == BATCH_ROWS


async def test_stopping_without_the_actor_spools_everything_that_waits(
    sender: OutcomeOutbox, actor: Actor, tmp_path: Path
) -> None:
    actor.away = True
    fill(sender, BATCH_ROWS + 7)
    await sender.stop()
    assert len(read_spool(tmp_path / "spool" / "me.jsonl")) == BATCH_ROWS + 7


async def test_rows_that_were_stored_but_not_acknowledged_are_stored_once(
    tmp_path: Path, actor: Actor
) -> None:
    async def log(batch: Sequence[Outcome]) -> None:
        await actor.log(batch)
        if len(actor.batches) == 1:
            raise TimeoutError("the acknowledgement got lost")

    sender = OutcomeOutbox(log, tmp_path / "me.jsonl")
    fill(sender, 2)
    sender.start()
    await until(lambda: not sender.pending_rows)
    assert actor.batches == [2, 2]
    assert sorted(actor.rows) == ["o0", "o1"]
    await sender.stop()


async def test_the_next_process_delivers_what_a_dead_one_has_spooled(
    sender: OutcomeOutbox, actor: Actor, tmp_path: Path
) -> None:
    dead = tmp_path / "spool" / "dead.jsonl"
    OutcomeOutbox(actor.log, dead)._spill([make_outcome("d")])
    os.utime(dead, (0, 0))
    sender.start()
    await until(lambda: "d" in actor.rows)
    await until(lambda: not (tmp_path / "spool" / "me.jsonl").exists())
    await sender.stop()
    assert not dead.exists()


async def test_a_spool_that_its_process_may_still_write_to_is_left_alone(
    sender: OutcomeOutbox, actor: Actor, tmp_path: Path
) -> None:
    alive = tmp_path / "spool" / "alive.jsonl"
    OutcomeOutbox(actor.log, alive)._spill(rows(1))
    await sender._replay()
    assert alive.exists()
    assert actor.attempts == 0


async def test_a_spool_that_cannot_be_written_is_counted_and_delivery_goes_on(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    sender = OutcomeOutbox(actor.log, tmp_path / "file" / "me.jsonl")
    monkeypatch.setattr(outcome_outbox, "MEMORY_ROWS", 4)
    actor.away = True
    fill(sender, 10)
    sender.start()
    await until(lambda: sender.lost_rows == 6)
    actor.away = False
    await until(lambda: not sender.pending_rows)
    assert sorted(actor.rows) == [f"o{i}" for i in range(6, 10)]
    await sender.stop()


async def test_the_spool_is_bounded(
    sender: OutcomeOutbox, actor: Actor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(outcome_outbox, "SPOOL_BYTES", 100)
    actor.away = True
    for _ in range(3):
        fill(sender, 2)
        await sender.stop()
    assert len(read_spool(tmp_path / "spool" / "me.jsonl")) == 2
    assert sender.lost_rows == 4


def test_a_spooled_row_comes_back_as_it_was(sender: OutcomeOutbox, tmp_path: Path) -> None:
    signals = (QualitySignal("feedback", 1.0, 5.0), QualitySignal("validator:json", 0.0))
    row = make_outcome(prompt_text='quoted "\n\u2028 text', signals=signals, ttft_s=None)
    sender._spill([row])
    assert read_spool(tmp_path / "spool" / "me.jsonl") == [row]


@pytest.mark.parametrize(
    "line", ['{"outcome_id": "cut', "5", "{}", "null", '{"numbers": 5}', "\x00\x00"]
)
def test_an_unreadable_line_costs_no_other_row(
    sender: OutcomeOutbox, tmp_path: Path, line: str
) -> None:
    spool = tmp_path / "spool" / "me.jsonl"
    sender._spill([make_outcome("before")])
    with spool.open("ab") as file:
        file.write(line.encode() + b"\xff\n")
    sender._spill([make_outcome("after")])
    assert [r.outcome_id for r in read_spool(spool)] == ["before", "after"]


def test_a_line_that_a_crash_cut_off_costs_no_later_row(
    sender: OutcomeOutbox, tmp_path: Path
) -> None:
    spool = tmp_path / "spool" / "me.jsonl"
    sender._spill([make_outcome("before"), make_outcome("cut")])
    spool.write_bytes(spool.read_bytes()[:-20])
    sender._spill([make_outcome("after")])
    assert [r.outcome_id for r in read_spool(spool)] == ["before", "after"]


async def test_outcomes_of_a_newer_program_are_kept_for_it(
    sender: OutcomeOutbox, actor: Actor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spool"
    spool = folder / "me.jsonl"
    sender._spill(rows(2))
    newer = spool.read_text("utf-8").replace('"version":', '"version":9')
    spool.write_text(newer, "utf-8")
    os.utime(spool, (0, 0))
    await sender._replay()
    (kept,) = folder.iterdir()
    assert (kept.suffix, kept.read_text("utf-8")) == (".newer", newer)
    await sender._replay()  # it is not tried again and again
    assert [*folder.iterdir()] == [kept]

    next_program = OutcomeOutbox(actor.log, folder / "next.jsonl")
    monkeypatch.setattr(outcome_outbox, "read_spool", lambda _path: rows(2))
    await next_program._replay()
    assert sorted(actor.rows) == ["o0", "o1"]
    assert not [*folder.iterdir()]


async def test_memory_is_bounded_while_an_actor_acknowledges_too_slowly(tmp_path: Path) -> None:
    most = await slow_actor_rows(tmp_path)
    assert most <= outcome_outbox.MEMORY_ROWS + 2 * BATCH_ROWS
