"""What a benchmark started ends with it, however it is ended."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that blocks clean up.

    Python's own way is to die where it stands, and leave a fleet or workers behind. For the main
    thread. A second SIGTERM does not disturb the cleaning up.
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def in_processes(
    call: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Results of `call` with the items' places, as they come; no worker outlives the iteration.

    Workers are started anew, not forked: LightGBM's threads would not survive it. One that is ended
    with us waits for nothing; should we be killed, each ends after the item it is at, because its
    queue is closed, which workers of `concurrent.futures` do not notice.
    """
    context = multiprocessing.get_context("spawn")
    # Its end terminates the workers; that of an executor waits for all that is left.
    with context.Pool(workers, _begin, (initializer,)) as pool:
        yield from pool.imap_unordered(_Numbered(call), enumerate(items))


def _begin(initializer: Callable[[], None] | None) -> None:
    # Ctrl-C reaches the whole group; whoever started us says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()


class _Numbered(Generic[Item, Result]):
    """`call` on the item of a pair, which keeps its number."""

    def __init__(self, call: Callable[[Item], Result]) -> None:
        self._call = call

    def __call__(self, pair: tuple[int, Item]) -> tuple[int, Result]:
        number, item = pair
        return number, self._call(item)
