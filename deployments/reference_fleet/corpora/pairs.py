"""A prompt with its answer, and the endless source of such pairs that every task has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Pair:
    """A prompt text (not yet wrapped), its answer and its assumed difficulty."""

    prompt: str
    answer: str
    difficulty: str


Draw = Callable[[Random], Pair]
