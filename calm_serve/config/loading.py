"""Read configuration files and say in one line what is wrong with them, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize, ValidationError

from calm_serve.config.base import nearest
from calm_serve.config.fleet import Adapter, Fleet, Resources, SLMSpec
from calm_serve.config.goals import Goals
from calm_serve.config.residency import ResidencyOptions
from calm_serve.config.service import ServeArgs
from calm_serve.errors import ConfigError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_PATH_START = ("/", "./", "../", "~")


def load_args(args: Mapping[str, Any], base: Path) -> tuple[ServeArgs, Fleet]:
    """Validate an application's `args`; relative paths start at `base`.

    Returns the typed arguments and the resolved fleet (weights and adapters as absolute paths).
    Raises ConfigError with the field's name and, for a wrong key, the nearest valid one.
    """
    data = dict(args)
    if isinstance(data.get("fleet"), Mapping):
        # On its own, because in the union with a path every error would be about the path.
        data["fleet"] = parse_fleet(data["fleet"], base, "args.fleet")
    try:
        typed = ServeArgs.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line("args", error)) from error
    if isinstance(typed.fleet, str):
        fleet = load_fleet(base / Path(typed.fleet).expanduser())
    else:
        fleet = _resolve(typed.fleet, base, "args.fleet")
    check_policy(typed.goals, fleet)
    check_budget(typed.residency, fleet)
    return typed, fleet


def load_fleet(path: Path) -> Fleet:
    """Read a fleet file (YAML); paths inside are relative to it. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"fleet file not found: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name}: expected a mapping with the key 'slms'")
    return parse_fleet(data, path.parent, path.name)


def parse_fleet(data: Mapping[str, Any], base: Path, name: str = "fleet") -> Fleet:
    """Validate a fleet given as a mapping; `name` prefixes errors. Raises ConfigError."""
    try:
        fleet = Fleet.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_one_line(name, error)) from error
    return _resolve(fleet, base, name)


def parse_goals(data: Mapping[str, Any], fleet: Fleet) -> Goals:
    """Validate goals given as a mapping, for `fleet`. Raises ConfigError with the field."""
    try:
        goals = Goals.model_validate(dict(data))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(_one_line("goals", error), param=where or None) from error
    check_policy(goals, fleet)
    return goals


def check_policy(goals: Goals, fleet: Fleet) -> None:
    """Raise ConfigError when the policy names an SLM that the fleet does not have."""
    ids = [slm.id for slm in fleet.slms]
    for slm_id in (goals.policy.slm, *goals.policy.shares):
        if slm_id and slm_id not in ids:
            hint = nearest(slm_id, ids)
            raise ConfigError(f"goals.policy names unknown SLM {slm_id!r}{hint}")


def parse_residency(data: Mapping[str, Any], fleet: Fleet) -> ResidencyOptions:
    """Validate residency settings that come at run time. Raises ConfigError."""
    try:
        residency = ResidencyOptions.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_one_line("residency", error)) from error
    check_budget(residency, fleet)
    return residency


def check_budget(residency: ResidencyOptions, fleet: Fleet) -> None:
    """Raise ConfigError when an SLM, or all that are pinned together, exceed the memory budget.

    A budget is per node and nobody knows the nodes yet, so one replica of each pinned SLM counts.
    """
    budget = residency.memory_budget_bytes
    if budget is None:
        return
    for slm in fleet.slms:
        if slm.declared_bytes > budget:
            raise ConfigError(
                f"SLM {slm.id!r}: {slm.declared_bytes:,} declared bytes exceed "
                f"residency.memory_budget_bytes ({budget:,})"
            )
    pinned = sum(slm.declared_bytes for slm in fleet.slms if slm.residency == "pinned")
    if pinned > budget:
        raise ConfigError(
            f"pinned SLMs declare {pinned:,} bytes, more than residency.memory_budget_bytes "
            f"({budget:,}); make some of them hot"
        )


def check_resources(
    fleet: Fleet, cpus: float, gpus: float, memory_bytes: float, router_cpus: float = 0.0
) -> None:
    """Raise ConfigError when the SLMs that must be hot cannot fit the cluster.

    cpus, gpus and memory_bytes are the cluster's totals; router_cpus is what its routers take.
    """
    need = {"CPUs": router_cpus, "GPUs": 0.0, "memory bytes": 0.0}
    have = {"CPUs": cpus, "GPUs": gpus, "memory bytes": memory_bytes}
    for slm in fleet.slms:
        if slm.locality == "remote":
            continue
        one = slm.resources
        per_replica = {
            "CPUs": one.num_cpus,
            "GPUs": one.num_gpus,
            "memory bytes": float(one.memory_bytes),
        }
        for kind, amount in per_replica.items():
            if amount > have[kind]:
                raise ConfigError(
                    f"SLM {slm.id!r}: one replica asks for {amount:g} {kind}, "
                    f"the cluster has {have[kind]:g}"
                )
            need[kind] += amount * slm.scaling.min_replicas
    for kind, amount in need.items():
        if amount > have[kind]:
            raise ConfigError(
                f"the fleet's minimum replicas and routers ask for {amount:g} {kind}, "
                f"the cluster has {have[kind]:g}; lower resources or make SLMs on_demand"
            )


def _resolve(fleet: Fleet, base: Path, name: str) -> Fleet:
    slms = tuple(_resolve_slm(slm, base, name) for slm in fleet.slms)
    update: dict[str, Any] = {"slms": slms}
    if fleet.predictor:
        folder = (base / Path(fleet.predictor).expanduser()).resolve()
        if not folder.is_dir():
            raise ConfigError(f"{name}: predictor folder not found: {fleet.predictor}")
        update["predictor"] = str(folder)
    return fleet.model_copy(update=update)


def _resolve_slm(slm: SLMSpec, base: Path, name: str) -> SLMSpec:
    if slm.locality == "remote":
        return slm
    where = f"{name}: SLM {slm.id!r}"
    adapters = tuple(_resolve_adapter(a, base, where) for a in slm.adapters)
    path = (base / Path(slm.model).expanduser()).resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{where}: {slm.model} has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"{where}: {slm.model} has no weights (*.safetensors)")
        return slm.model_copy(
            update={
                "model": str(path),
                "adapters": adapters,
                "resources": _count_weights(slm, path, adapters),
            }
        )
    if slm.model.startswith(_PATH_START) or not _HUB_ID.match(slm.model):
        raise ConfigError(f"{where}: weights not found: {slm.model}")
    return slm.model_copy(update={"adapters": adapters})


def _count_weights(slm: SLMSpec, model: Path, adapters: tuple[Adapter, ...]) -> Resources:
    if slm.resources.weights_bytes is not None:
        return slm.resources
    folders = [model, *(Path(a.path) for a in adapters)]
    size = sum(f.stat().st_size for folder in folders for f in folder.glob("*.safetensors"))
    return slm.resources.model_copy(update={"weights_bytes": ByteSize(size)})


def _resolve_adapter(adapter: Adapter, base: Path, where: str) -> Adapter:
    path = (base / Path(adapter.path).expanduser()).resolve()
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(f"{where}: adapter {adapter.name!r} not found: {adapter.path}")
    return adapter.model_copy(update={"path": str(path)})


def _one_line(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{name}{'.' if where else ''}{where}: {message}{more}"
