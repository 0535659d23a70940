"""Which replicas recently served which prompt prefixes, as this process saw it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Bounded memory of prefix block hashes and the replicas that served them.

    A block hash stands for the whole prompt up to and including that block
    (`RoutingContext.prefix_chain`). A prompt is served by few replicas, so holders are small
    tuples, shared along a chain. `add` and `retain` belong to one thread, the one that routes;
    `match` only reads and may be called from any thread. All operations are in-process, without
    I/O; `match` and `add` are linear in the chain, `retain` in the number of replicas.
    """

    def __init__(self, max_blocks: int) -> None:
        """Remember at most `max_blocks` blocks; ValueError below 1."""
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self._max_blocks = max_blocks
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._live: frozenset[str] | None = None  # None until membership is known

    def __len__(self) -> int:
        """Return the number of blocks remembered."""
        return len(self._holders)

    def match(self, chain: Sequence[int]) -> dict[str, int]:
        """Return for each live replica how many leading blocks of `chain` it has served.

        Only consecutive blocks from the start count, because a cache cannot use the rest;
        replicas without any are left out.
        """
        matched: dict[str, int] = {}
        holding: tuple[str, ...] = ()
        depth = 0
        for block in chain:
            holders = self._holders.get(block)
            if holders is None:
                break
            if depth == 0:
                holding = holders
            elif holders is not holding and holders != holding:
                for replica_id in holding:
                    if replica_id not in holders:
                        matched[replica_id] = depth
                holding = tuple(r for r in holding if r in holders)
                if not holding:
                    break
            depth += 1
        for replica_id in holding:
            matched[replica_id] = depth
        live = self._live
        if live is not None and not live.issuperset(matched):
            return {r: blocks for r, blocks in matched.items() if r in live}
        return matched

    def add(self, chain: Sequence[int], replica_id: str) -> None:
        """Remember that `replica_id` served `chain`; a replica known to be gone is ignored."""
        live = self._live
        if live is not None and replica_id not in live:
            return
        before: tuple[str, ...] | None = None
        after: tuple[str, ...] = (replica_id,)
        # From the tail, so that eviction takes tails before the heads they depend on.
        for block in reversed(chain):
            holders = self._holders.pop(block, ())
            if holders != before:
                before = holders
                after = _with(holders, replica_id, live)
            self._holders[block] = after
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def retain(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica.

        Blocks are cleaned when they are next touched, so a membership change never sweeps the
        index while requests wait.
        """
        self._live = frozenset(replica_ids)

    def check_integrity(self) -> None:
        """Raise AssertionError when a bound or an invariant is broken; call it where `add` runs."""
        if len(self._holders) > self._max_blocks:
            raise AssertionError(f"{len(self._holders)} blocks exceed {self._max_blocks}")
        for block, holders in self._holders.items():
            if not holders:
                raise AssertionError(f"block {block} has no holder")
            if len(set(holders)) != len(holders):
                raise AssertionError(f"block {block} names a holder twice: {holders}")


def _with(
    holders: tuple[str, ...], replica_id: str, live: frozenset[str] | None
) -> tuple[str, ...]:
    if live is not None and not live.issuperset(holders):
        holders = tuple(r for r in holders if r in live)
    return holders if replica_id in holders else (*holders, replica_id)
