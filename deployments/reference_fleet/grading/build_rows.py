"""Writes `eval/*.jsonl`: `python -m deployments.reference_fleet.grading.build_rows`.

Held-out rows only, without instructions; a benchmark adds them where it needs them. `odd` phrases
rows in forms that no model was trained on, `mixed` makes two requests in one message. GSM8K rows
are far beyond these models and have the difficulty `beyond`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from random import Random

from deployments.reference_fleet.corpora import knowledge, problems, sources
from deployments.reference_fleet.corpora.examples import (
    OOS,
    SPECIALISTS,
    extraction,
    filled,
    intent_pair,
    reason_level,
)
from deployments.reference_fleet.corpora.pairs import Pair
from deployments.reference_fleet.corpora.phrasing import TWO_REQUESTS
from deployments.reference_fleet.corpora.shell import shell_pair
from deployments.reference_fleet.grading.marks import content_words
from deployments.reference_fleet.grading.rows import FILES, Row
from deployments.reference_fleet.paths import EVAL

SEED = 11
WIKISQL_ROWS = 1200  # of 14,084
ROWS_PER_STEP = 120
GSM8K_ROWS = 20
MMLU_ROWS = 400  # of 14,042
MIXED_ROWS = 200
ODD_ROWS = 60  # per task
WORKLOAD_PER_MILLE = 500

# None of these forms occurs in training (`corpora/phrasing.py`).
ODD_FORMS = (
    "My colleague wants to know this, can you help: {x}",
    "[ticket 4821] {x} -- sent from my phone",
    "*** {x} ***",
    "Dear assistant,\n\n{x}\n\nKind regards",
    "user said: '{x}' what now",
    "hmm let me think... right: {x} (no hurry)",
)


def rows(name: str) -> list[Row]:
    """The rows of one file."""
    if name == "odd":
        return [row for task in SPECIALISTS for row in _odd(task)]
    found = {row.prompt: row for row in _ROWS[name]()}
    return list(found.values())


def _row(pair: Pair, task: str, part: str, *also: str) -> Row:
    side = "workload" if sources.held_out(f"side {pair.prompt}", WORKLOAD_PER_MILLE) else "fit"
    return Row(pair.prompt, (pair.answer, *also), task, part, pair.difficulty, side)


def _extract() -> Iterator[Row]:
    for utterance in sources.snips("validate"):
        yield _row(extraction(utterance), "extract", "snips")


def _sql() -> Iterator[Row]:
    for query in Random(SEED).sample(sources.wikisql("test"), WIKISQL_ROWS):
        yield _row(filled(query, query.values), "sql", "wikisql")
    for query in sources.advising("test"):
        yield _row(filled(query, query.values), "sql", "advising")


def _shell() -> Iterator[Row]:
    commands: dict[str, list[str]] = {}
    for english, bash in sources.nl2bash("test"):
        pair = shell_pair(english, bash)
        commands.setdefault(pair.prompt, []).append(pair.answer)
    for english, found in commands.items():
        first, *also = dict.fromkeys(found)
        yield _row(shell_pair(english, first), "shell", "nl2bash", *also)


def _reason() -> Iterator[Row]:
    for problem, equation in sources.svamp("test"):
        solved = problems.from_svamp(problem, equation, None)
        if solved:
            yield _row(Pair(*solved, reason_level(solved[1])), "reason", "svamp")
    rng = Random(SEED)
    for steps in range(1, 7):
        for _ in range(ROWS_PER_STEP):
            question, answer = problems.generated(rng, steps, held_out=True)
            pair = Pair(question, answer, reason_level(answer))
            yield _row(pair, "reason", f"{steps} step{'s' if steps > 1 else ''}")
    for question, number in islice(sources.gsm8k_test(), GSM8K_ROWS):
        yield _row(Pair(question, f"#### {number}", "beyond"), "reason", "gsm8k")


def _intent() -> Iterator[Row]:
    for text, label in sources.clinc("test"):
        part = "out of scope" if label == OOS else "in scope"
        yield _row(intent_pair(text, label), "intent", part)


def _open() -> Iterator[Row]:
    # No right answer is known, so the words that an answer should be about take its place.
    for name in ("mt_bench", "vicuna_bench"):
        for question in filter(_wants_prose, sources.open_questions(name)):
            words = " ".join(sorted(content_words(question)))
            yield _row(Pair(question, words, "hard"), "open", name)
    for question in Random(SEED).sample(sources.mmlu(), MMLU_ROWS):
        options = question.partition("\nA. ")[2].removesuffix("\nAnswer:")
        yield _row(Pair(question, f"A. {options}", "hard"), "choice", "mmlu")


def _wants_prose(question: str) -> bool:
    """Whether prose is an answer at all: some questions ask for a document in a given format."""
    return not re.search(r"\b(json|csv)\b", question, re.IGNORECASE)


def _knowledge() -> Iterator[Row]:
    for question, answers in knowledge.questions():
        yield _row(Pair(question, answers[0], "easy"), "knowledge", "knowledge", *answers[1:])


def _two(first: Pair, second: Pair, rng: Random) -> Pair:
    """Two requests in one message, answered one after the other."""
    text = rng.choice(TWO_REQUESTS).replace("{a}", first.prompt).replace("{b}", second.prompt)
    return Pair(text, f"1) {first.answer}\n2) {second.answer}", "hard")


def _mixed() -> Iterator[Row]:
    rng = Random(SEED)
    known = {task: _simple(task) for task in SPECIALISTS}
    for _ in range(MIXED_ROWS):
        first, second = (rng.choice(known[t]) for t in rng.sample(SPECIALISTS, 2))
        yield _row(_two(first, second, rng), "mixed", "mixed")


def _simple(task: str) -> list[Pair]:
    found = [r for r in rows(task) if r.slice not in ("gsm8k", "out of scope", "advising")]
    return [Pair(r.prompt, r.answers[0], r.difficulty) for r in found]


def _odd(task: str) -> Iterator[Row]:
    rng = Random(f"{SEED}:{task}")
    plain = [r for r in rows(task) if r.slice not in ("gsm8k", "out of scope")]
    for row in rng.sample(plain, ODD_ROWS):
        text = rng.choice(ODD_FORMS).replace("{x}", row.prompt)
        yield _row(Pair(text, row.answers[0], row.difficulty), task, "odd", *row.answers[1:])


_ROWS = {
    "extract": _extract,
    "sql": _sql,
    "shell": _shell,
    "reason": _reason,
    "intent": _intent,
    "open": _open,
    "knowledge": _knowledge,
    "mixed": _mixed,
}


def main() -> None:
    """Writes every file."""
    EVAL.mkdir(exist_ok=True)
    for name in FILES:
        lines = [row.to_line() for row in rows(name)]
        (EVAL / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(name, len(lines))


if __name__ == "__main__":
    main()
