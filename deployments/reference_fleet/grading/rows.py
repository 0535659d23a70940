"""The held-out rows in `eval/`, readable without the public data sets.

A hash of the prompt divides them in halves: benchmarks draw from the `workload` side, the shipped
predictor is fitted on the `fit` side alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from deployments.reference_fleet.paths import EVAL

FILES = ("extract", "sql", "shell", "reason", "intent", "open", "knowledge", "mixed", "odd")


@dataclass(frozen=True)
class Row:
    """One held-out request.

    `answers` are all that count as right. `slice` is the part of the task that has a score of its
    own; `side` is `workload` or `fit`.
    """

    prompt: str
    answers: tuple[str, ...]
    task: str
    slice: str
    difficulty: str
    side: str

    def to_line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def load(name: str) -> list[Row]:
    """The rows of one of `FILES`."""
    lines = (EVAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [Row(**(row | {"answers": tuple(row["answers"])})) for row in found]
