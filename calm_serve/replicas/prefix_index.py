"""Which replicas recently served which prompt prefixes, as far as this process knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

from calm_serve.types import PromptEnd

MAX_BLOCKS = 524_288
"""Of one index, however many replicas there are: about 90 MB."""

_SEVERAL = -1  # no block: blocks are CRC-32 values
_NO_LENGTHS: Mapping[str, int] = {}


class PrefixIndex:
    """Bounded memory of prefix block hashes and the replicas that served them.

    A block hash stands for the whole prompt up to and including that block
    (`RoutingContext.prefix_chain`), so a replica that served a block served all before it. A prompt
    is served by few replicas, so holders are small tuples, shared along a chain. `add` and `retain`
    belong to one thread, the one that routes; the others may be called from any thread. All
    operations are in-process, without I/O; `match` and `shared` are linear in the chain, `retain`
    and `emptied` in the number of replicas, `add` in both.

    A chain covers only the first blocks of a long prompt. Two prompts with equal chains are mostly
    turns of one conversation, so the later one is taken to continue the earlier one: for each
    replica, the index keeps the length of the longest prompt behind a chain's last block.

    A replica that loses its cache gets a new internal name, so its old blocks are cleaned like
    those of a removed replica: when they are next touched.
    """

    def __init__(self, blocks_per_replica: int) -> None:
        """Remember so many blocks per replica, but at most `MAX_BLOCKS`; ValueError below 1."""
        if blocks_per_replica < 1:
            raise ValueError(f"blocks_per_replica must be at least 1, got {blocks_per_replica}")
        self._blocks_per_replica = blocks_per_replica
        self.max_blocks = min(blocks_per_replica, MAX_BLOCKS)
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._next: dict[int, int] = {}  # the block that followed, or `_SEVERAL`
        self._lengths: dict[int, dict[str, int]] = {}  # tokens of prompts by their last block
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

        Replicas without any are left out.
        """
        matched: dict[str, int] = {}
        live = self._live
        seen: tuple[str, ...] = ()
        depth = len(chain)
        for block in reversed(chain):
            holders = self._holders.get(block, seen)
            if holders is not seen:
                seen = holders
                for name in holders:
                    if name not in matched and (live is None or name in live):
                        matched[name] = depth
                if live is not None and len(matched) == len(live):
                    break
            depth -= 1
        ids = self._ids
        return {ids.get(r, r): blocks for r, blocks in matched.items()} if ids else matched

    def lengths(self, chain: Sequence[int]) -> Mapping[str, int]:
        """Return, by replica, tokens of the longest prompt that it served with all of `chain`."""
        lengths = self._lengths.get(chain[-1]) if chain else None
        if not lengths:
            return _NO_LENGTHS
        ids = self._ids
        return {ids.get(r, r): n for r, n in lengths.items()} if ids else lengths

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

    def add(self, chain: Sequence[int], replica_id: str, prompt_tokens: int = 0) -> None:
        """Record that `replica_id` served a prompt; a replica known to be removed is ignored."""
        live, name = self._live, self._names.get(replica_id, replica_id)
        if live is not None and name not in live:
            return
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
        if chain and prompt_tokens:
            self._add_length(chain[-1], name, prompt_tokens)
        self._trim()

    def reported(self, replica_id: str, prompts: Iterable[PromptEnd]) -> None:
        """Record prompts that a replica says it served, whichever router sent them.

        Only their last blocks are known, which is enough: the next turn of a conversation contains
        them, and who served a block served all before it.
        """
        live, name = self._live, self._names.get(replica_id, replica_id)
        if live is not None and name not in live:
            return
        for prompt in prompts:
            for block in prompt.blocks:
                self._holders[block] = _with(self._holders.pop(block, ()), name, live)
            if prompt.blocks:
                self._add_length(prompt.blocks[-1], name, prompt.tokens)
        self._trim()

    def _trim(self) -> None:
        while len(self._holders) > self.max_blocks:
            block, _ = self._holders.popitem(last=False)
            self._next.pop(block, None)
            self._lengths.pop(block, None)

    def _add_length(self, block: int, name: str, prompt_tokens: int) -> None:
        kept = self._lengths.get(block, _NO_LENGTHS)
        holders = self._holders[block]
        lengths = {r: n for r, n in kept.items() if r in holders}
        lengths[name] = max(lengths.get(name, 0), prompt_tokens)
        self._lengths[block] = lengths  # replaced, because other threads read it

    def retain(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica.

        Blocks are cleaned when they are next touched, so a membership change never sweeps the
        index while requests wait.
        """
        present = frozenset(replica_ids)
        with self._membership:
            self._names = {r: name for r, name in self._names.items() if r in present}
            self._rename(present)
        # It never shrinks, or the loss of a replica would sweep the index.
        room = min(self._blocks_per_replica * len(present), MAX_BLOCKS)
        self.max_blocks = max(self.max_blocks, room)

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
        if len(self._holders) > self.max_blocks:
            raise AssertionError(f"{len(self._holders)} blocks exceed {self.max_blocks}")
        if not self._next.keys() <= self._holders.keys():
            raise AssertionError("a block that was forgotten still has a successor")
        if not self._lengths.keys() <= self._holders.keys():
            raise AssertionError("a block that was forgotten still has a length")
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
