"""`calm fit` and `calm eval`: a predictor from a score table, and what it would gain."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calm_serve.cli import render
from calm_serve.cli.progress import ProgressBar
from calm_serve.errors import ConfigError

_POLICIES = "POLICY SCORE COST SECONDS IS"
_MEANINGS = {
    "router": "the fitted router, by P(success) alone",
    "best_single": "the best model for every prompt, known in hindsight",
    "share_matched": "each model as often as the router, blindly",
    "random": "any model",
    "prompt_length": "the best model for prompts of this length",
    "task_best": "the best model for prompts of this task, which is told",
    "oracle": "the best model for each prompt, known in hindsight",
}
_MEASURES = {
    "apgr": "share of the gap between the two models that is closed, over all budgets",
    "cpt50": "percent of prompts to the stronger model for half of the gap",
    "cpt80": "the same for four fifths of the gap",
}
Fetch = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]


def add_commands(commands: Any, run: Callable[..., None], predictor_file: str) -> None:
    """Add both commands; `run` prints `args.text(args, fetch)`."""
    fit: ArgumentParser = commands.add_parser(
        "fit", help="fit a predictor on a score table, for a fleet to start with"
    )
    fit.add_argument("table", metavar="TABLE", help="score table, JSON lines")
    fit.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the fleet file's key `predictor`"
    )
    fit.set_defaults(run=run, text=fit_text, predictor_file=predictor_file)

    evaluate: ArgumentParser = commands.add_parser(
        "eval", help="what the router would gain on a score table, against what is simpler"
    )
    evaluate.add_argument("table", metavar="TABLE", help="score table, JSON lines")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures to this file")
    evaluate.add_argument(
        "--plot", metavar="FILE", help="draw cost and quality to this file (png, svg, pdf)"
    )
    evaluate.set_defaults(run=run, text=eval_text)


def fit_text(args: Namespace, fetch: Fetch) -> str:
    """Fit and write the predictor. Raises ConfigError. `fetch` is not used."""
    del fetch
    # Imported here, so that other commands do not wait for numpy and LightGBM.
    from calm_serve.datasets import fit_table, read_table

    table = read_table(Path(args.table))
    artifact = fit_table(table, created_at=time.time())
    path = Path(args.out) / args.predictor_file
    _write(path, artifact.to_bytes())
    found = artifact.metrics
    rows = [
        (name, render.number(found[name], ".3f"))
        for name in ("log_loss", "base_rate_log_loss", "auc", "calibration_error")
    ]
    return (
        f"{path}: predictor {artifact.version} of {', '.join(artifact.slm_ids)}\n"
        f"fitted on all {len(table.rows):,} prompts; of one that was fitted on the train prompts "
        f"alone, on {found['holdout_labelled']:,} held-out scores:\n\n"
        f"{render.table('METRIC VALUE', rows)}\n\n"
        f"in the fleet file: `predictor: {args.out}`, relative to that file"
    )


def eval_text(args: Namespace, fetch: Fetch) -> str:
    """Evaluate; write figures and picture where asked to. Raises ConfigError."""
    del fetch
    from calm_serve.datasets import Evaluator, draw, read_table

    evaluator = Evaluator(read_table(Path(args.table)), time.perf_counter)
    evaluation = evaluator.run(ProgressBar("fit").update)
    if args.json:
        _write(Path(args.json), (json.dumps(evaluation.figures, indent=1) + "\n").encode())
    if args.plot:
        draw(evaluation, Path(args.plot))
    return evaluation_text(evaluation.figures)


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """Return the figures of an evaluation as text."""
    rows = [
        (
            name,
            render.interval(figures[f"{name}_score"], figures[f"{name}_score_ci95"]),
            render.number(figures.get(f"{name}_cost"), ".4g"),
            render.number(figures.get(f"{name}_latency_s"), ".4g"),
            meaning,
        )
        for name, meaning in _MEANINGS.items()
        if figures[f"{name}_score"] is not None
    ]
    lines = [
        f"{figures['train_prompts']:,} prompts to learn from, {figures['test_prompts']:,} to test "
        f"on; models: {', '.join(figures['models'])}",
        "",
        render.table(_POLICIES, rows),
        "",
        *_differences(figures),
    ]
    shares = ", ".join(f"{model} {share:.0%}" for model, share in figures["router_shares"].items())
    lines.append(f"the router's shares: {shares}")
    if figures["apgr"] is not None:
        lines += ["", render.table("MEASURE ROUTER BY_LENGTH IS", _between_two(figures))]
    return "\n".join([*lines, "", *_learning(figures)])


def _differences(figures: Mapping[str, Any]) -> list[str]:
    names = {
        "best_single": "the best single model",
        "share_matched": "its own shares, blindly",
        "task_best": "the best model of each task",
    }
    return [
        f"router less {name}: "
        + render.interval(figures[f"router_minus_{rival}"], figures[f"router_minus_{rival}_ci95"])
        for rival, name in names.items()
        if figures[f"router_minus_{rival}"] is not None
    ]


def _between_two(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name.upper(),
            *(
                render.interval(figures[f"{by}{name}"], figures[f"{by}{name}_ci95"])
                for by in ("", "length_")
            ),
            meaning,
        )
        for name, meaning in _MEASURES.items()
    ]


def _learning(figures: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{point['prompts']:,}",
            render.interval(point["router_score"], point["router_score_ci95"]),
            "[{:.4g}, {:.4g}]".format(*point["router_minus_best_single_ci95"]),
        )
        for point in figures["learning_curve"]
    ]
    needed = figures["prompts_needed"]
    return [
        render.table("PROMPTS ROUTER LESS_BEST_SINGLE", rows),
        f"surely better than the best single model from {needed:,} prompts on"
        if needed is not None
        else "not surely better than the best single model with any number of these prompts",
        "",
        f"{render.number(figures['decisions_per_s'], ',.0f')} decisions a second in one thread; "
        "intervals are of 95 %, by bootstrap over the test prompts",
    ]


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
