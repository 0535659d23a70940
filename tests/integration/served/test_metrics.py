"""What was served can be read in Prometheus' format: from a router, and from Ray's own exporter."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.integration.served_fleet import TWO_REPLICAS, ServedFleet, eventually

EXPORT_S = 60.0  # replicas report to Ray's agent every 10 seconds


def scrape(url: str) -> Iterator[Sample]:
    text = httpx.get(url, timeout=60.0).raise_for_status().text
    for family in text_string_to_metric_families(text):
        yield from family.samples


def total(samples: Iterator[Sample], name: str, **labels: str) -> float:
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_a_routers_metrics_count_its_requests_by_slm_path_and_reason(fleet: ServedFleet) -> None:
    router, *_ = fleet.router_urls()
    labels = {"slm": "intent", "path": "pinned", "reason": "requested", "status": "ok"}
    before = total(scrape(f"{router}/metrics"), "calm_requests_total", **labels)
    body = {"model": "intent", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    for _ in range(3):
        httpx.post(f"{router}/v1/chat/completions", json=body, timeout=60.0).raise_for_status()
    after = list(scrape(f"{router}/metrics"))
    assert total(iter(after), "calm_requests_total", **labels) == before + 3
    assert total(iter(after), "calm_e2e_seconds_count", slm="intent") >= 3
    assert total(iter(after), "calm_slm_replicas", slm=TWO_REPLICAS) == 2
    assert total(iter(after), "calm_slm_state", slm="intent", state="hot") == 1
    assert total(iter(after), "calm_fleet_ready") == 1
    version = fleet.get("/v1/fleet")["predictor"]["version"]
    assert total(iter(after), "calm_predictor_info", version=version) == 1


def test_rays_exporter_has_the_same_series_with_serves_labels(fleet: ServedFleet) -> None:
    assert fleet.chat("hi", "intent", max_tokens=2).status_code == 200
    exporters = [f"http://{t}/metrics" for t in prometheus_targets(fleet)]

    def requests() -> float:
        labels = {"slm": "intent", "deployment": "router", "application": "calm", "status": "ok"}
        return sum(total(scrape(u), "ray_calm_requests_total", **labels) for u in exporters)

    eventually("ray_calm_requests_total is exported", requests, EXPORT_S)
    samples = [s for url in exporters for s in scrape(url)]
    slms = {s.labels["slm"] for s in samples if s.name == "ray_calm_slm_memory_bytes"}
    assert slms >= {"extract", "sql", "shell", "reason", "intent", "general"}
    assert total(iter(samples), "ray_calm_decision_seconds_count", slm="intent") > 0


def test_the_engines_own_metrics_are_exported_too(fleet: ServedFleet) -> None:
    assert fleet.chat("hi", "intent", max_tokens=2).status_code == 200
    exporters = [f"http://{t}/metrics" for t in prometheus_targets(fleet)]

    def generated() -> float:
        names = ("ray_vllm_generation_tokens_total", "ray_vllm_request_success_total")
        return sum(total(scrape(url), name) for url in exporters for name in names)

    eventually("vLLM's counters are exported", generated, EXPORT_S)


def prometheus_targets(fleet: ServedFleet) -> list[str]:
    """Ray's Prometheus service discovery, as its configuration for Prometheus reads it."""
    file = next(fleet.folder.rglob("prom_metrics_service_discovery.json"))
    return [t for group in json.loads(file.read_text("utf-8")) for t in group["targets"]]
