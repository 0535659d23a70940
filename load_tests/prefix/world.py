"""Requests whose prompts share prefixes: the Mooncake conversation trace, and generated chats.

A prompt is a list of block ids; equal ids stand for equal text. The trace (`traces/`) has the first
3,000 requests of the published one, with blocks of 512 tokens; all prompts share the first block.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from zlib import crc32

TRACE = Path(__file__).parent / "traces" / "mooncake_conversation_3000.jsonl.gz"
TRACE_BLOCK_TOKENS = 512
CHARS_PER_TOKEN = 4  # of the text of a simulated block

CHAT_BLOCK_TOKENS = 32
CHAT_SYSTEMS = 4  # system prompts, shared by many chats
CHAT_SYSTEM_BLOCKS = (4, 16)
CHAT_TURNS = (2, 8)
CHAT_USER_BLOCKS = (1, 4)
CHAT_ANSWER_BLOCKS = (1, 4)
CHAT_THINK_S = 20.0  # mean, exponential

_SHIFT = 1 << 32  # between the block ids of two copies of a workload


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `session` is the id of its chat, "" if the client sends none.

    `ends` are the numbers of blocks after which a chat's messages end: system, user, assistant
    and so on; () for a single message.
    """

    at_s: float
    blocks: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    session: str = ""
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    block_tokens: int
    requests: tuple[Request, ...]

    @property
    def input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(a.input_tokens for a in self.requests)


def mooncake(path: Path = TRACE) -> Workload:
    """The trace's requests at their own times and lengths."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    requests = tuple(
        Request(r["timestamp"] / 1e3, tuple(r["hash_ids"]), r["input_length"], r["output_length"])
        for r in rows
    )
    return Workload("mooncake", TRACE_BLOCK_TOKENS, requests)


def chats(
    count: int, duration_s: float, seed: int = 0, systems_count: int = CHAT_SYSTEMS
) -> Workload:
    """`count` chats that begin within `duration_s`; every turn contains the whole history."""
    rng = Random(f"chats {seed}")
    systems = [
        tuple(rng.getrandbits(31) for _ in range(rng.randint(*CHAT_SYSTEM_BLOCKS)))
        for _ in range(systems_count)
    ]
    requests = []
    for number in range(count):
        history = rng.choice(systems)
        ends = [len(history)]
        at_s = rng.uniform(0.0, duration_s)
        for _ in range(rng.randint(*CHAT_TURNS)):
            history += tuple(rng.getrandbits(31) for _ in range(rng.randint(*CHAT_USER_BLOCKS)))
            answer = tuple(rng.getrandbits(31) for _ in range(rng.randint(*CHAT_ANSWER_BLOCKS)))
            ends.append(len(history))
            tokens = len(history) * CHAT_BLOCK_TOKENS
            output = len(answer) * CHAT_BLOCK_TOKENS
            requests.append(Request(at_s, history, tokens, output, f"chat-{number}", tuple(ends)))
            history += answer
            ends.append(len(history))
            at_s += rng.expovariate(1.0 / CHAT_THINK_S)
    return Workload("chats", CHAT_BLOCK_TOKENS, tuple(sorted(requests, key=lambda a: a.at_s)))


def without_sessions(workload: Workload) -> Workload:
    """The same requests from clients that send no session id."""
    requests = tuple(replace(a, session="") for a in workload.requests)
    return Workload(f"{workload.name}_unnamed", workload.block_tokens, requests)


def thinned(workload: Workload, share: float) -> Workload:
    """About `share` of the conversations, each as a whole; the first two blocks identify one."""
    keep = int(share * 2**32)
    requests = tuple(
        a
        for a in workload.requests
        if crc32(repr(a.blocks[: min(2, len(a.blocks))]).encode()) < keep
    )
    return Workload(workload.name, workload.block_tokens, requests)


def until(workload: Workload, end_s: float) -> Workload:
    """The requests up to `end_s`."""
    requests = tuple(a for a in workload.requests if a.at_s <= end_s)
    return Workload(workload.name, workload.block_tokens, requests)


def half(workload: Workload, *, second: bool) -> Workload:
    """The requests of the first or the second half of the time, from time 0 on."""
    start_s = workload.requests[0].at_s
    middle_s = (start_s + workload.requests[-1].at_s) / 2
    requests = tuple(
        replace(a, at_s=a.at_s - (middle_s if second else start_s))
        for a in workload.requests
        if (a.at_s > middle_s) == second
    )
    return Workload(workload.name, workload.block_tokens, requests)


def copies(workload: Workload, count: int, offset_s: float, seed: int = 0) -> Workload:
    """`count` copies at once that share the first block only, each delayed by up to `offset_s`."""
    rng = Random(f"copies {seed}")
    found: list[Request] = []
    for number in range(count):
        later_s = rng.uniform(0.0, offset_s) if number else 0.0
        shift = number * _SHIFT
        for request in workload.requests:
            blocks = (request.blocks[0], *(b + shift for b in request.blocks[1:]))
            session = f"{request.session}-{number}" if request.session else ""
            found.append(
                replace(request, at_s=request.at_s + later_s, blocks=blocks, session=session)
            )
    found.sort(key=lambda a: a.at_s)
    return Workload(workload.name, workload.block_tokens, tuple(found))


def scaled(workload: Workload, block_tokens: int, max_blocks: int) -> Workload:
    """The same prompts with smaller blocks, cut after `max_blocks` blocks."""
    requests = tuple(
        replace(
            a,
            blocks=(cut := a.blocks[:max_blocks]),
            input_tokens=len(cut) * block_tokens,
        )
        for a in workload.requests
    )
    return Workload(workload.name, block_tokens, requests)


def at_pace(workload: Workload, duration_s: float, max_tokens: int) -> Workload:
    """The requests of at most `max_tokens`, at a pace that puts the last one at `duration_s`."""
    requests = [a for a in workload.requests if a.input_tokens <= max_tokens]
    start, end = requests[0].at_s, requests[-1].at_s
    pace = duration_s / (end - start)
    return Workload(
        workload.name,
        workload.block_tokens,
        tuple(replace(a, at_s=(a.at_s - start) * pace) for a in requests),
    )


def placeholder(block: int, chars: int) -> str:
    """The text of a simulated block; equal for equal ids only."""
    word = f"{block:x} "
    return (word * (chars // len(word) + 1))[:chars]


def texts(workload: Workload, max_chars: int) -> Iterator[str]:
    """The first `max_chars` characters of every prompt, as a client would send them."""
    chars = workload.block_tokens * CHARS_PER_TOKEN
    for request in workload.requests:
        needed = request.blocks[: -(-max_chars // chars)]
        yield "".join(placeholder(b, chars) for b in needed)[:max_chars]
