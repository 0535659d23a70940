"""The model registry on disk."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from calm_serve.errors import KnowledgeError, NewerRecordError
from calm_serve.learning.model_registry import (
    FOLDER,
    INDEX,
    KEPT,
    UNREADABLE,
    Index,
    ModelRegistry,
    RegisteredPredictor,
)
from calm_serve.learning.model_registry import PredictorState as State
from calm_serve.protocol.topics import PredictorChange


def entry(number: int, state: State = State.RETIRED) -> RegisteredPredictor:
    return RegisteredPredictor(
        f"lgbm-{number}", "trained", state, 1000.0 + number, 50, {"log_loss": 0.3}
    )


def filled(count: int) -> tuple[Index, dict[str, bytes]]:
    index = Index()
    for i in range(count):
        index = index.with_predictor(entry(i))
    return index, {p.version: p.version.encode() for p in index.predictors}


def test_index_and_artifacts_survive_a_restart(tmp_path: Path) -> None:
    index, blobs = filled(3)
    index = replace(
        index, pinned="lgbm-1", last_change=PredictorChange(5.0, "pinned", "lgbm-1", "", "why")
    )
    ModelRegistry(tmp_path).write(index, blobs)
    again = ModelRegistry(tmp_path)
    assert again.index == index
    assert again.read("lgbm-1") == b"lgbm-1"


def test_only_the_last_ones_and_those_in_use_are_kept(tmp_path: Path) -> None:
    registry, index = ModelRegistry(tmp_path), Index()
    for i, state in enumerate((State.PREVIOUS, State.CHAMPION)):
        index = index.with_predictor(entry(i, state))
        registry.write(index, {f"lgbm-{i}": b"x"})
    for i in range(2, 4 + KEPT):
        index = index.with_predictor(entry(i))
        registry.write(index, {f"lgbm-{i}": b"x"})
    kept = {p.version for p in registry.index.predictors}
    assert kept == {"lgbm-0", "lgbm-1", *(f"lgbm-{i}" for i in range(4, 4 + KEPT))}
    assert {p.stem for p in (tmp_path / FOLDER).glob("*.bin")} == kept


def test_a_pinned_one_is_kept(tmp_path: Path) -> None:
    index = replace(Index().with_predictor(entry(0)), pinned="lgbm-0")
    for i in range(1, 3 + KEPT):
        index = index.with_predictor(entry(i))
    assert "lgbm-0" in index.by_version
    assert "lgbm-1" not in index.by_version


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


def test_an_index_of_the_former_build_is_read(tmp_path: Path) -> None:
    index, blobs = filled(2)
    registry = ModelRegistry(tmp_path)
    index = replace(index, pinned="lgbm-1")
    registry.write(index, blobs)
    path = tmp_path / FOLDER / INDEX
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("predictors_index", 1)
    path.write_text(json.dumps(document["record"], indent=1))
    assert ModelRegistry(tmp_path).index == index


def test_a_field_that_a_later_build_added_loses_nothing(tmp_path: Path) -> None:
    index, blobs = filled(2)
    ModelRegistry(tmp_path).write(index, blobs)
    path = tmp_path / FOLDER / INDEX
    document = json.loads(path.read_text())
    document["record"]["models"][0]["fleet"] = "f1"
    path.write_text(json.dumps(document))
    again = ModelRegistry(tmp_path)
    assert again.index == index
    again.write(again.index.with_predictor(entry(9)), {"lgbm-9": b"x"})
    assert {"lgbm-0.bin", "lgbm-1.bin", "lgbm-9.bin"} <= set(files_of(tmp_path))


def test_an_index_of_a_newer_program_is_refused_and_every_file_stays(tmp_path: Path) -> None:
    index, blobs = filled(2)
    ModelRegistry(tmp_path).write(index, blobs)
    path = tmp_path / FOLDER / INDEX
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 2, "record": {"artifacts": []}}))
    before = files_of(tmp_path)
    with pytest.raises(NewerRecordError, match="version 2 was written by a newer") as refused:
        ModelRegistry(tmp_path)
    assert str(path) in refused.value.message
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("content", ["{", '{"models": [{"version": 1}]}', "[]", "\0" * 64, ""])
def test_a_malformed_index_is_set_aside_and_no_artifact_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    index, blobs = filled(3)
    ModelRegistry(tmp_path).write(index, blobs)
    (tmp_path / FOLDER / INDEX).write_text(content)
    with caplog.at_level(logging.ERROR):
        registry = ModelRegistry(tmp_path)
    assert registry.index == Index()
    assert INDEX in caplog.text
    registry.write(Index().with_predictor(entry(8)), {"lgbm-8": b"x"})
    registry.write(Index().with_predictor(entry(9)), {"lgbm-9": b"x"})
    files = files_of(tmp_path)
    (aside,) = (name for name in files if name.endswith(UNREADABLE))
    assert files[aside] == content.encode()
    assert {f"{version}.bin": blob for version, blob in blobs.items()}.items() <= files.items()
    assert "lgbm-8.bin" not in files  # a readable index named it


def test_an_index_that_the_disk_does_not_give_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER / INDEX).mkdir(parents=True)
    with pytest.raises(KnowledgeError, match="cannot be read"):
        ModelRegistry(tmp_path)


def test_an_index_that_could_not_be_written_changes_nothing(tmp_path: Path) -> None:
    index, blobs = filled(1)
    registry = ModelRegistry(tmp_path)
    registry.write(index, blobs)
    more = index.with_predictor(entry(7))
    (tmp_path / FOLDER / "lgbm-7.tmp").mkdir()  # the artifact cannot be written
    with pytest.raises(KnowledgeError, match="lgbm-7"):
        registry.write(more, {"lgbm-7": b"x"})
    assert ModelRegistry(tmp_path).index == registry.index == index


def test_a_missing_artifact_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"nowhere\.bin"):
        ModelRegistry(tmp_path).read("nowhere")


def test_a_transition_changes_one_predictor_and_notes_the_reason() -> None:
    index = (
        Index().with_predictor(entry(1, State.CHAMPION)).with_predictor(entry(2, State.CHALLENGER))
    )
    changed = index.with_transition(State.CHAMPION, State.ROLLED_BACK, "overconfident")
    assert changed.of(State.CHAMPION) is None
    assert changed.by_version["lgbm-1"].note == "overconfident"
    assert changed.by_version["lgbm-2"] == index.by_version["lgbm-2"]
