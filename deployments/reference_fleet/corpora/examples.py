"""Training streams and held-out sets of the reference fleet.

| task | source and licence | held out |
|---|---|---|
| extract | SNIPS, CC0-1.0 | published validation files |
| sql | WikiSQL, BSD-3-Clause; advising, CC-BY-4.0 | published question split |
| shell | nl2bash, MIT | hash of the English text |
| reason | SVAMP, MIT; generated problems | hash of the problem |
| intent | CLINC150, CC-BY-3.0 | published test split |

A task gives an endless stream, because values are swapped afresh each time. A model that sees the
same sentence with ever new values can only succeed by copying from the prompt, and learns to within
minutes; without the swapping, models of this size do not learn it at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from deployments.reference_fleet.corpora import problems, sources
from deployments.reference_fleet.corpora.pairs import Draw, Pair
from deployments.reference_fleet.corpora.phrasing import (
    Message,
    user,
    with_instruction,
    wrap,
)
from deployments.reference_fleet.corpora.shell import shell_draw, shell_pair

SPECIALISTS = ("extract", "sql", "shell", "reason", "intent")
LONGEST_CHARACTERS = 420
LONGEST_SQL_CHARACTERS = 900  # advising joins many tables
OOS = "oos"
ADVISING_RATIO = 0.3  # share of advising among the SQL examples
RECASED_RATIO = 0.3  # share of WikiSQL questions whose words change case


@dataclass(frozen=True)
class Example:
    """Messages and their answer, with task and difficulty."""

    messages: list[Message]
    answer: str
    task: str
    difficulty: str


def to_json(value: object) -> str:
    """The JSON form that all answers use."""
    return json.dumps(value, ensure_ascii=False)


def slots_of(pieces: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Slot names and values in the order of the text; the first of a name wins."""
    slots: dict[str, str] = {}
    for text, name in pieces:
        if name:
            slots.setdefault(name, text.strip())
    return slots


def extraction(utterance: sources.Utterance) -> Pair:
    """Utterance to `{"intent": ..., "slots": {...}}`; hard means four slots or more."""
    slots = slots_of(utterance.pieces)
    text = " ".join("".join(t for t, _ in utterance.pieces).split())
    level = "easy" if len(slots) < 3 else "medium" if len(slots) < 4 else "hard"
    return Pair(text, to_json({"intent": utterance.intent, "slots": slots}), level)


def _plain(utterance: sources.Utterance) -> str:
    return extraction(utterance).prompt.lower()


class Swapper:
    """Exchanges slot values between training utterances of the same slot name."""

    def __init__(self, intents: tuple[str, ...] = sources.SNIPS_INTENTS) -> None:
        # A dozen published training utterances are also in the validation files.
        held_out = {_plain(u) for u in sources.snips("validate")}
        everything = [u for u in sources.snips("train") if _plain(u) not in held_out]
        self.rows = [u for u in everything if u.intent in intents]
        self.values: dict[str, list[str]] = {}
        for row in everything:
            for text, name in row.pieces:
                if name:
                    self.values.setdefault(name, []).append(text)

    def sample(self, rng: Random) -> sources.Utterance:
        """A training utterance; each value is replaced with a chance of 60 %."""
        row = rng.choice(self.rows)
        pieces = tuple((self._value(text, name, rng), name) for text, name in row.pieces)
        return sources.Utterance(row.intent, pieces)

    def _value(self, text: str, name: str, rng: Random) -> str:
        if not name or rng.random() > 0.6:
            return text
        return rng.choice(self.values[name])


def _extract() -> Draw:
    swapper = Swapper()
    return lambda rng: extraction(swapper.sample(rng))


def filled(query: sources.Query, values: tuple[str, ...]) -> Pair:
    """Question and SQL with `values` put in; hard means that a column is not in the question."""
    question, sql = query.question, query.sql
    for index, value in enumerate(values):
        slot = f"{{{index}}}"
        question, sql = question.replace(slot, value), sql.replace(slot, value)
    if query.source == "advising":
        return Pair(question, sql, "hard")
    words = set(re.findall(r"[a-z0-9]+", question.lower()))
    columns = re.findall(r"(?:SELECT |AND |WHERE |\()([a-z][a-z0-9_]*)", query.sql)
    known = all(set(c.split("_")) <= words for c in columns)
    return Pair(
        question, sql, "easy" if known and len(values) < 2 else "medium" if known else "hard"
    )


def _sql() -> Draw:
    wiki = sources.wikisql("train") + sources.wikisql("dev")
    advising = sources.advising("train") + sources.advising("dev")
    values: dict[str, list[str]] = {}
    for query in wiki + advising:
        for value, kind in zip(query.values, query.kinds, strict=True):
            values.setdefault(kind, []).append(value)
    words = [v for q in wiki for v, k in zip(q.values, q.kinds, strict=True) if k != "number"]

    def draw(rng: Random) -> Pair:
        query = rng.choice(advising if rng.random() < ADVISING_RATIO else wiki)
        chosen = []
        for value, kind in zip(query.values, query.kinds, strict=True):
            near = rng.random()
            pool = (
                values[kind] if near < 0.35 else words if near < 0.6 and kind != "number" else None
            )
            chosen.append(
                rng.choice(pool)
                if (pool and query.source == "wikisql") or (pool and near < 0.35)
                else value
            )
        if query.source == "wikisql" and rng.random() < RECASED_RATIO:
            query = replace(query, question=_recased(query.question, rng))
        return filled(query, tuple(chosen))

    return draw


def _recased(question: str, rng: Random) -> str:
    """The question with words in another case, so that case does not decide a column's name."""
    if rng.random() < 0.3:
        return question.lower()
    share = rng.random()
    return re.sub(
        r"[^\W\d_]{3,}", lambda m: m[0].capitalize() if rng.random() < share else m[0], question
    )


