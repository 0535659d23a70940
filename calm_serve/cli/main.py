"""`calm`: check a configuration, explain a decision, show a running fleet and its predictors.

Exit status: 0 success; 1 the service or the request failed; 2 the configuration is wrong. Every
error is one line on stderr.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_serve.cli import goals, predictors, probe, render, replay, tables
from calm_serve.config import (
    ClusterResources,
    Fleet,
    ServeArgs,
    check_resources,
    find_application_args,
    load_args,
    minimum_resources,
    read_yaml,
)
from calm_serve.errors import (
    CalmError,
    ComponentError,
    ConfigError,
    KnowledgeError,
    RequestError,
)

if TYPE_CHECKING:
    import httpx

    from calm_serve.prediction import Predictor

DEFAULT_CONFIG = "serve_config.yaml"
DEFAULT_URL = "http://127.0.0.1:8000"
PREDICTOR_FILE = "predictor.bin"  # inside the fleet's `predictor` folder
TIMEOUT_S = 30.0
WATCH_PERIOD_S = 2.0
_CLEAR = "\x1b[H\x1b[2J"

# Share of a node's memory that Ray reserves for its object store.
_OBJECT_STORE_RATIO = 0.3

Fetch = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]


def fetch_json(url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
    """GET `url`, or POST `body` to it, and return the JSON object.

    Raises ComponentError when there is no answer and RequestError when the answer is an error or
    not a JSON object.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
    except ValueError as error:
        raise RequestError(f"{url}: {error}") from error
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise RequestError(f"{url}: {_error_message(error)}") from error
    except urllib.error.URLError as error:
        raise ComponentError(f"cannot reach {url}: {error.reason}") from error
    # Reset or timed out during the answer, or the peer does not speak HTTP.
    except (OSError, http.client.HTTPException) as error:
        raise ComponentError(f"cannot reach {url}: {error}") from error
    except ValueError as error:
        raise RequestError(f"{url}: the answer is not JSON: {error}") from error
    if not isinstance(answer, dict):
        raise RequestError(f"{url}: expected a JSON object")
    return answer


def this_machine() -> ClusterResources:
    """Return what a Ray node started here would offer.

    CPUs follow affinity and container quota; GPUs are NVIDIA's; memory is without the object store.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cpus = min(cpus, int(quota[0]) / int(quota[1]))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _cgroup("memory.max").strip()
    if limit.isdigit():
        memory = min(memory, float(limit))
    gpus = float(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
    return ClusterResources(cpus, gpus, memory * (1.0 - _OBJECT_STORE_RATIO))


@dataclass(frozen=True, slots=True)
class World:
    """Everything that the commands use outside this process; tests replace it."""

    fetch: Fetch = fetch_json
    machine: Callable[[], ClusterResources] = this_machine
    sleep: Callable[[float], None] = time.sleep
    transport: httpx.AsyncBaseTransport | None = None  # of many requests at once; None is HTTP


def main(argv: Sequence[str] | None = None, world: World | None = None) -> int:
    """Run `calm` with `argv` (the process's arguments by default) and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args, world or World())
        sys.stdout.flush()
    except ConfigError as error:
        return _fail(error.message, 2)
    except CalmError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has ended; without this Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="validate a configuration against this machine")
    check.add_argument("config", nargs="?", default=DEFAULT_CONFIG, metavar="CONFIG")
    check.set_defaults(run=_check)

    route = commands.add_parser("route", help="explain which SLM a prompt would go to, and why")
    route.add_argument("prompt", metavar="PROMPT")
    source = route.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help="decide without a service, as for an idle fleet (%(default)s)",
    )
    source.add_argument("--url", help=f"ask a running service, such as {DEFAULT_URL}")
    route.add_argument("--json", action="store_true", help="print the whole decision record")
    route.set_defaults(run=_route)

    fleet = commands.add_parser("fleet", help="show the SLMs of a running service")
    fleet.add_argument("--url", default=DEFAULT_URL, help="the service (%(default)s)")
    fleet.add_argument("--watch", action="store_true", help="refresh until interrupted")
    fleet.set_defaults(run=_fleet)
    probe.add_command(fleet, _probe)
    tables.add_commands(commands, _print, PREDICTOR_FILE)
    predictors.add_command(commands, DEFAULT_URL, _print)
    replay.add_command(commands, _print)
    goals.add_command(commands, DEFAULT_URL, _print)
    return parser


def _check(args: argparse.Namespace, world: World) -> None:
    typed, fleet = _load(Path(args.config))
    machine = world.machine()
    predictor = _shipped_predictor(fleet)
    check_resources(fleet, machine, typed.router.total_cpus)
    print(render.fleet_file(fleet))
    need = minimum_resources(fleet, typed.router.total_cpus)
    print(
        f"\nok: {len(fleet.slms)} SLMs, {len(fleet.rules)} rules, {len(fleet.safety)} safety "
        f"patterns, predictor {predictor.version if predictor else 'none'}; minimum replicas and "
        f"routers take {need.cpus:g} of {machine.cpus:g} CPUs and "
        f"{render.size(need.memory_bytes)} of {render.size(machine.memory_bytes)}"
    )


def _route(args: argparse.Namespace, world: World) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": args.prompt}]}
    if args.url:
        decision = world.fetch(f"{args.url.rstrip('/')}/v1/route", body)
    else:
        decision = _decide_locally(Path(args.config), body)
    if args.json:
        print(json.dumps(decision, indent=2))
    else:
        print(render.rendered(render.decision, decision))


def _fleet(args: argparse.Namespace, world: World) -> None:
    url = f"{args.url.rstrip('/')}/v1/fleet"
    while True:
        text = render.rendered(render.fleet_state, world.fetch(url, None))
        print(f"{_CLEAR}{text}" if args.watch else text, flush=True)
        if not args.watch:
            return
        world.sleep(WATCH_PERIOD_S)


def _probe(args: argparse.Namespace, world: World) -> None:
    print(probe.probe_text(args, world.transport))


def _print(args: argparse.Namespace, world: World) -> None:
    print(args.text(args, world.fetch))


def _load(path: Path) -> tuple[ServeArgs, Fleet]:
    args = find_application_args(read_yaml(path), path.name)
    return load_args(args, path.resolve().parent)


def _decide_locally(config: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    # Imported here, so that other commands do not wait for numpy and LightGBM.
    from calm_serve.requests import parse_chat, parse_overrides
    from calm_serve.routing import ModelSelector

    args, fleet = _load(config)
    selector = ModelSelector(fleet, args.goals, predictor=_shipped_predictor(fleet))
    request = parse_chat(body)
    decision = selector.decide(request, parse_overrides({}), "local")
    selector.complete(decision, request)
    return selector.explain(decision)


def _shipped_predictor(fleet: Fleet) -> Predictor | None:
    from calm_serve.prediction import LightGBMPredictor, MetadataPrior, load_artifact

    if not fleet.predictor:
        return None
    try:
        artifact = load_artifact(Path(fleet.predictor) / PREDICTOR_FILE)
        return LightGBMPredictor(artifact, MetadataPrior())
    except KnowledgeError as error:
        raise ConfigError(f"predictor: {error.message}") from error


def _error_message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code} {error.reason}"


def _cgroup(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")
    except OSError:
        return ""


def _fail(message: str, status: int) -> int:
    print(f"calm: {' '.join(message.split())}", file=sys.stderr)
    return status
