"""A pair of prompt and answer, and the English to bash pairs of nl2bash."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from deployments.reference_fleet import sources
from deployments.reference_fleet.shell_phrases import composed, reworded

COMPOSED, REWORDED = 0.15, 0.6  # shares of the training pairs


@dataclass(frozen=True)
class Pair:
    """A prompt text (not yet wrapped), its answer and how hard it is thought to be."""

    prompt: str
    answer: str
    difficulty: str


Draw = Callable[[Random], Pair]

_SHARED = re.compile(r"(?<![\w./-])(?:[\w.*?~/-]*[./*~][\w.*?~/-]*\w[\w.*?~/-]*|\d+)(?![\w/])")


def _shape(word: str) -> str:
    if word.isdigit():
        return f"digits{min(len(word), 4)}"
    return "path" if "/" in word else "glob" if "*" in word else "file"


def shell_pair(english: str, bash: str) -> Pair:
    """English to bash; the level follows the number of characters of the command."""
    level = "easy" if len(bash) < 30 else "medium" if len(bash) < 60 else "hard"
    return Pair(" ".join(english.split()), " ".join(bash.split()), level)


def shell_draw() -> Draw:
    """Training pairs; names and numbers that both sides share are swapped."""
    rows = [(e, b) for e, b in sources.nl2bash("train") if len(b) <= 140 and len(e) <= 240]
    pools: dict[str, list[str]] = {}
    shared: list[list[str]] = []
    for english, bash in rows:
        both = sorted(
            set(_SHARED.findall(english)) & set(_SHARED.findall(bash)), key=len, reverse=True
        )
        shared.append(both)
        for word in both:
            pools.setdefault(_shape(word), []).append(word)

    def draw(rng: Random) -> Pair:
        if rng.random() < COMPOSED:
            return shell_pair(*composed(rng))
        index = rng.randrange(len(rows))
        english, bash = rows[index]
        swaps = {w: rng.choice(pools[_shape(w)]) for w in shared[index] if rng.random() < 0.5}
        if swaps:
            replace = lambda m: swaps.get(m[0], m[0])  # noqa: E731
            english, bash = _SHARED.sub(replace, english), _SHARED.sub(replace, bash)
        if rng.random() < REWORDED:
            english = reworded(english, rng)
        return shell_pair(english, bash)

    return draw
