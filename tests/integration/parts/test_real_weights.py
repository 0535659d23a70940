"""The packaged models that `make weights` leaves on disk, loaded by vLLM on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calm_serve.config import models_folder
from deployments.packaged_models import MODELS, PackagedModel, is_intact

ROOT = Path(__file__).resolve().parents[3]
# Each in a process of its own: importing vLLM changes the one that does it.
PREPARE = """
import json, os, sys
from pathlib import Path
from calm_serve.config import parse_fleet
from deployments.slm.environment import process_environment

def spec_of(model):
    return parse_fleet({"slms": [{"id": "slm", "model": model}]}, Path()).slms[0]
"""
ANSWER = (
    PREPARE
    + """
import asyncio
spec = spec_of("models:smollm2-135m-instruct")
os.environ |= process_environment(spec)
from deployments.slm.engine.engine import Engine, engine_args
from deployments.slm.warm_up import post

async def main():
    defaults = engine_args(spec).create_engine_config().model_config.get_diff_sampling_param()
    engine = await Engine.start(spec)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "slm", "messages": messages, "max_tokens": 32, "temperature": 0}
    _, raw = await post(engine.app, "/v1/chat/completions", json.dumps(body).encode())
    engine.shutdown()
    print(json.dumps({"answer": json.loads(raw), "defaults": defaults}))

asyncio.run(main())
"""
)
EMBED = (
    PREPARE
    + """
spec = spec_of("models:all-minilm-l6-v2")
os.environ |= process_environment(spec)
from vllm import LLM

llm = LLM(
    model=spec.model,
    runner="pooling",
    dtype="float32",
    enforce_eager=True,
    gpu_memory_utilization=0.1,  # on a CPU: of the machine's memory
    max_num_seqs=4,
    max_num_batched_tokens=512,
)
outputs = llm.embed(json.loads(sys.argv[1]), use_tqdm=False)
print(json.dumps([output.outputs.embedding for output in outputs]))
"""
)
SENTENCES = (
    "How do I reset my password?",
    "I forgot my login and need a new one.",
    "The recipe needs two eggs and a cup of flour.",
)


def run(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_folder_is_as_it_was_made(model: PackagedModel) -> None:
    assert is_intact(models_folder() / model.name, model), "run `make weights`"


@pytest.mark.timeout(260)  # 15 to 60 s on two cores, nearly all of it imports
def test_smollm2_answers_by_its_chat_template_and_ends_by_itself() -> None:
    found = run(ANSWER)
    choice = found["answer"]["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"  # its end token is known, so it does not run on
    # System prompt of the template, question, and the opening of the answer.
    assert found["answer"]["usage"]["prompt_tokens"] == 37
    assert found["defaults"] == {"temperature": 0.2, "top_p": 0.9}  # of its model card


@pytest.mark.timeout(260)
def test_minilm_places_a_paraphrase_closer_than_another_subject() -> None:
    question, paraphrase, other = run(EMBED, json.dumps(SENTENCES))
    assert len(question) == 384

    def similarity(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))  # the vectors have length 1

    assert similarity(question, question) == pytest.approx(1, abs=1e-3)
    assert similarity(question, paraphrase) > similarity(question, other) + 0.3
