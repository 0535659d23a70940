"""The load generator's parts that need no socket: ends of answers, event times, arrivals."""

import json
from pathlib import Path
from random import Random

import pytest

from load_tests.common import arrivals
from load_tests.common.load import (
    ResponseEnd,
    address,
    percentile,
    post,
)
from load_tests.common.short_prompts import ShortPrompts, texts
from load_tests.common.sse import (
    Raw,
    dechunk,
    parse,
    text_events,
)

HEAD = b"HTTP/1.1 200 OK\r\nX-Calm-Model: sql\r\nx-calm-reason: pinned:requested\r\n"
STREAM = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


ROLE, A, B, C = event(""), event("a"), event('say "hi"'), event("c")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":60,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer_of(*pieces: tuple[float, bytes], due: float = 10.0):  # type: ignore[no-untyped-def]
    return parse(Raw(due, list(pieces), ""))


def test_events_with_text_have_the_time_of_the_piece_that_completed_them() -> None:
    answer = answer_of(
        (10.5, STREAM + chunk(ROLE) + chunk(A)),
        (10.6, chunk(B)),
        (10.8, chunk(C) + chunk(USAGE)),
        (10.9, chunk(DONE) + b"0\r\n\r\n"),
    )
    assert answer.error == ""
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.gaps_s == pytest.approx((0.1, 0.2))
    assert answer.e2e_s == pytest.approx(0.9)
    assert (answer.events, answer.tokens, answer.prompt_tokens) == (3, 3, 60)
    assert (answer.slm, answer.reason) == ("sql", "pinned:requested")
    assert answer.tpot_s == pytest.approx(0.15)


def test_an_event_that_is_cut_by_pieces_or_chunks_counts_when_its_end_is_there() -> None:
    body = STREAM + chunk(ROLE + A[:9]) + chunk(A[9:] + B) + chunk(USAGE + DONE) + b"0\r\n\r\n"
    cut = body.index(A[9:]) + 3
    answer = answer_of((10.1, body[:cut]), (10.4, body[cut:]))
    assert answer.ttft_s == pytest.approx(0.4)
    assert answer.gaps_s == (0.0,)


def test_several_events_in_one_chunk_that_came_in_two_pieces_have_two_times() -> None:
    body = STREAM + chunk(A + B + USAGE + DONE) + b"0\r\n\r\n"
    cut = body.index(B)
    assert answer_of((10.1, body[:cut]), (10.3, body[cut:])).gaps_s == pytest.approx((0.2,))


def test_an_answer_that_is_not_streamed_has_its_end_as_first_token() -> None:
    head = HEAD + b"content-type: application/json\r\ncontent-length: 33\r\n\r\n"
    answer = answer_of((10.2, head), (10.7, b'{"usage":{"completion_tokens":64}}'))
    assert (answer.error, answer.tokens, answer.gaps_s) == ("", 64, ())
    assert answer.ttft_s == answer.e2e_s == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", "status 429"),
        (STREAM + chunk(ROLE + A) + b"0\r\n\r\n", "no usage"),
        (STREAM + chunk(A + USAGE) + b"0\r\n\r\n", "cut"),
        (STREAM + chunk(USAGE + DONE) + b"0\r\n\r\n", "cut"),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error(data: bytes, error: str) -> None:
    assert answer_of((11.0, data)).error == error


def test_the_error_of_the_exchange_is_the_answers() -> None:
    assert parse(Raw(error="timeout")).error == "timeout"
    assert parse(Raw()).error == "not sent"


def test_chunks_are_joined_with_their_places() -> None:
    assert dechunk(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n") == (b"abcde", [(3, 6), (5, 17)])
    assert dechunk(b"") == (b"", [])


def test_only_events_with_text_are_found() -> None:
    assert text_events(ROLE + A + USAGE + DONE) == [len(ROLE + A)]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("data", "keep"),
    [
        (STREAM + chunk(A) + b"0\r\n\r\n", True),
        (STREAM + b"0\r\n\r\n", True),
        (HEAD + b"Content-Length: 4\r\n\r\nabcd", True),
        (HEAD + b"content-length: 0\r\n\r\n", True),
        (HEAD + b"connection: close\r\ncontent-length: 4\r\n\r\nabcd", False),
    ],
)
def test_the_end_of_an_answer_is_found_however_it_is_cut(
    data: bytes, keep: bool, step: int
) -> None:
    end = ResponseEnd()
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert [end.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert end.keep is keep


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    end = ResponseEnd()
    assert not end.feed(HEAD + b"\r\nsomething")


def test_a_request_is_ready_to_be_sent() -> None:
    request = post("http://127.0.0.1:81", "/v1/x", b"{}", "sql", key="k")
    assert request.address == address("http://127.0.0.1:81/") == ("127.0.0.1", 81)
    assert request.data.startswith(b"POST /v1/x HTTP/1.1\r\nhost: 127.0.0.1:81\r\n")
    assert b"authorization: Bearer k\r\n" in request.data
    assert request.data.endswith(b"content-length: 2\r\n\r\n{}")


def test_prompts_are_unique_and_fix_the_length_of_the_answer() -> None:
    prompts = ShortPrompts(["same text"], output_tokens=5)
    found = [prompts.body("sql", stream=bool(i % 2)) for i in range(20)]
    assert len({f["messages"][0]["content"] for f in found}) == 20
    assert all(f["max_tokens"] == 5 and f["ignore_eos"] for f in found)
    assert ["stream" in f for f in found[:2]] == [False, True]
    assert texts(5) == texts(5) != texts(5, seed=1)


def test_percentiles_lie_between_values() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) == 0.0


def test_poisson_arrivals_have_the_rate_and_no_memory() -> None:
    at_s = arrivals.poisson(20.0, 4000, Random(1))
    assert at_s == sorted(at_s)
    assert 4000 / at_s[-1] == pytest.approx(20.0, rel=0.1)
    assert arrivals.variation(at_s) == pytest.approx(1.0, rel=0.1)


def test_a_window_of_the_trace_keeps_its_bursts_at_another_rate(tmp_path: Path) -> None:
    file = tmp_path / arrivals.TRACE
    file.parent.mkdir()
    rows = [f"2023-11-16 18:{m:02}:0{s}.1234560,10,10" for m in range(3) for s in (0, 1, 2)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    trace = arrivals.read_trace(tmp_path)
    assert trace == pytest.approx([0, 1, 2, 60, 61, 62, 120, 121, 122])
    window = arrivals.scaled(trace, 3, 6, rate_per_s=50.0)
    assert window[0] == 0.0
    assert 5 / window[-1] == pytest.approx(50.0)
    assert arrivals.variation(window) == pytest.approx(arrivals.variation(trace[3:]))
