"""Configuration: what an operator may write down. Owner: any process.

Only `loading` blocks: it reads files. Everything else is validation.
"""

from calm_serve.config.base import Config
from calm_serve.config.fleet import (
    BATCHING,
    Adapter,
    BatchingProfile,
    Fleet,
    Resources,
    Rule,
    Scaling,
    SLMSpec,
)
from calm_serve.config.goals import Goals, SelectionPolicy, SelectionPolicyName
from calm_serve.config.loading import (
    check_resources,
    load_args,
    load_fleet,
    parse_fleet,
    parse_goals,
    parse_residency,
)
from calm_serve.config.residency import ResidencyOptions, ResidencyPolicyName
from calm_serve.config.service import Learning, RouterOptions, ServeArgs

__all__ = [
    "BATCHING",
    "Adapter",
    "BatchingProfile",
    "Config",
    "Fleet",
    "Goals",
    "Learning",
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
    "load_args",
    "load_fleet",
    "parse_fleet",
    "parse_goals",
    "parse_residency",
]
