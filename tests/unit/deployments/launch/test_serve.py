"""`python -m deployments.serve`: what it checks, sets and prints before Serve takes over."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from calm_serve.config import ClusterResources
from calm_serve.errors import ConfigError
from calm_serve.testing import make_spec
from deployments import serve
from deployments.slm.environment import process_environment

URL = "http://127.0.0.1:8000"
PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404"}


class Claim:
    """A block of ports that asks no socket."""

    environment = PORTS

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        serve, "local_resources", lambda: ClusterResources(4.0, 0.0, float(8 << 30))
    )
    monkeypatch.setattr(serve, "PortClaim", Claim)


def config(folder: Path, args: Any = None, **top: Any) -> Path:
    application = {"name": "calm", "import_path": "deployments.app:build_app", "args": args}
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application], **top}))
    return path


def fleet(**slm: Any) -> dict[str, Any]:
    return {"fleet": {"slms": [{"id": "small", "model": "example/model", **slm}]}}


def test_a_valid_configuration_gives_the_endpoint(tmp_path: Path) -> None:
    assert serve.check(config(tmp_path, fleet())) == URL
    http = {"host": "0.0.0.0", "port": 9000}
    assert serve.check(config(tmp_path, fleet(), http_options=http)) == "http://0.0.0.0:9000"
    assert serve.check(config(tmp_path, fleet(), http_options=None)) == URL


def test_a_fleet_that_does_not_fit_this_machine_is_refused_unless_another_one_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, fleet(resources={"num_cpus": 5}))
    with pytest.raises(ConfigError, match="asks for 5 CPUs, the cluster has 4"):
        serve.check(path)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert serve.check(path) == URL


def test_a_remote_slms_key_must_be_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = {"base_url": "http://x/v1", "api_key_env": "CLOUD_KEY"}
    path = config(tmp_path, fleet(locality="remote", remote=remote))
    monkeypatch.delenv("CLOUD_KEY", raising=False)
    with pytest.raises(ConfigError, match="'small': the environment variable CLOUD_KEY is not set"):
        serve.check(path)
    monkeypatch.setenv("CLOUD_KEY", "secret")
    assert serve.check(path) == URL


def test_applications_of_others_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "serve_config.yaml"
    ours = {"import_path": "deployments.app:build_app", "args": fleet()}
    other = {"name": "x", "import_path": "other:app", "args": {"fleet": "nowhere"}}
    path.write_text(yaml.safe_dump({"applications": [other, ours]}))
    assert serve.check(path) == URL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("applications: [", "not YAML"),
        ("- just a list", "mapping"),
        ("", "mapping"),
        ("applications: [{import_path: 'deployments.app:build_app'}]", "fleet"),
        ("applications: [{import_path: 'deployments.app:build_app', args: }]", "fleet"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "serve_config.yaml"
    if content is not None:
        path.write_text(content)
    assert serve.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_wrong_key_in_the_fleet_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'skill'.*'skills'"):
        serve.check(config(tmp_path, fleet(skill=["sql"])))


def test_an_endpoint_that_answers_already_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "fetch", lambda _: (503, {}))
    assert serve.main([str(config(tmp_path, fleet()))]) == 2
    assert f"{URL} already answers" in capsys.readouterr().err


def test_transport_flags_are_set_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*serve.FAST_TRANSPORT, *serve.QUIET, *PORTS):
        monkeypatch.delenv(name, raising=False)
    assert serve.FAST_TRANSPORT.items() <= serve.serve_environment(PORTS, fast=True).items()
    assert not serve.FAST_TRANSPORT.keys() & serve.serve_environment(PORTS, fast=False).keys()
    assert {**serve.QUIET, **PORTS}.items() <= serve.serve_environment(PORTS, fast=False).items()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert serve.serve_environment(PORTS, fast=True)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_the_operators_whole_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    assert serve.serve_environment(PORTS, fast=True)["SOMETHING_ELSE"] == "kept"


class Child:
    """A `serve run` that lives for some polls and has written `lines`."""

    def __init__(self, polls: int, *lines: bytes) -> None:
        self._polls = polls
        self.stdout = lines
        self.signals: list[int] = []

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def poll(self) -> int | None:
        self._polls -= 1
        return None if self._polls >= 0 else 1


def follow(monkeypatch: pytest.MonkeyPatch, polls: int, *answers: Any) -> int:
    script, asked = iter(answers), []

    def fetch(url: str) -> Any:
        asked.append(url)
        return next(script)

    monkeypatch.setattr(serve, "fetch", fetch)
    monkeypatch.setattr(serve, "POLL_S", 0.0)
    monkeypatch.setattr(serve.time, "sleep", lambda _: None)
    child = cast("subprocess.Popen[bytes]", Child(polls))
    serve.follow(child, URL, serve.Output(child))
    assert set(asked) == {f"{URL}/health"}
    return len(asked)


def test_states_are_printed_when_they_change_and_the_ready_line_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starting, ready = {"slms": {"small": "importing"}}, {"slms": {"small": "hot"}}
    answers = [(0, {}), (503, starting), (503, starting), (200, ready), (200, ready)]
    assert follow(monkeypatch, 9, *answers) == 4
    out = capsys.readouterr().out
    assert out.count("small: importing") == 1
    assert out.count("small: hot") == 1
    assert out.count("ready after") == 1


def test_following_ends_with_the_child(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(monkeypatch, 3, *[(0, {})] * 9) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line",
    [
        b"(controller) Deploying app 'calm' failed with exception:\n",
        b"(raylet) Task build_serve_application failed. There are 3 retries remaining, so the task "
        b"will be retried. Error: User exception:\n",
    ],
)
def test_a_failed_build_is_reported_and_stops_the_child(
    line: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    child = Child(9, line)
    output = serve.Output(cast("subprocess.Popen[bytes]", child))
    output.thread.join(5.0)
    serve.follow(cast("subprocess.Popen[bytes]", child), URL, output)
    assert child.signals == [signal.SIGINT]
    assert "could not be built" in capfd.readouterr().err


def test_the_ready_line_is_a_command_whose_body_is_json() -> None:
    line = serve.ready_line(URL, 12.3)
    assert "ready after 12 s" in line
    body = json.loads(line.split(" -d '")[1].rstrip("'"))
    assert body["model"] == "auto"
    assert f"{URL}/v1/chat/completions" in line


def http_error(body: bytes) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(URL, 503, "busy", Message(), io.BytesIO(body))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (http_error(b'{"slms": {}}'), (503, {"slms": {}})),
        (http_error(b"<html>"), (503, {})),
        (urllib.error.URLError("refused"), (0, {})),
        (TimeoutError(), (0, {})),
    ],
    ids=["starting", "not ours", "refused", "silent"],
)
def test_a_document_is_fetched_with_its_status(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, expected: Any
) -> None:
    def urlopen(url: str, timeout: float) -> Any:
        assert timeout > 0
        raise answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert serve.fetch(f"{URL}/health") == expected
    assert serve.port_taken(URL) is (expected[0] != 0)


def test_a_cpu_slm_gets_its_threads_and_one_process_less() -> None:
    values = process_environment(make_spec(resources={"threads": 3}))
    assert values["OMP_NUM_THREADS"] == "3"
    assert values["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_a_gpu_slm_keeps_the_engines_own_ways() -> None:
    values = process_environment(make_spec(resources={"num_gpus": 1}))
    assert not {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"} & values.keys()


def test_weights_on_disk_are_never_looked_up_elsewhere(tmp_path: Path) -> None:
    assert process_environment(make_spec(model=str(tmp_path)))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in process_environment(make_spec(model="example/model"))


def test_the_slms_own_variables_win() -> None:
    values = process_environment(make_spec(env={"OMP_NUM_THREADS": "9", "OWN": "x"}))
    assert (values["OMP_NUM_THREADS"], values["OWN"]) == ("9", "x")
