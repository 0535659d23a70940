"""A real engine on CPU sleeps and wakes: memory comes free, answers stay what they were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# In a process of its own: importing vLLM changes the one that does it.
SLEEP = """
import asyncio, json, os, sys
import psutil
from deployments.slm.environment import process_environment
from load_tests.common.direct import specs_of
from load_tests.common.served import fleet_file

slm, kernel = sys.argv[1:]
spec = next(s for s in specs_of(fleet_file("reference")) if s.id == slm)
os.environ |= process_environment(spec)

from vllm.model_executor.layers import utils
from deployments.slm.engine.engine import Engine, RequestFacts
from deployments.slm.sleep import ReplicaResidency
from deployments.slm.warm_up import post

if kernel == "onednn":  # what CPUs without matrix units run
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False

PROMPTS = ["How many students are in the class?", "Play jazz by Miles Davis", "a long one " * 100]

async def main():
    engine = await Engine.start(spec)
    core = psutil.Process(engine.pids()[0])
    names = [slm]
    for adapter in spec.adapters:
        names.append(f"{slm}:{adapter.name}")
        await engine.load_adapter(names[-1], adapter.path)
        break

    async def answer(prompt, model):
        facts = RequestFacts(on_tokens=lambda _tokens: None)
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 48}
        async with residency.awake():
            with engine.observed(facts):
                _, raw = await post(engine.app, "/v1/chat/completions", json.dumps(body).encode())
        message = json.loads(raw)["choices"][0]["message"]
        return message["content"], facts.cached_tokens

    async def answers():
        # One after the other: the order of sums, and so a token, may depend on the batch.
        return [await answer(prompt, model) for model in names for prompt in PROMPTS]

    def private_bytes():
        memory = core.memory_info()
        return memory.rss - memory.shared

    async def reach(state):
        while residency.state != state:
            await asyncio.sleep(0.01)

    reports = []
    def report(state, times, detail):
        reports.append((state, dict(times), detail))

    residency = ReplicaResidency(engine, report)
    await answers()
    before = [text for text, _ in await answers()]
    found = {"answers": len(set(before)), "equal": [], "cached": [], "freed": [], "taken": []}
    for _ in range(2):
        for i in range(0, 128, 8):  # let the KV cache take memory
            fill = [answer(f"{i + j} filling the cache " * 80, slm) for j in range(8)]
            await asyncio.gather(*fill)
        awake = private_bytes()
        residency.set_desired("asleep")
        await reach("asleep")
        asleep = private_bytes()
        held = [asyncio.create_task(answer(PROMPTS[0], slm)) for _ in range(4)]  # they wake it
        texts = [text for text, _ in await asyncio.gather(*held)]
        residency.set_desired("hot")
        found["taken"].append(private_bytes() - asleep)
        found["freed"].append(awake - asleep)
        after = await answers()
        found["cached"].append(after[1][1])
        found["equal"].append([text for text, _ in after] == before)
        found["equal"].append(set(texts) == {before[0]})
    found["reports"] = reports
    engine.shutdown()
    print(json.dumps(found))

asyncio.run(main())
"""
MIB = 1 << 20


@pytest.mark.timeout(420)  # 30 s each on two cores
@pytest.mark.parametrize(
    ("slm", "kernel", "models"),
    [pytest.param("extract", "own", 2, id="adapters"), pytest.param("sql", "onednn", 1)],
)
def test_a_sleeping_engine_gives_its_memory_back_and_answers_as_before(
    slm: str, kernel: str, models: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SLEEP, slm, kernel],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answers"] > models  # they differ, so that equality is evidence
    assert found["equal"] == [True] * 4
    assert found["cached"] == [0, 0]  # prefixes are forgotten with the cache
    assert min(found["freed"]) > 32 * MIB
    states = [state for state, _, _ in found["reports"]]
    assert states == ["asleep", "waking", "ready"] * 2
    assert found["reports"][-1][1]["wake"] < 1.0
