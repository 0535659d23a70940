"""Clusters on one machine get ports of their own, and HAProxy starts with splicing off."""

from __future__ import annotations

import http.server
import socket
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from calm_serve.errors import ConfigError
from deployments.launch import PortClaim, write_launcher
from tests.integration.served_fleet import free_port

FIRST = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"
LAST = "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"


def test_two_claims_share_no_port() -> None:
    with closing(PortClaim()) as one, closing(PortClaim()) as other:
        assert not set(one.environment.values()) & set(other.environment.values())
        ranges = sorted((int(c.environment[FIRST]), int(c.environment[LAST])) for c in (one, other))
        assert ranges[0][1] < ranges[1][0]


def test_a_block_is_given_back() -> None:
    with closing(PortClaim()) as claim:
        mine = claim.environment
    with closing(PortClaim()) as claim:
        assert claim.environment == mine


def test_a_block_in_which_a_port_is_taken_is_skipped() -> None:
    with closing(PortClaim()) as claim:
        mine = claim.environment
    with socket.create_server(("127.0.0.1", int(mine[FIRST]))), closing(PortClaim()) as claim:
        assert claim.environment[FIRST] != mine[FIRST]


def test_when_every_block_is_taken_it_is_an_error() -> None:
    claims: list[PortClaim] = []
    try:
        with pytest.raises(ConfigError, match="taken"):
            while len(claims) < 20:
                claims.append(PortClaim())
    finally:
        for claim in claims:
            claim.close()


CONFIGURATION = """
global
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option abortonclose
    option splice-request
    option splice-response
listen front
    bind 127.0.0.1:{front}
    server back 127.0.0.1:{back}
"""


def test_haproxy_notices_a_client_that_leaves_before_its_answer(tmp_path: Path) -> None:
    front, left = free_port(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.connection.settimeout(10.0)
            try:
                gone = self.connection.recv(1) == b""
            except ConnectionError:
                gone = True
            if gone:
                left.set()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as back:
        threading.Thread(target=back.serve_forever, daemon=True).start()
        text = CONFIGURATION.format(front=front, back=back.server_port)
        (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
        haproxy = subprocess.Popen(
            [write_launcher(tmp_path), "-db", "-f", tmp_path / "haproxy.cfg"],
            stderr=subprocess.DEVNULL,
        )
        try:
            with connected(front) as client:
                client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
                time.sleep(0.1)  # the body in a packet of its own, as most clients send it
                client.sendall(b"x" * 100)
                time.sleep(0.3)
            assert left.wait(5.0)
        finally:
            haproxy.terminate()
            haproxy.wait(10.0)
            back.shutdown()


def connected(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError("HAProxy did not start")
