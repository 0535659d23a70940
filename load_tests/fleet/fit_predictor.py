"""Fits the shipped predictor: `python -m load_tests.fleet.fit_predictor`, 15 minutes on 2 cores.

Serves the reference fleet without a predictor. Rows of the `fit` side of `eval/`, none of which is
in the standard workload, are sent, pinned, to every SLM; a specialist's answers to requests of
other tasks teach the predictor which requests it cannot serve. Each answer is graded and the grade
posted as feedback. Then the knowledge actor's trainer fits `predictor/predictor.bin` on the stored
outcomes. In-domain by construction: the prompts are of the same kinds as those of the evaluation.

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
from calm_serve.learning import TRAINED_UNTIL, refitted, train
from calm_serve.prediction import fit_seen_prompts
from calm_serve.requests import text_bits
from deployments.reference_fleet.grading.marks import credit
from deployments.reference_fleet.grading.rows import FILES, load
from deployments.reference_fleet.paths import PREDICTOR
from load_tests.common.client import Question, ask
from load_tests.common.served import fleet_file, served
from load_tests.common.termination import exit_on_sigterm
from load_tests.common.workloads import Request, request

SEED = 23
SLMS = ("extract", "sql", "shell", "reason", "intent", "general")
CONCURRENCY = 12
HOLDOUT_RATIO = 0.2
GENERALISTS_TASKS = ("open", "choice", "knowledge")
FAMILIAR_PER_FILE = 600  # prompts that count as familiar
MAX_TOKENS = 320  # the same for every task: the limit is a feature and must not reveal the task
NEVER = 1_000_000  # min_outcomes that is not reached, so that the service itself does not train


def requests(per_file: int) -> list[Request]:
    """At most `per_file` requests of the `fit` side of each file, in random order."""
    rng = Random(SEED)
    found: list[Request] = []
    for name in FILES:
        rows = [r for r in load(name) if r.side == "fit"]
        found += [request(r, rng) for r in rng.sample(rows, min(per_file, len(rows)))]
    rng.shuffle(found)
    return found


async def collect(url: str, workload: list[Request]) -> None:
    """Send each request to every SLM and post the grades as feedback."""
    slots = asyncio.Semaphore(CONCURRENCY)
    pairs = [(slm, one) for one in workload for slm in SLMS]
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
    """Train on all stored outcomes and write the artifact. Returns the training's metrics."""
    store = OutcomeStore(f"sqlite:///{(state_dir / 'outcomes.sqlite').absolute()}")
    try:
        outcomes = store.recent(50_000)
    finally:
        store.close()
    # Times depend on the machine: each deployment learns its own correction of TTFT.
    outcomes = [replace(o, timing=replace(o.timing, ttft_s=None)) for o in outcomes]
    training = train(outcomes, SLMS, seed=SEED, holdout_ratio=0.2, clock=time.time)
    artifact = refitted(training, outcomes, seed=SEED, clock=time.time)
    # Whether a prompt is familiar takes no answers, so every row of the fit side teaches it; chat
    # and knowledge, which are the generalist's, stay unfamiliar.
    known = (one for one in requests(FAMILIAR_PER_FILE) if one.row.task not in GENERALISTS_TASKS)
    texts = (one.messages[-1]["content"] for one in known)
    artifact = replace(artifact, seen=fit_seen_prompts(text_bits(text) for text in texts))
    artifact = replace(artifact, version=f"lgbm-{artifact.content_hash()}")
    # A deployment's own outcomes are all new to it, whatever their time.
    metrics = {name: v for name, v in artifact.metrics.items() if name != TRAINED_UNTIL}
    PREDICTOR.parent.mkdir(exist_ok=True)
    PREDICTOR.write_bytes(replace(artifact, metrics=metrics).to_bytes())
    return metrics


def _without_training(args: dict[str, Any]) -> None:
    args["learning"] |= {"min_outcomes": NEVER, "keep_prompts": True}


def main() -> None:
    """Collect, fit, print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-file", type=int, default=600, help="requests of each file of eval/")
    parser.add_argument("--state", type=Path, help="keep the outcomes here; use them if present")
    options = parser.parse_args()
    exit_on_sigterm()
    fleet = {key: value for key, value in fleet_file("reference").items() if key != "predictor"}
    fleet["slms"] = [entry for entry in fleet["slms"] if entry["id"] in SLMS]
    with TemporaryDirectory(prefix="calm") as name:
        state = options.state or Path(name)
        if not (state / "outcomes.sqlite").exists():
            with served(fleet, _without_training, state) as url:
                asyncio.run(collect(url, requests(options.per_file)))
                time.sleep(2.0)  # for the router's last batch of outcomes
        print(json.dumps(fit(state), indent=2))


if __name__ == "__main__":
    main()
