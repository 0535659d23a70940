"""The offline optimum of residency: an upper reference that knows the future.

`belady` (IBM Systems Journal 5(2), 1966) is for SLMs of equal sizes, `belady_bound` for others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Hashable, Mapping, Sequence


def belady(
    trace: Sequence[Hashable],
    slots: int,
    start: Collection[Hashable] = (),
    *,
    bypass: bool = False,
) -> int:
    """Most hits that a policy with `slots` equal places that loads on a miss can have.

    On a miss, the key whose next use is furthest in the future is evicted. With `bypass` that may
    be the requested key itself, which is then served without a place; no policy without prefetch
    has more hits. `start` are the keys in memory at the beginning.

    >>> belady("abcabc", 2), belady("abcabc", 2, bypass=True)
    (2, 2)
    """
    uses: dict[Hashable, list[int]] = {}
    for at, key in enumerate(trace):
        uses.setdefault(key, []).append(at)

    def next_use(key: Hashable, after: int) -> float:
        own = uses.get(key, [])
        position = bisect_right(own, after)
        return own[position] if position < len(own) else math.inf

    in_memory = set(list(start)[:slots])
    hits = 0
    for at, key in enumerate(trace):
        if key in in_memory:
            hits += 1
            continue
        if slots <= 0:
            continue
        if len(in_memory) >= slots:
            furthest = max(in_memory, key=lambda k: next_use(k, at))
            if bypass and next_use(furthest, at) <= next_use(key, at):
                continue
            in_memory.remove(furthest)
        in_memory.add(key)
    return hits


def belady_bound(
    trace: Sequence[str], sizes: Mapping[str, int], budget_bytes: int, start: Collection[str] = ()
) -> int:
    """Upper bound of the hits of any policy that loads on a miss, for unequal sizes.

    The optimum for unequal sizes is NP-hard. No more SLMs fit at once than of the smallest ones, so
    the optimum with that many equal places and bypass is a bound.
    """
    left, places = budget_bytes, 0
    for size in sorted(sizes.values()):
        if size > left:
            break
        left -= size
        places += 1
    return belady(trace, max(places, len(start)), start, bypass=True)
