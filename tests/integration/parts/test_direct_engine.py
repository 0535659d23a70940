"""The vLLM server that the benchmarks compare with has the engine that an SLM deployment has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPARE = """
import json
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from deployments.slm.engine.engine import engine_args
from load_tests.common.direct import arguments, bare_fleet, specs_of

found = {}
for spec in specs_of(bare_fleet(["sql", "general"])):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments(spec))
    theirs, ours = vars(AsyncEngineArgs.from_cli_args(parsed)), vars(engine_args(spec))
    found[spec.id] = {k: [theirs.get(k), v] for k, v in ours.items() if theirs.get(k) != v}
print(json.dumps(found))
"""
# The command line's own defaults, each of which means the same as the other side's, and the methods
# by which ours sleeps, which touch nothing while it is awake.
DEFAULTS = {
    "reasoning_parser_plugin",
    "mm_device_do_normalize",
    "enable_lora",
    "worker_extension_cls",
}


@pytest.mark.timeout(260)  # vLLM's imports take 20 s on two cores
def test_both_engines_have_the_same_arguments() -> None:
    # In a process of its own: importing vLLM changes the one that does it.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARE],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=240,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"sql", "general"}
    for slm, differences in found.items():
        assert set(differences) <= DEFAULTS, (slm, differences)
