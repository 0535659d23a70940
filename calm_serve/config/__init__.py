"""Configuration: fleet, goals, service. Owner: any. Only `loading` blocks, because it reads files.

Takes mappings and YAML files and gives frozen, validated sections. It reads the files that it is
given and the model folders that they name, and writes nothing.
"""

from calm_serve.config.base import Config, error_field, first_error
from calm_serve.config.fleet import (
    BATCHING,
    Adapter,
    BatchingProfile,
    Dialect,
    Fleet,
    Marker,
    Prices,
    Remote,
    Resources,
    Rule,
    Scaling,
    SLMSpec,
)
from calm_serve.config.goals import Goals, SelectionPolicy, SelectionPolicyName
from calm_serve.config.loading import (
    FLEET_APPLICATION,
    ClusterResources,
    check_resources,
    find_application_args,
    load_args,
    load_fleet,
    minimum_resources,
    models_folder,
    parse_fleet,
    parse_goals,
    parse_residency,
    parse_yaml,
    read_yaml,
)
from calm_serve.config.residency import ResidencyOptions, ResidencyPolicyName
from calm_serve.config.service import DECISION_LOG, Learning, RouterOptions, ServeArgs

__all__ = [
    "BATCHING",
    "DECISION_LOG",
    "FLEET_APPLICATION",
    "Adapter",
    "BatchingProfile",
    "ClusterResources",
    "Config",
    "Dialect",
    "Fleet",
    "Goals",
    "Learning",
    "Marker",
    "Prices",
    "Remote",
    "ResidencyOptions",
    "ResidencyPolicyName",
    "Resources",
    "RouterOptions",
    "Rule",
    "SLMSpec",
    "Scaling",
    "SelectionPolicy",
    "SelectionPolicyName",
    "ServeArgs",
    "check_resources",
    "error_field",
    "find_application_args",
    "first_error",
    "load_args",
    "load_fleet",
    "minimum_resources",
    "models_folder",
    "parse_fleet",
    "parse_goals",
    "parse_residency",
    "parse_yaml",
    "read_yaml",
]
