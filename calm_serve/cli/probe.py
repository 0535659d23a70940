"""`calm fleet probe`: every SLM of a service answers prompts; the grades become a score table."""

from __future__ import annotations

import asyncio
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_serve.cli.progress import ProgressBar
from calm_serve.errors import ComponentError

if TYPE_CHECKING:
    import httpx

    from calm_serve.datasets import ProbeReport

CONCURRENCY, MAX_CONCURRENCY = 4, 256
TIMEOUT_S = 300.0  # of one answer; a small machine writes some tokens a second


def add_command(fleet: ArgumentParser, run: Callable[..., None]) -> None:
    """Add the command below `calm fleet`, whose `--url` it takes before and after its name."""
    commands = fleet.add_subparsers(metavar="COMMAND")
    probe: ArgumentParser = commands.add_parser(
        "probe", help="ask every SLM every prompt, grade the answers, write a score table"
    )
    probe.add_argument("prompts", metavar="PROMPTS", help="prompts with their grading, JSON lines")
    probe.add_argument("--url", default=SUPPRESS, help="the service")
    probe.add_argument(
        "--out", required=True, metavar="TABLE", help="score table; prompts in it are not asked"
    )
    probe.add_argument(
        "--judge",
        default="",
        metavar="SLM",
        help="grades answers to prompts without reference and validator",
    )
    probe.add_argument(
        "--concurrency",
        type=_concurrency,
        default=CONCURRENCY,
        metavar="N",
        help="prompts at once (%(default)s)",
    )
    probe.set_defaults(run=run)


def probe_text(args: Namespace, transport: httpx.AsyncBaseTransport | None) -> str:
    """Probe, and return what was written; `transport` is HTTP's by default.

    Raises ConfigError for wrong input, and ComponentError when the service cannot be reached or
    prompts are left without a row.
    """
    from calm_serve.datasets import read_prompts

    prompts = read_prompts(Path(args.prompts), has_judge=bool(args.judge))
    report = asyncio.run(_probe(args, prompts, transport))
    text = f"{args.out}: {report.written:,} rows written, {report.skipped:,} prompts skipped"
    if not report.failed:
        return text
    line, reason = report.failed[0]
    raise ComponentError(
        f"{text}, {len(report.failed):,} failed, the first in line {line}: {reason}; the same "
        "command asks them again"
    )


async def _probe(
    args: Namespace, prompts: Any, transport: httpx.AsyncBaseTransport | None
) -> ProbeReport:
    import httpx

    from calm_serve.datasets import Probe

    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(
        base_url=args.url, transport=transport, timeout=TIMEOUT_S, limits=limits
    ) as client:
        probe = Probe(client, clock=time.perf_counter, judge=args.judge)
        bar = ProgressBar("probe")
        return await probe.run(prompts, Path(args.out), args.concurrency, bar.update)


def _concurrency(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_CONCURRENCY:
        raise ArgumentTypeError(f"a whole number from 1 to {MAX_CONCURRENCY}")
    return int(text)
