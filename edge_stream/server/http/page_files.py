"""The page at `/`: static files of this package, served from memory under a strict content security policy."""

from __future__ import annotations

import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Response

# Whatever a model writes, the page loads its own files and talks to this server only.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by URL path, read once: no request reaches the file system."""
    folder = Path(__file__).resolve().parent / "page"
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        text = kind.startswith("text/") or kind == "application/javascript"
        name = file.relative_to(folder).as_posix()
        out["/" if name == "index.html" else "/" + name] = file.read_bytes(), kind + ("; charset=utf-8" if text else "")
    return out


def page_route(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    """A route that sends a file."""
    headers = {
        "Content-Security-Policy": _POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def send() -> Response:
        return Response(data, media_type=kind, headers=headers)

    return send
