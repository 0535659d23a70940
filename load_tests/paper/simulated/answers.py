"""Data of the `paper` simulation: measured answers, and models of the speed of their engines.

Every request of the standard workload was answered by every SLM of the reference fleet
(`recorded/README.md`); a simulated answer has the grade and the tokens of the real one. Two fleets
give the same answers at different speeds:

- `reference`: times and energy fitted to those same runs (`fit`), each SLM on a device of its own,
  whereas the served engines share two cores;
- `published`: published speeds of models of 1.5 and 7 billion parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calm_serve.config import Fleet, SLMSpec, load_fleet
from calm_serve.prediction import LightGBMPredictor, MetadataPrior, load_artifact
from calm_serve.requests import ContextBuilder, Overrides, fill_features, parse_chat
from calm_serve.types import RoutingContext
from deployments.reference_fleet.paths import SCORES
from load_tests.common.served import FLEETS
from load_tests.common.workloads import Request, standard

ANSWERS = Path(__file__).parent / "recorded" / "reference.npz"
MAX_TOKENS = 320  # of every request, as in the served part
CONCURRENCY = 8  # requests in flight while the answers were measured

# From the decision to wake until the SLM answers, for the reference fleet. Measured inside an
# engine on 2 cores: 4 to 13 ms to wake, 27 to 95 ms for the evicted SLM to sleep. The remainder,
# assumed, is the way of the desired state through the knowledge actor. Only the first two use the
# CPU.
WAKE_S, WAKE_BUSY_S = 0.1, 0.05
WATTS = 6.0  # of one busy core, as the service estimates where it has no counter

Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Speed:
    """One SLM's device. The time of a step grows linearly with the number of requests in it.

    The energy of a request is its share of the device's power during steps, plus a part outside of
    the engine that does not depend on the batch.
    """

    first_s: float  # to the first token, alone
    tpot_s: float  # per token after the first, alone
    slowdown: float  # share added to `tpot_s` by every further request in the batch
    watts: float  # while a step runs
    request_j: float  # per request, outside of steps
    wake_s: float
    wake_j: float

    def pace(self, at_once: int) -> float:
        """Time of a token in a batch of `at_once` requests (1 or more), over that alone."""
        return 1.0 + self.slowdown * (at_once - 1)

    def joules(self, tokens: float, at_once: int) -> float:
        """Energy of an answer in a batch of `at_once` requests."""
        return self.request_j + tokens * self.step_j(at_once)

    def step_j(self, at_once: int) -> float:
        """Energy of one token in a batch of `at_once` requests."""
        return self.watts * self.tpot_s * self.pace(at_once) / at_once


@dataclass(frozen=True)
class Answers:
    """The workload with every SLM's answers; tables have the shape [requests, SLMs]."""

    requests: list[Request]
    contexts: list[RoutingContext]  # with features
    slms: tuple[str, ...]
    tables: dict[str, Table]
    fleet: Fleet
    speeds: dict[str, Speed]

    def __len__(self) -> int:
        return len(self.contexts)

    def column(self, slm_id: str) -> int:
        """The SLM's column in the tables."""
        return self.slms.index(slm_id)

    @property
    def largest(self) -> str:
        """The SLM with most parameters, the generalist."""
        return max(self.fleet.slms, key=lambda s: s.parameters).id

    def alone(self) -> tuple[float, float]:
        """Seconds and joules of a mean request to the largest SLM, in a batch of 1."""
        speed = self.speeds[self.largest]
        tokens = float(self.tables["output_tokens"][:, self.column(self.largest)].mean())
        return speed.first_s + tokens * speed.tpot_s, speed.joules(tokens, 1)

    def tasks(self) -> list[str]:
        """The task of each request; "general" where no specialist has it."""
        return [r.row.task if r.row.task in self.slms else "general" for r in self.requests]


def reference(path: Path = ANSWERS) -> Answers:
    """The reference fleet with its measured answers and speeds."""
    with np.load(path) as file:
        slms = tuple(str(s) for s in file["slms"])
        tables = {k: file[k].astype(np.float64) for k in file.files if k != "slms"}
    fleet = load_fleet(FLEETS / "reference.yaml")
    fleet = fleet.model_copy(update={"slms": tuple(s for s in fleet.slms if s.id in slms)})
    requests = standard()
    if tables["exact"].shape != (len(requests), len(slms)):
        raise ValueError(f"{path.name} does not hold the standard workload's answers")
    builder, contexts = ContextBuilder(fleet), []
    for one in requests:
        request = parse_chat({"messages": one.messages, "max_tokens": MAX_TOKENS})
        contexts.append(builder.build(request, Overrides(), ""))
        fill_features(contexts[-1], request)
    speeds = {s.id: fit(tables, slms.index(s.id), *_measured(s)) for s in fleet.slms}
    return Answers(requests, contexts, slms, tables, fleet, speeds)


