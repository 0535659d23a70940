"""Which replicas recently served which prompt prefixes, from this process's own requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

ANSWER_BLOCKS = 8
"""Work of an answer, in prompt blocks of about 32 tokens; its length is not known in advance."""

WORK_MEMORY = 64
"""Requests per replica after which work counts 1/e; tests/unit/replicas notices much fewer."""

_SEVERAL = -1  # no block: blocks are CRC-32 values


class PrefixIndex:
    """Bounded memory of prefix block hashes and the replicas that served them.

    A block hash stands for the whole prompt up to and including that block
    (`RoutingContext.prefix_chain`). A prompt is served by few replicas, so holders are small
    tuples, shared along a chain. `add` and `retain` belong to one thread, the one that routes;
    the others may be called from any thread. All operations are in-process, without I/O; `match`
    and `shared` are linear in the chain, `retain` and `emptied` in the number of replicas, `add`
    in both.

    A replica that loses its cache gets a new internal name, so its old blocks are cleaned like
    those of a removed replica: when they are next touched.
    """

    def __init__(self, max_blocks: int) -> None:
        """Remember at most `max_blocks` blocks; ValueError below 1."""
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self._max_blocks = max_blocks
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._next: dict[int, int] = {}  # the block that followed, or `_SEVERAL`
        self._work: dict[str, float] = {}
        self._live: frozenset[str] | None = None  # names; None until membership is known
        self._names: dict[str, str] = {}  # replica id to internal name, where they differ
        self._ids: dict[str, str] = {}  # the inverse
        self._emptied = 0
        self._membership = Lock()

    def __len__(self) -> int:
        """Return the number of blocks remembered."""
        return len(self._holders)

    def match(self, chain: Sequence[int]) -> dict[str, int]:
        """Return for each live replica how many leading blocks of `chain` it has served.

        Only consecutive blocks from the start count, because a cache cannot use the rest;
        replicas without any are left out.
        """
        matched: dict[str, int] = {}
        matching: tuple[str, ...] = ()  # replicas that served all blocks so far
        depth = 0
        for block in chain:
            holders = self._holders.get(block)
            if holders is None:
                break
            if depth == 0:
                matching = holders
            elif holders is not matching and holders != matching:
                kept = frozenset(holders)  # a block may be cached by all of a thousand replicas
                for replica_id in matching:
                    if replica_id not in kept:
                        matched[replica_id] = depth
                matching = tuple(r for r in matching if r in kept)
                if not matching:
                    break
            depth += 1
        for replica_id in matching:
            matched[replica_id] = depth
        live = self._live
        if live is not None and not live.issuperset(matched):
            matched = {r: blocks for r, blocks in matched.items() if r in live}
        ids = self._ids
        return {ids.get(r, r): blocks for r, blocks in matched.items()} if ids else matched

    def shared(self, chain: Sequence[int]) -> int:
        """Return how many leading blocks of `chain` are shared with other conversations.

        That is the deepest block after which prompts diverged, such as the end of a system prompt.
        The block after it identifies the conversation: all its turns have it, and processes that
        served other turns find the same one. Last blocks do not count, because they are partial
        and change with every turn.
        """
        depth = 0
        for i in range(len(chain) - 2):
            after = self._next.get(chain[i])
            if after is None:
                break
            if after != chain[i + 1]:
                depth = i + 1
                if after != _SEVERAL:
                    break
        return depth

    @property
    def work(self) -> Mapping[str, float]:
        """Blocks that each replica computed for this process, decaying with later requests."""
        return self._work

    def add(self, chain: Sequence[int], replica_id: str) -> None:
        """Record that `replica_id` served `chain`; a replica known to be removed is ignored."""
        live, name = self._live, self._names.get(replica_id, replica_id)
        if live is not None and name not in live:
            return
        self._count_work(chain, replica_id, name)
        before: tuple[str, ...] | None = None
        after: tuple[str, ...] = (name,)
        # From the tail, so that eviction takes tails before the heads they depend on.
        for block in reversed(chain):
            holders = self._holders.pop(block, ())
            if holders != before:
                before = holders
                after = _with(holders, name, live)
            self._holders[block] = after
        for i in range(len(chain) - 2):
            if self._next.setdefault(chain[i], chain[i + 1]) != chain[i + 1]:
                self._next[chain[i]] = _SEVERAL
        while len(self._holders) > self._max_blocks:
            self._next.pop(self._holders.popitem(last=False)[0], None)

    def _count_work(self, chain: Sequence[int], replica_id: str, name: str) -> None:
        cached, seen = 0, None
        for block in chain:
            holders = self._holders.get(block, ())
            if holders is not seen and name not in holders:
                break
            cached, seen = cached + 1, holders
        work = self._work
        work.setdefault(replica_id, 0.0)
        kept = 1.0 - 1.0 / (WORK_MEMORY * len(work))
        for name in work:
            work[name] *= kept
        work[replica_id] += len(chain) - cached + ANSWER_BLOCKS

    def retain(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica.

        Blocks are cleaned when they are next touched, so a membership change never sweeps the
        index while requests wait. A new replica starts with the mean work of the others, so that
        it receives its share of the requests and not all of them.
        """
        present = frozenset(replica_ids)
        with self._membership:
            self._names = {r: name for r, name in self._names.items() if r in present}
            self._rename(present)
        old = [self._work[r] for r in present if r in self._work]
        mean = sum(old) / len(old) if old else 0.0
        self._work = {r: self._work.get(r, mean) for r in present}

    def emptied(self, replica_id: str) -> None:
        """Forget what a replica served: its cache is gone, as after sleep."""
        with self._membership:
            live = self._live
            name = self._names.get(replica_id, replica_id)
            if live is None or name not in live:
                return
            self._emptied += 1
            present = frozenset(self._ids.get(r, r) for r in live)
            self._names = {**self._names, replica_id: f"{replica_id}#{self._emptied}"}
            self._rename(present)

    def _rename(self, present: Iterable[str]) -> None:
        self._ids = {name: r for r, name in self._names.items()}
        self._live = frozenset(self._names.get(r, r) for r in present)

    def check_integrity(self) -> None:
        """Raise AssertionError when a bound or an invariant is broken; call it where `add` runs."""
        if len(self._holders) > self._max_blocks:
            raise AssertionError(f"{len(self._holders)} blocks exceed {self._max_blocks}")
        if not self._next.keys() <= self._holders.keys():
            raise AssertionError("a block that was forgotten still has a successor")
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
