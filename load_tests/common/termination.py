"""A benchmark's child processes end with it, however it ends."""

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
    """Make SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that blocks clean up.

    By default Python ends at once and leaves a served fleet or workers behind. Call it in the main
    thread. A second SIGTERM is ignored, so that it does not interrupt the cleanup.
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
    """Yield (index of the item, result of `call`) in order of completion.

    No worker outlives the iteration. Workers are spawned, not forked, because LightGBM's threads do
    not survive a fork. If this process is killed, each worker ends after its current item, since
    its queue is closed; workers of `concurrent.futures` would not notice.
    """
    context = multiprocessing.get_context("spawn")
    # Leaving the pool terminates the workers; leaving an executor waits for all remaining items.
    with context.Pool(workers, _begin, (initializer,)) as pool:
        yield from pool.imap_unordered(_Numbered(call), enumerate(items))


def _begin(initializer: Callable[[], None] | None) -> None:
    # Ctrl-C reaches the whole process group; the parent decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()


class _Numbered(Generic[Item, Result]):
    """`call` on the item of a (number, item) pair, keeping the number."""

    def __init__(self, call: Callable[[Item], Result]) -> None:
        self._call = call

    def __call__(self, pair: tuple[int, Item]) -> tuple[int, Result]:
        number, item = pair
        return number, self._call(item)
