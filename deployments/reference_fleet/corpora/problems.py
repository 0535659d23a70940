"""Arithmetic word problems with their worked steps: generated ones of 1 to 6 steps, and SVAMP.

An answer lists one calculation per line and ends with the result: `12 + 5 = 17`,
`17 - 9 = 8`, `#### 8`. All numbers are whole and not negative.
"""

from __future__ import annotations

import re
from random import Random

from deployments.reference_fleet.corpora import sources

TEST_PER_MILLE = 50
Step = tuple[str, int, str]  # operator, operand, sentence

NAMES = [
    "Ana",
    "Ben",
    "Carla",
    "Dan",
    "Ella",
    "Frank",
    "Grace",
    "Hugo",
    "Ines",
    "Jack",
    "Kira",
    "Leo",
    "Mary",
    "Nina",
    "Omar",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Vera",
    "Walt",
    "Yara",
    "Zoe",
    "Brenda",
    "Jesse",
    "Marco",
    "Lily",
    "Edward",
    "Rachel",
    "Adam",
    "Julia",
    "Peter",
    "Susan",
    "Kevin",
]
THINGS = [
    "apples",
    "marbles",
    "books",
    "stickers",
    "cookies",
    "pencils",
    "balloons",
    "cards",
    "eggs",
    "toys",
    "flowers",
    "coins",
    "shells",
    "candies",
    "oranges",
    "pens",
    "stamps",
    "tickets",
    "bottles",
    "cups",
    "pages",
    "bricks",
    "beads",
    "peaches",
    "crayons",
]
ADD = (
    "{name} buys {n} more.",
    "Then {name} gets {n} more {thing}.",
    "A friend gives {name} {n} {thing}.",
    "{name} finds another {n}.",
    "{other} gives {n} {thing} to {name}.",
    "Later {n} more are added.",
)
SUBTRACT = (
    "{name} gives {n} away.",
    "{name} loses {n} of them.",
    "Then {n} {thing} are sold.",
    "{name} gives {n} {thing} to {other}.",
    "{n} of the {thing} break.",
    "{other} takes {n} of them.",
)
DOUBLE = (
    "The number of {thing} then grows to {n} times as many.",
    "{name} now has {n} times as many.",
    "A machine makes {n} copies of the whole pile and keeps only the copies.",
)
SHARE = (
    "{name} shares them equally among {n} people and keeps one share.",
    "The {thing} are put into {n} equal boxes and {name} keeps one box.",
)
START = (
    "{name} has {n} {thing}.",
    "{name} starts with {n} {thing}.",
    "There are {n} {thing} on a table.",
)
ASK = (
    "How many {thing} are there now?",
    "How many {thing} does {name} have now?",
    "How many are left?",
)
ONE_STEP = (
    ("There are {a} {thing} in each of {b} boxes. How many {thing} are there in all?", "*"),
    ("Each pack of {thing} costs {a} dollars. How much do {b} packs cost?", "*"),
    ("{name} has {a} {thing} and {other} has {b} {thing}. How many do they have together?", "+"),
    ("{name} had {a} {thing} and used {b}. How many {thing} are left?", "-"),
    ("{name} has {a} {thing}. {other} has {b} {thing}. How many more does {name} have?", "-"),
    ("{c} {thing} are put equally into {b} bags. How many {thing} are in each bag?", "/"),
    ("{name} reads {a} pages each day. How many pages does {name} read in {b} days?", "*"),
    ("What is {a} plus {b}?", "+"),
    ("What is {a} minus {b}?", "-"),
    ("What is {a} times {b}?", "*"),
    ("What is {c} divided by {b}?", "/"),
    ("{a} + {b}", "+"),
    ("{a} - {b} = ?", "-"),
    ("Calculate {a} * {b}.", "*"),
)


