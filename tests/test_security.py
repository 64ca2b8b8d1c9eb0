"""What docs/security.md promises of the server and of the RPC server, apart from what their own tests show."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from serving_bench import ServerProcess, edge_stream_command

from edge_stream.cli.rpc_server import main as rpc_server
from edge_stream.hardware import devices
from edge_stream.server.settings import Settings

KEY = "sk-very-secret-0123456789"


def test_secrets_are_in_no_log_and_no_answer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """As an argument, from a file, in good and bad requests, with --verbose; prompts are in no log either."""
    log, keys, sessions = tmp_path / "log", tmp_path / "keys", tmp_path / "sessions"
    keys.write_text(f"# of the house\n{KEY}-filed\n")
    flags = ["-c", "96", "-np", "1", "-t", "1", "--verbose", "--api-key", KEY, "--api-key-file", str(keys)]
    answers = []
    with ServerProcess(edge_stream_command(str(tiny("chat")), sessions, *flags), log=log) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = {"messages": [{"role": "user", "content": "my-own-business"}], "max_tokens": 2}
            for key in (KEY, f"{KEY}-filed", f"{KEY}-wrong"):
                for header in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}):
                    answers.append(client.post("/v1/chat/completions", json=body, headers=header))
                    answers.append(client.post("/v1/chat/completions", content=b"{broken", headers=header))
                    answers += [
                        client.get(path, headers=header) for path in ("/props", "/slots", "/metrics", "/v1/models")
                    ]
            assert {answer.status_code for answer in answers} == {200, 400, 401}
            assert all(KEY not in answer.text for answer in answers)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:  # no HTTP
            sock.sendall(f"GET / HTTP/1.1\r\nAuthorization Bearer {KEY}\r\n\r\n".encode())
            assert KEY.encode() not in sock.recv(4096)
    written = [path.read_bytes() for path in (log, *(p for p in sessions.rglob("*") if p.is_file()))]
    assert b"listening on" in written[0]
    assert all(KEY.encode() not in data for data in written)
    assert b"my-own-business" not in written[0]


def test_settings_are_shown_without_keys() -> None:
    assert KEY not in repr(Settings(("a",), api_keys=(KEY,)))


def test_headers(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever a model writes, a browser runs nothing of it."""
    with ServerProcess(
        edge_stream_command(str(tiny("chat")), tmp_path / "s", "-c", "96", "-np", "1", "-t", "1")
    ) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            page = client.get("/")
            for answer in (page, client.get("/v1/models"), client.get("/nowhere"), client.post("/completion")):
                assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
                assert "server" not in answer.headers
            policy = page.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
            assert not any("unsafe" in rule or "*" in rule for rule in policy)
            assert "<script>" not in page.text and "onclick=" not in page.text and "style=" not in page.text
            assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
            assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_rpc_is_for_this_machine_unless_a_flag_says_otherwise(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(devices, "serve_rpc", lambda host, *_: served.append(host))
    refused = CliRunner().invoke(rpc_server, ["--host", host])
    assert refused.exit_code == 2 and served == []
    assert "the protocol has no authentication" in refused.output and "--trust-network" in refused.output
    trusted = CliRunner().invoke(rpc_server, ["--host", host, "--trust-network"])
    assert trusted.exit_code == 0 and served == [host] and "warning: whoever can reach" in trusted.stderr


def test_rpc_on_loopback_needs_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(devices, "serve_rpc", lambda host, *_: served.append(host))
    assert CliRunner().invoke(rpc_server, []).exit_code == 0 and served == ["127.0.0.1"]
