"""Figures of the benchmarks `overhead` and `throughput` from measured values."""

import json

import pytest
import yaml

from load_tests.common.direct import arguments, bare_fleet, specs_of
from load_tests.common.load import Run, post
from load_tests.common.sse import Answer
from load_tests.overhead import benchmark as overhead
from load_tests.overhead.benchmark import Measured, Point
from load_tests.peers import gateways, ray_serve
from load_tests.throughput import benchmark as throughput
from load_tests.throughput import runs


def answer(ttft_s: float = 0.01, gap_s: float = 0.002, slm: str = "sql") -> Answer:
    return Answer("", ttft_s, ttft_s + 63 * gap_s, (gap_s,) * 63, 64, 64, 60, slm)


def test_a_run_is_summed_up_in_milliseconds() -> None:
    found = overhead.summary([answer(0.01), answer(0.03)])
    assert found["ttft_p50_ms"] == pytest.approx(20.0)
    assert found["gap_p50_ms"] == found["gap_p99_ms"] == pytest.approx(2.0)


def test_only_answers_of_the_measured_slm_count_for_auto() -> None:
    run = Run([answer(), answer(slm="general"), Answer("timeout")], 1.0, 0.1)
    assert len(overhead.kept(Point("auto", 1, True), run)) == 1
    assert len(overhead.kept(Point("pinned", 1, True), run)) == 2
    assert run.errors == 1
    assert run.tokens_per_s == 128.0


def test_overhead_is_the_median_of_the_differences_within_a_repeat() -> None:
    measured = Measured()
    # The second repeat was slow for both sides: the medians alone would hide that.
    for added, base in ((3.0, 10.0), (2.0, 50.0), (4.0, 11.0)):
        for point in overhead.POINTS:
            more = 0.0 if point.side == "direct" else added
            measured.runs[point.name].append(overhead.summary([answer((base + more) / 1e3)]))
    found = overhead.figures_of(measured, "_no_fast_flags")
    assert found["ttft_overhead_p50_ms_no_fast_flags"] == pytest.approx(3.0)
    assert found["auto_ttft_overhead_p50_ms_no_fast_flags"] == pytest.approx(3.0)
    assert found["pinned.c16.streamed.ttft_overhead_p50_ms_range_no_fast_flags"] == [2.0, 4.0]
    assert found["gap_overhead_p99_ms_no_fast_flags"] == pytest.approx(0.0)
    assert "pinned.c1.whole.gap_overhead_p50_ms_no_fast_flags" not in found
    overhead.show(found, "_no_fast_flags")


def test_a_repeat_without_answers_is_left_out() -> None:
    measured = Measured()
    for point in overhead.POINTS:
        empty = point == Point("auto", 1, True)
        measured.runs[point.name] += [{} if empty else overhead.summary([answer()])]
    found = overhead.figures_of(measured, "")
    assert "auto_ttft_overhead_p50_ms" not in found
    assert found["ttft_overhead_p50_ms"] == 0.0
    overhead.show(found, "")


def test_goodput_counts_what_met_the_slo_of_its_own_slm() -> None:
    slos = {"sql": runs.ServiceLevel(0.02, 0.003), "general": runs.ServiceLevel(0.5, 0.003)}
    requests = [post("http://x:1", "/", b"", slm) for slm in ("sql", "sql", "general", "sql")]
    answers = [answer(0.01), answer(0.03), answer(0.03), Answer("status 429")]
    assert runs.goodput(Run(answers, 9.0, 0.1), requests, slos, 4.0) == 0.5
    assert not slos["sql"].met(answer(0.01, gap_s=0.004))


def test_the_slo_is_a_multiple_of_one_request_alone() -> None:
    slo = runs.slo_of([answer(0.01), answer(0.01), answer(0.09)])
    assert slo.ttft_s == pytest.approx(0.1)
    assert slo.tpot_s == pytest.approx(0.01)


def test_ratios_are_ours_over_the_others_within_a_repeat() -> None:
    values = {
        "tokens/direct_vllm": [100.0, 200.0, 100.0],
        "tokens/calm_serve": [90.0, 190.0, 80.0],
        "tokens/smg": [50.0, 0.0, 100.0],
        "tokens_sql/direct_vllm": [10.0],
        "tokens_sql/calm_serve": [9.0],
        "goodput_azure/direct_vllm": [5.0, 4.0, 4.0],
        "goodput_azure/calm_serve": [4.0, 4.0, 5.0],
    }
    sides = ["direct_vllm", "calm_serve", "smg"]
    found = throughput.ratios(values, sides)
    assert found["tokens_ratio_direct_vllm"] == 0.9
    assert found["tokens_ratio_direct_vllm_range"] == [0.8, 0.95]
    assert found["tokens_ratio_direct_vllm_sql"] == 0.9
    assert found["goodput_ratio_direct_vllm_azure"] == 1.0
    # A repeat in which the other side failed cannot be compared.
    assert found["tokens_ratio_smg"] == 1.3
    measured = runs.Measured(values=values)
    figures = throughput.figures_of(measured, sides)
    assert figures["smg.tokens_tokens_per_s"] == 50.0
    throughput.show(measured, figures, sides)


def test_the_bare_fleet_has_the_wanted_slms_and_nothing_that_names_others() -> None:
    fleet = bare_fleet(["sql", "reason"])
    assert [e["id"] for e in fleet["slms"]] == ["sql", "reason"]
    assert {s for r in fleet["rules"] for s in r["slms"]} == {"sql", "reason"}
    (sql, reason) = specs_of(fleet)
    assert not sql.validator
    line = arguments(sql)
    assert line[line.index("--max-num-seqs") + 1] == str(sql.limits.max_num_seqs)
    # The profile of `reason` is another one.
    assert arguments(reason) != line


def test_the_complexity_router_of_the_peer_decides_and_changes_nothing() -> None:
    specs = specs_of(bare_fleet(["sql", "reason"]))
    text = gateways.litellm_config(specs, {"sql": "http://a", "reason": "http://b"}, "sk-1")
    models = {m["model_name"]: m["litellm_params"] for m in yaml.safe_load(text)["model_list"]}
    assert list(models) == ["sql", "auto-sql", "reason", "auto-reason"]
    router = models["auto-sql"]["complexity_router_config"]
    assert set(router["tiers"].values()) == {"sql"}
    assert router["max_tokens_from_tier_model"] is False


def test_the_peers_on_ray_get_the_same_engine() -> None:
    specs = specs_of(bare_fleet(["sql"]))
    (plain,) = json.loads(ray_serve.document(specs, 1, prefix_aware=False))["llm_configs"]
    (aware,) = json.loads(ray_serve.document(specs, 1, prefix_aware=True))["llm_configs"]
    assert plain["engine_kwargs"]["max_num_seqs"] == specs[0].limits.max_num_seqs
    assert "request_router_config" in aware["deployment_config"]
    assert "request_router_config" not in plain["deployment_config"]
