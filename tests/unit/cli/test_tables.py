"""`calm fit`, `calm eval` and `calm fleet probe`: what they write, print, and refuse."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
import pytest

from calm_serve.cli import main
from calm_serve.cli.progress import ProgressBar
from calm_serve.datasets import read_table
from calm_serve.testing import FakeClock
from tests.chat_service import ChatService
from tests.score_tables import SUBJECTS, make_rows, write_rows
from tests.unit.cli.test_main import errors, write_config


def test_a_fleet_routes_its_first_request_by_a_fitted_predictor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_rows(tmp_path / "table.jsonl", make_rows(200))
    assert main.main(["fit", str(table), "--out", str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert "of coder, cook, poet" in out
    assert f"`predictor: {tmp_path / 'mine'}`" in out

    slms = [{"id": name, "model": "weights"} for name in SUBJECTS]
    args = {"goals": {"exploration_ratio": 0.0}}
    config = write_config(tmp_path, {"slms": slms, "predictor": "mine"}, args)
    for subject, text in SUBJECTS.items():
        assert main.main(["route", f"{text} 77", "--config", config]) == 0
        assert capsys.readouterr().out.startswith(f"-> {subject}  (scored, best_score)")


def test_check_accepts_a_fitted_predictor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_rows(tmp_path / "table.jsonl", make_rows(60))
    main.main(["fit", str(table), "--out", str(tmp_path / "mine")])
    config = write_config(
        tmp_path, {"slms": [{"id": "cook", "model": "weights"}], "predictor": "mine"}
    )
    capsys.readouterr()
    assert main.main(["check", config]) == 0
    assert "predictor lgbm-" in capsys.readouterr().out


def test_eval_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_rows(tmp_path / "table.jsonl", make_rows(240))
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    arguments = ["eval", str(table), "--json", str(figures), "--plot", str(picture)]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(figures.read_text())
    for policy in ("router", "best_single", "share_matched", "task_best", "oracle"):
        assert f"\n{policy} " in out
        low, high = found[f"{policy}_score_ci95"]
        assert low <= found[f"{policy}_score"] <= high
    assert found["router_minus_best_single_ci95"][0] > 0.0
    assert found["decisions_per_s"] > 0.0
    assert "surely better than the best single model from" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_of_two_models_prints_their_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [r | {"scores": {"large": 1.0, "poet": r["scores"]["poet"]}} for r in make_rows(240)]
    assert main.main(["eval", str(write_rows(tmp_path / "t", rows))]) == 0
    out = capsys.readouterr().out
    assert "MEASURE" in out
    assert "APGR" in out
    assert "CPT80" in out


def test_a_wrong_line_is_one_message_with_the_status_of_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "x", "scores": {"a": 1}}, {"prompt": "x", "scores": {"a": 2}}]
    table = str(write_rows(tmp_path / "table.jsonl", rows))
    for command in (["eval", table], ["fit", table, "--out", str(tmp_path)]):
        assert main.main(command) == 2
        assert "table.jsonl: line 2: scores.a: Input should be less than" in errors(capsys)


def test_probe_asks_a_service_and_writes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{"prompt": f"{i} + 2", "answers": [str(i + 2)]} for i in range(6)]
    source, out = str(write_rows(tmp_path / "prompts.jsonl", prompts)), tmp_path / "table.jsonl"
    transport = httpx.ASGITransport(ChatService())
    arguments = ["fleet", "probe", source, "--out", str(out), "--url", "http://service"]
    assert main.main(arguments, main.World(transport=transport)) == 0
    assert "6 rows written, 0 prompts skipped" in capsys.readouterr().out
    assert len(read_table(out).rows) == 6
    assert main.main(arguments, main.World(transport=transport)) == 0
    assert "0 rows written, 6 prompts skipped" in capsys.readouterr().out


def test_probe_says_which_prompts_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "x", "answers": ["1"]}]))
    world = main.World(transport=httpx.ASGITransport(ChatService(refusing=("adder", "reader"))))
    assert main.main(["fleet", "probe", source, "--out", str(tmp_path / "t")], world) == 1
    message = errors(capsys)
    assert "1 failed, the first in line 1: every SLM refused it" in message
    assert "the same command asks them again" in message


@pytest.mark.parametrize("number", ["0", "many", "1000"])
def test_concurrency_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["fleet", "probe", "p", "--out", "t", "--concurrency", number])
    assert caught.value.code == 2
    assert "a whole number from 1 to 256" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_tells_the_time_left_and_ends_its_line() -> None:
    stream, clock = Terminal(), FakeClock()
    bar = ProgressBar("probe", stream, clock)
    bar.update(10, 40)  # ten were there before
    clock.advance(60.0)
    bar.update(20, 40)
    bar.update(21, 40)  # too soon to draw again
    clock.advance(120.0)
    bar.update(40, 40)
    first, second, last = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == "probe [######------------------] 10/40"
    assert second == "probe [############------------] 20/40, 2:00 left"
    assert last == f"probe [{'#' * 24}] 40/40\n"


def test_a_progress_bar_is_silent_without_a_terminal() -> None:
    stream = io.StringIO()
    ProgressBar("probe", stream, FakeClock()).update(1, 2)
    assert stream.getvalue() == ""
