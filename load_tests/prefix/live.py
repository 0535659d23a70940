"""The same workloads, served by one SLM with two replicas, once for every policy.

Each trace block becomes `TRACE_TOKENS` tokens (of 512: a factor of 1/8) and prompts are cut after
`TRACE_BLOCKS` blocks, so that they fit the model's 2,048 tokens. Only some conversations are kept,
as a whole, and sent at a faster pace. vLLM's blocks have `KV_BLOCK` tokens. Cached tokens are the
engine's own counts; they and the serving replica are read from the outcome store.
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
    Request,
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
MAX_PROMPT_TOKENS = CONTEXT_TOKENS - 128  # leaves room for roles and the answer
TIMEOUT_S = 120.0
FLUSH_S = 2.0  # time for the routers' last outcomes, which are sent every half second

# Request routers, set by an override of the deployment in Serve's configuration.
ROUTERS = {
    "ours": "",
    "round_robin": "load_tests.prefix.routers:RoundRobin",
    "power_of_two": "load_tests.prefix.routers:PowerOfTwo",
}
RAY_NOT_RUN = (
    "Ray's PrefixCacheAffinityRouter was not served: ray.serve.llm needs pyarrow, which is not a "
    "dependency, and the class reads prompts from attributes that plain request bodies do not "
    "have. Its rule is simulated."
)


@dataclass(frozen=True)
class Row:
    """The outcome of one request, from the outcome store."""

    replica_id: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float


def workloads() -> dict[str, Workload]:
    """Both workloads at the pace of the served part."""
    trace = scaled(thinned(mooncake(), TRACE_SHARE), TRACE_TOKENS, TRACE_BLOCKS)
    return {
        "mooncake": at_pace(trace, DURATION_S, MAX_PROMPT_TOKENS),
        "chats": at_pace(chats(CHATS, 5 * DURATION_S), DURATION_S, MAX_PROMPT_TOKENS),
    }


class Writer:
    """Writes text with a known number of tokens: words of one token, each with a space."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = Template((folder / "chat_template.jinja").read_text("utf-8"))
        words = (w for w in self.tokenizer.get_vocab() if w.isascii() and w.isalpha())
        plain = (w for w in words if w.islower() and len(w) >= 3)
        self._words = sorted(w for w in plain if len(self._ids(f"{w} ")) == 2)

    def block(self, number: int, tokens: int) -> str:
        """The text of a block, the same for the same number; `tokens` is even."""
        rng = Random(number)
        return "".join(f"{rng.choice(self._words)} " for _ in range(tokens // 2))

    def messages(self, request: Request, tokens: int) -> list[dict[str, str]]:
        """The chat messages of a request, with `tokens` tokens per block."""
        texts = [self.block(b, tokens) for b in request.blocks]
        if not request.ends:
            return [{"role": "user", "content": "".join(texts)}]
        roles = ["system", *("user", "assistant") * len(request.ends)]
        starts = (0, *request.ends)
        return [
            {"role": role, "content": "".join(texts[start:end])}
            for role, start, end in zip(roles, starts, request.ends, strict=False)
        ]

    def kv_blocks(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, tuple[int, ...]]:
        """Number of tokens, and the ids of their full blocks, as in the engine's prefix cache."""
        ids = self._ids(self._template.render(messages=messages, add_generation_prompt=True))
        value, blocks = 0, []
        for start in range(0, len(ids) - len(ids) % KV_BLOCK, KV_BLOCK):
            value = hash((value, *ids[start : start + KV_BLOCK]))
            blocks.append(value)
        return len(ids), tuple(blocks)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def cached_ceiling(prompts: Sequence[tuple[int, tuple[int, ...]]], max_blocks: int) -> float:
    """Share of the prompts' tokens that a single cache of `max_blocks` blocks would serve."""
    cache = BlockCache(max_blocks)
    cached = 0
    for tokens, blocks in prompts:
        # The engine always computes the last token, because it needs its logits.
        cached += min(cache.take(blocks), (tokens - 1) // KV_BLOCK) * KV_BLOCK
    return cached / sum(tokens for tokens, _ in prompts)


def run() -> tuple[dict[str, Any], dict[str, Any]]:
    """Serve the workloads under every policy. Returns configuration and figures."""
    spec = _spec()
    writer = Writer(Path(spec["model"]))
    timed = sorted(
        (
            (name, w.block_tokens, request)
            for name, w in workloads().items()
            for request in w.requests
        ),
        key=lambda one: one[2].at_s,
    )
    sent = [(name, request, writer.messages(request, tokens)) for name, tokens, request in timed]
    prompts = [writer.kv_blocks(messages) for _, _, messages in sent]
    ceilings = {
        "infinite_ceiling": cached_ceiling(prompts, 1 << 40),
        "pooled_ceiling": cached_ceiling(prompts, REPLICAS * KV_TOKENS // KV_BLOCK),
    }
    figures: dict[str, Any] = {f"live.{k}": round(v, 4) for k, v in ceilings.items()}
    for policy in ROUTERS:
        found = _measure(policy, spec, sent)
        figures |= {f"live.{policy}.{k}": v for k, v in summary(sent, found, ceilings).items()}
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
        "requests": len(sent),
        "prompt_tokens": sum(tokens for tokens, _ in prompts),
        "ray_prefix_router": RAY_NOT_RUN,
    }
    return config, figures


def summary(
    sent: Sequence[tuple[str, Request, Any]], rows: Sequence[Row], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Figures of one policy; load is tokens computed plus tokens generated."""
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
    for name in dict.fromkeys(name for name, _, _ in sent):
        own = [row for (kind, _, _), row in zip(sent, rows, strict=True) if kind == name]
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


def _measure(
    policy: str, spec: dict[str, Any], sent: Sequence[tuple[str, Request, Any]]
) -> list[Row]:
    override = {
        "name": f"slm-{SLM}",
        "request_router_config": {"request_router_class": ROUTERS[policy]},
    }
    with TemporaryDirectory(prefix="calm-state", ignore_cleanup_errors=True) as state:
        with served(
            {"slms": [spec]}, state=Path(state), deployments=[override] if ROUTERS[policy] else ()
        ) as url:
            ids = asyncio.run(_replay(url, sent))
            time.sleep(FLUSH_S)
        return _rows(Path(state) / "outcomes.sqlite", ids)


async def _replay(url: str, sent: Sequence[tuple[str, Request, Any]]) -> list[str]:
    """Send each request at its time, but after its chat's previous turn; returns decision ids."""
    turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        start = time.perf_counter()

        async def one(request: Request, messages: Any) -> str:
            await asyncio.sleep(start + request.at_s - time.perf_counter())
            if not request.session:
                return await _post(client, messages)
            async with turns[request.session]:
                return await _post(client, messages)

        return await asyncio.gather(*(one(request, messages) for _, request, messages in sent))


async def _post(client: httpx.AsyncClient, messages: Any) -> str:
    body = {
        "model": SLM,
        "messages": messages,
        "stream": True,  # so that the router measures the time to the first token
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
        raise RuntimeError(f"{len(missing)} of {len(ids)} requests have no outcome")
    return [found[i] for i in ids]
