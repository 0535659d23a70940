"""RouteLLM's public results as score tables: a weak and a strong model on MMLU, GSM8K, MT-Bench.

The files are those of lm-sys/RouteLLM at 0b64fda (Apache-2.0), in the folder `routellm` of
DATA_DIR. Prompts that RouteLLM lists as contaminated are left out, as in its own evaluation.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calm_serve.datasets import ScoreTable, TableRow, table_of

FOLDER = "routellm"
MODELS = {
    "mixtral-8x7b-instruct-v0.1": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "gpt-4-1106-preview": "gpt-4-1106-preview",
}
MAX_JUDGE_SCORE = 10.0  # of MT-Bench, from 1

csv.field_size_limit(1 << 24)


def read(folder: Path, benchmark: str) -> ScoreTable:
    """The table of `mmlu`, `gsm8k` or `mt_bench`; `folder` is that of RouteLLM's files.

    The tasks of MMLU are its 57 subjects. A score of MT-Bench is the mean of both turns' grades,
    as a share of the best one, and its prompt is the first turn.
    """
    readers = {"mmlu": _mmlu, "gsm8k": _gsm8k, "mt_bench": _mt_bench}
    return table_of(
        [TableRow.model_validate(row) for row in readers[benchmark](folder / benchmark)]
    )


def _mmlu(folder: Path) -> Iterator[dict[str, Any]]:
    left_out = _contaminated(folder)
    for path in sorted((folder / "responses").glob("mmlu_*.csv")):
        yield from _rows(path, left_out, path.stem.removeprefix("mmlu_"))


def _gsm8k(folder: Path) -> Iterator[dict[str, Any]]:
    yield from _rows(folder / "gsm8k_responses.csv", _contaminated(folder), "gsm8k")


def _mt_bench(folder: Path) -> Iterator[dict[str, Any]]:
    left_out = _contaminated(folder)
    grades: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in _lines(folder / "judgements.jsonl"):
        grades[row["question_id"], row["model"]].append(row["score"] / MAX_JUDGE_SCORE)
    for question in _lines(folder / "question.jsonl"):
        if left_out.isdisjoint(question["turns"]):
            found = {name: grades[question["question_id"], model] for name, model in MODELS.items()}
            yield {
                "prompt": question["turns"][0],
                "scores": {name: sum(both) / len(both) for name, both in found.items()},
                "task": question["category"],
            }


def _rows(path: Path, left_out: set[str], task: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["prompt"] not in left_out:
                scores = {name: float(row[model] == "True") for name, model in MODELS.items()}
                yield {"prompt": row["prompt"], "scores": scores, "task": task}


def _contaminated(folder: Path) -> set[str]:
    return {row["eval_prompt"] for row in _lines(folder / "contaminated_prompts.jsonl")}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
