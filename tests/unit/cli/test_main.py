"""`calm`: what it prints and its exit status, without a service."""

from __future__ import annotations

import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_serve.cli import main, render
from calm_serve.config import ClusterResources
from calm_serve.errors import ComponentError, RequestError

FLEET: dict[str, Any] = {
    "slms": [
        {"id": "sql", "model": "weights", "skills": ["sql"], "resources": {"num_cpus": 0.5}},
        {"id": "general", "model": "weights", "scaling": {"max_replicas": 3}},
    ],
    "markers": {"sql-word": r"\bselect\b"},
    "rules": [{"name": "sql-first", "marker": "sql-word", "slms": ["sql"]}],
}
ANSWER: dict[str, Any] = {
    "ready": False,
    "predictor": {"version": "lgbm-3"},
    "slms": [
        {
            "id": "sql",
            "state": "hot",
            "replicas": 1,
            "target_replicas": 2,
            "running": 3,
            "waiting": 4,
            "capacity": 16,
            "kv_usage_ratio": 0.25,
            "cached_prefix_ratio": None,
            "memory_bytes": 3 << 29,
            "ready_s": {"import": 6.0, "engine": 9.0, "warmup": 1.5, "total": 16.5},
            "ttft_s": 0.0123,
            "tpot_s": None,
            "energy_j_per_token": 0.05,
            "requests": 70,
            "failures": 2,
            "adapters": [],
            "detail": "breaker half open",
        }
    ],
}


