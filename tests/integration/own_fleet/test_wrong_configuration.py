"""A wrong configuration is one clear line and exit status 2 before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.served_fleet import ROOT, free_port

WEIGHTS = ROOT / "deployments" / "reference_fleet" / "models" / "extract"


def serve(folder: Path, fleet: Any, **args: Any) -> subprocess.CompletedProcess[str]:
    config = {
        "http_options": {"port": free_port()},
        "applications": [
            {
                "name": "calm",
                "import_path": "deployments.app:build_app",
                "args": {"fleet": fleet, "learning": {"state_dir": str(folder / "state")}} | args,
            }
        ],
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run(folder, path)


def run(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "deployments.serve", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )


def entry(slm_id: str = "one", **more: Any) -> dict[str, Any]:
    return {"id": slm_id, "model": str(WEIGHTS), **more}


@pytest.mark.parametrize(
    ("slms", "words"),
    [
        pytest.param([entry(contxt_tokens=1024)], ("contxt_tokens", "context_tokens"), id="key"),
        pytest.param([entry(engine={"max_sequences": 4})], ("max_sequences",), id="engine key"),
        pytest.param([entry(model="./nowhere")], ("one", "not found", "./nowhere"), id="weights"),
        pytest.param([entry(), entry()], ("duplicate", "one"), id="same id twice"),
        pytest.param([entry(resources={"memory_bytes": "900TiB"})], ("one", "memory"), id="memory"),
        pytest.param([entry(resources={"num_cpus": 500})], ("one", "500 CPUs"), id="CPUs"),
        pytest.param([entry(resources={"num_gpus": 64})], ("one", "64 GPUs"), id="GPUs"),
        pytest.param(
            [entry(adapters=[{"name": "gone", "path": "./gone"}])], ("gone",), id="adapter"
        ),
        pytest.param([], ("slms",), id="no SLM"),
    ],
)
def test_a_wrong_fleet_is_refused_in_one_line_before_ray_starts(
    tmp_path: Path, slms: list[dict[str, Any]], words: tuple[str, ...]
) -> None:
    refused = serve(tmp_path, {"slms": slms})
    assert_refused(tmp_path, refused, words)


def test_a_wrong_option_of_the_router_is_refused(tmp_path: Path) -> None:
    refused = serve(tmp_path, {"slms": [entry()]}, router={"replica": 2})
    assert_refused(tmp_path, refused, ("replica", "replicas"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, run(tmp_path, tmp_path / "serve.yaml"), ("not found", "serve.yaml"))
    assert_refused(tmp_path, serve(tmp_path, "nowhere.yaml"), ("not found", "nowhere.yaml"))


def assert_refused(
    folder: Path, refused: subprocess.CompletedProcess[str], words: tuple[str, ...]
) -> None:
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    line, *rest = refused.stderr.splitlines()
    assert not rest
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not (folder / "ray").exists()  # Ray makes its session folder first
    assert not (folder / "state").exists()
