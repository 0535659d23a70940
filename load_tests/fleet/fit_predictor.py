"""Fits the shipped predictor: `python -m load_tests.fleet.fit_predictor`, 15 minutes on 2 cores.

Serves the reference fleet without a predictor. Rows of the `fit` side of `eval/` (none of the
standard workload) go, pinned, to every SLM: from what a specialist makes of others' requests the
predictor learns to tell them apart. Each answer is graded and the grade sent as feedback; then the
knowledge actor's own trainer turns the stored outcomes into `predictor/predictor.bin`. In-domain by
construction: the prompts are of the same kinds as the evaluation's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from tqdm import tqdm

from calm_serve.knowledge import OutcomeStore
from calm_serve.learning import train
from deployments.reference_fleet.grading.marks import credit
from deployments.reference_fleet.grading.rows import FILES, load
from deployments.reference_fleet.paths import PREDICTOR
from load_tests.common.asking import Question, ask
from load_tests.common.served import fleet_file, served
from load_tests.common.termination import exit_on_sigterm
from load_tests.common.workloads import Request, request

SEED = 23
SLMS = ("extract", "sql", "shell", "reason", "intent", "general")
CONCURRENCY = 12
MAX_TOKENS = 320  # the same for every task: the limit is a feature, and must not tell the task
NEVER = 1_000_000  # outcomes before the service itself would train


def requests(per_file: int) -> list[Request]:
    """At most `per_file` requests of the `fit` side of each file, in random order."""
    rng = Random(SEED)
    found: list[Request] = []
    for name in FILES:
        rows = [r for r in load(name) if r.side == "fit"]
        found += [request(r, rng) for r in rng.sample(rows, min(per_file, len(rows)))]
    rng.shuffle(found)
    return found


async def collect(url: str, asked: list[Request]) -> None:
    """Ask every SLM each request and send the grades as feedback."""
    slots = asyncio.Semaphore(CONCURRENCY)
    pairs = [(slm, one) for one in asked for slm in SLMS]
    async with httpx.AsyncClient(base_url=url, timeout=180.0) as client:
        with tqdm(total=len(pairs), mininterval=1.0) as bar:

            async def graded(slm: str, one: Request) -> None:
                async with slots:
                    question = Question(slm, one.messages, MAX_TOKENS)
                    answer = await ask(client, question)
                    score = credit(one.row.task, answer.text, list(one.row.answers))
                    feedback = {"decision_id": answer.decision_id, "score": score}
                    (await client.post("/v1/feedback", json=feedback)).raise_for_status()
                bar.update()

            async with asyncio.TaskGroup() as group:
                for slm, one in pairs:
                    group.create_task(graded(slm, one))


def fit(state_dir: Path) -> dict[str, Any]:
    """Train on everything in the store and write the artifact; returns its metrics."""
    store = OutcomeStore(f"sqlite:///{(state_dir / 'outcomes.sqlite').absolute()}")
    try:
        outcomes = store.recent(50_000)
    finally:
        store.close()
    # Times belong to the machine they were measured on: the TTFT correction is learned in place.
    outcomes = [replace(o, timing=replace(o.timing, ttft_s=None)) for o in outcomes]
    training = train(outcomes, SLMS, seed=SEED, holdout_ratio=0.2, clock=time.time)
    PREDICTOR.parent.mkdir(exist_ok=True)
    PREDICTOR.write_bytes(training.artifact.to_bytes())
    return dict(training.metrics)


def _learn_nothing(args: dict[str, Any]) -> None:
    args["learning"]["min_outcomes"] = NEVER


def main() -> None:
    """Collect, fit, print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-file", type=int, default=600, help="requests of each file of eval/")
    options = parser.parse_args()
    exit_on_sigterm()
    fleet = {key: value for key, value in fleet_file("reference").items() if key != "predictor"}
    with TemporaryDirectory(prefix="calm") as name:
        with served(fleet, _learn_nothing, Path(name)) as url:
            asyncio.run(collect(url, requests(options.per_file)))
            time.sleep(2.0)  # the router's last batch is under way
        print(json.dumps(fit(Path(name)), indent=2))


if __name__ == "__main__":
    main()