def write_config(
    folder: Path, fleet: Mapping[str, Any] = FLEET, args: Mapping[str, Any] | None = None
) -> str:
    weights = folder / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "chat_template.jinja").write_text("{{ messages }}")
    (weights / "model.safetensors").write_bytes(b"")
    (folder / "fleet.yaml").write_text(yaml.safe_dump(dict(fleet)))
    application = {
        "name": "calm",
        "import_path": "deployments.app:build_app",
        "args": {"fleet": "fleet.yaml", **(args or {})},
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return str(path)


def world(
    answer: Mapping[str, Any] | None = None,
    cpus: float = 8.0,
    seen: list[tuple[str, Any]] | None = None,
) -> main.World:
    def fetch(url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        if seen is not None:
            seen.append((url, body))
        return dict(answer or {})

    return main.World(fetch=fetch, machine=lambda: ClusterResources(cpus, 0.0, float(32 << 30)))


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """The text of stderr; it must be one line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("calm: ")
    return captured.err


def test_check_shows_every_slm_and_what_the_fleet_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["check", write_config(tmp_path)], world()) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["SLM", "WEIGHTS", "WHERE", "DOES"]
    assert out[1].split()[2:4] == ["local", "chat"]  # its folder has a chat template
    assert [line.split()[0] for line in out[1:3]] == ["sql", "general"]
    assert "1-3" in out[2].split()
    assert out[-1].startswith("ok: 2 SLMs, 1 rules")
    assert "1.7 of 8 CPUs and 4 GiB of 32 GiB" in out[-1]


def test_check_names_a_wrong_key_and_the_nearest_valid_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, args={"gaols": {}})
    assert main.main(["check", config], world()) == 2
    assert "'gaols'; the nearest valid key is 'goals'" in errors(capsys)


def test_check_refuses_a_fleet_that_does_not_fit_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["check", write_config(tmp_path)], world(cpus=1.0)) == 2
    assert "minimum replicas and routers ask for 1.7 CPUs" in errors(capsys)


def test_check_refuses_missing_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "weights" / "model.safetensors").unlink()
    assert main.main(["check", config], world()) == 2
    assert "has no weights" in errors(capsys)


def test_check_refuses_a_predictor_that_does_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictor").mkdir()
    (tmp_path / "predictor" / main.PREDICTOR_FILE).write_bytes(b"not a predictor")
    config = write_config(tmp_path, FLEET | {"predictor": "predictor"})
    assert main.main(["check", config], world()) == 2
    assert "predictor.bin: not a predictor artifact" in errors(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "configuration not found"),
        ("a: [1", "not YAML"),
        ("- 1", "expected a mapping with the key 'applications'"),
        ("applications: [{name: other}]", "no application with args.fleet"),
    ],
)
def test_check_names_the_error_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "serve_config.yaml"
    if text is not None:
        path.write_text(text)
    assert main.main(["check", str(path)], world()) == 2
    assert message in errors(capsys)


def test_route_explains_the_decision_of_a_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert main.main(["route", "SELECT the oldest user", "--config", config]) == 0
    out = capsys.readouterr().out
    assert out.startswith("-> sql  (rule, rule_match, rule sql-first)")
    assert "markers sql-word" in out
    assert "then, by score, to general" in out
    assert "> sql" in out


def test_route_shows_the_terms_of_every_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, args={"goals": {"exploration_ratio": 0.0}})
    assert main.main(["route", "Tell me a story.", "--config", config]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].split()[:5] == ["SLM", "SCORE", "QUALITY", "LATENCY", "ENERGY"]
    assert table[1].startswith("> ")
    assert {line.removeprefix("> ").split()[0] for line in table[1:]} == {"sql", "general"}
    assert all(len(line.removeprefix("> ").split()) >= 11 for line in table[1:])


def test_route_shows_how_novel_the_prompt_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    main.main(["route", "select", "--json", "--config", config])
    record = json.loads(capsys.readouterr().out) | {"novelty": {"ratio": 0.456, "threshold": 0.3}}
    assert main.main(["route", "select", "--url", "http://host:8000/"], world(record)) == 0
    assert "novelty 0.46, unfamiliar above 0.30" in capsys.readouterr().out


def test_route_shows_why_a_candidate_was_excluded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = FLEET["slms"][0] | {"context_tokens": 64, "languages": []}
    big = FLEET["slms"][1] | {"context_tokens": 100_000}
    config = write_config(tmp_path, {"slms": [small, big]})
    assert main.main(["route", "long story " * 400, "--config", config]) == 0
    out = capsys.readouterr().out
    assert out.startswith("-> general")
    assert "excluded: context" in out


def test_route_as_json_is_the_whole_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert main.main(["route", "select", "--json", "--config", config]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["slm_id"], record["rule"]) == ("sql", "sql-first")
    assert record["context"]["requested_model"] == "auto"


def test_route_calls_a_running_service_and_prints_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    main.main(["route", "select", "--json", "--config", config])
    record = json.loads(capsys.readouterr().out)
    seen: list[tuple[str, Any]] = []
    assert (
        main.main(["route", "select", "--url", "http://host:8000/"], world(record, seen=seen)) == 0
    )
    assert capsys.readouterr().out.startswith("-> sql  (rule")
    url, body = seen[0]
    assert url == "http://host:8000/v1/route"
    assert body == {"model": "auto", "messages": [{"role": "user", "content": "select"}]}


def test_answer_of_another_service_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["route", "x", "--url", "http://host"], world({"hello": 1})) == 1
    assert "does not look like calm_serve's" in errors(capsys)


def test_fleet_is_a_table_with_unknowns_shown_as_dashes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[str, Any]] = []
    assert main.main(["fleet"], world(ANSWER, seen=seen)) == 0
    assert seen == [("http://127.0.0.1:8000/v1/fleet", None)]
    head, _, names, row = capsys.readouterr().out.splitlines()
    assert head == "fleet not ready, predictor lgbm-3"
    cells = row.split()
    assert cells[:7] == ["sql", "hot", "1/2", "3/16", "4", "25%", "-"]
    assert "1.5 GiB" in row
    assert "16.5 s" in row
    assert "12.3 ms" in row
    assert row.endswith("breaker half open")
    assert names.index("NOTE") == row.index("breaker")


def test_fleet_watch_refreshes_until_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    seen: list[tuple[str, Any]] = []
    watched = world(ANSWER, seen=seen)
    watched = main.World(watched.fetch, watched.machine, sleep)
    assert main.main(["fleet", "--watch"], watched) == 130
    assert len(seen) == 3
    assert capsys.readouterr().out.count("fleet not ready") == 3


def test_unreachable_service_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert main.main(["fleet"]) == 1
    assert "cannot reach http://127.0.0.1:8000/v1/fleet" in errors(capsys)


def http_error(body: bytes) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://h", 503, "Busy", Message(), io.BytesIO(body))


@pytest.mark.parametrize(
    ("body", "message"),
    [(b'{"error": {"message": "no SLM"}}', "no SLM"), (b"<html>", "HTTP 503 Busy")],
)
def test_an_error_of_the_service_is_shown_unchanged(
    monkeypatch: pytest.MonkeyPatch, body: bytes, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise http_error(body)

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(RequestError, match=message):
        main.fetch_json("http://h/v1/fleet", None)


def test_slow_service_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    with pytest.raises(ComponentError, match="timed out"):
        main.fetch_json("http://h/v1/fleet", None)


def test_a_server_without_http_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(*_: object, **__: object) -> None:
        raise http.client.BadStatusLine("+PONG")

    monkeypatch.setattr(urllib.request, "urlopen", greet)
    with pytest.raises(ComponentError, match="PONG"):
        main.fetch_json("http://h/v1/fleet", None)


@pytest.mark.parametrize("url", ["fleet", "http://ho st", "localhost:8000"])
def test_a_url_that_is_none_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["fleet", "--url", url]) == 1
    assert url in errors(capsys)


@pytest.mark.parametrize("body", [b"plain text", b"[1, 2]"])
def test_answer_that_is_no_json_object_is_refused(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(body))
    with pytest.raises(RequestError, match="JSON"):
        main.fetch_json("http://h/v1/fleet", None)


def test_this_machine_offers_something() -> None:
    machine = main.this_machine()
    assert machine.cpus > 0
    assert machine.memory_bytes > 1 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023.9 * 2**20, "1024 MiB"), (5 << 30, "5 GiB")],
)
def test_sizes_are_readable(count: float | None, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (2e-4, "200 us"), (0.0456, "45.6 ms"), (90.0, "90 s")]
)
def test_times_are_readable(value: float | None, text: str) -> None:
    assert render.seconds(value) == text