def fit(tables: dict[str, Table], column: int, alone_s: float, slowdown: float) -> Speed:
    """The speed of one SLM, from its answers and the measured time and slowdown of its tokens.

    `alone_s` is the time of a token in a batch of 1. Time to first token and energy are fitted to
    the answers, which were measured with CONCURRENCY requests in flight. The lesser of the two
    measured slowdowns is used, because other work on the machine can only increase one.
    """
    tokens, latency = tables["output_tokens"][:, column], tables["latency_s"][:, column]
    # Medians of ten groups by length, so that outliers do not count.
    order = np.array_split(np.argsort(tokens, kind="stable"), 10)
    x = np.array([np.mean(tokens[part]) for part in order])
    y = np.array([np.median(latency[part]) for part in order])
    per_token_s, first_s = (float(v) for v in np.polyfit(x, y, 1))
    slowdown = min(slowdown, max(per_token_s / alone_s - 1.0, 0.0) / (CONCURRENCY - 1))
    pace = 1.0 + slowdown * (CONCURRENCY - 1)
    steps_j = float(tokens.mean()) * WATTS * alone_s * pace / CONCURRENCY
    return Speed(
        first_s=max(first_s / pace, alone_s),
        tpot_s=alone_s,
        slowdown=slowdown,
        watts=WATTS,
        request_j=max(float(tables["energy_j"][:, column].mean()) - steps_j, 0.0),
        wake_s=WAKE_S,
        wake_j=WATTS * WAKE_BUSY_S,
    )


def _measured(spec: SLMSpec) -> tuple[float, float]:
    """Seconds per token in a batch of 1, and the share that each further request adds.

    From scores.json: `python -m load_tests fleet` measures with 1 and with 16 requests in flight,
    of which at most as many run as the SLM has slots.
    """
    figures = json.loads(SCORES.read_text(encoding="utf-8"))["figures"]
    alone, busy = (figures[f"{spec.id}.cost.{key}"] for key in ("tpot_ms", "tpot_16_ms"))
    return alone / 1000.0, (busy / alone - 1.0) / (min(16, spec.limits.max_num_seqs) - 1)


# Tokens per second of one request alone, bf16, vLLM 0.4.2, NVIDIA A100 80 GB, 1 token in and 2,048
# out: Qwen2's documentation, "Speed Benchmark", tables "1.5B (vLLM)" and "7B (vLLM)"
# (QwenLM/Qwen2.5 at 4da996c576418cc9ecdff35aeddfcdca814e9568, docs/source/benchmark/
# speed_benchmark.rst).
QWEN2_TOKENS_PER_S = {"1.5B": 175.55, "7B": 80.45}
# Parameters, from the model cards (Qwen/Qwen2-1.5B-Instruct, Qwen/Qwen2-7B-Instruct).
QWEN2_PARAMETERS = {"1.5B": 1_540_000_000, "7B": 7_620_000_000}
# NVIDIA A100 80GB PCIe, product brief PB-10577-001: board power, and bandwidth of its link.
A100_WATTS = 300.0
PCIE_4_BYTES_PER_S = 32e9
A100_FLOPS = 312e12  # dense bf16, same source
# Assumed, not published: half of the peak FLOPS in the prefill, a quarter of the link's bandwidth
# while waking, the whole board power during steps, and the slowdown of prediction/latency.py.
PREFILL_RATIO, LINK_RATIO, SLOWDOWN = 0.5, 0.25, 0.5 / 15


def published(base: Answers) -> Answers:
    """The same answers at published speeds: specialists as Qwen2 1.5B, the generalist as 7B."""
    specs, speeds = [], {}
    prompt = float(base.tables["prompt_tokens"].mean())
    for spec in base.fleet.slms:
        size = "7B" if spec.id == "general" else "1.5B"
        parameters, tpot_s = QWEN2_PARAMETERS[size], 1.0 / QWEN2_TOKENS_PER_S[size]
        wake_s = 2.0 * parameters / (PCIE_4_BYTES_PER_S * LINK_RATIO)
        speeds[spec.id] = Speed(
            first_s=tpot_s + prompt * 2.0 * parameters / (A100_FLOPS * PREFILL_RATIO),
            tpot_s=tpot_s,
            slowdown=SLOWDOWN,
            watts=A100_WATTS,
            request_j=0.0,
            wake_s=wake_s,
            wake_j=A100_WATTS * wake_s,
        )
        specs.append(_sized(spec, parameters, speeds[spec.id]))
    fleet = base.fleet.model_copy(update={"slms": tuple(specs)})
    return Answers(base.requests, base.contexts, base.slms, base.tables, fleet, speeds)


def _sized(spec: SLMSpec, parameters: int, speed: Speed) -> SLMSpec:
    """The SLM's entry as an operator would write it for such a model."""
    resources = spec.resources.model_copy(
        update={"weights_bytes": 2 * parameters, "kv_cache_bytes": 4 << 30}
    )
    priors = spec.priors.model_copy(
        update={
            "ttft_s": speed.first_s,
            "tpot_s": speed.tpot_s,
            "energy_j_per_token": speed.step_j(CONCURRENCY),
            "wake_s": speed.wake_s,
        }
    )
    return spec.model_copy(
        update={"parameters": parameters, "resources": resources, "priors": priors}
    )


def shipped(fleet: Fleet) -> LightGBMPredictor:
    """The predictor that the fleet file names."""
    path = Path(fleet.predictor) / "predictor.bin"
    return LightGBMPredictor(load_artifact(path), MetadataPrior())
