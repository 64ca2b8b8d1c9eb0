"""Model files from URLs (-mu), kept in the cache folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import replace_file

_BLOCK_BYTES = 1 << 20
_CONNECT_SECONDS = 30


def fetch(url: str, folder: Path, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The file of a URL, downloaded unless it was before; if interrupted, nothing is left. Raises EdgeStreamError.

    on_progress: is told a name, the bytes so far, and those in all (0: unknown). With HF_HUB_OFFLINE (--offline)
    nothing is downloaded.
    """
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2]) or "model.gguf"
    path = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if path.exists():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise EdgeStreamError(f"{url} has not been downloaded, and --offline downloads nothing")
    from urllib.request import Request, urlopen  # slow to import, and seldom used

    request = Request(url, headers={"User-Agent": "edge-stream"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(request, timeout=_CONNECT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0)

            def write(temporary: str) -> None:
                done = 0
                with open(temporary, "wb") as file:
                    while block := response.read(_BLOCK_BYTES):
                        file.write(block)
                        done += len(block)
                        if on_progress:
                            on_progress(name, done, max(done, total))
                if done < total:
                    raise EdgeStreamError(f"{url} ended after {done:,} of {total:,} bytes")

            replace_file(path, write)
    except (OSError, ValueError) as error:
        raise EdgeStreamError(f"cannot download {url}: {getattr(error, 'reason', None) or error}") from None
    return path
