"""Score tables with a known truth: the prompt's subject decides which of three models is right."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

SUBJECTS = {
    "poet": "Write a poem about the moon over a quiet harbour number",
    "coder": "def solve(values): return the sorted list of integers, variant",
    "cook": "Which spices belong into a stew of lentils for this many guests:",
}


def make_rows(
    count: int, *, seed: int = 0, noise: float = 0.1, **extra: Any
) -> list[dict[str, Any]]:
    """Rows whose subject's model has score 1 and the others 0, `noise` of the scores swapped."""
    random = Random(seed)
    found = []
    for number in range(count):
        subject = random.choice(list(SUBJECTS))
        scores = {
            model: float((model == subject) != (random.random() < noise)) for model in SUBJECTS
        }
        found.append(
            {"prompt": f"{SUBJECTS[subject]} {number}", "scores": scores, "task": subject, **extra}
        )
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
