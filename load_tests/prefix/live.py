"""The same workloads against one SLM with two replicas, really served, once for every policy.

Each trace block becomes `TRACE_TOKENS` tokens (of 512: a factor of 1/8) and prompts are cut after
`TRACE_BLOCKS` of them, so that they fit the model's 2,048 tokens; conversations are thinned, whole,
and the remaining requests come faster. vLLM's blocks are `KV_BLOCK` tokens. Cached tokens are the
engine's own counts, taken with the serving replica from the rows that every request leaves.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from jinja2 import Template
from tokenizers import Tokenizer

from load_tests.common.served import fleet_file, served
from load_tests.prefix.simulation import BlockCache, imbalance
from load_tests.prefix.world import (
    Ask,
    Workload,
    at_pace,
    chats,
    mooncake,
    scaled,
    thinned,
)

SLM = "sql"
REPLICAS = 2
CONTEXT_TOKENS = 2048
KV_BLOCK = 32
KV_TOKENS = 12_288  # of one replica's cache
KV_BYTES_PER_TOKEN = 2 * 4 * 6 * 32 * 2  # keys and values, layers, heads, head size, bfloat16
TRACE_TOKENS, TRACE_BLOCKS, TRACE_SHARE = 64, 28, 0.07
CHATS = 24
DURATION_S = 60.0
ANSWER_TOKENS = 8
MOST_TOKENS = CONTEXT_TOKENS - 128  # leaves room for roles and the answer
TIMEOUT_S = 120.0
FLUSH_S = 2.0  # the routers write their rows every half second

# Set as an operator would: an override of the deployment in Serve's configuration.
ROUTERS = {
    "ours": "",
    "round_robin": "load_tests.prefix.routers:RoundRobin",
    "power_of_two": "load_tests.prefix.routers:PowerOfTwo",
}
RAY_NOT_RUN = (
    "Ray's PrefixCacheAffinityRouter was not served: ray.serve.llm needs pyarrow, which is not a "
    "dependency, and the class reads prompts from attributes that plain request bodies do not "
    "have. Its rule is among the simulated ones."
)


@dataclass(frozen=True)
class Row:
    """What one request left behind."""

    replica_id: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float


def workloads() -> dict[str, Workload]:
    """Both workloads at the pace of the live part; chats name no session."""
    trace = scaled(thinned(mooncake(), TRACE_SHARE), TRACE_TOKENS, TRACE_BLOCKS)
    return {
        "mooncake": at_pace(trace, DURATION_S, MOST_TOKENS),
        "chats": at_pace(chats(CHATS, 5 * DURATION_S), DURATION_S, MOST_TOKENS),
    }


class Writer:
    """Text of known length: words that are one token, with a space, which is another."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = Template((folder / "chat_template.jinja").read_text("utf-8"))
        words = (w for w in self.tokenizer.get_vocab() if w.isascii() and w.isalpha())
        plain = (w for w in words if w.islower() and len(w) >= 3)
        self._words = sorted(w for w in plain if len(self._ids(f"{w} ")) == 2)

    def block(self, number: int, tokens: int) -> str:
        """The text of a block, equal for equal numbers; `tokens` is even."""
        rng = Random(number)
        return "".join(f"{rng.choice(self._words)} " for _ in range(tokens // 2))

    def messages(self, ask: Ask, tokens: int) -> list[dict[str, str]]:
        """The chat messages of a request whose blocks have `tokens` tokens."""
        texts = [self.block(b, tokens) for b in ask.blocks]
        if not ask.ends:
            return [{"role": "user", "content": "".join(texts)}]
        roles = ["system", *("user", "assistant") * len(ask.ends)]
        starts = (0, *ask.ends)
        return [
            {"role": role, "content": "".join(texts[start:end])}
            for role, start, end in zip(roles, starts, ask.ends, strict=False)
        ]

    def kv_blocks(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, tuple[int, ...]]:
        """Number of tokens, and the full blocks that the engine's cache would know them by."""
        ids = self._ids(self._template.render(messages=messages, add_generation_prompt=True))
        value, blocks = 0, []
        for start in range(0, len(ids) - len(ids) % KV_BLOCK, KV_BLOCK):
            value = hash((value, *ids[start : start + KV_BLOCK]))
            blocks.append(value)
        return len(ids), tuple(blocks)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def cached_ceiling(prompts: Sequence[tuple[int, tuple[int, ...]]], max_blocks: int) -> float:
    """Share of the prompts' tokens that one cache of `max_blocks` blocks would serve."""
    cache = BlockCache(max_blocks)
    cached = 0
    for tokens, blocks in prompts:
        # The engine always computes the last token: it needs its logits.
        cached += min(cache.take(blocks), (tokens - 1) // KV_BLOCK) * KV_BLOCK
    return cached / sum(tokens for tokens, _ in prompts)


def run() -> tuple[dict[str, Any], dict[str, Any]]:
    """Serve and replay under every policy. Returns configuration and figures."""
    spec = _spec()
    writer = Writer(Path(spec["model"]))
    todo = sorted(
        ((name, w.block_tokens, ask) for name, w in workloads().items() for ask in w.asks),
        key=lambda one: one[2].at_s,
    )
    asks = [(name, ask, writer.messages(ask, tokens)) for name, tokens, ask in todo]
    prompts = [writer.kv_blocks(messages) for _, _, messages in asks]
    ceilings = {
        "infinite_ceiling": cached_ceiling(prompts, 1 << 40),
        "pooled_ceiling": cached_ceiling(prompts, REPLICAS * KV_TOKENS // KV_BLOCK),
    }
    figures: dict[str, Any] = {f"live.{k}": round(v, 4) for k, v in ceilings.items()}
    for policy in ROUTERS:
        found = _measure(policy, spec, asks)
        figures |= {f"live.{policy}.{k}": v for k, v in summary(asks, found, ceilings).items()}
    config = {
        "slm": SLM,
        "replicas": REPLICAS,
        "kv_block_tokens": KV_BLOCK,
        "kv_tokens_per_replica": KV_TOKENS,
        "trace_factor": TRACE_TOKENS / 512,
        "trace_most_blocks": TRACE_BLOCKS,
        "trace_share": TRACE_SHARE,
        "chats": CHATS,
        "duration_s": DURATION_S,
        "requests": len(asks),
        "prompt_tokens": sum(tokens for tokens, _ in prompts),
        "ray_prefix_router": RAY_NOT_RUN,
    }
    return config, figures


def summary(
    asks: Sequence[tuple[str, Ask, Any]], rows: Sequence[Row], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Figures of one policy; load is tokens computed and generated."""
    work: dict[str, int] = defaultdict(int)
    for row in rows:
        work[row.replica_id] += row.prompt_tokens - row.cached_tokens + row.output_tokens
    loads = [*work.values(), *[0] * (REPLICAS - len(work))]
    share = _share(rows)
    ttfts = sorted(row.ttft_s for row in rows)
    found = {
        "cached_share": share,
        "hit_share_of_ceiling": share / ceilings["pooled_ceiling"],
        "load_imbalance": imbalance(loads),
        "ttft_p50_ms": 1e3 * ttfts[len(ttfts) // 2],
        "ttft_p95_ms": 1e3 * ttfts[len(ttfts) * 95 // 100],
    }
    for name in dict.fromkeys(name for name, _, _ in asks):
        own = [row for (kind, _, _), row in zip(asks, rows, strict=True) if kind == name]
        found[f"{name}.cached_share"] = _share(own)
    return {key: round(value, 4) for key, value in found.items()}


def _share(rows: Sequence[Row]) -> float:
    return sum(r.cached_tokens for r in rows) / sum(r.prompt_tokens for r in rows)


def _spec() -> dict[str, Any]:
    spec = next(s for s in fleet_file("reference")["slms"] if s["id"] == SLM)
    return {
        **spec,
        "context_tokens": CONTEXT_TOKENS,
        "batching": "interactive",
        "engine": {"block_size": KV_BLOCK},
        "resources": {**spec["resources"], "kv_cache_bytes": KV_TOKENS * KV_BYTES_PER_TOKEN},
        "scaling": {"min_replicas": REPLICAS, "max_replicas": REPLICAS},
    }


def _measure(policy: str, spec: dict[str, Any], asks: Sequence[tuple[str, Ask, Any]]) -> list[Row]:
    override = {
        "name": f"slm-{SLM}",
        "request_router_config": {"request_router_class": ROUTERS[policy]},
    }
    with TemporaryDirectory(prefix="calm-state", ignore_cleanup_errors=True) as state:
        with served(
            {"slms": [spec]}, state=Path(state), deployments=[override] if ROUTERS[policy] else ()
        ) as url:
            ids = asyncio.run(_replay(url, asks))
            time.sleep(FLUSH_S)
        return _rows(Path(state) / "outcomes.sqlite", ids)


async def _replay(url: str, asks: Sequence[tuple[str, Ask, Any]]) -> list[str]:
    """Decision ids of all requests, each sent at its time but never before its chat's last turn."""
    turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        start = time.perf_counter()

        async def one(ask: Ask, messages: Any) -> str:
            await asyncio.sleep(start + ask.at_s - time.perf_counter())
            if not ask.session:
                return await _post(client, messages)
            async with turns[ask.session]:
                return await _post(client, messages)

        return await asyncio.gather(*(one(ask, messages) for _, ask, messages in asks))


async def _post(client: httpx.AsyncClient, messages: Any) -> str:
    body = {
        "model": SLM,
        "messages": messages,
        "stream": True,  # so that the time to the first token is the router's own
        "max_tokens": ANSWER_TOKENS,
        "min_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    got = await client.post("/v1/chat/completions", json=body)
    got.raise_for_status()
    return str(got.headers["x-calm-decision-id"])


def _rows(path: Path, ids: Sequence[str]) -> list[Row]:
    names = "outcome_id, served_replica, prompt_tokens, cached_tokens, output_tokens, ttft_s"
    with closing(sqlite3.connect(path)) as database:
        found = {row[0]: Row(*row[1:]) for row in database.execute(f"SELECT {names} FROM outcomes")}
    missing = [i for i in ids if i not in found]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(ids)} requests left no row")
    return [found[i] for i in ids]
