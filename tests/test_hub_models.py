"""`hf:user/repo[:quant]`: cached files are used without a network. The hub's client is a stand-in."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.hf_api import RepoSibling

from edge_stream.errors import EdgeStreamError
from edge_stream.models import names


@dataclass
class ModelInfo:
    """What is used of the hub's answer."""

    siblings: list[RepoSibling]


class Hub:
    """A hub that nobody can reach, and its cache on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models--me--a"
        self.n_calls = 0

    def add(self, *names: str, commit: str = "c1", main: bool = True) -> None:
        """Put files into the cache as the hub's client does: links to blobs."""
        for name in names:
            file = self.folder / "snapshots" / commit / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"GGUF")
        if main:
            (self.folder / "refs").mkdir(exist_ok=True)
            (self.folder / "refs" / "main").write_text(commit)

    def refuse(self, *_: Any, **__: Any) -> Any:
        self.n_calls += 1
        raise OSError("no network\nsecond line")

    def path(self, name: str, commit: str = "c1") -> Path:
        return self.folder / "snapshots" / commit / name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", made.refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.refuse)
    return made


def test_a_cached_file_needs_no_network(hub: Hub) -> None:
    hub.add("a-Q4_K_M.gguf", "a-Q8_0.gguf", "mmproj-a-Q8_0.gguf")
    assert names.resolve("hf:me/a") == hub.path("a-Q4_K_M.gguf")
    assert names.resolve("hf:me/a:q8_0") == hub.path("a-Q8_0.gguf")
    assert hub.n_calls == 0


def test_a_cached_split_model_needs_all_its_parts(hub: Hub) -> None:
    parts = [f"big/a-F16-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.add(*parts[:2])
    with pytest.raises(EdgeStreamError, match="cannot download hf:me/a:F16: no network"):
        names.resolve("hf:me/a:F16")
    hub.add(parts[2])
    assert names.resolve("hf:me/a:F16") == hub.path(parts[0])
    assert hub.n_calls == 1


def test_the_current_snapshot_comes_before_older_ones(hub: Hub) -> None:
    hub.add("a-Q4_K_M.gguf", "a-Q8_0.gguf", commit="a-old", main=False)
    hub.add("a-Q4_K_M.gguf", commit="b-new")
    assert names.resolve("hf:me/a") == hub.path("a-Q4_K_M.gguf", "b-new")
    assert names.resolve("hf:me/a:Q8_0") == hub.path("a-Q8_0.gguf", "a-old")


def test_the_only_cached_file_serves_offline_where_no_tag_was_given(hub: Hub) -> None:
    """The hub is asked first: it may have the default, Q4_K_M."""
    hub.add("a-Q5_0.gguf")
    assert names.resolve("hf:me/a") == hub.path("a-Q5_0.gguf")
    assert hub.n_calls == 1
    with pytest.raises(EdgeStreamError, match=r"^cannot download hf:me/a:Q8_0: no network \(cached: a-Q5_0.gguf\)$"):
        names.resolve("hf:me/a:Q8_0")


def test_an_unfinished_download_is_not_a_file(hub: Hub) -> None:
    hub.add("other.txt")
    hub.path("a-Q4_K_M.gguf").symlink_to("absent-blob")
    with pytest.raises(EdgeStreamError, match=r"^cannot download hf:me/a: no network$"):
        names.resolve("hf:me/a")


def test_nothing_cached_is_one_sentence(hub: Hub) -> None:
    with pytest.raises(EdgeStreamError, match=r"^cannot download hf:me/a:Q8_0: no network$"):
        names.resolve("hf:me/a:Q8_0")


def test_what_is_not_cached_is_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("a-Q8_0.gguf")

    def download(_repo: str, name: str) -> str:
        hub.add(name)
        return str(hub.path(name))

    files = [RepoSibling(rfilename=name) for name in ("README.md", "a-Q4_K_M.gguf", "a-Q8_0.gguf")]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _self, _repo, timeout: ModelInfo(files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert names.resolve("hf:me/a") == hub.path("a-Q4_K_M.gguf")


class Busy(BaseHTTPRequestHandler):
    """A hub that answers every request with 503, which its client's listing of files takes as "try again later"."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(503)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_hub_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client's listing of files would ask six times, with longer and longer pauses."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        server.asked = []  # type: ignore[attr-defined]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EdgeStreamError, match=r"^cannot download hf:me/none: .*503"):
            names.resolve("hf:me/none")
        server.shutdown()
        asked = [path for path in server.asked if path.startswith("/api/models/")]  # type: ignore[attr-defined]
        assert asked == ["/api/models/me/none"]


def test_the_files_of_a_split_model(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002", "a-00002-of-00002", "a-00001-of-00003", "b-00001-of-00002", "a"):
        (tmp_path / f"{name}.gguf").touch()
    found = names.parts(tmp_path / "a-00002-of-00002.gguf")
    assert [path.name for path in found] == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    assert names.parts(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]