def apply(operator: str, left: int, right: int) -> int | None:
    """The whole, non-negative result, or None where there is none."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right if left >= right else None
    if operator == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def worked(lines: list[str], result: int) -> str:
    """The answer text: one calculation per line, then `#### result`."""
    return "\n".join([*lines, f"#### {result}"])


def generated(rng: Random, steps: int, *, held_out: bool) -> tuple[str, str]:
    """A random problem of `steps` calculations (1..6) as (question, answer).

    The SHA-1 of its words decides the side, so no held-out problem occurs in training.
    """
    while True:
        found = one_step(rng) if steps == 1 and rng.random() < 0.7 else chain(rng, steps)
        if sources.held_out(found[0], TEST_PER_MILLE) == held_out:
            return found


def one_step(rng: Random) -> tuple[str, str]:
    """A one-line problem in one of the fixed forms."""
    text, operator = rng.choice(ONE_STEP)
    name, other = rng.sample(NAMES, 2)
    wide = operator in "+-"
    a, b = rng.randint(2, 199 if wide else 20), rng.randint(2, 99 if wide else 12)
    if operator == "-" and b > a:
        a, b = b, a
    c = a * b
    left = c if operator == "/" else a
    result = apply(operator, left, b)
    assert result is not None
    question = text.format(a=a, b=b, c=c, name=name, other=other, thing=rng.choice(THINGS))
    return question, worked([f"{left} {operator} {b} = {result}"], result)


def chain(rng: Random, steps: int) -> tuple[str, str]:
    """A story in which one amount changes `steps` times."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "thing": rng.choice(THINGS)}
    value = rng.randint(3, 99)
    sentences = [rng.choice(START).format(n=value, **words)]
    lines = []
    for _ in range(steps):
        operator, operand, text = _step(rng, value)
        result = apply(operator, value, operand)
        assert result is not None
        sentences.append(text.format(n=operand, **words))
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    sentences.append(rng.choice(ASK).format(**words))
    return " ".join(sentences), worked(lines, value)


def _step(rng: Random, value: int) -> Step:
    kind = rng.random()
    divisors = [n for n in range(2, 10) if value and value % n == 0]
    if kind < 0.15 and 0 < value < 60:
        return "*", rng.randint(2, 5), rng.choice(DOUBLE)
    if kind < 0.3 and divisors:
        return "/", rng.choice(divisors), rng.choice(SHARE)
    if kind < 0.65 and value > 1:
        return "-", rng.randint(1, min(value, 80)), rng.choice(SUBTRACT)
    return "+", rng.randint(1, 80), rng.choice(ADD)


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def from_svamp(problem: str, equation: str, rng: Random | None) -> tuple[str, str] | None:
    """SVAMP problem with its worked steps; with `rng` the numbers are replaced.

    None where a result is not whole, or where a replaced number does not occur exactly once in the
    problem: text and equation might then disagree.
    """
    numbers = [n[:-2] if n.endswith(".0") else n for n in _NUMBER.findall(equation)]
    if any("." in n for n in numbers):
        return None
    if rng is None:
        return _solve(problem, equation.replace(".0", ""))
    for _ in range(8):
        replaced = _renumber(problem, equation.replace(".0", ""), numbers, rng)
        solved = _solve(*replaced) if replaced else None
        if solved:
            return solved
    return None


def _renumber(
    problem: str, equation: str, numbers: list[str], rng: Random
) -> tuple[str, str] | None:
    found = _NUMBER.findall(problem)
    if len(set(numbers)) != len(numbers) or any(found.count(n) != 1 for n in numbers):
        return None
    fresh = {
        n: str(max(2, int(int(n) * rng.uniform(0.4, 1.8)) + rng.randint(-2, 3))) for n in numbers
    }
    swap = lambda m: fresh.get(m[0], m[0])  # noqa: E731
    return _NUMBER.sub(swap, problem), _NUMBER.sub(swap, equation)


def _solve(problem: str, equation: str) -> tuple[str, str] | None:
    """Reduces innermost brackets one at a time and writes one line for each."""
    lines: list[str] = []
    text = equation
    inner = re.compile(r"\(\s*(\d+)\s*([-+*/])\s*(\d+)\s*\)")
    while (match := inner.search(text)) is not None:
        left, operator, right = int(match[1]), match[2], int(match[3])
        result = apply(operator, left, right)
        if result is None or result > 9999:
            return None
        lines.append(f"{left} {operator} {right} = {result}")
        text = text[: match.start()] + str(result) + text[match.end() :]
    if not lines or not text.strip().isdigit():
        return None
    return problem, worked(lines, int(text))


def final_number(answer: str) -> str | None:
    """The number after the last `####`, without commas, or None."""
    found = re.findall(r"####\s*(-?[\d,]+)", answer)
    return found[-1].replace(",", "") if found else None
