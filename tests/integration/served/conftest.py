"""The reference fleet, once for this folder, as it was before after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.integration.rest import Rest
from tests.integration.served_fleet import ServedFleet, reference_config


@pytest.fixture(scope="package")
def fleet() -> Iterator[ServedFleet]:
    """The reference fleet with two router replicas and two of one SLM.

    It neither explores nor trains, so that what one test sends changes no other one's decisions.
    """
    with ServedFleet(reference_config(exploration_ratio=0.0)).running() as served:
        yield served


@pytest.fixture(scope="package")
def rest(fleet: ServedFleet) -> Rest:
    """What the fleet looks like when it is at rest."""
    return Rest(fleet)


@pytest.fixture(autouse=True)
def at_rest(rest: Rest) -> Iterator[None]:
    """Undo what the test changed, and wait until the fleet is at rest again."""
    yield
    rest.restore()


@pytest.fixture(scope="package")
def client(fleet: ServedFleet) -> OpenAI:
    """The official client, connected to the fleet."""
    return fleet.openai()
