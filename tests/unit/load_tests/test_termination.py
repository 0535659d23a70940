"""What a benchmark started does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from load_tests import __main__ as benchmarks
from load_tests.fleet import fit_predictor

ROOT = Path(__file__).resolve().parents[3]
# Two workers that say who they are and then never end by themselves.
SCRIPT = """
import os, signal
from load_tests.common import termination

def stay(number):
    os.write(1, f"{os.getpid()}\\n".encode())
    signal.pause()

if __name__ == "__main__":
    termination.exit_on_sigterm()
    for _ in termination.in_processes(stay, [1, 2, 3], workers=2):
        pass
"""


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_no_worker_survives_the_termination_of_its_benchmark(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.terminate()
    try:
        # The workers hold the other end of the pipe: it ends when the last of them is gone.
        rest, _ = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        raise
    assert rest == b""
    assert process.returncode == 143


def test_every_benchmark_cleans_up_when_it_is_terminated(
    monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    cleaned: list[str] = []

    def main(_: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not disturb
            cleaned.append("fleet")
        return 0

    monkeypatch.setattr(sys, "argv", ["load_tests", "decision"])
    monkeypatch.setattr(benchmarks.importlib, "import_module", lambda _: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as ended:
        benchmarks.main()
    assert (ended.value.code, cleaned) == (143, ["fleet"])


def test_fitting_the_predictor_ends_its_fleet_when_it_is_terminated(
    monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    ended: list[str] = []

    @contextmanager
    def served(*_: Any) -> Iterator[str]:
        try:
            yield "http://fleet"
        finally:
            ended.append("fleet")

    async def collect(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["fit_predictor", "--per-file", "1"])
    monkeypatch.setattr(fit_predictor, "served", served)
    monkeypatch.setattr(fit_predictor, "collect", collect)
    with pytest.raises(SystemExit):
        fit_predictor.main()
    assert ended == ["fleet"]
