"""The last event of a replica's stream is taken off, and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.protocol.answers import ANSWER_END, AnswerEnd
from calm_serve.testing import make_facts
from deployments.router.upstream.end_scanner import EndScanner
from deployments.wire import END_EVENT

END = AnswerEnd(make_facts("r1"), ongoing=3)
EVENT = END_EVENT + ANSWER_END.encode(END) + b"\n\n"
# Texts that come close to the last event without being it.
PIECES = st.sampled_from(
    [b"data: x\n\n", b": calm.en\n\n", b"data: : calm.end x\n\n", b": ", b":", b"\n"]
)
ANSWERS = st.lists(PIECES, max_size=8).map(lambda pieces: b"".join(pieces) + b"data: y\n\n")


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(ANSWERS, st.lists(st.integers(0, 10_000), max_size=12))
def test_however_a_stream_is_cut_the_answer_is_whole_and_the_end_is_read(
    answer: bytes, cuts: list[int]
) -> None:
    scanner = EndScanner()
    passed = b"".join(scanner.feed(chunk) for chunk in split(answer + EVENT, cuts))
    assert passed == answer
    assert scanner.end() == END


@given(ANSWERS)
def test_complete_events_pass_without_waiting(answer: bytes) -> None:
    scanner = EndScanner()
    assert scanner.feed(answer) == answer


@pytest.mark.parametrize("missing", [1, 2, 20, len(EVENT)])
def test_a_stream_that_breaks_off_has_no_end(missing: int) -> None:
    scanner = EndScanner()
    scanner.feed(b"data: x\n\n" + EVENT[: len(EVENT) - missing])
    assert scanner.end() is None
