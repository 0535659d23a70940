"""Writes `eval/<task>.jsonl`: `python -m deployments.reference_fleet.evalsets`.

Held-out rows only. Every other prompt carries telling words (`told`), so a router can
be tested on both kinds. GSM8K rows are far beyond these models and marked `beyond`.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random

from deployments.reference_fleet.chat import Prose, chat
from deployments.reference_fleet.data import SPECIALISTS, held_out
from deployments.reference_fleet.sources import gsm8k_test

EVAL = Path(__file__).parent / "eval"
ROWS = 150
BEYOND = 20
CHATS = 60
SEED = 11  # not the seed of the scores printed during training


def rows(task: str) -> list[dict[str, object]]:
    """The rows of one file."""
    if task == "general":
        return _general()
    found: list[dict[str, object]] = []
    for index, example in enumerate(held_out(task, ROWS, SEED)):
        found.append(
            {
                "prompt": example.messages[-1]["content"],
                "answer": example.answer,
                "task": task,
                "difficulty": example.difficulty,
                "told": bool(index % 2),
            }
        )
    if task == "reason":
        for question, number in islice(gsm8k_test(), BEYOND):
            found.append(_row(question, f"#### {number}", "reason", "beyond"))
    return found


def _general() -> list[dict[str, object]]:
    # Templates and verse have no test side; these rows show the form, not the skill.
    rng, prose = Random(SEED), Prose()
    talk = dict(chat(rng) for _ in range(4 * CHATS))
    found = [_row(q, a, "general", "easy") for q, a in islice(talk.items(), CHATS)]
    for _ in range(CHATS):
        found.append(_row(*prose.sample(rng), "general", "hard"))
    return found


def _row(prompt: str, answer: str, task: str, difficulty: str) -> dict[str, object]:
    return {
        "prompt": prompt,
        "answer": answer,
        "task": task,
        "difficulty": difficulty,
        "told": False,
    }


def main() -> None:
    """Writes all six files."""
    EVAL.mkdir(exist_ok=True)
    for task in (*SPECIALISTS, "general"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(task)]
        (EVAL / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(task, len(lines))


if __name__ == "__main__":
    main()
