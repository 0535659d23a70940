"""How right an answer is: exact match, its parts, and a partial credit.

`marks` has a value in [0, 1] for each measure of a task; their names are the columns of
`python -m load_tests fleet`. `credit` is one number in [0, 1], the label that the predictor learns.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from deployments.reference_fleet.corpora.problems import final_number

Marks = dict[str, float]

_WIKISQL = re.compile(r"select (?:(count|max|min|sum|avg)\((.+?)\)|(\S+)) from table where (.+)")
_TERM = re.compile(r'(\S+) ([=<>]) ("[^"]*"|\S+)(?: and |$)')
_STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_PARTS = re.compile(r"^1\) (.*)\n2\) (.*)$", re.DOTALL)
_WORD = re.compile(r"""\d?>>?|[|;&<>()]+|(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'|;&<>()])+""")
_RUNS_ANOTHER = {"xargs", "-exec", "-execdir", "-ok", "sudo", "time", "nohup"}
_RUNS_ANOTHER |= {"do", "then", "else", "while", "if", "!"}
_ENDS = {"\\;", "';'", '";"', "+"}  # of -exec
ARGUMENT = "ARG"
PROSE_WORDS = 12  # fewer are a label or a command
VARIED_RATIO = 0.5  # share of different pairs of words; an endless repetition has fewer


def parsed(text: str) -> Any:
    """The JSON value of `text`, or None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def marks(task: str, answer: str, references: list[str]) -> Marks:
    """Every measure of `task` for `answer`, against the right answer that it matches best."""
    return max((_MARKS[task](answer, one) for one in references), key=lambda found: found["exact"])


def credit(task: str, answer: str, references: list[str]) -> float:
    """Partial credit in [0, 1]: 1 for an exact answer, 0 for a wrong number or label."""
    found = marks(task, answer, references)
    if found["exact"]:
        return 1.0
    if task == "extract":
        return 0.5 * found["intent"] * found["slot_f1"]
    if task == "sql":
        return 0.5 * found.get("select", 0.0) * found.get("where_values", 0.0)
    if task == "shell":
        return 0.7 if found["template"] else 0.3 * found["utility"]
    return 0.0


def _extract(answer: str, reference: str) -> Marks:
    got, expected = parsed(answer), parsed(reference)
    if not isinstance(got, dict):
        return {"exact": 0.0, "intent": 0.0, "slot_f1": 0.0}
    slots, right = got.get("slots"), expected["slots"]
    slots = slots if isinstance(slots, dict) else {}
    same = sum(slots.get(name) == value for name, value in right.items())
    f1 = 2 * same / (len(slots) + len(right)) if slots or right else 1.0
    same_intent = float(got.get("intent") == expected["intent"])
    return {"exact": float(got == expected), "intent": same_intent, "slot_f1": f1}


def normal_sql(text: str) -> str:
    """Lower case, single spaces, and WikiSQL's conditions in alphabetic order."""
    plain = " ".join(text.lower().split())
    head, found, conditions = plain.partition(" from table where ")
    if not found:
        return plain
    return head + found + " and ".join(sorted(conditions.split(" and ")))


def _sql(answer: str, reference: str) -> Marks:
    exact = float(normal_sql(answer) == normal_sql(reference))
    expected = _clauses(reference)
    if expected is None:
        return {"exact": exact}
    got = _clauses(answer) or ("", "", set(), set())
    names = ("aggregate", "select", "where_columns", "where_values")
    parts = {name: float(a == b) for name, a, b in zip(names, got, expected, strict=True)}
    # An answer that is not a query must not score for lacking an aggregate, as the right one does.
    parts["aggregate"] *= float(bool(got[1]))
    return {"exact": exact, **parts}


def _clauses(text: str) -> tuple[str, str, set[str], set[str]] | None:
    found = _WIKISQL.fullmatch(" ".join(text.lower().split()))
    if found is None:
        return None
    terms = _TERM.findall(found[4])
    return found[1] or "", found[2] or found[3], {t[0] for t in terms}, {t[2] for t in terms}


def template(command: str) -> str:
    """Utilities, options and operators as they are, every argument as `ARG`.

    After the template accuracy of Lin et al., LREC 2018, section 6.2. Theirs has a type for each
    argument, from the manual pages by their own parser; here all arguments have one type.
    """
    found: list[str] = []
    utility = True
    for word in _WORD.findall(command):
        if re.fullmatch(r"\d?>>?|[|;&<>()]+", word):
            found.append(word)
            utility = not re.fullmatch(r"\d?>>?|<+|&", word)
        elif word in _ENDS:
            found.append("+" if word == "+" else ";")
        elif utility and not word.startswith("-"):
            found.append(word)
            utility = word in _RUNS_ANOTHER
        elif word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            found.append(word.partition("=")[0])
            utility = word in _RUNS_ANOTHER
        else:
            found.append(ARGUMENT)
    return " ".join(found)


def _shell(answer: str, reference: str) -> Marks:
    return {
        "exact": float(answer.split() == reference.split()),
        "template": float(template(answer) == template(reference)),
        "utility": float(answer.split()[:1] == reference.split()[:1]),
    }


def _reason(answer: str, reference: str) -> Marks:
    number = final_number(answer)
    steps = [tuple(m.groups()) for m in _STEP.finditer(answer)]
    right = [tuple(m.groups()) for m in _STEP.finditer(reference)]
    return {
        "exact": float(number is not None and number == final_number(reference)),
        "steps": float(steps == right),
    }


def _label(answer: str, reference: str) -> Marks:
    return {"exact": float(parsed(answer) == parsed(reference))}


def content_words(text: str) -> set[str]:
    """Words of five letters and more, in lower case: what a text is about, roughly."""
    return set(re.findall(r"[^\W\d_]{5,}", text.lower()))


def _is_code(answer: str) -> bool:
    """Whether an answer begins like a document or a query, whole or broken off."""
    return answer.lstrip().startswith(("{", "[", "SELECT "))


def is_prose(answer: str) -> bool:
    """Whether an answer is running text: no JSON, no query, not one phrase again and again."""
    if _is_code(answer):
        return False
    words = answer.lower().split()
    pairs = list(pairwise(words))
    return len(words) >= PROSE_WORDS and len(set(pairs)) >= VARIED_RATIO * len(pairs)


def _open(answer: str, reference: str) -> Marks:
    """The form of an answer whose truth nobody has judged: prose about the question's words."""
    about = content_words(answer) & set(reference.split())
    return {"exact": float(is_prose(answer) and bool(about))}


def _choice(answer: str, reference: str) -> Marks:
    """Whether an answer names one of the options; which one is right is not known."""
    letter = re.match(r"\W*(?:answer\W+|option\W+)?([A-D])\b", answer, re.IGNORECASE)
    options = [line[3:].lower() for line in reference.splitlines()]
    named = any(option and option in answer.lower() for option in options)
    return {"exact": float(not _is_code(answer) and (bool(letter) or named))}


def _knowledge(answer: str, reference: str) -> Marks:
    """Whether the right answer is in the text, as whole words."""
    found = re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", answer, re.IGNORECASE)
    return {"exact": float(found is not None)}


def _mixed(answer: str, reference: str) -> Marks:
    got, expected = _PARTS.match(answer.strip()), _PARTS.match(reference)
    assert expected is not None, reference
    same = [float(got is not None and _same(got[i], expected[i])) for i in (1, 2)]
    return {"exact": same[0] * same[1], "first": same[0], "second": same[1]}


def _same(answer: str, reference: str) -> bool:
    if reference.startswith("{"):
        return bool(parsed(answer) == parsed(reference))
    if "####" in reference:
        return final_number(answer) == final_number(reference)
    if reference.startswith("SELECT"):
        return normal_sql(answer) == normal_sql(reference)
    return answer.split() == reference.split()


_MARKS = {
    "extract": _extract,
    "sql": _sql,
    "shell": _shell,
    "reason": _reason,
    "intent": _label,
    "mixed": _mixed,
    "open": _open,
    "choice": _choice,
    "knowledge": _knowledge,
}
