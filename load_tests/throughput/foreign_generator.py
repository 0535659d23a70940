"""Ours against the same engine directly, loaded by vLLM's own benchmark client.

    python -m load_tests.throughput.foreign_generator --json FILE

The load generator of the other benchmarks is this project's; this run shows that the figures do not
depend on it. Random prompts, 64 tokens each way, 1 and 16 at once, the sides in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from load_tests.common import report
from load_tests.common.direct import arguments, bare_fleet, direct, specs_of
from load_tests.common.load import median
from load_tests.common.served import served
from load_tests.common.termination import exit_on_sigterm

SLM = "sql"
TOKENS = 64  # of a prompt and of an answer
PROMPTS = {1: 24, 16: 160}  # by concurrency
REPEATS = 3
MEASURES = ("median_ttft_ms", "median_itl_ms", "p99_itl_ms", "output_throughput")
# vLLM's command line needs package metadata that its CPU wheel lacks; its module does not.
CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def run(url: str, tokenizer: str, at_once: int, seed: int) -> dict[str, float]:
    """One run of vLLM's client. Raises CalledProcessError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", CLIENT]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--base-url", url, "--model", SLM, "--tokenizer", tokenizer]
        command += ["--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
        command += ["--random-input-len", str(TOKENS), "--random-output-len", str(TOKENS)]
        command += ["--num-prompts", str(PROMPTS[at_once]), "--max-concurrency", str(at_once)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "found.json"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ, timeout=300)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text("utf-8"))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests to {url} failed")
    return {name: float(found[name]) for name in MEASURES}


def main() -> None:
    """Measure both sides, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    chosen = parser.parse_args()
    exit_on_sigterm()
    fleet = bare_fleet([SLM])
    (spec,) = specs_of(fleet)
    values: dict[str, list[float]] = defaultdict(list)
    with direct([spec]) as urls, served(fleet) as ours:
        sides = {"direct_vllm": urls[SLM], "calm_serve": ours}
        for url in sides.values():
            run(url, spec.model, 16, 0)  # warm-up
        for repeat in tqdm(range(chosen.repeats), desc="vLLM's client"):
            for at_once in PROMPTS:
                for side, url in sides.items():
                    for name, value in run(url, spec.model, at_once, 1 + repeat).items():
                        values[f"{side}.c{at_once}.{name}"].append(value)
    figures: dict[str, Any] = {name: round(median(v), 3) for name, v in values.items()}
    for at_once in PROMPTS:
        pair = [values[f"{side}.c{at_once}.output_throughput"] for side in sides]
        ratios = [b / a for a, b in zip(*pair, strict=True)]
        figures[f"c{at_once}.tokens_ratio_direct_vllm"] = round(median(ratios), 4)
    for name, value in figures.items():
        print(f"{name:<44}{value}")
    config = {"engine": arguments(spec), "tokens": TOKENS, "prompts": PROMPTS}
    report.write(chosen.json, "foreign_generator", config, figures)


if __name__ == "__main__":
    main()
