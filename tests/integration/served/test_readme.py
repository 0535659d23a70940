"""The README's examples run against the served fleet, and its routing table holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.integration.served_fleet import ROOT, ServedFleet

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `([^`]+)` \| (\w+) \| (rule|scored) \|$", README, re.MULTILINE)


def block(language: str, containing: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(b for b in found if containing in b)


def test_the_readmes_curl_command_names_the_slm_in_its_headers(fleet: ServedFleet) -> None:
    command = block("sh", "curl -i").replace("http://127.0.0.1:8000", fleet.url)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    head, _, body = done.stdout.replace("\r", "").partition("\n\n")
    assert re.search(r"^x-calm-model: \w+$", head, re.MULTILINE)
    assert json.loads(body)["choices"][0]["message"]["content"]


def test_the_readmes_python_example_prints_an_answer(fleet: ServedFleet) -> None:
    program = block("python", "OpenAI").replace("http://127.0.0.1:8000", fleet.url)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip()


def test_the_readmes_goals_are_taken_and_remembered(fleet: ServedFleet) -> None:
    command = block("sh", "-X PUT").replace("http://127.0.0.1:8000", fleet.url)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    changed, history = (json.loads(part) for part in done.stdout.replace("}{", "}\n{").split("\n"))
    assert {t["name"] for t in changed["targets"]} == {"e2e_p95_s", "min_quality"}
    assert history["history"][0]["by"] == "you"


@pytest.mark.parametrize(("prompt", "slm", "stage"), TABLE)
def test_the_readmes_routing_table_holds(
    fleet: ServedFleet, prompt: str, slm: str, stage: str
) -> None:
    decision = fleet.route(prompt)
    assert (decision["slm_id"], decision["path"]) == (slm, stage)


def test_the_readmes_routing_table_covers_every_stage() -> None:
    assert {stage for _, _, stage in TABLE} == {"rule", "scored"}
    assert len(TABLE) >= 5
