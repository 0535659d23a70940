"""A load generator with little CPU cost: raw HTTP/1.1 over asyncio, closed or open loop.

During a load, received data costs one clock reading and one append; answers are parsed afterwards.
Every request ends with an answer, an error or a timeout, and each of them is counted.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from load_tests.common.sse import Answer, Raw, parse

TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 256  # of the open loop; a further request waits, and its waiting is measured
_END_OF_CHUNKS = b"\r\n0\r\n\r\n"
_END_OF_HEAD = b"\r\n\r\n"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Request:
    """The bytes to send. `slm` is the model that the request is for."""

    address: Address
    data: bytes
    slm: str


@dataclass(slots=True)
class Run:
    """One load: answers in the order of the requests, duration, and the generator's CPU time."""

    answers: list[Answer]
    elapsed_s: float
    client_cpu_ratio: float  # of one core
    late_s: float = 0.0  # largest delay between a request's due time and its sending (open loop)

    @property
    def good(self) -> list[Answer]:
        """Complete answers."""
        return [a for a in self.answers if not a.error]

    @property
    def errors(self) -> int:
        """Requests without a complete answer."""
        return len(self.answers) - len(self.good)

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens, as the servers count them, per second of the load."""
        return sum(a.tokens for a in self.good) / self.elapsed_s


def address(url: str) -> Address:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def post(url: str, path: str, body: bytes, slm: str, key: str = "") -> Request:
    """A POST of a JSON document; `key` is a bearer token."""
    host, port = address(url)
    bearer = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"{bearer}content-length: {len(body)}\r\n\r\n"
    )
    return Request((host, port), head.encode() + body, slm)


async def closed_loop(
    requests: Sequence[Request], concurrency: int, timeout_s: float = TIMEOUT_S
) -> Run:
    """Send all requests, `concurrency` at a time, each as soon as an earlier one has ended."""
    pool = _Pool()
    # Connect the workers before the clock starts.
    await pool.prepare([r.address for r in requests[:concurrency]])
    raws: list[Raw] = [Raw() for _ in requests]
    waiting = iter(range(len(requests)))

    async def worker() -> None:
        for i in waiting:
            raws[i].due = time.perf_counter()
            await pool.exchange(requests[i], raws[i], timeout_s)

    with _timed() as times:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    pool.close()
    return Run([parse(raw) for raw in raws], times.wall_s, times.cpu_s / times.wall_s)


async def open_loop(
    requests: Sequence[Request], at_s: Sequence[float], timeout_s: float = TIMEOUT_S
) -> Run:
    """Send request i at `at_s[i]` after the start, independently of the others.

    Latencies are measured from the time at which a request was due.
    """
    pool, slots = _Pool(), asyncio.Semaphore(MAX_CONNECTIONS)
    raws: list[Raw] = [Raw() for _ in requests]

    async def one(i: int) -> None:
        async with slots:
            await pool.exchange(requests[i], raws[i], timeout_s)

    late = 0.0
    with _timed() as times:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i, at in enumerate(at_s):
                due = start + at
                delay = due - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                raws[i].due = due
                late = max(late, time.perf_counter() - due)
                group.create_task(one(i))
    pool.close()
    return Run([parse(raw) for raw in raws], times.wall_s, times.cpu_s / times.wall_s, late)


@dataclass(slots=True)
class _Times:
    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def _timed() -> Iterator[_Times]:
    """Wall and CPU time of the block, with the garbage collector off."""
    times = _Times()
    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield times
    finally:
        times.wall_s, times.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        gc.enable()


class _Pool:
    """Kept-alive connections by address; one request at a time on each."""

    def __init__(self) -> None:
        self._idle: dict[Address, list[_Connection]] = defaultdict(list)

    async def prepare(self, addresses: Sequence[Address]) -> None:
        """Open a connection to each address; stop at a failure, which a request then reports."""
        for one in addresses:
            try:
                self._idle[one].append(await _connect(one))
            except (OSError, TimeoutError):
                return

    async def exchange(self, request: Request, raw: Raw, timeout_s: float) -> None:
        """Send the request and fill `raw` until the answer ends, an error or the timeout."""
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                idle = self._idle[request.address]
                while idle and connection is None:
                    connection = idle.pop()
                    if connection.closed:
                        connection = None
                if connection is None:
                    connection = await _connect(request.address)
                await connection.exchange(request.data, raw)
        except TimeoutError:
            raw.error = "timeout"
        except OSError as error:
            raw.error = type(error).__name__
        if connection is None:
            return
        if raw.error or connection.closed:
            connection.close()
        else:
            self._idle[request.address].append(connection)

    def close(self) -> None:
        """Close all idle connections; after a load every connection is idle."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()


async def _connect(to: Address) -> _Connection:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, connection = await loop.create_connection(_Connection, *to)
    return connection


@dataclass(slots=True)
class ResponseEnd:
    """Detects the end of one HTTP response as its data arrives."""

    head: bytes | None = b""  # None once it is complete
    left: int = -1  # bytes of the body still to come; -1 for a chunked body
    keep: bool = True  # the server keeps the connection open
    tail: bytes = field(default=b"")

    def feed(self, data: bytes) -> bool:
        """Take the next data; True when the response is complete."""
        if self.head is not None:
            self.head += data
            place = self.head.find(_END_OF_HEAD)
            if place < 0:
                return False
            head, data = self.head[:place].lower(), self.head[place + len(_END_OF_HEAD) :]
            self.head = None
            self.keep = b"\r\nconnection: close" not in head
            self.tail = b"\r\n"
            if b"\r\ntransfer-encoding: chunked" not in head:
                _, found, rest = head.partition(b"\r\ncontent-length:")
                # Without a length, the response ends when the connection closes.
                self.left = int(rest.split(b"\r\n", 1)[0]) if found else 1 << 62
        if self.left >= 0:
            self.left -= len(data)
            return self.left <= 0
        self.tail = (self.tail + data)[-len(_END_OF_CHUNKS) :]
        return self.tail == _END_OF_CHUNKS


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._raw: Raw | None = None
        self._end = ResponseEnd()
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, data: bytes, raw: Raw) -> None:
        """Send a request and wait for the end of the response."""
        assert self._transport is not None
        self._raw, self._end = raw, ResponseEnd()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        await self._done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._raw is None:
            return
        self._raw.pieces.append((now, data))
        if self._end.feed(data):
            self.closed = self.closed or not self._end.keep
            self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        # A response without a length ends here; any other that is still awaited is cut off.
        unbounded = self._end.head is None and self._end.left > 1 << 61
        self._finish("" if unbounded and exc is None else "disconnected")

    def _finish(self, error: str) -> None:
        if self._done is not None and not self._done.done():
            if self._raw is not None:
                self._raw.error = error
            self._done.set_result(None)
        self._raw = None

    def close(self) -> None:
        """Close the connection at once."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile `share` (0 to 1), interpolated linearly; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The median; 0 for no values."""
    return percentile(values, 0.5)
