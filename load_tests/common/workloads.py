"""The standard workload: labelled requests that every benchmark of routing sends.

Held-out rows of the reference fleet (`deployments/reference_fleet/eval`), of the side that no
predictor was fitted on, over all tasks and difficulties. About two in three say neither their task
nor the form of the answer, so a keyword rule decides the minority; four tasks have easy and hard
slices, so the task alone does not decide either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from deployments.reference_fleet.corpora.phrasing import (
    TELLING,
    Message,
    told,
    user,
)
from deployments.reference_fleet.grading.rows import Row, load

SEED = 2602
TOLD_RATIO = 0.35  # of the requests of a specialist's task

# (file, rows that qualify, how many): sizes are balanced over difficulty, not as published.
Quota = tuple[str, Callable[[Row], bool], int]
QUOTAS: tuple[Quota, ...] = (
    ("extract", lambda r: r.difficulty == "easy", 90),
    ("extract", lambda r: r.difficulty == "medium", 70),
    ("extract", lambda r: r.difficulty == "hard", 50),
    ("sql", lambda r: r.slice == "advising", 70),
    ("sql", lambda r: r.slice == "wikisql" and r.difficulty == "easy", 80),
    ("sql", lambda r: r.slice == "wikisql" and r.difficulty != "easy", 90),
    ("shell", lambda r: r.difficulty == "easy", 80),
    ("shell", lambda r: r.difficulty == "medium", 80),
    ("shell", lambda r: r.difficulty == "hard", 40),
    ("reason", lambda r: r.slice == "svamp", 50),
    ("reason", lambda r: r.slice[0] in "12", 80),
    ("reason", lambda r: r.slice[0] == "3", 40),
    ("reason", lambda r: r.slice[0] in "456", 100),
    ("intent", lambda r: r.slice == "in scope", 150),
    ("intent", lambda r: r.slice == "out of scope", 50),
    ("general", lambda r: r.task == "chat", 25),
    ("general", lambda r: r.task == "prose", 20),
    ("mixed", lambda r: True, 45),
    ("odd", lambda r: True, 60),
)


@dataclass(frozen=True)
class Request:
    """One labelled request; `told` says whether its text names the task or the format."""

    messages: list[Message]
    row: Row
    told: bool


def standard(seed: int = SEED) -> list[Request]:
    """The 1,270 requests, shuffled; the same for the same seed."""
    rng = Random(seed)
    found: list[Request] = []
    for name, wanted, count in QUOTAS:
        rows = [r for r in load(name) if r.side == "workload" and wanted(r)]
        found += [request(row, rng) for row in rng.sample(rows, count)]
    rng.shuffle(found)
    return found


def request(row: Row, rng: Random, told_ratio: float = TOLD_RATIO) -> Request:
    """The row as a request, with telling words for `told_ratio` of a specialist's tasks."""
    named = row.task in TELLING and row.slice != "odd" and rng.random() < told_ratio
    text = told(row.task, row.prompt, rng) if named else row.prompt
    return Request([user(text)], row, named)
