"""Training process: one retraining, from the log to a verdict, in a child of low priority.

The parent writes a job to the child's standard input and reads the reply from its standard output
(one versioned record each). So training never blocks the event loop, a crash in native code ends
the child only, and no command line contains a database password.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning import (
    RETRAIN_JOB,
    RETRAIN_REPLY,
    RetrainJob,
    RetrainReply,
    RetrainResult,
    retrain,
)

# A row's features take about 9 kB at the peak (measured with 6,000 and 12,000 rows; the outcomes
# themselves are not counted), so those of all rows about 0.5 GB. 12,000 rows took 19 s of CPU.
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
        out, err = await asyncio.wait_for(child.communicate(RETRAIN_JOB.encode(job)), TIMEOUT_S)
    except TimeoutError as error:
        raise KnowledgeError(f"training took more than {TIMEOUT_S:g} s") from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        last = err.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise KnowledgeError(f"training process ended with {child.returncode}: {last}")
    reply = RETRAIN_REPLY.decode(out)
    if reply.result is None:
        raise KnowledgeError(reply.error)
    return reply.result


def main() -> None:
    """Entry of the child process."""
    os.nice(NICENESS)
    # LightGBM's Python side prints to standard output, which carries the reply here.
    reply_to, sys.stdout = sys.stdout.buffer, sys.stderr
    reply_to.write(RETRAIN_REPLY.encode(_reply(sys.stdin.buffer.read())))
    reply_to.flush()


def _reply(job: bytes) -> RetrainReply:
    try:
        return RetrainReply(retrain_from_store(RETRAIN_JOB.decode(job), time.time))
    except KnowledgeError as error:
        return RetrainReply(error=error.message)


if __name__ == "__main__":
    main()
