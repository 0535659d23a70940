"""The language of a prompt, and how probable it is.

py3langid counts byte sequences that are typical of a language (naive Bayes). 128 characters take 40
to 80 us; loading takes a second and 75 MB. So it is loaded only for a fleet in which a decision can
depend on the language.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from calm_serve.config import Fleet
from calm_serve.types import UNKNOWN_LANGUAGE

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LANGUAGE_CHARS = 128  # that are read
# A less probable language is unknown. Of 4,000 English prompts, 0.1 % were of another language at
# this probability; of 84 sentences in 14 other languages, 99 % were recognised.
MIN_RATIO = 0.4
# Labels beyond ISO 639-1: what they are written like.
_ALIASES = {"yue": "zh", "wuu": "zh", "arz": "ar", "ary": "ar", "pcm": "en"}
_CODE_CHARS = 2  # of ISO 639-1


class LanguageDetector:
    """Detects languages. Loading it blocks for a second; afterwards it only reads its memory."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # see the module

        self._identifier: LanguageIdentifier = LanguageIdentifier.from_model_file(
            MODEL_FILE, norm_probs=True
        )

    @property
    def languages(self) -> tuple[str, ...]:
        """The ISO 639-1 codes that can be detected, sorted."""
        return tuple(
            sorted({c for c in map(_code, self._identifier.labels) if c != UNKNOWN_LANGUAGE})
        )

    def detect(self, text: str) -> tuple[str, float]:
        """Return the language of the first LANGUAGE_CHARS characters, and its probability.

        The language is "und", with the probability 0, when none is probable.
        """
        label, ratio = self._identifier.classify(text[:LANGUAGE_CHARS])
        code = _code(label)
        if code == UNKNOWN_LANGUAGE or ratio < MIN_RATIO:
            return UNKNOWN_LANGUAGE, 0.0
        return code, ratio


@cache
def load_detector() -> LanguageDetector:
    """Return the process's only detector; the first call blocks for a second."""
    return LanguageDetector()


def needs_detector(fleet: Fleet) -> bool:
    """Return whether a decision of the fleet can depend on the prompt's language.

    That is when a rule names one, or when SLMs of one task differ in theirs.
    """
    tasks: dict[str, set[frozenset[str]]] = {}
    for spec in fleet.slms:
        tasks.setdefault(spec.task, set()).add(frozenset(spec.languages))
    return any(rule.language for rule in fleet.rules) or any(len(d) > 1 for d in tasks.values())


def _code(label: str) -> str:
    found = _ALIASES.get(label, label)
    return found if len(found) == _CODE_CHARS else UNKNOWN_LANGUAGE
