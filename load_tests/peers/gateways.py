"""Other gateways in front of the same vLLM servers, in environments of their own.

`python -m load_tests.peers install` makes the environments below `.peers/` (git-ignored). A peer
that cannot run here is reported with its error; the others are still measured.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from calm_serve.config import SLMSpec
from calm_serve.errors import CalmError
from deployments.launch import PortClaim
from deployments.serve import serve_environment
from load_tests.common.direct import Server, started
from load_tests.common.load import closed_loop
from load_tests.common.served import ROOT, free_port
from load_tests.common.short_prompts import ShortPrompts
from load_tests.peers import ray_serve

FOLDER = ROOT / ".peers"
VERSIONS = {
    "litellm": "litellm[proxy]==1.106.2",
    "smg": "smg==1.13.0",
    "vllm_router": "vllm-router==0.1.17",
    "ray_serve_llm": "pyarrow==26.0.1",  # what Ray Serve LLM needs beyond our own environment
}
# Peers of a group run at the same time. A second Ray cluster with its engines is a group alone,
# because nothing more fits on the machine.
GROUPS = (("litellm", "smg", "vllm_router"), ("ray_serve_llm",), ("ray_serve_llm_prefix",))
FIRST_ANSWER_S = 120.0
RAY_READY_S = 240.0


@dataclass(frozen=True, slots=True)
class Side:
    """One gateway: SLM id to the URL and the model name to use there."""

    name: str
    targets: Mapping[str, tuple[str, str]]
    key: str = ""


Start = Callable[[ExitStack, Sequence[SLMSpec], Mapping[str, str]], Side]


def install() -> None:
    """Make the environments. Raises CalledProcessError if a package cannot be installed."""
    for name, package in VERSIONS.items():
        folder = FOLDER / name
        if name == "ray_serve_llm":
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade"]
            subprocess.run([*pip, "--target", str(folder), package], check=True)
            continue
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", package], check=True)


def start(
    stack: ExitStack, names: Sequence[str], specs: Sequence[SLMSpec], direct: Mapping[str, str]
) -> tuple[list[Side], dict[str, str]]:
    """Start these peers until `stack` ends. Returns those that answer, and the others' errors."""
    found, failed = [], {}
    for name in names:
        print(f"starting {name}", flush=True)
        with ExitStack() as own:
            try:
                side = _STARTS[name](own, specs, direct)
                _first_answers(side)
            except (RuntimeError, OSError, CalmError) as error:
                failed[name] = str(error)
                continue
            found.append(side)
            stack.push(own.pop_all())
    return found, failed


def litellm_config(specs: Sequence[SLMSpec], direct: Mapping[str, str], key: str) -> str:
    """LiteLLM's configuration: each SLM, and a complexity router of which every tier is that SLM.

    The decision is thus made and its cost measured, while the SLM is the same as on all sides.
    """
    models = []
    for slm in (spec.id for spec in specs):
        upstream = {"model": f"hosted_vllm/{slm}", "api_base": f"{direct[slm]}/v1", "api_key": "-"}
        router = {
            "model": "auto_router/complexity_router",
            "complexity_router_default_model": slm,
            "complexity_router_config": {
                "tiers": dict.fromkeys(("SIMPLE", "MEDIUM", "COMPLEX", "REASONING"), slm),
                # By default the router replaces the client's limit with the model's whole context.
                "max_tokens_from_tier_model": False,
            },
        }
        models.append({"model_name": slm, "litellm_params": upstream})
        models.append({"model_name": f"auto-{slm}", "litellm_params": router})
    return yaml.safe_dump({"model_list": models, "general_settings": {"master_key": key}})


def _first_answers(side: Side) -> None:
    """Wait until every SLM has answered once. Raises RuntimeError with the last error."""
    prompts, deadline = ShortPrompts(output_tokens=4), time.monotonic() + FIRST_ANSWER_S
    for slm, (url, model) in side.targets.items():
        while True:
            request = prompts.request(url, model, slm=slm, key=side.key)
            (answer,) = asyncio.run(closed_loop([request], 1)).answers
            if not answer.error:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{slm} does not answer: {answer.error}")
            time.sleep(1.0)


def _litellm(own: ExitStack, specs: Sequence[SLMSpec], direct: Mapping[str, str]) -> Side:
    folder = Path(own.enter_context(tempfile.TemporaryDirectory()))
    key = "sk-" + secrets.token_hex(24)  # LiteLLM does not start with a weak key
    (folder / "config.yaml").write_text(litellm_config(specs, direct, key), encoding="utf-8")
    port = free_port()
    command = [str(FOLDER / "litellm" / "bin" / "litellm"), "--config", str(folder / "config.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    server = _server(own, "litellm", command, port, environment)
    server.wait("/health/liveliness")
    return Side("litellm", {s.id: (server.url, f"auto-{s.id}") for s in specs}, key)


def _smg(own: ExitStack, specs: Sequence[SLMSpec], direct: Mapping[str, str]) -> Side:
    # One router in front of the workers of all SLMs.
    command = [str(FOLDER / "smg" / "bin" / "smg"), "launch"]
    server = _rust(own, "smg", command, [direct[s.id] for s in specs])
    return Side("smg", {s.id: (server.url, s.id) for s in specs})


def _vllm_router(own: ExitStack, specs: Sequence[SLMSpec], direct: Mapping[str, str]) -> Side:
    # vllm-router takes its workers for replicas of one model, so each SLM has a router of its own.
    command = [str(FOLDER / "vllm_router" / "bin" / "vllm-router")]
    urls = {s.id: _rust(own, "vllm_router", command, [direct[s.id]]).url for s in specs}
    return Side("vllm_router", {slm: (url, slm) for slm, url in urls.items()})


def _rust(own: ExitStack, name: str, command: list[str], workers: Sequence[str]) -> Server:
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    options += ["--log-level", "error", "--prometheus-port", str(free_port())]
    options += ["--worker-urls", *workers]
    server = _server(own, name, [*command, *options], port, {})
    server.wait()
    return server


def _ray(own: ExitStack, specs: Sequence[SLMSpec], *, prefix_aware: bool) -> Side:
    name = "ray_serve_llm_prefix" if prefix_aware else "ray_serve_llm"
    folder = own.enter_context(
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    )
    ports = PortClaim()
    own.callback(ports.close)
    port = free_port()
    path = Path(folder) / "app.json"
    path.write_text(ray_serve.document(specs, port, prefix_aware=prefix_aware), encoding="utf-8")
    environment = {
        # The same transport as ours; with Serve's defaults the throughput is half as high.
        **serve_environment(ports.environment, fast=True),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(FOLDER / "ray_serve_llm"),
    }
    command = [sys.executable, "-m", "load_tests.peers.ray_serve", str(path)]
    server = _server(own, name, command, port, environment)
    server.wait("/v1/models", RAY_READY_S)
    return Side(name, {s.id: (server.url, s.id) for s in specs})


def _server(
    own: ExitStack, name: str, command: list[str], port: int, environment: Mapping[str, str]
) -> Server:
    url = f"http://127.0.0.1:{port}"
    return own.enter_context(started(name, command, url, environment))


_STARTS: dict[str, Start] = {
    "litellm": _litellm,
    "smg": _smg,
    "vllm_router": _vllm_router,
    "ray_serve_llm": lambda own, specs, _: _ray(own, specs, prefix_aware=False),
    "ray_serve_llm_prefix": lambda own, specs, _: _ray(own, specs, prefix_aware=True),
}


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.peers", description=__doc__)
    parser.add_argument("command", choices=["install"])
    parser.parse_args()
    install()
    return 0
