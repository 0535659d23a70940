"""What several commands read of a configuration: its errors, its application, its resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from calm_serve.config import (
    FLEET_APPLICATION,
    ClusterResources,
    Fleet,
    Goals,
    error_field,
    find_application_args,
    first_error,
    minimum_resources,
    read_yaml,
)
from calm_serve.errors import ConfigError
from calm_serve.testing import make_spec

OURS = {"import_path": FLEET_APPLICATION, "args": {"fleet": "ours.yaml"}}
OTHER = {"import_path": "other:app", "args": {"fleet": "other.yaml"}}


def error_of(data: Any, kind: Any = Goals) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(data)
    return caught.value


def test_an_error_is_one_line_with_the_field_and_the_number_of_others() -> None:
    error = error_of({"policy": {"name": "nobody"}, "quality_floor": 2})
    assert error_field(error) == "quality_floor"
    line = "quality_floor: Input should be less than or equal to 1"
    assert first_error("goals", error) == f"goals.{line} (and 1 more)"
    assert first_error("", error, counted=False) == line


def test_an_error_about_the_whole_has_no_field() -> None:
    error = error_of({"latncy": 1})
    assert error_field(error) == ""
    assert first_error("goals", error).startswith("goals: unknown key 'latncy'; the nearest")
    assert first_error("", error).startswith("unknown key 'latncy'; the nearest")


@pytest.mark.parametrize(
    ("applications", "fleet"),
    [
        ([OTHER, OURS], "ours.yaml"),
        ([{"args": {"id": "an-slm"}}, OTHER], "other.yaml"),
        (["text", {"name": "no args"}, {"args": "fleet"}, OTHER], "other.yaml"),
    ],
)
def test_the_fleets_application_is_found_among_others(applications: Any, fleet: str) -> None:
    found = find_application_args({"applications": applications}, "file.yaml")
    assert found == {"fleet": fleet}


def test_the_fleets_application_may_lack_arguments() -> None:
    document = {"applications": [{"import_path": FLEET_APPLICATION, "args": None}]}
    assert find_application_args(document, "file.yaml") == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "file.yaml: expected a mapping with the key 'applications'"),
        ({}, "file.yaml: no application with args.fleet"),
        ({"applications": 3}, "file.yaml: no application with args.fleet"),
        ({"applications": [{"args": {"id": "x"}}]}, "file.yaml: no application with args.fleet"),
        ({"applications": [OURS, OURS]}, "file.yaml: 2 applications import"),
        ({"applications": [OURS | {"args": "fleet"}]}, "expected a mapping"),
    ],
)
def test_a_file_without_one_fleet_application_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_application_args(document, "file.yaml")


def test_minimum_resources_are_those_of_local_replicas_and_routers() -> None:
    two = make_spec(
        "two",
        scaling={"min_replicas": 2, "max_replicas": 2},
        resources={"num_cpus": 1.5, "num_gpus": 1, "memory_bytes": 1 << 30},
    )
    remote = make_spec("remote", locality="remote", remote={"base_url": "http://x/v1"})
    fleet = Fleet(slms=(two, remote))
    assert minimum_resources(fleet, 0.5) == ClusterResources(3.5, 2.0, float(2 << 30))


def test_a_folder_or_a_missing_file_is_no_configuration(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(ConfigError, match="configuration not found"):
            read_yaml(path)
