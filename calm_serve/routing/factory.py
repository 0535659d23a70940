"""Builds the baseline that the goals name, and keeps its state while another policy is active."""

from __future__ import annotations

from collections.abc import Callable

from calm_serve.config import Fleet, Goals, Rule, SelectionPolicy, SelectionPolicyName
from calm_serve.routing.baselines import (
    Baseline,
    Broadest,
    Fastest,
    Largest,
    LeastLoaded,
    RoundRobin,
    Shares,
    Single,
    Uniform,
)
from calm_serve.routing.calm_paper import CalmPaper, Reader


def rules_of(goals: Goals, fleet: Fleet) -> tuple[Rule, ...]:
    """Return the fleet's rules for the policies that follow them, `calm` and `rules`; else none."""
    return (
        fleet.rules
        if goals.policy.name in (SelectionPolicyName.CALM, SelectionPolicyName.RULES)
        else ()
    )


def build(goals: Goals, fleet: Fleet, read: Reader) -> Baseline | None:
    """Return the goals' baseline, None for `calm`; `read` gives the buckets of a text."""
    make: dict[SelectionPolicyName, Callable[[SelectionPolicy], Baseline]] = {
        SelectionPolicyName.PAPER: lambda _: CalmPaper(read),
        SelectionPolicyName.RANDOM: lambda _: Uniform(),
        SelectionPolicyName.ROUND_ROBIN: lambda _: RoundRobin(),
        SelectionPolicyName.LEAST_LOADED: lambda _: LeastLoaded(),
        SelectionPolicyName.LARGEST: lambda _: Largest(),
        SelectionPolicyName.SINGLE: lambda policy: Single(policy.slm),
        SelectionPolicyName.SHARES: lambda policy: Shares(policy.shares),
        SelectionPolicyName.RULES: lambda _: Broadest(),
        SelectionPolicyName.FASTEST: lambda _: Fastest(),
    }
    if goals.policy.name is SelectionPolicyName.CALM:
        return None
    found = make[goals.policy.name](goals.policy)
    found.set_fleet(fleet)
    return found


class BaselineRegistry:
    """Baselines with their memory, also while inactive; at most one of each name."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._kept: dict[SelectionPolicyName, tuple[SelectionPolicy, Baseline]] = {}

    def take(self, goals: Goals, fleet: Fleet) -> Baseline | None:
        """Return the goals' baseline with the memory of its last use; None for `calm`."""
        policy, kept = self._kept.get(goals.policy.name, (None, None))
        if kept is None or policy != goals.policy:
            kept = build(goals, fleet, self._read)
            if kept is not None:
                self._kept[goals.policy.name] = goals.policy, kept
        else:
            kept.set_fleet(fleet)
        return kept
