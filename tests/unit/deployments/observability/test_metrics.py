"""The metrics table: what is observed reaches both outlets, with bounded labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from calm_serve.testing import change_outcome, make_outcome
from calm_serve.types import EngineFacts, FailedAttempt, PromptFeatures, Timing
from deployments.observability.catalogue import (
    BY_NAME,
    METRICS,
    Kind,
    Metric,
)
from deployments.observability.exporters import (
    Record,
    RouterMetrics,
    cache_class,
    render_fleet_metrics,
)
from deployments.observability.host import HostMonitor, HostUsage, ProcessTreeCpu
from tests.exported_series import series_of

OUTCOME = make_outcome(
    "d1",
    slm_id="code",
    path="rule",
    reason="rule_match",
    rule="sql",
    retries=1,
    predicted=None,
    features=PromptFeatures(),
    timing=Timing(ttft_s=0.03, e2e_s=0.4, tpot_s=0.004, decision_s=3e-4, cold=True),
    engine=EngineFacts("", 100, 48, 20, queue_s=0.002, energy_j=2.5, energy_source="rapl"),
)
HOST = HostUsage(cpu_ratio=0.5, memory_used_bytes=100, memory_total_bytes=400)
SNAPSHOT: dict[str, Any] = {
    "ready": True,
    "requests_in_work": 3,
    "predictor": {"version": "lgbm-7"},
    "goals": {
        "weights": {"latency_per_s": 0.1},
        "targets": [{"name": "ttft_p95_s", "target": 1.0, "measured": 0.5, "held": True}],
    },
    "residency": {"budget_bytes": 400, "hot_bytes": 300, "swaps": 7, "queued_requests": 2},
    "alarms": [{"kind": "quality", "slm": "code"}],
    "choices": {
        "calibration_error": 0.04,
        "unfamiliar_ratio": 0.07,
        "entropy_ratio": 0.8,
        "gain_best_single": 0.05,
        "gain_share_matched": 0.1,
    },
    "slms": [
        {
            "id": "code",
            "state": "hot",
            "replicas": 2,
            "target_replicas": 3,
            "running": 5,
            "waiting": 1,
            "capacity": 16,
            "kv_usage_ratio": 0.25,
            "cached_prefix_ratio": None,
            "memory_bytes": 1 << 30,
            "ready_s": {"import": 6.0, "engine": 9.0, "warmup": 1.0, "total": 16.0},
            "wake_s": 0.2,
            "calibration_factor": 0.4,
            "energy": {
                "source": "estimate",
                "idle_j": 12.5,
                "attribution_error_ratio": 0.01,
            },
        },
        {"id": "chat", "state": "cold", "replicas": 0, "ready_s": None},
    ],
}


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """Stands where Ray's metrics do, with their rules: declared labels only, no zero counts."""

    def __init__(self) -> None:
        self.records: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, metric: Metric) -> Record:
        def record(value: float, labels: dict[str, str]) -> None:
            assert tuple(labels) == metric.labels
            assert metric.kind is not Kind.COUNTER or value > 0
            self.records.append((metric.name, value, labels))

        return record

    def of(self, name: str) -> list[tuple[float, dict[str, str]]]:
        return [(value, labels) for n, value, labels in self.records if n == name]


def router_metrics(clock: Clock | None = None) -> tuple[RouterMetrics, Recorder]:
    recorder = Recorder()
    return RouterMetrics(clock or Clock(), ["code", "chat"], recorder), recorder


