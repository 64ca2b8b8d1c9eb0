"""Session files with other contents, whose checksums fit."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable


def rewritten(data: bytes, tag: bytes, change: Callable[[bytes], bytes], version: int | None = None) -> bytes:
    """A session file whose section `tag` is changed; with another number in the place of its version if given."""
    out, at = bytearray(data[:16]), 16
    if version is not None:
        out[8:12] = struct.pack("<I", version)
    for _ in range(struct.unpack_from("<I", data, 12)[0]):
        name, size = data[at : at + 4], struct.unpack_from("<Q", data, at + 8)[0]
        content = data[at + 16 : at + 16 + size]
        at += 16 + size
        if name == tag:
            content = change(content)
        head = struct.pack("<Q", len(content))
        out += name + struct.pack("<I", zlib.crc32(name + head + content)) + head + content
    return bytes(out)
