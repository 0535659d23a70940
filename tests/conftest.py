"""Shared by all tiers. With this file here, pytest makes `tests.…` importable from every test."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-order-seed",
        type=int,
        help="Shuffle folders, the modules of a folder and the tests of a module; the same seed "
        "gives the same order.",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("random_order_seed")
    return None if seed is None else f"random order: --random-order-seed {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle what was collected; folders and modules stay together, with what they share."""
    seed = config.getoption("random_order_seed")
    if seed is None:
        return
    random = Random(seed)
    ranks: defaultdict[object, float] = defaultdict(random.random)
    items.sort(key=lambda i: (ranks[i.path.parent], ranks[i.path], random.random()))
