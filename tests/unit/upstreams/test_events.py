"""The scanner: any split of a stream gives the same events, and no stream takes more memory."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calm_serve.upstreams.events import Event, EventScanner, EventTooLargeError

BOM = b"\xef\xbb\xbf"
LINE_ENDS = (b"\n", b"\r\n", b"\r")
LINES = st.sampled_from(
    [
        b"",
        b"data",
        b"data:",
        b"data: ",
        b"data: [DONE]",
        b'data: {"a": "\xf0\x9f\xab\xa0"}',
        b"data:no blank",
        b"data: {",
        b"event: error",
        b"event:message_stop",
        b": keepalive",
        b":",
        b"id: 7",
        b"retry: 1000",
        b"unknown",
        BOM,
    ]
)
STREAMS = st.builds(
    lambda start, lines, last: start + b"".join(a + b for a, b in lines) + last,
    st.sampled_from([b"", BOM]),
    st.lists(st.tuples(LINES, st.sampled_from(LINE_ENDS)), max_size=12),
    LINES,
)


def scan(chunks: list[bytes], **options: int) -> tuple[list[Event], bool]:
    scanner = EventScanner(**options)
    events = [event for chunk in chunks for event in scanner.feed(chunk)]
    return events + scanner.finish(), scanner.truncated


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(p % (len(stream) + 1) for p in places), len(stream)]
    return [stream[a:b] for a, b in pairwise(bounds)]


def by_the_standard(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Return (name, data) of each event, line by line as the HTML standard describes it."""
    found: list[tuple[bytes, bytes]] = []
    name, data = b"", list[bytes]()
    text = stream.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for line in text.split(b"\n")[:-1]:
        if not line:
            if data:
                found.append((name, b"\n".join(data)))
            name, data = b"", []
        elif not line.startswith(b":"):
            field, _, value = line.partition(b":")
            value = value[1:] if value[:1] == b" " else value
            if field == b"event":
                name = value
            elif field == b"data":
                data.append(value)
    return found


@given(STREAMS, st.lists(st.integers(0, 10_000), max_size=30))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [9, 10, 11, 12])
@example(b"data: a\r\rdata: b\r\r\n", [8, 9])
def test_any_split_gives_the_same_events(stream: bytes, places: list[int]) -> None:
    assert scan(cut(stream, places)) == scan([stream])


@given(STREAMS)
def test_events_are_those_of_the_standard(stream: bytes) -> None:
    scanner = EventScanner()
    events = scanner.feed(stream)
    rest = stream[len(b"".join(e.raw for e in events)) :]
    ended = stream[: len(stream) - len(rest)]
    # A stream that ends in CR may go on with the LF of the same line end: it is not decided yet.
    assert by_the_standard(rest.removesuffix(b"\r")) == []
    assert [(e.name, e.data) for e in events if e.data is not None] == by_the_standard(ended)


@given(STREAMS, st.lists(st.integers(0, 10_000), max_size=30))
def test_the_bytes_of_the_events_are_the_stream(stream: bytes, places: list[int]) -> None:
    scanner = EventScanner()
    events = [e for chunk in cut(stream, places) for e in scanner.feed(chunk)]
    assert stream.startswith(b"".join(e.raw for e in events))
    whole = b"".join(e.raw for e in events + scanner.finish())
    assert whole.startswith(stream) or scanner.truncated
    assert set(whole[len(stream) :]) <= set(b"\n")


@given(STREAMS, st.integers(1, 40), st.lists(st.integers(0, 10_000), max_size=8))
def test_no_event_above_the_bound_is_returned_or_kept(
    stream: bytes, bound: int, places: list[int]
) -> None:
    scanner = EventScanner(max_event_bytes=bound)
    events = []
    try:
        for chunk in cut(stream, places):
            events += scanner.feed(chunk)
            assert len(scanner._buffer) <= bound
        events += scanner.finish()
    except EventTooLargeError:
        assert scanner.truncated
        assert any(len(e.raw) > bound for e in scan([stream])[0]) or scan([stream])[1]
    assert all(len(e.raw) <= bound + 2 for e in events)
    assert events == scan([stream])[0][: len(events)]


def test_a_large_event_in_small_pieces_is_read_once() -> None:
    data = json.dumps({"x": "y" * 2_000_000}).encode()
    stream = b"data: " + data + b"\n\n"
    pieces = [stream[i : i + 512] for i in range(0, len(stream), 512)]
    events, truncated = scan(pieces)
    assert ([e.data for e in events], truncated) == ([data], False)


def test_an_event_above_the_bound_is_an_error_after_the_events_before_it() -> None:
    scanner = EventScanner(max_event_bytes=20)
    assert [e.data for e in scanner.feed(b"data: a\n\ndata: " + b"b" * 20)] == [b"a"]
    with pytest.raises(EventTooLargeError, match="20 bytes"):
        scanner.feed(b"\n\n")
    with pytest.raises(EventTooLargeError):
        scanner.finish()


@pytest.mark.parametrize(
    ("rest", "raw"),
    [
        (b"data: [DONE]", b"data: [DONE]\n\n"),
        (b"data: [DONE]\n", b"data: [DONE]\n\n"),
        (b"data: [DONE]\r\n", b"data: [DONE]\r\n\n"),
        (b"data: [DONE]\r", b"data: [DONE]\r\n\n"),
        (b"data: [DONE]\r\n\r", b"data: [DONE]\r\n\r"),
        (b'data: {"a": 1}', b'data: {"a": 1}\n\n'),
        (b": bye", b": bye\n\n"),
    ],
)
def test_a_whole_last_event_gets_the_blank_line_it_lacks(rest: bytes, raw: bytes) -> None:
    events, truncated = scan([b"data: first\n\n", rest])
    assert events[1].raw == raw
    assert not truncated
    assert by_the_standard(raw + b"\n") == by_the_standard(rest + b"\n\n")


@pytest.mark.parametrize("rest", [b"data: {", b'data: {"a": "b', b"data: half", b"data: [DO"])
def test_half_an_event_is_not_returned(rest: bytes) -> None:
    events, truncated = scan([b"data: first\n\n", rest])
    assert [e.data for e in events] == [b"first"]
    assert truncated


def test_lines_of_data_are_joined_and_the_name_is_kept() -> None:
    (event,) = EventScanner().feed(b"event: error\ndata: {\ndata: }\nid: 1\n\n")
    assert (event.name, event.data) == (b"error", b"{\n}")


def test_a_byte_order_mark_is_no_part_of_the_first_event() -> None:
    (event,) = EventScanner().feed(BOM + b"data: a\n\n")
    assert (event.data, event.raw) == (b"a", BOM + b"data: a\n\n")
