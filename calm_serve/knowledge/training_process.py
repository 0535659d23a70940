"""Training process: one retraining, from the log to a verdict, in a child of low priority.

The parent writes a job to the child's standard input and reads the result from its standard output
(one JSON document each). So training never blocks the event loop, a crash in native code ends the
child only, and no command line contains a database password.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning import RetrainJob, RetrainResult, retrain

# 50,000 rows take about 110 MB of memory and less than a minute on one core.
MAX_TRAINING_ROWS = 50_000
TIMEOUT_S = 900.0  # of a training; then the child is killed
NICENESS = 10  # of the child: serving has priority


def retrain_from_store(job: RetrainJob, clock: Callable[[], float]) -> RetrainResult:
    """Read the newest outcomes and `retrain` on them. Raises KnowledgeError."""
    store = OutcomeStore(job.store_url)
    try:
        outcomes = store.recent(MAX_TRAINING_ROWS)
    finally:
        store.close()
    return retrain(job, outcomes, clock)


async def retrain_in_child(job: RetrainJob) -> RetrainResult:
    """Run `retrain_from_store` in a child process, which ends with this call.

    Raises KnowledgeError.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "calm_serve.knowledge.training_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        out, err = await asyncio.wait_for(child.communicate(_encode(job)), TIMEOUT_S)
    except TimeoutError as error:
        raise KnowledgeError(f"training took more than {TIMEOUT_S:g} s") from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        last = err.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise KnowledgeError(f"training process ended with {child.returncode}: {last}")
    answer = json.loads(out)
    if "error" in answer:
        raise KnowledgeError(answer["error"])
    return RetrainResult(**{**answer, "blob": _from_text(answer["blob"])})


def main() -> None:
    """Entry of the child process."""
    os.nice(NICENESS)
    # LightGBM's Python side prints to standard output, which carries the result here.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    answer: dict[str, Any]
    try:
        result = retrain_from_store(_decode(json.load(sys.stdin)), time.time)
        answer = {**asdict(result), "blob": _to_text(result.blob)}
    except KnowledgeError as error:
        answer = {"error": error.message}
    json.dump(answer, answer_to)


def _encode(job: RetrainJob) -> bytes:
    return json.dumps({**asdict(job), "champion": _to_text(job.champion)}).encode()


def _decode(data: Mapping[str, Any]) -> RetrainJob:
    values = {**data, "slm_ids": tuple(data["slm_ids"]), "champion": _from_text(data["champion"])}
    return RetrainJob(**values)


def _to_text(blob: bytes | None) -> str | None:
    return None if blob is None else base64.b64encode(blob).decode()


def _from_text(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


if __name__ == "__main__":
    main()
