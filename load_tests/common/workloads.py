"""The standard workload: labelled requests that every routing benchmark sends.

Held-out rows of the reference fleet (`deployments/reference_fleet/eval`), from the side that no
predictor was fitted on: the specialists' tasks over all difficulties, and a fifth free chat and
knowledge. Almost three in four name neither their task nor the form of the answer, so keyword rules
decide only a minority. Open questions and choices are graded by the form of the answer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from deployments.reference_fleet.corpora.phrasing import (
    INSTRUCTIONS,
    Message,
    user,
    with_instruction,
)
from deployments.reference_fleet.grading.rows import Row, load

SEED = 2602
INSTRUCTED_RATIO = 0.35  # of the requests of specialists' tasks

# (file, filter, number of rows): balanced over difficulty, not as in the published sets.
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
    ("open", lambda r: r.task == "open", 75),
    ("open", lambda r: r.task == "choice", 165),
    ("knowledge", lambda r: True, 70),
    ("mixed", lambda r: True, 45),
    ("odd", lambda r: True, 60),
)


@dataclass(frozen=True)
class Request:
    """One labelled request; `instructed` if an instruction names the task or the format."""

    messages: list[Message]
    row: Row
    instructed: bool


def standard(seed: int = SEED) -> list[Request]:
    """The 1,535 requests, shuffled; the same for the same seed."""
    rng = Random(seed)
    found: list[Request] = []
    for name, qualifies, count in QUOTAS:
        rows = [r for r in load(name) if r.side == "workload" and qualifies(r)]
        found += [request(row, rng) for row in rng.sample(rows, count)]
    rng.shuffle(found)
    return found


def request(row: Row, rng: Random, instructed_ratio: float = INSTRUCTED_RATIO) -> Request:
    """The row as a request, with an instruction for `instructed_ratio` of specialists' tasks."""
    named = row.task in INSTRUCTIONS and row.slice != "odd" and rng.random() < instructed_ratio
    text = with_instruction(row.task, row.prompt, rng) if named else row.prompt
    return Request([user(text)], row, named)