def samples(exported: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    def each() -> Iterator[tuple[tuple[str, frozenset[tuple[str, str]]], float]]:
        for family in text_string_to_metric_families(exported.decode()):
            for sample in family.samples:
                yield (sample.name, frozenset(sample.labels.items())), sample.value

    return dict(each())


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


SPLIT = {"slm": "code", "path": "rule", "cache": "partial", "warmth": "cold"}


def test_every_metric_is_described_prefixed_and_unique() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("calm_")
        assert not metric.name.endswith("_total")
        assert metric.description.endswith(".")


def test_histograms_have_rising_positive_buckets_and_others_have_none() -> None:
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(bound > 0 for bound in metric.buckets)


def test_one_outcome_reaches_ray_and_the_exporter_alike() -> None:
    metrics, recorder = router_metrics()
    metrics.observe(OUTCOME)
    (counted,) = recorder.of("calm_requests")
    labels = SPLIT | {"reason": "rule_match", "status": "ok"}
    assert counted == (1.0, labels)
    shown = samples(render_fleet_metrics(metrics.aggregates, {}))
    assert shown[key("calm_requests_total", **labels)] == 1.0
    assert shown[key("calm_output_tokens_total", **SPLIT)] == 20.0
    assert shown[key("calm_energy_joules_total", **SPLIT, source="rapl")] == 2.5
    assert shown[key("calm_ttft_seconds_sum", **SPLIT)] == pytest.approx(0.03)
    assert shown[key("calm_queue_seconds_count", **SPLIT)] == 1.0
    assert shown[key("calm_retries_total", slm="code")] == 1.0


def test_the_exporter_accumulates_counters_and_buckets() -> None:
    metrics, _ = router_metrics()
    for ttft_s in (0.005, 0.006, 0.5, 999.0):
        metrics.observe(change_outcome(OUTCOME, ttft_s=ttft_s))
    shown = samples(render_fleet_metrics(metrics.aggregates, {}))
    below = {le: shown[key("calm_ttft_seconds_bucket", **SPLIT, le=le)] for le in BUCKETS}
    assert below == {"0.005": 1, "0.01": 2, "0.35": 2, "0.5": 3, "60.0": 3, "+Inf": 4}
    assert shown[key("calm_prompt_tokens_total", **SPLIT)] == 400.0


BUCKETS = ("0.005", "0.01", "0.35", "0.5", "60.0", "+Inf")


def test_unknown_times_and_zero_counts_are_not_recorded() -> None:
    metrics, recorder = router_metrics()
    metrics.observe(
        change_outcome(
            OUTCOME,
            status="error",
            ttft_s=None,
            tpot_s=None,
            queue_s=None,
            energy_j=None,
            retries=0,
            output_tokens=0,
        )
    )
    assert {name for name, _, _ in recorder.records} == {
        "calm_requests",
        "calm_decision_seconds",
        "calm_prompt_tokens",
        "calm_cached_tokens",
    }


def test_labels_a_client_could_invent_become_other() -> None:
    metrics, recorder = router_metrics()
    for n in range(500):
        metrics.observe(
            change_outcome(
                OUTCOME,
                slm_id=f"slm-{n}",
                path=f"path-{n}",
                reason=f"reason-{n}",
                status=f"status-{n}",
                energy_source=f"source-{n}",
            )
        )
    assert len(metrics.aggregates.values["calm_requests"]) == 1
    labels = recorder.of("calm_requests")[0][1]
    assert {labels[name] for name in ("slm", "path", "reason", "status")} == {"other"}


def test_an_slm_that_joined_later_has_series_of_its_own() -> None:
    metrics, recorder = router_metrics()
    joined = {**SNAPSHOT, "slms": [*SNAPSHOT["slms"], {"id": "joined", "state": "hot"}]}
    metrics.refresh(joined, HOST)
    metrics.observe(change_outcome(OUTCOME, slm_id="joined"))
    assert recorder.of("calm_requests")[0][1]["slm"] == "joined"
    metrics.refresh(joined, HOST)
    rates = {r["slm"]: v for v, r in recorder.of("calm_requests_per_second")}
    assert rates["joined"] > 0.0
    metrics.refresh(SNAPSHOT, HOST)
    metrics.observe(change_outcome(OUTCOME, slm_id="joined"))
    assert recorder.of("calm_requests")[-1][1]["slm"] == "other"


@pytest.mark.parametrize(
    ("prompt", "cached", "expected"),
    [(100, 0, "none"), (100, 16, "partial"), (100, 96, "full"), (0, 0, "none")],
)
def test_cache_class_is_the_cached_share_of_the_prompt(
    prompt: int, cached: int, expected: str
) -> None:
    assert (
        cache_class(change_outcome(OUTCOME, prompt_tokens=prompt, cached_tokens=cached)) == expected
    )


def test_refresh_sets_the_fleet_gauges_in_ray() -> None:
    metrics, recorder = router_metrics()
    metrics.refresh(SNAPSHOT, HOST)
    assert (2.0, {"slm": "code"}) in recorder.of("calm_slm_replicas")
    assert (1.0, {"slm": "code"}) in recorder.of("calm_slm_waiting_requests")
    assert (0.5, {}) in recorder.of("calm_host_cpu_ratio")
    states = {(r["slm"], r["state"]): v for v, r in recorder.of("calm_slm_state")}
    assert (states["code", "hot"], states["code", "cold"], states["chat", "cold"]) == (1, 0, 1)


def test_request_rate_is_recent_and_falls_when_requests_stop() -> None:
    clock = Clock()
    metrics, recorder = router_metrics(clock)
    for _ in range(600):
        clock.now += 0.1
        metrics.observe(OUTCOME)
    metrics.refresh(SNAPSHOT, HOST)
    clock.now += 300.0
    metrics.refresh(SNAPSHOT, HOST)
    rates = [v for v, labels in recorder.of("calm_requests_per_second") if labels["slm"] == "code"]
    assert rates[0] == pytest.approx(10.0, rel=0.02)
    assert rates[1] < 0.1


def test_the_exporter_shows_the_fleet_snapshot_it_is_given() -> None:
    metrics, _ = router_metrics()
    metrics.refresh({"ready": False, "slms": []}, HOST)
    shown = samples(render_fleet_metrics(metrics.aggregates, SNAPSHOT))
    assert shown[key("calm_fleet_ready")] == 1.0
    assert shown[key("calm_slm_memory_bytes", slm="code")] == float(1 << 30)
    assert shown[key("calm_slm_start_seconds", slm="code", phase="engine")] == 9.0
    assert shown[key("calm_predictor_info", version="lgbm-7")] == 1.0
    assert shown[key("calm_host_memory_used_bytes")] == 100.0
    assert key("calm_slm_cached_prefix_ratio", slm="code") not in shown


def test_the_exporter_shows_alarms_that_are_on_and_zero_for_those_that_are_off() -> None:
    metrics, _ = router_metrics()
    shown = samples(render_fleet_metrics(metrics.aggregates, SNAPSHOT))
    assert shown[key("calm_alarm", kind="quality", slm="code")] == 1.0
    assert shown[key("calm_alarm", kind="speed", slm="code")] == 0.0
    assert shown[key("calm_alarm", kind="prompt_mix", slm="")] == 0.0
    assert shown[key("calm_energy_idle_joules", slm="code", source="estimate")] == 12.5
    assert shown[key("calm_choice_gain", against="share_matched")] == 0.1


def test_the_exporter_writes_the_series_names_the_table_promises() -> None:
    metrics, _ = router_metrics()
    metrics.observe(OUTCOME)
    attempt = FailedAttempt("chat", "transport", 0.1, 0.25)
    failed = {
        "failure": "transport",
        "failed_attempts": (attempt,),
        "cost": 0.25,
        "currency": "EUR",
    }
    metrics.observe(change_outcome(OUTCOME, **failed))
    for hot in (True, False):
        metrics.observe(change_outcome(OUTCOME, preferred="chat", preferred_hot=hot))
    metrics.refresh(SNAPSHOT, HOST)
    full = SNAPSHOT | {"slms": [SNAPSHOT["slms"][0] | {"cached_prefix_ratio": 0.1}]}
    names = {name for name, _ in samples(render_fleet_metrics(metrics.aggregates, full))}
    promised = {series for metric in METRICS for series in series_of(metric)}
    assert names == promised | {"calm_predictor_info"}


def test_residency_hits_are_counted_for_the_preferred_slm() -> None:
    metrics, _ = router_metrics()
    for preferred, hot in (("chat", True), ("chat", False), ("chat", True), ("nobody", True)):
        metrics.observe(change_outcome(OUTCOME, preferred=preferred, preferred_hot=hot))
    shown = samples(render_fleet_metrics(metrics.aggregates, SNAPSHOT))
    assert shown[key("calm_residency_hits_total", slm="chat")] == 2.0
    assert shown[key("calm_residency_misses_total", slm="chat")] == 1.0
    assert shown[key("calm_residency_hits_total", slm="other")] == 1.0
    assert shown[key("calm_residency_hot_bytes")] == 300.0


def test_host_monitor_reads_plausible_ratios() -> None:
    clock = Clock()
    monitor = HostMonitor(clock)
    clock.now += 1e-3
    usage = monitor.read()
    assert 0.0 <= usage.cpu_ratio <= 1.0
    assert 0 < usage.memory_used_bytes < usage.memory_total_bytes


def test_process_cpu_time_grows_with_work() -> None:
    cpu_s = ProcessTreeCpu(Clock())
    before = cpu_s()
    while cpu_s() == before:  # the kernel counts in ticks of 10 ms
        sum(range(10_000))
    assert cpu_s() > before


def test_failures_are_counted_by_slm_and_kind_and_money_goes_to_who_charged_it() -> None:
    metrics, recorder = router_metrics()
    attempts = (FailedAttempt("chat", "full"), FailedAttempt("gone", "bad_answer", 0.1, 0.25))
    metrics.observe(change_outcome(OUTCOME, failed_attempts=attempts, cost=0.75, currency="EUR"))
    assert recorder.of("calm_failed_attempts") == [
        (1.0, {"slm": "chat", "kind": "full"}),
        (1.0, {"slm": "other", "kind": "bad_answer"}),
    ]
    assert recorder.of("calm_cost") == [
        (0.25, {"slm": "other", "currency": "EUR"}),
        (0.5, {"slm": "code", "currency": "EUR"}),
    ]
    assert recorder.of("calm_refused_requests") == []  # it was answered


@pytest.mark.parametrize(
    ("slm_id", "failure", "labels"),
    [
        ("code", "timed_out", {"slm": "code", "kind": "timed_out"}),
        ("", "no_slm", {"slm": "none", "kind": "no_slm"}),
        ("code", "cancelled", None),
        ("code", "", None),
    ],
)
def test_requests_that_got_an_error_are_counted_by_its_kind(
    slm_id: str, failure: str, labels: dict[str, str] | None
) -> None:
    metrics, recorder = router_metrics()
    metrics.observe(change_outcome(OUTCOME, slm_id=slm_id, failure=failure))
    assert [found for _, found in recorder.of("calm_refused_requests")] == (
        [] if labels is None else [labels]
    )


def test_requests_refused_before_a_decision_are_counted_without_an_slm() -> None:
    metrics, recorder = router_metrics()
    metrics.refused("router_full")
    metrics.refused("whatever a client writes")
    assert recorder.of("calm_refused_requests") == [
        (1.0, {"slm": "none", "kind": "router_full"}),
        (1.0, {"slm": "none", "kind": "other"}),
    ]
