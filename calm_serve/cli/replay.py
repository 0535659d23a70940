"""`calm replay`: decide logged requests again under other goals or with another predictor."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from calm_serve.cli import render
from calm_serve.config import (
    Goals,
    SelectionPolicyName,
    find_application_args,
    first_error,
    parse_yaml,
    read_yaml,
)
from calm_serve.errors import ConfigError, KnowledgeError

if TYPE_CHECKING:
    from calm_serve.prediction import LightGBMPredictor

PROGRESS_ROWS = 1000
Fetch = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]


def add_command(commands: Any, run: Callable[..., None]) -> None:
    """Add the command; `run` prints `args.text(args, fetch)`."""
    replay: ArgumentParser = commands.add_parser(
        "replay", help="decide logged requests again under other goals, and estimate the effect"
    )
    replay.add_argument("log", metavar="LOG", help="SQLite store, its URL, or JSON lines")
    replay.add_argument(
        "--goals", required=True, help="goals as JSON, or a file with goals or a serve_config.yaml"
    )
    replay.add_argument(
        "--predictor", metavar="FILE", help="predictor artifact (default: the logged predictions)"
    )
    replay.add_argument("--json", action="store_true", help="print the whole report")
    replay.set_defaults(run=run, text=replay_text)


def replay_text(args: Namespace, fetch: Fetch) -> str:
    """Read the log, decide again, estimate the effect; progress goes to stderr on a terminal.

    Raises ConfigError for wrong goals, another policy than calm or an unreadable predictor, and
    KnowledgeError for an unreadable log. `fetch` is not used.
    """
    del fetch
    # Imported here, so that other commands do not wait for numpy, LightGBM and SQLAlchemy.
    from calm_serve.knowledge import read_outcomes
    from calm_serve.learning import Replay, ReplaySettings
    from calm_serve.routing import config_version

    goals = read_goals(args.goals)
    if goals.policy.name is not SelectionPolicyName.CALM:
        raise ConfigError("goals.policy: only the policy 'calm' can be replayed")
    predictor = _predictor(args.predictor) if args.predictor else None
    replay = Replay(ReplaySettings(goals, config_version(goals), predictor))
    for outcome in read_outcomes(args.log):
        replay.add(outcome)
        if replay.outcomes % PROGRESS_ROWS == 0:
            _progress(f"{replay.outcomes:,} outcomes")
    _progress(f"{len(replay.log):,} decisions: estimating")
    report = replay.report()
    _progress("")
    return json.dumps(report, indent=2) if args.json else _replay(report)


def read_goals(given: str) -> Goals:
    """Return goals from JSON text, a file of goals, or a serve_config.yaml. Raises ConfigError."""
    name = "--goals"
    if not given.lstrip().startswith("{"):
        name = Path(given).name
        data = read_yaml(Path(given), "goals")
    else:
        data = parse_yaml(given, name)
    if isinstance(data, dict) and "applications" in data:
        data = find_application_args(data, name).get("goals", {})
    try:
        return Goals.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {first_error('', error)}") from error


def _predictor(path: str) -> LightGBMPredictor:
    from calm_serve.prediction import LightGBMPredictor, MetadataPrior, load_artifact

    try:
        return LightGBMPredictor(load_artifact(Path(path)), MetadataPrior())
    except KnowledgeError as error:
        raise ConfigError(f"predictor: {error.message}") from error


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _replay(report: Mapping[str, Any]) -> str:
    decisions, comparable = report["decisions"], report["comparable"]
    lines = [f"{report['outcomes']:,} outcomes, {decisions:,} scored decisions made again"]
    lines += [f"  left out: {n:,} {why}" for why, n in report["skipped"].items()]
    if comparable:
        share = report["reproduced"] / comparable
        lines.append(f"reproduced: {share:.2%} of {comparable:,} with the same goals and predictor")
    lines += [f"  not comparable: {n:,} {why}" for why, n in report["not_comparable"].items()]
    if report["differing"]:
        lines.append(f"  not reproduced, for example: {', '.join(report['differing'])}")
    if not decisions:
        return "\n".join(lines)
    if moving := report["weights"]:
        priced = {k: v for k, v in moving.items() if v and not k.endswith("_after_s")}
        now = ", ".join(f"{k}={v:.3g}" for k, v in priced.items())
        lines.append(f"weights moved to hold the targets; at the end: {now}")
    lines.append(f"changed: {report['changed']:,} ({report['changed'] / decisions:.1%})")
    lines += [f"  {m['from']} -> {m['to']}: {m['decisions']:,}" for m in report["moved"][:20]]
    rows = [
        (
            metric,
            str(found["rows"]),
            render.number(found["logged"], ".4g"),
            *(
                render.interval(found[name]["value"], found[name]["ci95"])
                for name in ("doubly_robust", "direct", "ips", "self_normalised")
            ),
            render.number(found["effective_rows"], ".0f"),
            render.interval(found["difference"]["value"], found["difference"]["ci95"]),
        )
        for metric, found in report["estimates"].items()
        if found is not None
    ]
    header = "METRIC ROWS LOGGED DOUBLY_ROBUST DIRECT IPS SELF_NORMALISED EFFECTIVE DIFFERENCE"
    lines += ["", render.table(header, rows)]
    if any(report["estimates"].values()):
        clip = max(found["clip"] for found in report["estimates"].values() if found)
        lines.append(
            "CI95 by bootstrap; DIFFERENCE is doubly robust minus logged; weights are clipped at "
            f"{clip:.3g}. An estimate: the effect on the other SLM's queue is not known."
        )
    return "\n".join(lines)
