"""The memory budget in configurations: what counts, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calm_serve.config import ResidencyOptions
from calm_serve.config.loading import check_budget, load_args, load_fleet
from calm_serve.errors import ConfigError
from calm_serve.testing import make_fleet, make_spec

ROOT = Path(__file__).parents[3]


def slm(slm_id: str, size: int = 100, **fields: Any) -> Any:
    return make_spec(slm_id, resources={"weights_bytes": size, "kv_cache_bytes": 0}, **fields)


def budget(size: int) -> ResidencyOptions:
    return ResidencyOptions(memory_budget_bytes=size)


def test_declared_bytes_are_weights_adapters_and_kv_cache() -> None:
    (extract,) = [
        s
        for s in load_fleet(ROOT / "deployments" / "fleets" / "reference.yaml").slms
        if s.id == "extract"
    ]
    models = ROOT / "deployments" / "reference_fleet" / "models" / "extract"
    files = sum(f.stat().st_size for f in models.rglob("*.safetensors"))
    assert extract.resources.weights_bytes == files
    assert extract.declared_bytes == files + extract.resources.kv_cache_bytes


def test_weights_of_a_hub_id_are_counted_by_parameters_unless_they_are_stated() -> None:
    resources = {"kv_cache_bytes": 1000}
    assert make_spec("a", parameters=5, resources=resources).declared_bytes == 1010
    stated = {**resources, "weights_bytes": 7}
    assert make_spec("a", parameters=5, resources=stated).declared_bytes == 1007


def test_a_remote_slm_takes_no_memory() -> None:
    remote = make_spec("a", locality="remote", remote={"base_url": "http://far/v1"})
    assert remote.declared_bytes == 0


def test_pinned_slms_must_fit_the_budget_together() -> None:
    fleet = make_fleet(slm("a", residency="pinned"), slm("b", residency="pinned"), slm("c"))
    check_budget(budget(200), fleet)
    with pytest.raises(ConfigError, match="pinned SLMs declare 200 bytes"):
        check_budget(budget(199), fleet)


def test_every_slm_must_fit_the_budget_alone() -> None:
    with pytest.raises(ConfigError, match="'b': 300 declared bytes"):
        check_budget(budget(250), make_fleet(slm("a"), slm("b", 300)))


def test_without_a_budget_everything_fits() -> None:
    check_budget(ResidencyOptions(), make_fleet(slm("a", 10**15)))


def test_pinned_needs_a_replica() -> None:
    with pytest.raises(ValidationError, match="residency pinned needs"):
        slm("a", residency="pinned", scaling={"min_replicas": 0})


def test_a_budget_that_is_too_small_is_refused_when_the_arguments_are_read() -> None:
    args = {
        "fleet": str(ROOT / "deployments" / "fleets" / "reference.yaml"),
        "residency": {"memory_budget_bytes": "100MiB"},
    }
    with pytest.raises(ConfigError, match=r"exceed residency\.memory_budget_bytes"):
        load_args(args, ROOT)
