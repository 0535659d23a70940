"""`calm models` and `calm replay`: what was learned, and what other goals would have done."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from calm_serve import cli_text
from calm_serve.config import Goals, SelectionPolicyName
from calm_serve.errors import ConfigError, KnowledgeError

if TYPE_CHECKING:
    from calm_serve.prediction import LightGBMPredictor

PROGRESS_ROWS = 1000
Fetch = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]


def add_commands(commands: Any, default_url: str, run: Callable[..., None]) -> None:
    """Describe both commands to argparse; `run` is called with this module's function."""
    models: ArgumentParser = commands.add_parser(
        "models", help="list stored predictors; pin one, unpin, or roll back"
    )
    models.add_argument("action", nargs="?", choices=["list", "pin", "unpin", "rollback"])
    models.add_argument("version", nargs="?", default="", metavar="VERSION", help="to pin")
    models.add_argument("--url", default=default_url, help="the service (%(default)s)")
    models.add_argument("--json", action="store_true", help="print the whole document")
    models.set_defaults(run=run, text=models_text)

    replay: ArgumentParser = commands.add_parser(
        "replay", help="decide logged requests again under other goals, and estimate the effect"
    )
    replay.add_argument("log", metavar="LOG", help="SQLite store, its URL, or JSON lines")
    replay.add_argument(
        "--goals", required=True, help="goals as JSON, or a file: goals or a serve_config.yaml"
    )
    replay.add_argument("--predictor", metavar="FILE", help="predictor artifact (as logged)")
    replay.add_argument("--json", action="store_true", help="print the whole report")
    replay.set_defaults(run=run, text=replay_text)


def models_text(args: Namespace, fetch: Fetch) -> str:
    """Ask the service, or tell it; return the list as it is afterwards."""
    url = f"{args.url.rstrip('/')}/v1/predictors"
    if (args.action == "pin") != bool(args.version):
        raise ConfigError("VERSION is required to pin, and only then")
    body = None
    if args.action not in (None, "list"):
        body = {"action": args.action}
        if args.version:
            body["version"] = args.version
    answer = fetch(url, body)
    return json.dumps(answer, indent=2) if args.json else cli_text.rendered(_models, answer)


def replay_text(args: Namespace, fetch: Fetch) -> str:
    """Read the log, decide again, estimate; progress goes to a terminal's stderr."""
    del fetch
    # Imported here: `calm fleet` should not wait for numpy, LightGBM and SQLAlchemy.
    from calm_serve.knowledge import read_outcomes
    from calm_serve.learning import Replay, Rules
    from calm_serve.routing import config_version

    goals = read_goals(args.goals)
    if goals.policy.name is not SelectionPolicyName.CALM:
        raise ConfigError("goals.policy: only decisions of the policy 'calm' can be made again")
    predictor = _predictor(args.predictor) if args.predictor else None
    replay = Replay(Rules(goals, config_version(goals), predictor))
    for outcome in read_outcomes(args.log):
        replay.add(outcome)
        if replay.outcomes % PROGRESS_ROWS == 0:
            _progress(f"{replay.outcomes:,} outcomes")
    _progress(f"{len(replay.log):,} decisions: estimating")
    report = replay.report()
    _progress("")
    return json.dumps(report, indent=2) if args.json else _replay(report)


def read_goals(given: str) -> Goals:
    """Goals from JSON text, a file of goals, or a serve_config.yaml. Raises ConfigError."""
    name = "--goals"
    if not given.lstrip().startswith("{"):
        path = Path(given)
        if not path.is_file():
            raise ConfigError(f"goals not found: {given}")
        name = path.name
        try:
            given = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: not text that can be read: {error}") from error
    try:
        data = yaml.safe_load(given)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if isinstance(data, dict) and "applications" in data:
        data = _configured(data["applications"], name)
    try:
        return Goals.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {where}{': ' if where else ''}{first['msg']}") from error


def _configured(applications: Any, name: str) -> Any:
    """The goals of the fleet's own application; of others there may be several."""
    for application in applications if isinstance(applications, list) else ():
        args = application.get("args") if isinstance(application, dict) else None
        if isinstance(args, dict) and "fleet" in args:
            return args.get("goals", {})
    raise ConfigError(f"{name}: no application with args.fleet")


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


def _models(answer: Mapping[str, Any]) -> str:
    rows = [
        (
            model["version"] + (" (pinned)" if model["version"] == answer["pinned"] else ""),
            model["state"].replace("_", " "),
            model["source"],
            str(model["trained_on"]),
            *(
                cli_text.number(model["metrics"].get(name), ".3f")
                for name in ("log_loss", "base_rate_log_loss", "auc", "calibration_error")
            ),
            model["note"],
        )
        for model in answer["data"]
    ]
    lines = [
        cli_text.table(
            "VERSION STATE SOURCE LABELS LOG_LOSS BASE_RATE AUC CALIBRATION NOTE", rows, left=3
        )
    ]
    if shadow := answer["shadow"]:
        text = f"shadow: {shadow['version']} compared on {shadow['requests']} requests"
        if shadow["requests"]:
            text += f", agreement {shadow['agreement_ratio']:.2f}, expected gain "
            text += _interval(shadow["predicted_gain"], shadow["predicted_gain_ci95"])
        lines.append(text)
    if probation := answer["probation"]:
        lines.append(
            f"probation: log loss {probation['log_loss']:.3f} live, "
            f"{probation['previous_log_loss']:.3f} of the previous predictor, on "
            f"{probation['labelled']} labelled outcomes; gain "
            + _interval(probation["gain"], probation["gain_ci95"])
        )
    if training := answer["last_training"]:
        lines.append(f"last training: {_training(training)}")
    if change := answer["last_change"]:
        action = change["action"].replace("_", " ")
        before = change["before"] or "none"
        lines.append(f"last change: {action} {before} -> {change['version']}: {change['reason']}")
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> str:
    reason = str(training["reason"]).replace("_", " ")
    if "version" not in training:
        return f"{reason}: {training['detail']}"
    text = f"{training['version']} against {training['against']}: {reason}"
    if interval := training["difference_ci95"]:
        gain = training["champion_loss"] - training["challenger_loss"]
        text += f", log loss gain {_interval(gain, interval)} on {training['held_out']} labels"
    return text + (f"; {training['then']}" if "then" in training else "")


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
            cli_text.number(found["logged"], ".4g"),
            *(
                _interval(found[name]["value"], found[name]["ci95"])
                for name in ("doubly_robust", "direct", "ips", "self_normalised")
            ),
            cli_text.number(found["effective_rows"], ".0f"),
            _interval(found["difference"]["value"], found["difference"]["ci95"]),
        )
        for metric, found in report["estimates"].items()
        if found is not None
    ]
    header = "METRIC ROWS LOGGED DOUBLY_ROBUST DIRECT IPS SELF_NORMALISED EFFECTIVE DIFFERENCE"
    lines += ["", cli_text.table(header, rows)]
    if any(report["estimates"].values()):
        clip = max(found["clip"] for found in report["estimates"].values() if found)
        lines.append(
            "CI95 by bootstrap; DIFFERENCE is doubly robust less logged; weights are clipped at "
            f"{clip:.3g}. Estimated: what the other SLM's queue would have done is not known."
        )
    return "\n".join(lines)


def _interval(value: float, ci95: list[float] | tuple[float, float]) -> str:
    return f"{value:.4g} [{ci95[0]:.4g}, {ci95[1]:.4g}]"
