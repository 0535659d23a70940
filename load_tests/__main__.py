"""`python -m load_tests NAME [--json FILE]`: run one benchmark."""

from __future__ import annotations

import argparse
import importlib
import sys

from load_tests.common.termination import exit_on_sigterm

BENCHMARKS = {
    "decision": "CPU time of a routing decision, by path, size of the fleet and prompt length",
    "fleet": "quality and cost of every model of the reference fleet, as served",
    "overhead": "latency that the router adds to the same vLLM engine called directly",
    "paper": "the CALM paper's experiment: generalist alone, paper's policy, content-blind, ours",
    "prefix": "cached share of prompts and load balance over the replicas of one SLM",
    "routing": "quality, latency and energy of routing against other policies",
    "scale": "the decision core on simulated time: cost, state, and stale views of the load",
    "throughput": "saturated tokens/s and goodput against direct vLLM and other gateways",
}


def main() -> int:
    """Run the module of the chosen benchmark. Returns the exit status."""
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
