"""`calm goals`: targets of a running service, their status, the weights, and recent changes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from calm_serve.cli import render

_TARGETS = "GOAL TARGET MEASURED HELD FEASIBLE REQUESTS"
_WEIGHTS = "WEIGHT NOW STATED"
_CHANGES = "WHEN WHO GOALS"
_STATED = {
    "latency_per_s": "latency_weight_per_s",
    "energy_per_j": "energy_weight_per_j",
    "switching": "switching_weight",
}


def add_command(
    commands: Any, default_url: str, run: Callable[[argparse.Namespace, Any], None]
) -> None:
    """Add the command; `run` prints `args.text(args, fetch)`."""
    goals = commands.add_parser("goals", help="show targets and weights of a running service")
    goals.add_argument("--url", default=default_url, help="the service (%(default)s)")
    goals.add_argument(
        "--history",
        type=int,
        default=0,
        metavar="N",
        help="also show the last N changes of the goals",
    )
    goals.set_defaults(run=run, text=_goals)


def _goals(args: argparse.Namespace, fetch: Callable[[str, None], dict[str, Any]]) -> str:
    query = f"?history={args.history}" if args.history else ""
    answer = fetch(f"{args.url.rstrip('/')}/v1/goals{query}", None)
    return render.rendered(goals_text, answer)


def goals_text(answer: Mapping[str, Any]) -> str:
    """Return the answer of GET /v1/goals as text."""
    stated, changed = answer["goals"], answer["changed"]
    policy = f"policy {answer['policy']}, goals {answer['version']}"
    if changed["by"]:
        policy += f", set by {changed['by']} at {_when(changed['at'])}"
    targets = [
        (
            target["name"],
            render.number(target["target"]),
            render.number(target["measured"]),
            _yes_no(target["held"]),
            _yes_no(target["feasible"]),
            str(target["samples"]),
        )
        for target in answer["targets"]
    ]
    weights = [
        (name, render.number(value), render.number(stated.get(_STATED.get(name, ""))))
        for name, value in answer["weights"].items()
    ]
    parts = [policy, render.table(_TARGETS, targets) if targets else "no target is set"]
    parts.append(render.table(_WEIGHTS, weights))
    if "history" in answer:
        changes = [(_when(c["at"]), c["by"], _fields(c["new"])) for c in answer["history"]]
        parts.append(render.table(_CHANGES, changes, left=2))
    return "\n\n".join(parts)


def _yes_no(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")


def _fields(goals: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in goals.items()) or "defaults"
