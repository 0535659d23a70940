"""Languages that a fleet file may name: those that the detector of `requests` can tell apart."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from calm_serve.config.base import nearest

# ISO 639-1. `tests/unit/requests/test_languages.py` compares them with the detector's.
_CODES = """
    af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy
    ga gd gl gu ha he hi hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo
    lt lv mg mk ml mn mr ms mt my ne nl nn no oc om or pa pl ps pt qu ro ru rw sa se si sk
    sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu
"""
DETECTED_LANGUAGES = tuple(_CODES.split())


def _detected(code: str) -> str:
    if code in DETECTED_LANGUAGES:
        return code
    # "en-GB" and "english" mean "en", whose letters they start with.
    start = code[:2].lower()
    hint = f"; the nearest is {start!r}" if start in DETECTED_LANGUAGES else ""
    raise ValueError(
        f"{code!r} is no language that can be detected (ISO 639-1)"
        f"{hint or nearest(code, list(DETECTED_LANGUAGES))}"
    )


Language = Annotated[str, AfterValidator(_detected)]
