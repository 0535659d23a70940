"""The offline optimum of residency, which knows the future.

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
    """Most hits that any policy with `slots` equal places and loading on a miss can have.

    On a miss the one that is wanted furthest in the future goes; with `bypass`, that may be the
    one just asked for, which is then answered without a place, so nobody does better without
    prefetch. `start` is what the places hold first.

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

    held = set(list(start)[:slots])
    hits = 0
    for at, key in enumerate(trace):
        if key in held:
            hits += 1
            continue
        if slots <= 0:
            continue
        if len(held) >= slots:
            furthest = max(held, key=lambda k: next_use(k, at))
            if bypass and next_use(furthest, at) <= next_use(key, at):
                continue
            held.remove(furthest)
        held.add(key)
    return hits


def belady_bound(
    trace: Sequence[str], sizes: Mapping[str, int], budget_bytes: int, start: Collection[str] = ()
) -> int:
    """At least as many hits as any policy of unequal sizes can have that loads on a miss.

    With unequal sizes the optimum is NP-hard. However they are chosen, no more SLMs fit than the
    smallest ones do, so as many equal places, with bypass, are an upper bound.
    """
    left, places = budget_bytes, 0
    for size in sorted(sizes.values()):
        if size > left:
            break
        left -= size
        places += 1
    return belady(trace, max(places, len(start)), start, bypass=True)
