"""The knowledge actor in a real Ray: training in a child, publishing, dying and coming back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from calm_serve.config import Learning
from calm_serve.errors import ConfigError
from calm_serve.protocol.outcomes import OUTCOME, encode_batch
from calm_serve.protocol.topics import REGISTRATION, RegisteredSLM, Topic, decode
from deployments.knowledge.actor import get_knowledge
from deployments.knowledge.address import NAMESPACE, actor_name
from tests.knowledge_data import make_fleet, make_outcome, make_spec, make_world

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def learning(tmp_path: Path) -> Iterator[Learning]:
    yield Learning(state_dir=str(tmp_path), min_outcomes=60, retrain_every=1000)
    ray.kill(ray.get_actor(actor_name("test"), namespace=NAMESPACE), no_restart=True)


async def patiently(actor: Any, method: str, *args: Any) -> Any:
    """Call a method of an actor that may be restarting."""
    for _ in range(100):
        try:
            return await getattr(actor, method).remote(*args)
        except RayActorError:
            await asyncio.sleep(0.2)
    raise AssertionError("the actor did not come back")


def process_of(state_dir: str) -> int:
    """The process that holds the outcome database open: the actor."""
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            targets = [str(fd.readlink()) for fd in (folder / "fd").iterdir()]
        except OSError:  # the process ended, or belongs to another user
            continue
        if f"{state_dir}/outcomes.sqlite" in targets:
            return int(folder.name)
    raise AssertionError("no process has the database open")


async def test_outcomes_in_predictor_out_and_both_survive_a_kill(learning: Learning) -> None:
    actor = await get_knowledge("test", make_fleet(), learning)
    seen = {t: u.revision for t, u in (await actor.follow.remote({}, 0.0)).items()}
    waiting = asyncio.ensure_future(patiently(actor, "follow", seen, 60.0, [Topic.PREDICTOR]))
    rows = make_world(300)
    assert await actor.log.remote("b1", encode_batch(rows)) == [o.outcome_id for o in rows]
    trained = (await waiting)[Topic.PREDICTOR]
    assert decode(Topic.PREDICTOR, trained).source == "trained"

    killed = process_of(learning.state_dir)
    os.kill(killed, signal.SIGKILL)
    again = (await patiently(actor, "follow", {}, 0.0))[Topic.PREDICTOR]
    assert again.payload == trained.payload
    assert again.revision != trained.revision
    assert OUTCOME.decode(await patiently(actor, "outcome", "o7")) == rows[7]
    assert process_of(learning.state_dir) != killed


async def test_a_restarted_actor_has_the_settings_of_the_last_deployment(
    learning: Learning,
) -> None:
    actor = await get_knowledge("test", make_fleet(), learning)
    patient = learning.model_copy(update={"min_outcomes": 1000})
    await get_knowledge("test", make_fleet(), patient)
    await actor.log.remote("b1", encode_batch(make_world(70)))
    os.kill(process_of(learning.state_dir), signal.SIGKILL)
    assert (await patiently(actor, "retrain"))["reason"] == "too_few_outcomes"


async def test_every_caller_gets_the_same_actor_and_its_log_cannot_move(
    learning: Learning, tmp_path: Path
) -> None:
    first = await get_knowledge("test", make_fleet(), learning)
    await first.log.remote("b", encode_batch([make_outcome("a")]))
    second = await get_knowledge("test", make_fleet(), learning)
    assert (await second.status.remote())["outcomes"] == 1
    moved = learning.model_copy(update={"state_dir": str(tmp_path / "elsewhere")})
    with pytest.raises(ConfigError, match="state_dir"):
        await get_knowledge("test", make_fleet(), moved)


async def test_a_refused_registration_reaches_the_caller_as_what_it_is(learning: Learning) -> None:
    actor = await get_knowledge("test", make_fleet(), learning)
    spec = make_spec("later").model_dump(mode="json")
    await actor.register_slm.remote(REGISTRATION.encode(RegisteredSLM(spec, "app2")))
    with pytest.raises(ConfigError, match="taken"):
        await actor.register_slm.remote(REGISTRATION.encode(RegisteredSLM(spec, "app3")))