def reason_level(answer: str) -> str:
    """One calculation is easy, two or three medium, more are hard."""
    steps = answer.count("\n")
    return "easy" if steps == 1 else "medium" if steps <= 3 else "hard"


def _reason(steps: tuple[int, ...]) -> Draw:
    rows = sources.svamp("train")

    def draw(rng: Random) -> Pair:
        if rng.random() < 0.2:
            problem, equation = rng.choice(rows)
            pair = problems.from_svamp(problem, equation, rng if rng.random() < 0.8 else None)
            if pair:
                return Pair(*pair, reason_level(pair[1]))
        question, answer = problems.generated(rng, rng.choice(steps), held_out=False)
        return Pair(question, answer, reason_level(answer))

    return draw


# The specialist sees short problems, the generalist's adapter all lengths. A small model fails
# beyond the lengths that it was trained on, so difficulty decides between the two.
SHORT_STEPS = (1, 1, 1, 2, 2, 2, 2, 3, 3)
ALL_STEPS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)


POLITE = ("please ", "hey ", "can you tell me ", "i want to know ", "ok ", "um ", "so ", "hi, ")


def intent_pair(text: str, label: str) -> Pair:
    """Utterance to `{"intent": ...}`; out of scope is hard, short utterances are easy."""
    level = "hard" if label == OOS else "easy" if len(text) < 40 else "medium"
    return Pair(text, to_json({"intent": label}), level)


def _intent() -> Draw:
    # The first 600 rows of the published validation side are left out of training.
    rows = [r for r in sources.clinc("train") + intent_validation()[600:] if r[1] != OOS]
    known = [r[0] for r in sources.clinc("train") if r[1] == OOS]
    others = [_sql(), shell_draw()]

    def draw(rng: Random) -> Pair:
        kind = rng.random()
        if kind < 0.06:
            return intent_pair(rng.choice(known), OOS)
        if kind < 0.09:
            return intent_pair(rng.choice(others)(rng).prompt.lower()[:80], OOS)
        text, label = rng.choice(rows)
        if kind < 0.15:
            other, unlike = rng.choice(rows)
            if unlike != label:
                return intent_pair(_crossed(text, other), OOS)
        words = [w for w in text.split() if rng.random() > 0.08]
        text = " ".join(words) if rng.random() < 0.6 and len(words) > 2 else text
        return intent_pair((rng.choice(POLITE) if rng.random() < 0.12 else "") + text, label)

    return draw


def intent_validation() -> list[tuple[str, str]]:
    """CLINC150's in-scope validation rows in an order fixed by a seed."""
    rows = [r for r in sources.clinc("val") if r[1] != OOS]
    Random("clinc-validation").shuffle(rows)
    return rows


def _crossed(text: str, other: str) -> str:
    """Half of one request and half of another: known words, but out of scope as a whole."""
    left, right = text.split(), other.split()
    return " ".join(left[: (len(left) + 1) // 2] + right[len(right) // 2 :])


def draw_of(task: str, steps: tuple[int, ...] = SHORT_STEPS) -> Draw:
    """The source of a task's pairs; `steps` are the lengths of generated problems, to draw from."""
    makers = {
        "extract": _extract,
        "sql": _sql,
        "shell": shell_draw,
        "reason": lambda: _reason(steps),
        "intent": _intent,
    }
    return makers[task]()


def stream(task: str, seed: int, steps: tuple[int, ...] = SHORT_STEPS) -> Iterator[Example]:
    """Endless training examples of `task`, the same for the same seed.

    `steps` are the lengths of generated problems, to draw from.
    """
    rng = Random(f"{task}:{seed}")
    draw = draw_of(task, steps)
    while True:
        yield _wrapped(task, draw, rng)


def _wrapped(task: str, draw: Draw, rng: Random) -> Example:
    longest = LONGEST_SQL_CHARACTERS if task == "sql" else LONGEST_CHARACTERS
    while True:
        pair, before = draw(rng), draw(rng)
        messages = wrap(task, pair.prompt, (before.prompt, before.answer), rng)
        size = sum(len(m["content"]) for m in messages) + len(pair.answer)
        if size <= longest:
            return Example(messages, pair.answer, task, pair.difficulty)


def held_out(task: str, count: int, seed: int = 7) -> list[Example]:
    """`count` held-out examples, every other one with an instruction; fixed by `seed`."""
    rng = Random(f"eval:{task}:{seed}")
    pairs = _test_pairs(task, rng)
    rng.shuffle(pairs)
    found = []
    for index, pair in enumerate(pairs[:count]):
        text = with_instruction(task, pair.prompt, rng) if index % 2 else pair.prompt
        found.append(Example([user(text)], pair.answer, task, pair.difficulty))
    return found


def _test_pairs(task: str, rng: Random) -> list[Pair]:
    if task == "extract":
        return [extraction(u) for u in sources.snips("validate")]
    if task == "sql":
        rows = sources.wikisql("test")
        kept = rng.sample(rows, 1350) + sources.advising("test")
        return [filled(q, q.values) for q in kept]
    if task == "shell":
        return [shell_pair(e, b) for e, b in sources.nl2bash("test")]
    if task == "intent":
        # The published test side is 18 % out of scope; it is kept so.
        return [intent_pair(text, label) for text, label in sources.clinc("test")]
    solved = [problems.from_svamp(p, e, None) for p, e in sources.svamp("test")]
    pairs = [Pair(*s, reason_level(s[1])) for s in solved if s]
    for index in range(len(pairs)):
        question, answer = problems.generated(rng, 1 + index % 6, held_out=True)
        pairs.append(Pair(question, answer, reason_level(answer)))
    return pairs
