"""`calm predictors`: list the stored predictors; pin one, unpin, or roll back."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import Any

from calm_serve.cli import render
from calm_serve.errors import ConfigError

Fetch = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]


def add_command(commands: Any, default_url: str, run: Callable[..., None]) -> None:
    """Add the command; `run` prints `args.text(args, fetch)`."""
    predictors: ArgumentParser = commands.add_parser(
        "predictors", help="list stored predictors; pin one, unpin, or roll back"
    )
    predictors.add_argument("action", nargs="?", choices=["list", "pin", "unpin", "rollback"])
    predictors.add_argument("version", nargs="?", default="", metavar="VERSION", help="to pin")
    predictors.add_argument("--url", default=default_url, help="the service (%(default)s)")
    predictors.add_argument("--json", action="store_true", help="print the whole document")
    predictors.set_defaults(run=run, text=predictors_text)


def predictors_text(args: Namespace, fetch: Fetch) -> str:
    """Send the action, if any; return the list of predictors afterwards as text.

    Raises ConfigError for a missing or needless version, and what `fetch` raises.
    """
    url = f"{args.url.rstrip('/')}/v1/predictors"
    if (args.action == "pin") != bool(args.version):
        raise ConfigError("VERSION is required with pin, and only with pin")
    body = None
    if args.action not in (None, "list"):
        body = {"action": args.action}
        if args.version:
            body["version"] = args.version
    answer = fetch(url, body)
    return json.dumps(answer, indent=2) if args.json else render.rendered(_predictors, answer)


def _predictors(answer: Mapping[str, Any]) -> str:
    rows = [
        (
            predictor["version"]
            + (" (pinned)" if predictor["version"] == answer["pinned"] else ""),
            predictor["state"].replace("_", " "),
            predictor["source"],
            str(predictor["trained_on"]),
            *(
                render.number(predictor["metrics"].get(name), ".3f")
                for name in ("log_loss", "base_rate_log_loss", "auc", "calibration_error")
            ),
            predictor["note"],
        )
        for predictor in answer["data"]
    ]
    lines = [
        render.table(
            "VERSION STATE SOURCE LABELS LOG_LOSS BASE_RATE AUC CALIBRATION NOTE", rows, left=3
        )
    ]
    if shadow := answer["shadow"]:
        text = f"shadow: {shadow['version']} compared on {shadow['requests']} requests"
        if shadow["requests"]:
            text += f", agreement {shadow['agreement_ratio']:.2f}, expected gain "
            text += render.interval(shadow["predicted_gain"], shadow["predicted_gain_ci95"])
        lines.append(text)
    if live := answer["post_promotion"]:
        lines.append(
            f"since promotion: log loss {live['log_loss']:.3f}, of the previous predictor "
            f"{live['previous_log_loss']:.3f}, on {live['labelled']} labelled outcomes; gain "
            + render.interval(live["gain"], live["gain_ci95"])
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
        text += (
            f", log loss gain {render.interval(gain, interval)} on {training['held_out']} labels"
        )
    return text + (f"; {training['then']}" if "then" in training else "")
