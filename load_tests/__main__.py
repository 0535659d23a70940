"""`python -m load_tests NAME [--json FILE]`: run one benchmark."""

from __future__ import annotations

import argparse
import importlib
import sys

from load_tests.common.termination import exit_on_sigterm

BENCHMARKS = {
    "decision": "what a routing decision costs, by path, size of the fleet and prompt length",
    "fleet": "what every model of the fleet answers, and what it costs, as served",
    "overhead": "latency that our path adds to the same vLLM engine asked directly",
    "paper": "the CALM paper's experiment: generalist alone, the paper's policy, blind, and ours",
    "prefix": "share of prompts found in the replicas' prefix caches, and how even the load is",
    "routing": "quality, latency and energy of routing against other policies",
    "scale": "the decision core on simulated time: cost, state, and old views of the load",
    "throughput": "saturated tokens/s and goodput against direct vLLM and other gateways",
}


def main() -> int:
    """Dispatch to the benchmark's own module. Returns the exit status."""
    names = "\n".join(f"  {name:<12}{text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m load_tests",
        description=__doc__,
        epilog=f"benchmarks (each has --help):\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    chosen = parser.parse_args(sys.argv[1:2])
    exit_on_sigterm()
    module = importlib.import_module(f"load_tests.{chosen.benchmark}.benchmark")
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
