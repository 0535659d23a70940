"""Fits the shipped predictor on really served answers of the reference fleet.

`python -m deployments.reference_fleet.fit_predictor --state-dir .calm` against a running service:
held-out prompts (none of `eval/`) go, pinned, to the specialist of their task, to the generalist
and to one SLM at random; each answer is graded and the grade sent as feedback; then the knowledge
actor's own trainer turns the stored outcomes into `predictor/predictor.bin`. In-domain by
construction: same kinds of prompt as the evaluation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import Any

import httpx
from tqdm import tqdm

from calm_serve.knowledge.store import OutcomeStore
from calm_serve.knowledge.trainer import train
from deployments.reference_fleet.chat import Prose, chat
from deployments.reference_fleet.data import SPECIALISTS, Example, held_out
from deployments.reference_fleet.evalsets import EVAL
from deployments.reference_fleet.problems import final_number
from deployments.reference_fleet.scoring import parsed

SEED = 23
OUT = Path(__file__).parent / "predictor" / "predictor.bin"
SLMS = (*SPECIALISTS, "general")
CONCURRENCY = 12
MAX_TOKENS = 120


def prompts(per_task: int) -> list[Example]:
    """Held-out examples of every task in random order, without the rows of `eval/`."""
    reserved = {
        json.loads(line)["prompt"]
        for path in EVAL.glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    rng, prose = Random(SEED), Prose()
    found: list[Example] = []
    for task in SPECIALISTS:
        drawn = held_out(task, 2 * per_task, SEED)
        fresh = [e for e in drawn if e.messages[-1]["content"] not in reserved]
        found += fresh[:per_task]
    pairs = [chat(rng) if i % 2 else prose.sample(rng) for i in range(per_task)]
    found += [
        Example([{"role": "user", "content": question}], answer, "general", "easy")
        for question, answer in pairs
        if question not in reserved
    ]
    rng.shuffle(found)
    return found


def grade(task: str, answer: str, wanted: str) -> float:
    """How right an answer is, in [0, 1]; partial credit, so that weak models can be told apart."""
    if task in ("extract", "intent"):
        got, goal = parsed(answer), parsed(wanted)
        if not isinstance(got, dict) or got.get("intent") != goal["intent"]:
            return 0.0
        slots, goal_slots = got.get("slots", {}), goal.get("slots", {})
        if not isinstance(slots, dict) or got.keys() != goal.keys():
            return 0.0
        same = sum(slots.get(k) == v for k, v in goal_slots.items())
        return float(0.5 + 0.5 * (2 * same + 1) / (len(slots) + len(goal_slots) + 1))
    if task == "reason":
        number = final_number(answer)
        # Worked steps to a wrong number are closer than no arithmetic at all.
        return 0.0 if number is None else 1.0 if number == final_number(wanted) else 0.3
    return SequenceMatcher(None, answer.split(), wanted.split()).ratio()


async def ask(client: httpx.AsyncClient, slm: str, example: Example) -> None:
    """One pinned request and its grade."""
    body = {"model": slm, "messages": example.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    text = answer.json()["choices"][0]["message"]["content"] or ""
    feedback = {
        "decision_id": answer.headers["x-calm-decision-id"],
        "score": grade(example.task, text, example.answer),
    }
    (await client.post("/v1/feedback", json=feedback)).raise_for_status()


async def collect(url: str, examples: list[Example]) -> None:
    """Ask three SLMs each prompt, `CONCURRENCY` requests at a time."""
    slots, rng = asyncio.Semaphore(CONCURRENCY), Random(SEED)
    pairs = [(slm, e) for e in examples for slm in sorted({e.task, "general", rng.choice(SLMS)})]
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        with tqdm(total=len(pairs)) as bar:

            async def one(slm: str, example: Example) -> None:
                async with slots:
                    await ask(client, slm, example)
                bar.update()

            async with asyncio.TaskGroup() as group:
                for slm, example in pairs:
                    group.create_task(one(slm, example))


def fit(state_dir: Path, store_url: str) -> dict[str, Any]:
    """Train on everything in the store and write the artifact; returns its metrics."""
    store = OutcomeStore(store_url or f"sqlite:///{(state_dir / 'outcomes.sqlite').absolute()}")
    try:
        outcomes = store.recent(50_000)
    finally:
        store.close()
    # Times belong to the machine they were measured on: the TTFT correction is learned in place.
    outcomes = [replace(o, ttft_s=None) for o in outcomes]
    training = train(outcomes, SLMS, seed=SEED, holdout_ratio=0.2, clock=time.time)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(training.artifact.to_bytes())
    return dict(training.metrics)


def main() -> None:
    """Collect, fit, print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--state-dir", type=Path, default=Path(".calm"))
    parser.add_argument("--store-url", default="")
    parser.add_argument("--per-task", type=int, default=500)
    options = parser.parse_args()
    asyncio.run(collect(options.url, prompts(options.per_task)))
    time.sleep(2.0)  # the router's last batch is under way
    print(json.dumps(fit(options.state_dir, options.store_url), indent=2))


if __name__ == "__main__":
    main()
